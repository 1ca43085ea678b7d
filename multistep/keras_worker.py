"""The process that trains for a Keras on another backend: python -m multistep.keras_worker FOLDER, with KERAS_BACKEND=torch.

FOLDER has model.keras, train.npz, perhaps validation.npz, and asked.json; it gets weights.npz and answer.json, or error.json.
When the process that asked goes away, this one saves and ends: its standard input closes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path) -> int:
    """Exit code 0, 2 with error.json for a UserError, 128 + the signal when interrupted."""
    threading.Thread(target=_until_alone, daemon=True).start()
    from multistep.types import Interrupted, UserError

    try:
        _train(folder)
    except UserError as error:
        return _fail(folder, str(error), 0, 2)
    except Interrupted as error:
        return _fail(folder, str(error), error.signal, 128 + error.signal)
    return 0


def _train(folder: Path) -> None:
    import keras

    from multistep.keras import _here
    from multistep.types import UserError

    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    try:
        model: Any = keras.saving.load_model(str(folder / "model.keras"), compile=False)
    except (TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"model: it cannot be loaded in a process of its own ({reason}). Run with KERAS_BACKEND=torch."
        ) from None
    found = _here(model, _splits(folder), asked["link"], asked["settings"], Path(asked["out"]))
    np.savez(folder / "weights.npz", *model.get_weights())
    (folder / "answer.json").write_text(json.dumps(found), encoding="utf-8")


def _splits(folder: Path) -> dict[str, list[np.ndarray]]:
    found = {}
    for split in ("train", "validation"):
        path = folder / f"{split}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as arrays:
                found[split] = [arrays[f"arr_{n}"] for n in range(len(arrays.files))]
    return found


def _fail(folder: Path, text: str, number: int, code: int) -> int:
    (folder / "error.json").write_text(json.dumps({"text": text, "signal": number}), encoding="utf-8")
    return code


def _until_alone() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
