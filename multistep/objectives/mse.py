"""Mean squared error. Best on standardised targets (mean 0 and scale 1 on train).

Shapes: B examples, K numbers each; one number may be [B] or [B,1], outputs and targets each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from multistep.objectives.base import BaseObjective
from multistep.objectives.shapes import aligned, row_means

if TYPE_CHECKING:
    from torch import Tensor


class MeanSquaredError(BaseObjective):
    good_for: ClassVar[str] = "numbers whose mean is wanted, with errors about equally large everywhere"

    kind: Literal["mse"] = "mse"

    def loss(self, outputs_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Mean over the batch and the numbers of (output - target)^2."""
        import torch.nn.functional as F

        return F.mse_loss(*aligned(outputs_BK, targets_BK))

    def each(self, outputs_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """The mean squared error of every example [B]."""
        import torch.nn.functional as F

        return row_means(F.mse_loss(*aligned(outputs_BK, targets_BK), reduction="none"))
