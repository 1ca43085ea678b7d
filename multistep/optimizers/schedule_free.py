"""Schedule-Free AdamW: gradients are taken between the iterate z and its running average x; the average is what is shipped.

    y = (1-b1) z + b1 x: where the gradient g is taken;  a = lr sqrt(1-b2^t)
    v <- b2 v + (1-b2) g^2;  z <- z - a (g / (sqrt(v) + eps) + wd y);  c = a^2 / sum a^2;  x <- (1-c) x + c z

Source: Defazio et al. 2024, "The road less scheduled".
The parameters hold y in training and x after `settle(optimizer, training=False)`, which keeps y in the state meanwhile.
Only y and z are stored: x = (y - (1-b1) z) / b1, and so y <- (1-c) y + c z - (1-c)(1-b1) a (g / (sqrt(v) + eps) + wd y).
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


class ScheduleFree(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(
            2.5e-3, 3e-4, 1e-2, "AlgoPerf submission, version 2 (with beta2 .9955, weight decay .081, warm-up 2 %)"
        ),
        "fine_tune": Rate(
            8e-5, 1e-5, 5e-4, "prior: twice AdamW's (the authors say one to ten times), not measured here"
        ),
        "adapter": Rate(8e-4, 1e-4, 5e-3, "prior: twice AdamW's, not measured here"),
    }
    good_for = (
        "runs whose end is not known: it can be judged and shipped at any moment; a constant rate after a warm-up"
    )
    wrong_for = "schedules that decay to zero: the averaging is its decay already"
    bytes_a_parameter = 8.0  # 12 while settled for judging
    cost = 5.0

    kind: Literal["schedule_free"] = "schedule_free"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-6, 1e-1, log=True, live=True)] = 2.5e-3
    weight_decay: Annotated[float, Field(ge=0, le=10), Tunable(1e-4, 1.0, log=True, live=True)] = 0.01
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.995
    eps: Annotated[float, Field(gt=0)] = 1e-8

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        from multistep.optimizers.rule import RuleOptimizer

        settings = {"lr": self.lr, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        return RuleOptimizer(parameter_groups(parameters, self.weight_decay, head_lr), _rule, settings)

    def settle(self, optimizer: torch.optim.Optimizer, training: bool) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                if not state:
                    continue  # never updated: x and y are the same
                if training and "y" in state:
                    parameter.data.copy_(state.pop("y"))
                elif not training and "y" not in state:
                    state["y"] = parameter.detach().clone()
                    parameter.data.lerp_(state["z"], 1 - 1 / group["beta1"])


def _rule(parts: list[Part]) -> None:
    import torch

    from multistep.optimizers.rule import advance, memory

    if any("y" in state for part in parts for state in part.states):
        raise RuntimeError(
            "the parameters are settled for judging: call settle(optimizer, training=True) before step()"
        )
    for part in parts:
        group, y = part.group, part.parameters
        for parameter, state in zip(y, part.states, strict=True):
            if "z" not in state:
                state |= {"z": parameter.clone(memory_format=torch.preserve_format), "weight": 0.0}
        steps, z, v = advance(part), memory(part, "z"), memory(part, "v")
        sizes = [group["lr"] * math.sqrt(1 - group["beta2"] ** t) for t in steps]
        shares = []
        for state, size in zip(part.states, sizes, strict=True):
            state["weight"] += size**2
            shares.append(size**2 / state["weight"] if size else 0.0)
        torch._foreach_mul_(v, group["beta2"])
        torch._foreach_addcmul_(v, part.gradients, part.gradients, 1 - group["beta2"])
        root = torch._foreach_sqrt(v)
        torch._foreach_add_(root, group["eps"])
        u = torch._foreach_div(part.gradients, root)
        if group["weight_decay"]:
            torch._foreach_add_(u, y, alpha=group["weight_decay"])
        torch._foreach_mul_(u, sizes)
        torch._foreach_sub_(z, u)
        ahead = [(1 - c) * (1 - group["beta1"]) for c in shares]
        torch._foreach_mul_(u, ahead)
        torch._foreach_lerp_(y, z, shares)
        torch._foreach_sub_(y, u)
