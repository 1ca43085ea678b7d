"""Cross-entropy of tokens, shared by the objectives that predict sequences. Targets of -100 do not count.

    loss = sum over tokens of (nll + z logsumexp(logits)^2) / tokens

The second term (z-loss) keeps the softmax's normalizer near 1. Without a token that counts the loss is 0, with a graph.
Sources: Szegedy et al. 2016, arXiv 1512.00567 (smoothing); Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, section 5 (z-loss).
Shapes: B rows, T positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from multistep.objectives.shapes import IGNORED, Hidden
from multistep.types import UserError

if TYPE_CHECKING:
    from torch import Tensor


def token_loss(outputs: Tensor | Hidden, ids_BT: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Mean nats per token that counts; outputs are logits [B,T,V], or what they are made of."""
    import torch.nn.functional as F

    if isinstance(outputs, Hidden):
        from multistep.objectives.pieces import piecewise_loss

        return piecewise_loss(outputs, ids_BT, label_smoothing, z_loss)
    z_NV, ids_N = _flat(outputs, ids_BT)
    counts_N = ids_N != IGNORED
    total = F.cross_entropy(z_NV, ids_N, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum")
    if z_loss:
        total = total + z_loss * (z_NV.logsumexp(1) ** 2).masked_fill(~counts_N, 0.0).sum()
    return total / counts_N.sum().clamp_min(1)


def row_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Mean nats per token that counts of every row [B]; 0 for a row without one."""
    import torch.nn.functional as F

    nats_N = F.cross_entropy(*_flat(logits_BTV, ids_BT), ignore_index=IGNORED, reduction="none")
    return nats_N.view(ids_BT.shape).sum(1) / (ids_BT != IGNORED).sum(1).clamp_min(1)


def n_tokens(ids_BT: Tensor) -> float:
    """How many tokens count."""
    return float((ids_BT != IGNORED).sum())


def _flat(logits_BTV: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    if logits_BTV.ndim != 3 or logits_BTV.shape[:2] != ids_BT.shape:
        raise UserError(
            f"outputs {list(logits_BTV.shape)} do not fit targets {list(ids_BT.shape)}: "
            "give outputs [rows, positions, vocabulary] and targets [rows, positions]."
        )
    return logits_BTV.float().flatten(0, 1), ids_BT.long().flatten()
