"""Adam: momentum over the root of the mean square, both corrected for their start at zero. Fused into one kernel.

    g <- g + wd w;  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  w <- w - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

Source: Kingma and Ba 2015, "Adam: a method for stochastic optimization"; torch.optim.Adam does the work.
Weight decay is an L2 penalty in the gradient, as it was before AdamW; 0 is the default.
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


class Adam(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(1e-3, 1e-4, 6e-3, "the paper's default"),
        "fine_tune": Rate(4e-5, 1e-5, 3e-4, "AdamW's: without weight decay they are the same"),
        "adapter": Rate(4e-4, 1e-4, 3e-3, "AdamW's: without weight decay they are the same"),
    }
    good_for = "models of tutorials that name it; without weight decay it is AdamW"
    wrong_for = "regularized training: its weight decay is divided away where gradients are large; take adamw"
    bytes_a_parameter = 8.0
    cost = 1.0

    kind: Literal["adam"] = "adam"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-6, 1e-1, log=True, live=True)] = 1e-3
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        import torch

        groups = parameter_groups(parameters, self.weight_decay, head_lr)
        return torch.optim.Adam(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)
