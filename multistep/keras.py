"""The Keras front door: a compiled Keras 3 model and arrays in, the same model back, trained, with the reasons.

    result = multistep.keras.optimize(model, x_train, y_train, validation_data=(x_val, y_val), budget="10 epochs")
    result.model; result.best; print(result.explain()); result.save("sentiment.keras")

Loss and optimizer are the compiled ones. On Keras's torch backend the work is done here; on another (TensorFlow, JAX) by a process
of its own with that backend, which gets model and data as files (no pickle) and gives the weights back.
"""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from multistep import journal, report
from multistep.launch import alone
from multistep.types import Interrupted, MetricValue, UserError, nearest

try:
    import keras
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise UserError('keras is not installed. Install it with: pip install "multistep[keras]"') from None
    raise UserError(
        f"keras: its backend {error.name} is not installed. Set the variable KERAS_BACKEND=torch."
    ) from None

from multistep.keras_compiled import check_losses, goal_of, targets_of, updates_of

__all__ = ["Trained", "optimize"]

EPOCHS = "10 epochs"
PRECISIONS = ("auto", "fp32", "bf16")
VALIDATION_SHARE = 0.1  # of train, held out where no validation data is given


@dataclass
class Trained:
    """What `optimize` gives back. `best` and `validation` are of the weights that `model` holds, on the validation data."""

    model: Any
    metric: str
    best: MetricValue
    validation: dict[str, MetricValue]
    out: Path
    _folder: Any = field(default=None, repr=False)  # keeps a temporary folder alive

    def save(self, path: str | Path) -> None:
        """The model as a .keras file, for Keras on any backend."""
        self.model.save(str(path))

    def records(self) -> list[dict[str, Any]]:
        """The journal."""
        return journal.read(self.out / "journal.jsonl")

    def explain(self) -> str:
        """What was tried, what was decided and why, in words and a table."""
        return report.explain(self.records())


def optimize(
    model: Any,
    x: Any,
    y: Any,
    *,
    validation_data: Sequence[Any] | None = None,
    budget: str | float = EPOCHS,
    batch_size: int = 32,
    metric: str = "loss",
    objective: Any = None,
    optimizer: Any = None,
    schedule: Any = None,
    controller: str = "staged",
    patience: int = 0,
    precision: str = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    verbose: bool | int = 1,
) -> Trained:
    """Train a Keras model within a budget, "10 epochs" or one of `multistep.optimize`; stops before it where the model overfits.

    `x`: an array, or a list of them for several inputs; `y`: targets as `fit` takes them. `validation_data`: (x, y); without it a
    tenth of the rows is held out. `objective`, `optimizer`: in place of the compiled ones; `optimizer="adamw"` lets the run look
    for the learning rate, the compiled one is taken as given. `metric`: decides between states, "loss" or one that fits.
    `precision`: "fp32", "bf16" (the factors of an LSTM's products in training; state, sums and judging stay float32) or "auto".
    `verbose`: a line an epoch on standard error. `out`: a folder for the journal; a run that was stopped there goes on, and so does a
    finished one with a larger budget.
    Raises UserError on bad input, Interrupted after SIGINT or SIGTERM with everything saved.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} is not known.{nearest(precision, PRECISIONS)}")
    xs, n = _inputs(x, "x")
    model(_first(xs))  # builds it
    check_losses(model)
    goal, updates = goal_of(model, objective), updates_of(model, optimizer)
    splits = {"train": [*xs, targets_of(y, goal, "y")]}
    if validation_data is not None:
        if len(validation_data) != 2:
            raise UserError(f"validation_data: {len(validation_data)} parts. Give (x, y).")
        splits["validation"] = [
            *_inputs(validation_data[0], "validation_data")[0],
            targets_of(validation_data[1], goal, "validation_data"),
        ]
    held = 0 if validation_data is not None else max(2, round(n * VALIDATION_SHARE))
    temporary = tempfile.TemporaryDirectory(prefix="multistep-") if out is None else None
    folder = Path(temporary.name if temporary is not None else str(out))
    objective = (
        goal.objective if len(goal.objective) > 1 else goal.objective["kind"]
    )  # by its name alone nothing of it is given
    settings: dict[str, Any] = {
        "objective": objective, "optimizer": updates.optimizer, "clip": updates.clip, "metric": metric,
        "budget": _budget(budget, n - held, batch_size), "batch_size": batch_size, "schedule": schedule,
        "controller": controller, "patience": patience, "precision": precision, "seed": seed, "looks": "epoch", "quiet": not verbose,
    }  # fmt: skip
    work = _here if keras.backend.backend() == "torch" else _elsewhere
    found = work(model, splits, goal.link, settings, folder)
    return Trained(model, found["metric"], found["validation"][found["metric"]], found["validation"], folder, temporary)


def _here(
    model: Any, splits: dict[str, list[np.ndarray]], link: Any, settings: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Train in this process; the model's variables are filled."""
    from multistep.keras_module import KerasModule, as_function, gains_by_bf16
    from multistep.modules import optimize as optimize_module

    wanted = settings["precision"]
    bf16 = wanted == "bf16" or (wanted == "auto" and gains_by_bf16(model))
    settings = {**{k: v for k, v in settings.items() if k != "precision"}, "bf16": bf16}
    with as_function(model, link, bf16) as left:
        module = KerasModule(model, left)
        given = {k: tuple(v) for k, v in splits.items()}
        result = optimize_module(module, train=given["train"], validation=given.get("validation"), out=out, **settings)
    return {"metric": result.metric, "validation": result.validation}


# ---------------------------------------------------------------------------------------------- another backend


def _elsewhere(
    model: Any, splits: dict[str, list[np.ndarray]], link: Any, settings: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Train in a process with the torch backend; the model gets the weights that come back."""
    if not isinstance(settings["schedule"], str | dict | None):
        raise UserError("schedule: give its name or a dictionary with a kind: it goes to another process.")
    with tempfile.TemporaryDirectory(prefix="multistep-keras-") as name:
        folder = Path(name)
        model.save(str(folder / "model.keras"), include_optimizer=False)
        for split, parts in splits.items():
            np.savez(folder / f"{split}.npz", *parts)
        asked = {"link": link, "settings": settings, "out": str(out.absolute())}
        (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        _run(folder)
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        with np.load(folder / "weights.npz", allow_pickle=False) as weights:
            model.set_weights([weights[f"arr_{n}"] for n in range(len(weights.files))])
    return {**answer, "validation": {k: MetricValue(*v) for k, v in answer["validation"].items()}}


def _run(folder: Path) -> None:
    """The worker to its end: its lines pass through, SIGINT and SIGTERM go to it, its error becomes ours."""
    environment = {**alone(), "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-m", "multistep.keras_worker", str(folder)]
    worker = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    last = ""
    with _forwarded(worker) as seen:
        assert worker.stderr is not None
        for line in worker.stderr:
            last = line.strip() or last
            print(line, end="", file=sys.stderr, flush=True)
        code = worker.wait()
    failed = folder / "error.json"
    if failed.exists():
        error = json.loads(failed.read_text(encoding="utf-8"))
        if error["signal"]:
            raise Interrupted(error["signal"])
        raise UserError(error["text"])
    if code:
        if seen[0]:
            raise Interrupted(seen[0])
        raise UserError(
            f"the process with Keras on torch ended with {code} ({last[:200]}). Run with KERAS_BACKEND=torch."
        )


@contextmanager
def _forwarded(worker: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Signals of this process reach the worker, which saves and ends."""
    seen = [0]
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def pass_on(number: int, frame: object) -> None:
        seen[0] = number
        worker.send_signal(number)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------- input


def _inputs(x: Any, name: str) -> tuple[list[np.ndarray], int]:
    """The arrays of one or several inputs, and their rows."""
    parts = [np.asarray(part) for part in (x if isinstance(x, list | tuple) and _several(x) else [x])]
    if any(p.dtype.kind not in "biuf" or not p.ndim for p in parts):
        raise UserError(f"{name}: not an array of numbers with a row an example. Pad or cut texts to one length first.")
    rows = {len(p) for p in parts}
    if len(rows) != 1 or not rows.pop():
        raise UserError(
            f"{name}: its inputs have {' and '.join(str(len(p)) for p in parts)} rows. Give them the same number."
        )
    return [p.astype(np.float32) if p.dtype == np.float64 else p for p in parts], len(parts[0])


def _several(x: Sequence[Any]) -> bool:
    """A list of arrays is several inputs, a list of numbers or rows is one."""
    return bool(x) and all(isinstance(part, np.ndarray) and part.ndim > 1 for part in x)


def _first(xs: list[np.ndarray]) -> Any:
    rows = [x[:1] for x in xs]
    return rows[0] if len(rows) == 1 else rows


def _budget(budget: str | float, rows: int, batch_size: int) -> str | float:
    """'10 epochs' in updates; the rest as it is."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*epochs?\s*", str(budget))
    if match is None:
        return budget
    updates = round(float(match[1]) * max(1, round(rows / max(1, batch_size))))
    if not updates or not math.isfinite(updates):
        raise UserError(f"budget: {budget!r} must be above zero.")
    return f"{updates} updates"
