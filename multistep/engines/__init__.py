"""Engines: what a bundle's models run on, chosen by data. Files of other libraries are made once, beside the bundle's own.

Three calls, for an encoder (evaluate.EncoderText) and for a model that writes (writing.Neural) alike:

    variants(model)                                 -> [(name, Runtime), ...]   what can run here, torch in float32 first
    prepare(model, runtime, folder)                 -> a model in its place     folder: of the bundle; files go to engines/<name>/
    agree(reference, candidate, rows, task, metric) -> Agreement                whether it may stand in; if not, the numbers in words

`rows` are texts, and `task` the bundle's, for encoders; records for models that write, with `metric` where they have right answers.
What was decided is kept in `multistep.json` under "engine", which `load_bundle` obeys:

    a bundle that writes   {"runtime": "ctranslate2", "dtype": "int8", "threads": 2, "batch": 16}
    one that gives labels  {"encoder": {"runtime": "onnx", "dtype": "fp32"}, "threads": 1, "batch": 32}

A missing library, files that are not there or were made of other weights, and settings that an engine has not: UserError, never
another engine in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from multistep.data.cells import Record
from multistep.engines.agreement import Agreement, agree_labels, agree_texts
from multistep.engines.labels import OnnxText, encoder_variants, prepare_encoder
from multistep.engines.runtime import Runtime
from multistep.engines.writers import prepare_writer, writer_variants
from multistep.evaluate import EncoderText, TextModel
from multistep.metrics import TaskLike
from multistep.writing import Neural, Speaker


def variants(model: EncoderText | Neural) -> list[tuple[str, Runtime]]:
    """What can run here, by name; the first is torch in float32. Libraries that are not installed are left out."""
    found = writer_variants(model) if isinstance(model, Neural) else encoder_variants(model)
    return [(runtime.name, runtime) for runtime in found]


@overload
def prepare(model: EncoderText, runtime: Runtime, folder: Path, make: bool = True) -> TextModel: ...
@overload
def prepare(model: Neural, runtime: Runtime, folder: Path, make: bool = True) -> Neural: ...
def prepare(model: EncoderText | Neural, runtime: Runtime, folder: Path, make: bool = True) -> TextModel | Neural:
    """The model on another engine. `folder`: the bundle's, or any other to try things in. Without `make`, only what is there already
    and was made of these weights is taken. Raises UserError."""
    if isinstance(model, Neural):
        return prepare_writer(model, runtime, folder, make)
    return prepare_encoder(model, runtime, folder, make)


def agree(
    reference: TextModel | Speaker, candidate: TextModel | Speaker, rows: Sequence[str] | Sequence[Record],
    task: TaskLike | None = None, metric: str | None = None,
) -> Agreement:  # fmt: skip
    """Whether `candidate` may stand in for `reference` (agreement.py says what is allowed)."""
    if task is not None:
        return agree_labels(task, reference, candidate, rows)  # pyright: ignore[reportArgumentType]
    return agree_texts(reference, candidate, rows, metric)  # pyright: ignore[reportArgumentType]


__all__ = ["Agreement", "OnnxText", "Runtime", "agree", "agree_labels", "agree_texts", "prepare", "variants"]
