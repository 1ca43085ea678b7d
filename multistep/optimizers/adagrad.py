"""Adagrad: every parameter's step shrinks with the squares of all its gradients so far.

    g <- g + wd w;  s <- s + g^2;  w <- w - lr g / (sqrt(s) + eps)

Source: Duchi, Hazan and Singer 2011, "Adaptive subgradient methods"; torch.optim.Adagrad does the work, fused.
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


class Adagrad(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(1e-2, 1e-3, 0.1, "torch's default; not measured here"),
        "fine_tune": Rate(
            4e-4, 4e-5, 4e-3, "prior: ten times AdamW's, for steps shrink as 1/sqrt(updates); not measured here"
        ),
        "adapter": Rate(4e-3, 4e-4, 4e-2, "prior: ten times AdamW's, not measured here"),
    }
    good_for = "sparse features and embeddings of rare words, in short runs"
    wrong_for = "long runs of deep networks: its steps only ever shrink"
    bytes_a_parameter = 4.0
    cost = 0.71

    kind: Literal["adagrad"] = "adagrad"
    lr: Annotated[float, Field(gt=0, le=10), Tunable(1e-5, 1.0, log=True, live=True)] = 1e-2
    eps: Annotated[float, Field(gt=0)] = 1e-10
    initial_accumulator: Annotated[float, Field(ge=0)] = (
        0.0  # what the sums of squares begin at: it tames the first steps
    )

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        import torch

        groups = parameter_groups(parameters, self.weight_decay, head_lr)
        fused = not any(p.is_cuda for _, p in parameters)  # torch has the fused kernel for the CPU only
        return torch.optim.Adagrad(
            groups, lr=self.lr, eps=self.eps, initial_accumulator_value=self.initial_accumulator, fused=fused
        )
