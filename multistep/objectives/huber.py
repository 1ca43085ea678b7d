"""Huber's loss: squared near the target, absolute far from it.

    loss(r) = r^2 / 2 where |r| < delta, else delta (|r| - delta/2)        r = output - target

Source: Huber 1964, "Robust estimation of a location parameter".
Differs from the source: nothing known. `delta` is in the units of the targets: 1 suits standardised ones.
Shapes: B examples, K numbers each; one number may be [B] or [B,1], outputs and targets each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from multistep.objectives.base import BaseObjective
from multistep.objectives.shapes import aligned, row_means
from multistep.types import Tunable

if TYPE_CHECKING:
    from torch import Tensor


class Huber(BaseObjective):
    good_for: ClassVar[str] = "numbers with a few wild targets: smooth like mse near, calm like mae far"

    kind: Literal["huber"] = "huber"
    delta: Annotated[float, Field(gt=0, allow_inf_nan=False), Tunable(0.1, 10.0, log=True)] = 1.0

    def loss(self, outputs_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Mean over the batch and the numbers."""
        import torch.nn.functional as F

        return F.huber_loss(*aligned(outputs_BK, targets_BK), delta=self.delta)

    def each(self, outputs_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """The mean loss of every example [B]."""
        import torch.nn.functional as F

        return row_means(F.huber_loss(*aligned(outputs_BK, targets_BK), reduction="none", delta=self.delta))
