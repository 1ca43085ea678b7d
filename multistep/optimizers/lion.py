"""Lion: the sign of a momentum. Every weight moves by the learning rate, one way or the other.

    w <- (1 - lr wd) w - lr sign(b1 m + (1-b1) g);  m <- b2 m + (1-b2) g

Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms".
"""
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from multistep.optimizers.base import GradientOptimizer, Rate, parameter_groups
from multistep.types import Tunable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from multistep.optimizers.rule import Part


class Lion(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(2e-4, 3e-5, 1e-3, "AlgoPerf submission of 2026 (with betas .95, .98 and weight decay .5)"),
        "fine_tune": Rate(1e-5, 2e-6, 6e-5, "prior: the paper's three to ten times below AdamW, not measured here"),
        "adapter": Rate(1e-4, 2e-5, 6e-4, "prior: the paper's three to ten times below AdamW, not measured here"),
    }
    good_for = "large batches, with half of AdamW's state"
    wrong_for = "small batches: the sign of a noisy gradient is mostly noise"
    bytes_a_parameter = 4.0
    cost = 2.3

    kind: Literal["lion"] = "lion"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-7, 1e-2, log=True, live=True)] = 2e-4
    weight_decay: Annotated[float, Field(ge=0, le=10), Tunable(1e-3, 10.0, log=True, live=True)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.95
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        from multistep.optimizers.rule import RuleOptimizer

        groups = parameter_groups(parameters, self.weight_decay, head_lr)
        return RuleOptimizer(groups, _rule, {"lr": self.lr, "beta1": self.beta1, "beta2": self.beta2})


def _rule(parts: list[Part]) -> None:
    import torch

    from multistep.optimizers.rule import decay, memory

    for part in parts:
        group, m = part.group, memory(part, "m")
        direction = torch._foreach_lerp(m, part.gradients, 1 - group["beta1"])
        torch._foreach_sign_(direction)
        decay(part, group["lr"])
        torch._foreach_add_(part.parameters, direction, alpha=-group["lr"])
        torch._foreach_lerp_(m, part.gradients, 1 - group["beta2"])
