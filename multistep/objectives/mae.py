"""Mean absolute error: its best constant is the median, so single wild targets move it little.

Shapes: B examples, K numbers each; one number may be [B] or [B,1], outputs and targets each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from multistep.objectives.base import BaseObjective
from multistep.objectives.shapes import aligned, row_means

if TYPE_CHECKING:
    from torch import Tensor


class MeanAbsoluteError(BaseObjective):
    good_for: ClassVar[str] = "numbers whose median is wanted, or that are judged by their absolute error"

    kind: Literal["mae"] = "mae"

    def loss(self, outputs_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Mean over the batch and the numbers of |output - target|."""
        import torch.nn.functional as F

        return F.l1_loss(*aligned(outputs_BK, targets_BK))

    def each(self, outputs_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """The mean absolute error of every example [B]."""
        import torch.nn.functional as F

        return row_means(F.l1_loss(*aligned(outputs_BK, targets_BK), reduction="none"))
