"""What a model runs on, as data; the library it needs; and the files made for it, which know of which weights they were made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from multistep.state import replace_folder
from multistep.types import Spec, UserError

FORMAT = 1
FILE = "engine.json"
_MAKE = "Make it again with: multistep tune RUN"


class Runtime(Spec):
    """A library, the numbers it computes in, and how much at once. `dtype`: int8 are weights of 8 bits."""

    runtime: Literal["torch", "onnx", "ctranslate2"] = "torch"
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # 0: as many as torch has
    batch: Annotated[int, Field(ge=0, le=65_536)] = 0  # rows at once at most; 0: what the model does by itself
    lookup: Annotated[int, Field(ge=0, le=64)] = 0  # tokens guessed at once (multistep/lookup.py): torch, greedy

    @property
    def name(self) -> str:
        """ "onnx-int8": of a folder and in a journal; threads and batch are not part of it."""
        return f"{self.runtime}-{self.dtype}" + (f"-lookup{self.lookup}" if self.lookup else "")

    @property
    def n_threads(self) -> int:
        return self.threads or torch.get_num_threads()


_NEEDS = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "ctranslate2": ("ctranslate2",)}


def lacks(runtime: Runtime, making: bool = True) -> tuple[str, ...]:
    """The packages that are not there; without `making`, those that running needs."""
    needed = _NEEDS[runtime.runtime] if making else _NEEDS[runtime.runtime][-1:]
    return tuple(name for name in needed if util.find_spec(name) is None)


def check_installed(runtime: Runtime, making: bool = True) -> None:
    """Raises UserError that names the extra."""
    if missing := lacks(runtime, making):
        raise UserError(
            f"{runtime.name}: {' and '.join(missing)} is not installed. Install it: pip install 'multistep[{runtime.runtime}]'"
        )


def fingerprint(*modules: torch.nn.Module) -> str:
    """Of all weights, by their names and bytes."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _facts(target: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((target / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def found(folder: Path, runtime: Runtime, mark: str) -> Path | None:
    """The folder `engines/<name>` of a bundle, if it is there and of the weights that `mark` says."""
    target = folder / "engines" / runtime.name
    facts = _facts(target) or {}
    return target if facts.get("format") == FORMAT and facts.get("fingerprint") == mark else None


def made(folder: Path, runtime: Runtime, mark: str, write: Callable[[Path], None] | None) -> Path:
    """The folder `engines/<name>` of a bundle with the files of this runtime. Where it is not there or of other weights than `mark`
    says, `write` fills a new one, which takes its place in one step; without `write` that is a UserError."""
    if (there := found(folder, runtime, mark)) is not None:
        return there
    target = folder / "engines" / runtime.name
    if write is None:
        why = "is not there" if _facts(target) is None else "was made of other weights"
        raise UserError(f"{target}: what {runtime.name} runs {why}. {_MAKE}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        versions = {name: metadata.version(name) for name in _NEEDS[runtime.runtime]}
        facts = {"format": FORMAT, "fingerprint": mark, "runtime": runtime.runtime, "dtype": runtime.dtype, **versions}
        (temporary / FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
