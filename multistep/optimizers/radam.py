"""RAdam: Adam that warms itself up: plain momentum until the mean square is known well enough, then scaled by how well.

    m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  r_inf = 2/(1-b2) - 1;  r_t = r_inf - 2 t b2^t / (1-b2^t)
    s = sqrt((r_t-4)(r_t-2) r_inf / ((r_inf-4)(r_inf-2) r_t)) sqrt(1-b2^t) / (sqrt(v) + eps)  where r_t > 5, else 1
    w <- (1 - lr wd) w - lr s m / (1-b1^t)

Source: Liu et al. 2020, "On the variance of the adaptive learning rate and beyond"; torch.optim.RAdam does the work.
Differs from the source: decoupled weight decay.
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


class RAdam(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(1e-3, 3e-4, 6e-3, "the paper's for language models"),
        "fine_tune": Rate(4e-5, 1e-5, 3e-4, "prior: AdamW's, not measured here"),
        "adapter": Rate(4e-4, 1e-4, 3e-3, "prior: AdamW's, not measured here"),
    }
    good_for = "training without a warm-up of the learning rate"
    wrong_for = "runs of a few updates, and schedules that warm up already: there it is a slower AdamW"
    bytes_a_parameter = 8.0
    cost = 6.0

    kind: Literal["radam"] = "radam"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-6, 1e-1, log=True, live=True)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=10), Tunable(1e-4, 1.0, log=True, live=True)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(gt=0.5, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        import torch

        return torch.optim.RAdam(
            parameter_groups(parameters, self.weight_decay, head_lr),
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            decoupled_weight_decay=True,
        )
