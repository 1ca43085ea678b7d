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

CPU_TOKENS = 256  # of a piece, so that its logits stay near the processor: 128 and 512 were slower (LOG.md, 2026-11-25)
TOKENS = 4096  # elsewhere


class PiecewiseLoss(torch.autograd.Function):
    """The sum of nats over the tokens that count. Its gradient is taken with it and cannot be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, states_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, label_smoothing: float, z_loss: float
    ) -> Tensor:
        dtype, e, device = _product_dtype(states_ND), label_smoothing, states_ND.device
        w_VD = weight_VD.detach().to(dtype)
        sum_D = weight_VD.detach().float().sum(0)
        grad_states, grad_weight = torch.empty_like(states_ND), torch.zeros_like(weight_VD, dtype=torch.float32)
        total, spread_D = torch.zeros((), device=device), torch.zeros_like(sum_D)
        size = CPU_TOKENS if device.type == "cpu" else TOKENS
        ignored = bool((ids_N == IGNORED).any())
        for first in range(0, len(states_ND), size):
            ids_C = ids_N[first : first + size]
            counts_C1, own_C1 = (ids_C != IGNORED)[:, None], ids_C.clamp_min(0)[:, None]
            h_CD = states_ND[first : first + size].to(dtype)
            z_CV = (h_CD @ w_VD.T).float()
            own_z_C1, most_C1 = z_CV.gather(1, own_C1), z_CV.amax(1, keepdim=True)
            mean_C1 = (h_CD * sum_D).sum(1, keepdim=True) / len(w_VD)  # of the logits
            p_CV = z_CV.sub_(most_C1).exp_()  # four times as fast as torch's softmax of so many entries on a CPU
            sum_C1 = p_CV.sum(1, keepdim=True)
            lse_C1 = most_C1 + sum_C1.log()
            nats_C1 = lse_C1 - (1 - e) * own_z_C1 - e * mean_C1 + z_loss * lse_C1**2
            total += nats_C1.masked_fill(~counts_C1, 0.0).sum()
            # The gradient is p (1 + 2 z lse) - (1 - e) [own] - e / V; its last part is added at the end.
            p_CV.mul_((1 + 2 * z_loss * lse_C1) / sum_C1).scatter_add_(1, own_C1, torch.full_like(sum_C1, e - 1))
            if ignored:
                p_CV.masked_fill_(~counts_C1, 0.0)
            g_CV = p_CV.to(dtype)
            spread_C1 = counts_C1 * (e / len(w_VD))
            grad_states[first : first + size] = g_CV @ w_VD - spread_C1 * sum_D
            grad_weight += g_CV.T @ h_CD
            spread_D += (spread_C1 * h_CD).sum(0)
        grad_weight -= spread_D
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
