"""Adafactor: Adam's mean square as the product of a row and a column, no momentum; the step is relative to the weights' size.

    b = 1 - t^-0.8;  r <- b r + (1-b) mean_C g^2;  c <- b c + (1-b) mean_R g^2;  u = g / sqrt(r c / mean r)
    w <- (1 - lr wd) w - min(lr, 1/sqrt(t)) max(1e-3, rms w) u / max(1, rms u)

Source: Shazeer and Stern 2018, "Adafactor: adaptive learning rates with sublinear memory cost"; torch.optim.Adafactor does
the work. A vector keeps its whole mean square. Shapes: R rows, C columns.
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


class Adafactor(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(
            1e-2, 1e-3, 0.1, "the paper's largest relative step, which T5 was pretrained with (Raffel et al. 2020)"
        ),
        "fine_tune": Rate(1e-3, 1e-4, 1e-2, "Raffel et al. 2020 fine-tune T5 at a constant 1e-3"),
        "adapter": Rate(1e-2, 1e-3, 0.1, "prior: ten times fine_tune as for AdamW, not measured here"),
    }
    good_for = "models whose optimizer state does not fit into memory: it has next to none"
    wrong_for = "models that do fit: slower a step than AdamW, and no better; weights that start at zero move slowly"
    bytes_a_parameter = 0.0157  # 4 (R + C) / (R C) for 512 x 512
    cost = 6.5

    kind: Literal["adafactor"] = "adafactor"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-5, 1.0, log=True, live=True)] = 1e-2
    beta2_decay: Annotated[float, Field(lt=0, ge=-1)] = -0.8
    clip_rms: Annotated[float, Field(ge=1)] = 1.0  # the update's root mean square is at most this (d in the paper)

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        import torch

        groups = parameter_groups(parameters, self.weight_decay, head_lr)
        optimizer = torch.optim.Adafactor(groups, lr=self.lr, beta2_decay=self.beta2_decay, d=self.clip_rms)
        for group in optimizer.param_groups:  # a copy of the optimizer is asked for it by torch where there is a GPU
            group["capturable"] = False
        return optimizer
