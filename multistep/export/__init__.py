"""Models for other programs: a Hugging Face folder, an ONNX graph, a CTranslate2 model, a Keras model.

    export(bundle folder, to, out) -> Exported

Every export is run against the model's own outputs before it takes its place; one that disagrees is not written. `out` must not
hold anything yet. A README.md in it has the lines that use it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from multistep.bundle import find_bundle, load_bundle
from multistep.export.checked import Exported
from multistep.export.labels import LabelModel, label_model, to_folder, to_onnx
from multistep.export.writers import WRITER_TARGETS
from multistep.language_bundle import LanguageBundle
from multistep.state import replace_folder
from multistep.types import UserError, nearest
from multistep.writing import Neural

TARGETS = ("folder", "onnx", "ctranslate2", "keras")


def export(run: str | Path, to: str, out: str | Path) -> Exported:
    """Write the model of a run or bundle into the new folder `out`. Raises UserError where that cannot be, with what can."""
    if to not in TARGETS:
        raise UserError(f"to: {to!r} is not known.{nearest(to, TARGETS)}")
    folder, target = find_bundle(Path(run)), Path(out)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target}: there is something already. Choose a new folder.")
    write = _writer(folder, to)
    temporary = target.absolute().with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        agreement = write(temporary)
        replace_folder(temporary, target.absolute())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files = tuple(sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()))
    return Exported(to=to, out=str(target), agreement=agreement, files=files)


def _writer(folder: Path, to: str) -> Callable[[Path], str]:
    """What fills a folder and gives the measured agreement in words."""
    bundle = load_bundle(folder)
    if isinstance(bundle, LanguageBundle):
        if not isinstance(bundle.speaker, Neural):
            kind = bundle.info["standing"]["kind"]
            raise UserError(
                f"{folder}: what answers is a {kind}, which no other program reads. Copy the folder and use multistep.load."
            )
        if to not in WRITER_TARGETS:
            raise UserError(f"{to}: not for a model that writes. Use --to folder or --to ctranslate2.")
        language, write = bundle, WRITER_TARGETS[to]
        return lambda into: write(language, into)
    model = label_model(folder, bundle)
    match to:
        case "folder":
            return lambda into: to_folder(model, into)
        case "onnx":
            return lambda into: to_onnx(model, into)
        case "keras":
            return lambda into: _to_keras(model, into)
        case _:
            raise UserError(f"{to}: for models that write; this one gives labels. Use --to onnx, keras or folder.")


def _to_keras(model: LabelModel, into: Path) -> str:
    from multistep.export.keras_model import to_keras  # imports Keras, which not everyone has

    return to_keras(model, into)


__all__ = ["TARGETS", "Exported", "export"]
