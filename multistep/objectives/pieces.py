"""Cross-entropy of tokens from hidden states, the projection to a large vocabulary made piece by piece. No more than a piece of the
logits [N,V] is ever in memory, and its gradient is taken while it is there. Value and gradients are those of `tokens.token_loss`.

Source: the idea is that of Liger (Hsu et al. 2024, arXiv 2410.10989, section 3.2: fused linear cross-entropy).
Shapes: N tokens, C tokens of a piece, D width, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multistep.objectives.shapes import IGNORED, Hidden

TOKENS = {
    "cpu": 256
}  # of a piece, so that its logits stay near the processor: 128 and 512 were slower (LOG.md, 2026-11-25)
TOKENS_ELSEWHERE = 4096


class PiecewiseLoss(torch.autograd.Function):
    """The sum of nats over the tokens that count. Its gradient is taken with it and cannot be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, states_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, label_smoothing: float, z_loss: float
    ) -> Tensor:
        dtype = _product_dtype(states_ND)
        w_VD, e, vocabulary = weight_VD.detach().to(dtype), label_smoothing, len(weight_VD)
        grad_states, grad_weight = torch.empty_like(states_ND), torch.zeros_like(weight_VD, dtype=torch.float32)
        device = states_ND.device
        total, size = torch.zeros((), device=device), TOKENS.get(device.type, TOKENS_ELSEWHERE)
        for first in range(0, len(states_ND), size):
            ids_C = ids_N[first : first + size]
            counts_C1, own_C1 = (ids_C != IGNORED)[:, None], ids_C.clamp_min(0)[:, None]
            h_CD = states_ND[first : first + size].to(dtype)
            z_CV = h_CD @ w_VD.T
            p_CV = z_CV.log_softmax(1, dtype=torch.float32)
            nats_C1 = (e - 1) * p_CV.gather(1, own_C1)
            if e:
                nats_C1 = nats_C1 - e * p_CV.mean(1, keepdim=True)
            p_CV.exp_()
            if z_loss:
                lse_C1 = z_CV.float().logsumexp(1, keepdim=True)
                nats_C1 = nats_C1 + z_loss * lse_C1**2
                p_CV *= 1 + 2 * z_loss * lse_C1
            total += nats_C1.masked_fill(~counts_C1, 0.0).sum()
            if e:
                p_CV -= e / vocabulary
            p_CV.scatter_add_(1, own_C1, torch.full_like(nats_C1, e - 1))
            g_CV = p_CV.masked_fill_(~counts_C1, 0.0).to(dtype)
            grad_states[first : first + size] = g_CV @ w_VD
            grad_weight += g_CV.T @ h_CD
        ctx.save_for_backward(grad_states, grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_states, grad_weight = ctx.saved_tensors
        return grad_states * grads[0], grad_weight * grads[0], None, None, None


def piecewise_loss(hidden: Hidden, ids_BT: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Mean nats per token that counts; 0 when there are none."""
    total: Any = PiecewiseLoss.apply(
        hidden.states_BTD.flatten(0, -2), hidden.weight_VD, ids_BT.flatten().long(), label_smoothing, z_loss
    )
    return total / (ids_BT != IGNORED).sum().clamp_min(1)


def _product_dtype(states: Tensor) -> torch.dtype:
    """What autocast would compute the projection in."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
