"""An encoder with its head as an ONNX graph: ids and mask in, logits out; and the same graph with weights of 8 bits.

Weights of 8 bits are in blocks of 32 with a scale each, and every row of activations is rounded by itself (ONNX Runtime's MatMulNBits):
what a text gets does not depend on its neighbours in the batch. The other way, one scale for all activations of a batch
(`quantize_dynamic`), was faster and not kept: on all-MiniLM-L6-v2 a text's logits moved by up to 1.0 with its batch (LOG.md).
Shapes: B rows, T tokens, K outputs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multistep.models.base import TextEncoder
from multistep.models.encoder import Encoder, pool
from multistep.models.lstm import Lstm
from multistep.types import UserError

_BLOCK = 32
_HIDDEN = -1e9
OPSET = 18
_TALKING = ("torch.onnx", "onnx_ir", "onnxscript", "onnxruntime.quantization.matmul_nbits_quantizer")


class Graph(nn.Module):
    """`features` and the head of an encoder without a branch that depends on the values, times `scale`, plus `shift`."""

    def __init__(self, model: TextEncoder, scale: float, shift: float):
        super().__init__()
        self.model: Any = model
        self.scale, self.shift = scale, shift

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.model.head(self._features(ids_BT, mask_BT)) * self.scale + self.shift

    def _features(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        if isinstance(self.model, Lstm):
            states_BTD = self.model.lstm(self.model.embeddings(ids_BT))[0]
            return torch.einsum("btd,bt->bd", states_BTD, mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1))
        real_BT = mask_BT.bool()
        if not self.model.n_layers:
            hidden = self.model.backbone(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
            return pool(hidden, real_BT)
        bias = (~real_BT)[:, None, None, :].to(torch.float32) * _HIDDEN
        hidden_BTD = self.model.backbone.embeddings(input_ids=ids_BT)
        for layer in self.model.layers():
            hidden_BTD = layer(hidden_BTD, bias)
        return pool(hidden_BTD, real_BT)


def write_graph(model: TextEncoder, path: Path, scale: float = 1.0, shift: float = 0.0) -> None:
    """Inputs "ids" and "mask" [B,T] int64 (mask: 1 for tokens, 0 for what fills up), output "logits" [B,K] float32.

    Raises UserError where the model has no graph."""
    if not isinstance(model, Encoder | Lstm):
        raise UserError(f"onnx: a {type(model).__name__} has no graph here. Use the runtime torch.")
    device = model.head.weight.device
    ids_BT = torch.full((2, 5), model.pad_id, device=device)
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quiet(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Graph(model, scale, shift).eval(), (ids_BT, mask_BT), dynamo=True, input_names=["ids", "mask"],
                output_names=["logits"], dynamic_shapes=(free, free), opset_version=OPSET, verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(str(path))
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0][:160]
        raise UserError(f"onnx: this model has no graph ({reason}). Use the runtime torch.") from None


def quantize_graph(path: Path, out: Path) -> None:
    """The graph of `path` with the weights of its products in 8 bits."""
    with _quiet():
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            onnx.load(str(path)), bits=8, block_size=_BLOCK, is_symmetric=True, accuracy_level=4
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(out))  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _quiet() -> Iterator[None]:
    """What these libraries say of their work is not said; nor is the root logger left with the handler that importing one of them adds."""
    root = logging.getLogger()
    handlers, loggers = list(root.handlers), [logging.getLogger(name) for name in _TALKING]
    levels = [log.level for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        yield
    finally:
        root.handlers[:] = handlers
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
