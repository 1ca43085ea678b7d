"""AdamW: Adam with decoupled weight decay, fused into one kernel.

    m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  w <- (1 - lr wd) w - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization"; torch.optim.AdamW does the work.
Differs from the source: biases, norms and embeddings are not decayed (`decays`), as is usual for transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from multistep.optimizers.base import GradientOptimizer, Rate, decays, parameter_groups
from multistep.types import Tunable

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["AdamW", "decays"]


class AdamW(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(
            1.5e-3, 3e-4, 6e-3, "calibrated NadamW of AlgoPerf: 1.75e-3; tuned baseline of modded-nanogpt: 1.5e-3"
        ),
        "fine_tune": Rate(
            4e-5, 1e-5, 3e-4, "grid of 1e-5 to 8e-5 for encoders of base size; small encoders, top layers: 3e-4"
        ),
        "adapter": Rate(4e-4, 1e-4, 3e-3, "ten times fine_tune: Schulman et al. 2025, 'LoRA without regret'"),
    }
    good_for = "any transformer; what to take when nothing else is known"
    wrong_for = "a convex problem, which a second-order solver ends in seconds"
    bytes_a_parameter = 8.0
    cost = 1.0

    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-6, 1e-1, log=True, live=True)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0, le=10), Tunable(1e-4, 1.0, log=True, live=True)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: Annotated[float, Field(gt=0)] = 1e-8

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(
            parameter_groups(parameters, self.weight_decay, head_lr),
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )
