"""RMSprop: the gradient over the root of a moving average of its square.

    g <- g + wd w;  v <- a v + (1-a) g^2;  w <- w - lr g / (sqrt(v) + eps)

Source: Tieleman and Hinton 2012, lecture 6e of "Neural networks for machine learning"; torch.optim.RMSprop does the work.
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


class RMSprop(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(1e-3, 1e-4, 1e-2, "the lecture's 0.001; not measured here"),
        "fine_tune": Rate(3e-5, 5e-6, 2e-4, "prior: AdamW's, a little lower for want of momentum; not measured here"),
        "adapter": Rate(3e-4, 5e-5, 2e-3, "prior: ten times fine_tune as for AdamW, not measured here"),
    }
    good_for = "recurrent networks, and Adam's scaling with half of its state"
    wrong_for = "the first updates of a pretrained model: v starts at zero and is not corrected, so they are too large"
    bytes_a_parameter = 4.0
    cost = 2.6

    kind: Literal["rmsprop"] = "rmsprop"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-6, 1e-1, log=True, live=True)] = 1e-3
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.99
    eps: Annotated[float, Field(gt=0)] = 1e-8

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        import torch

        groups = parameter_groups(parameters, self.weight_decay, head_lr)
        return torch.optim.RMSprop(groups, lr=self.lr, alpha=self.alpha, eps=self.eps)
