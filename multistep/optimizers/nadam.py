"""NAdam with decoupled weight decay (NadamW): Adam that looks one step of its momentum ahead, as Nesterov's method does.

    u_t = b1 (1 - 0.5 0.96^(t psi));  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2
    n = u_(t+1) m / (1 - u_1...u_(t+1)) + (1-u_t) g / (1 - u_1...u_t)
    w <- (1 - lr wd) w - lr n / (sqrt(v / (1-b2^t)) + eps)

Sources: Dozat 2016, "Incorporating Nesterov momentum into Adam"; torch.optim.NAdam does the work.
Differs from the source: decoupled weight decay, as in AlgoPerf's baseline. Where the parameters themselves are bfloat16, torch
rounds the product of the u when it loads a state: a resumed run then differs in the last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from multistep.optimizers.base import GradientOptimizer, Rate, parameter_groups
from multistep.types import Tunable

if TYPE_CHECKING:
    import torch
    from torch import nn


class NAdam(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(
            1.75e-3, 3e-4, 6e-3, "calibrated baseline of AlgoPerf (with beta1 .9327, beta2 .9955, weight decay .081)"
        ),
        "fine_tune": Rate(
            4e-5, 1e-5, 3e-4, "prior: AdamW's; Gkouti et al. 2024 find adaptive methods alike once tuned"
        ),
        "adapter": Rate(4e-4, 1e-4, 3e-3, "prior: AdamW's, not measured here"),
    }
    good_for = "training from random weights with one calibrated setting: the baseline that is hard to beat"
    wrong_for = "small CPUs: torch has no fused kernel for it, and AdamW does much the same with one"
    bytes_a_parameter = 8.0
    cost = 5.2

    kind: Literal["nadam"] = "nadam"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-6, 1e-1, log=True, live=True)] = 1.75e-3
    weight_decay: Annotated[float, Field(ge=0, le=10), Tunable(1e-4, 1.0, log=True, live=True)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.995
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum_decay: Annotated[float, Field(ge=0)] = 4e-3

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        import torch

        return torch.optim.NAdam(
            parameter_groups(parameters, self.weight_decay, head_lr),
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            momentum_decay=self.momentum_decay,
            decoupled_weight_decay=True,
        )
