"""Prodigy: AdamW that estimates its own learning rate d from how far it has come. `lr` is a multiplier of d.

    m <- b1 m + (1-b1) d g;  v <- b2 v + (1-b2) d^2 g^2;  b = sqrt(b2);  w0 = the weights at the start
    r <- b r + (1-b) lr d^2 <g, w0 - w>;  s <- b s + (1-b) lr d^2 g
    w <- (1 - lr d wd) w - lr d m / (sqrt(v) + d eps);  d <- max(d, r / |s|_1)

Source: Mishchenko and Defazio 2024, "Prodigy: an expeditiously adaptive parameter-free learner", algorithm 4.
Differs from the source: decoupled weight decay, by lr d wd. |s|_1 and the inner product run over all parameters that
have a gradient.
"""
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from multistep.optimizers.base import GradientOptimizer, Rate, parameter_groups
from multistep.types import Tunable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from multistep.optimizers.rule import Part


class Prodigy(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(1.0, 0.3, 3.0, "the paper: 1, a multiplier of the estimate"),
        "fine_tune": Rate(1.0, 0.3, 3.0, "the paper: 1, a multiplier of the estimate; not measured here"),
        "adapter": Rate(1.0, 0.3, 3.0, "the paper: 1, a multiplier of the estimate; not measured here"),
    }
    good_for = "a first run where no learning rate is known and none can be searched for"
    wrong_for = "a model whose learning rate is known: AlgoPerf's calibrated AdamW family is ahead of it; little memory"
    bytes_a_parameter = 16.0
    cost = 7.3

    kind: Literal["prodigy"] = "prodigy"
    lr: Annotated[float, Field(gt=0, le=100), Tunable(1e-2, 1e1, log=True, live=True)] = 1.0
    weight_decay: Annotated[float, Field(ge=0, le=10), Tunable(1e-4, 1.0, log=True, live=True)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    first_d: Annotated[float, Field(gt=0)] = 1e-6

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        from multistep.optimizers.rule import RuleOptimizer

        settings = {"lr": self.lr, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        settings |= {"d": self.first_d, "r": 0.0}
        return RuleOptimizer(
            parameter_groups(parameters, self.weight_decay, head_lr), _rule, settings, shared=("d", "r")
        )


def _rule(parts: list[Part]) -> None:
    import torch

    from multistep.optimizers.rule import decay, memory

    first = parts[0].group
    d, r, b = first["d"], first["r"], math.sqrt(first["beta2"])
    come, length = [], []
    for part in parts:
        group, w, g, lr = part.group, part.parameters, part.gradients, part.group["lr"]
        for parameter, state in zip(w, part.states, strict=True):
            if "start" not in state:
                state["start"] = parameter.clone(memory_format=torch.preserve_format)
        m, v, s = memory(part, "m"), memory(part, "v"), memory(part, "s")
        way = torch._foreach_sub(memory(part, "start"), w)
        come += [lr * d**2 * (a * c).sum() for a, c in zip(way, g, strict=True)]
        torch._foreach_mul_(s, b)
        torch._foreach_add_(s, g, alpha=(1 - b) * lr * d**2)
        length += torch._foreach_norm(s, 1)
        torch._foreach_mul_(m, group["beta1"])
        torch._foreach_add_(m, g, alpha=(1 - group["beta1"]) * d)
        torch._foreach_mul_(v, group["beta2"])
        torch._foreach_addcmul_(v, g, g, (1 - group["beta2"]) * d**2)
        root = torch._foreach_sqrt(v)
        torch._foreach_add_(root, d * group["eps"])
        decay(part, lr * d)
        torch._foreach_addcdiv_(w, m, root, -lr * d)
    r = b * r + (1 - b) * float(torch.stack(come).double().sum())
    total = float(torch.stack(length).double().sum())
    first["r"], first["d"] = r, max(d, r / total) if total else d
