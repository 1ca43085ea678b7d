"""Encoders on other engines: the same texts, the same tokenizer, batches cut alike; logits within what `agree` allows.

Shapes: N texts, B rows, T tokens, K outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from multistep.data.batches import by_length
from multistep.engines.graph import quantize_graph, write_graph
from multistep.engines.runtime import Runtime, check_installed, fingerprint, found, lacks, made
from multistep.evaluate import EncoderText, TextModel
from multistep.models.encoder import Encoder, pad
from multistep.models.recurrence import has_bf16
from multistep.types import UserError

_GRAPH = "model.onnx"


def encoder_variants(model: EncoderText) -> list[Runtime]:
    """What this encoder could run on here. torch has no int8 for a CPU: its quantize_dynamic is given up by its makers."""
    known = [Runtime()]
    cpu = model.model.head.weight.device.type == "cpu"
    if model.model.in_bf16 and (has_bf16() or not cpu):
        known.append(Runtime(dtype="bf16"))
    if cpu and not lacks(Runtime(runtime="onnx")):
        known += [Runtime(runtime="onnx")]
        if isinstance(
            model.model, Encoder
        ):  # of an LSTM the products are inside of an operation that has no such weights
            known.append(Runtime(runtime="onnx", dtype="int8"))
    return known


def prepare_encoder(model: EncoderText, runtime: Runtime, folder: Path, make: bool) -> TextModel:
    if runtime.lookup:
        raise UserError(f"{runtime.name}: lookup is for models that write. Leave it out.")
    match runtime.runtime, runtime.dtype:
        case "torch", "fp32":
            return replace(model, bf16=False, batch=runtime.batch, threads=runtime.threads)
        case "torch", "bf16" if model.model.in_bf16:
            return replace(_in_bf16(model), batch=runtime.batch, threads=runtime.threads)
        case "onnx", "fp32":
            return _on_onnx(model, runtime, folder, make)
        case "onnx", "int8" if isinstance(model.model, Encoder):
            return _on_onnx(model, runtime, folder, make)
    known = ", ".join(r.name for r in encoder_variants(model))
    raise UserError(f"{runtime.name}: no engine for a {type(model.model).__name__} that gives labels. Known: {known}.")


def _in_bf16(model: EncoderText) -> EncoderText:
    """Weights in bfloat16, once and for all: autocast casts them for every batch, which one short text does not pay for. The mean
    over tokens and the head stay in float32."""
    if not isinstance(model.model, Encoder):
        return replace(model, bf16=True)
    twin = copy.deepcopy(model.model)
    twin.backbone.bfloat16()
    return replace(model, model=twin, bf16=False)


def _on_onnx(model: EncoderText, runtime: Runtime, folder: Path, make: bool) -> OnnxText:
    check_installed(runtime, making=make)

    mark = fingerprint(model.model)

    def write(into: Path) -> None:
        if runtime.dtype == "fp32":
            return write_graph(model.model, into / _GRAPH)
        whole = found(folder, runtime.with_(dtype="fp32"), mark)  # to make a graph takes seconds, to quantize it little
        if whole is None:
            write_graph(model.model, whole := into / "whole.onnx")
        else:
            whole = whole / _GRAPH
        quantize_graph(whole, into / _GRAPH)
        (into / "whole.onnx").unlink(missing_ok=True)
        return None

    place = made(folder, runtime, mark, write if make else None)
    return OnnxText(
        session_of(place / _GRAPH, runtime.n_threads), model.tokenize, model.pad_id, model.model.head.out_features,
        model.model.encode_tokens, runtime.batch, model.scale, model.mean,
    )  # fmt: skip


def session_of(path: Path, threads: int) -> Any:
    """An ONNX Runtime session on the CPU. Raises UserError where the file is damaged."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no base class of their own
        reason = str(error).strip().splitlines()[0][:160]
        raise UserError(f"{path}: ONNX Runtime cannot read it ({reason}). Make it again.") from None


@dataclass
class OnnxText:
    """A text model (evaluate.py) whose graph ONNX Runtime computes. `session`: what `session_of` gave."""

    session: Any
    tokenize: Callable[[Sequence[str]], list[np.ndarray]]
    pad_id: int
    n_outputs: int
    encode_tokens: int
    batch: int = 0
    scale: float = 1.0
    mean: float = 0.0

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """[N,K] float64."""
        ids = self.tokenize(texts)
        logits_NK = np.zeros((len(ids), self.n_outputs))
        for rows in by_length(np.array([len(r) for r in ids]), self.encode_tokens, self.batch):
            ids_BT, mask_BT = pad([ids[r] for r in rows], self.pad_id)
            given = {"ids": ids_BT.numpy(), "mask": mask_BT.numpy().astype(np.int64)}
            logits_NK[rows] = self.session.run(None, given)[0]
        return logits_NK * self.scale + self.mean
