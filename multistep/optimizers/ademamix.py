"""AdEMAMix: AdamW with a second, much slower momentum added to the first.

    m <- b1 m + (1-b1) g;  n <- b3(t) n + (1-b3(t)) g;  v <- b2 v + (1-b2) g^2
    w <- (1 - lr wd) w - lr (m / (1-b1^t) + alpha(t) n) / (sqrt(v / (1-b2^t)) + eps)

alpha(t) rises linearly over `ramp` updates; b3(t) rises from b1 to b3 so that its half-life rises linearly.
Source: Pagliardini, Ablin and Grangier 2024, "The AdEMAMix optimizer: better, faster, older".
Differs from the source: `ramp` is 1000 updates, not the run's length, which is not known here; beta3 is 0.999 (a half-life of 700
updates), not 0.9999, for runs of some thousand updates.
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


class AdEMAMix(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(
            2e-3, 3e-4, 6e-3, "AlgoPerf submission of 2026 (with betas .8, .995, .9995, alpha 8, weight decay .1)"
        ),
        "fine_tune": Rate(4e-5, 1e-5, 2e-4, "prior: AdamW's, not measured here"),
        "adapter": Rate(4e-4, 1e-4, 2e-3, "prior: AdamW's, not measured here"),
    }
    good_for = "long pretraining of language models, where old gradients still say something"
    wrong_for = "runs of fewer than a few thousand updates: the slow momentum does not fill"
    bytes_a_parameter = 12.0
    cost = 7.5

    kind: Literal["ademamix"] = "ademamix"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-6, 1e-1, log=True, live=True)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0, le=10), Tunable(1e-4, 1.0, log=True, live=True)] = 0.1
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    beta3: Annotated[float, Field(gt=0, lt=1)] = 0.999
    alpha: Annotated[float, Field(ge=0)] = 5.0
    ramp: Annotated[int, Field(ge=0)] = 1000
    eps: Annotated[float, Field(gt=0)] = 1e-8

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        from multistep.optimizers.rule import RuleOptimizer

        settings = {"lr": self.lr, "beta1": self.beta1, "beta2": self.beta2, "beta3": self.beta3, "eps": self.eps}
        settings |= {"alpha": self.alpha, "ramp": self.ramp}
        return RuleOptimizer(parameter_groups(parameters, self.weight_decay, head_lr), _rule, settings)


def slow_beta(done: float, beta1: float, beta3: float) -> float:
    """b3(t) when the share `done` of the ramp is over: 1 / ln b3(t) goes from 1 / ln b1 to 1 / ln b3 linearly."""
    if done >= 1:
        return beta3
    return math.exp(1 / ((1 - done) / math.log(beta1) + done / math.log(beta3)))


def _rule(parts: list[Part]) -> None:
    import torch

    from multistep.optimizers.rule import advance, decay, memory, root_mean_square

    for part in parts:
        group, g, steps = part.group, part.gradients, advance(part)
        m, n = memory(part, "m"), memory(part, "n")
        done = [min(1.0, t / group["ramp"]) if group["ramp"] else 1.0 for t in steps]
        slow = [slow_beta(share, group["beta1"], group["beta3"]) for share in done]
        torch._foreach_lerp_(m, g, 1 - group["beta1"])
        torch._foreach_mul_(n, slow)
        torch._foreach_add_(n, torch._foreach_mul(g, [1 - b for b in slow]))
        root = root_mean_square(part, group["beta2"], group["eps"], steps)
        u = torch._foreach_div(m, [1 - group["beta1"] ** t for t in steps])
        torch._foreach_add_(u, torch._foreach_mul(n, [group["alpha"] * share for share in done]))
        decay(part, group["lr"])
        torch._foreach_addcdiv_(part.parameters, u, root, -group["lr"])
