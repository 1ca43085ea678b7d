"""Mean squared error of one standardised number per example (targets have mean 0 and scale 1 on train)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from multistep.types import Spec

if TYPE_CHECKING:
    from torch import Tensor


class MeanSquaredError(Spec):
    kind: Literal["mse"] = "mse"

    def loss(self, outputs_B1: Tensor, targets_B: Tensor) -> Tensor:
        """Mean over the batch of (output - target)^2."""
        import torch.nn.functional as F

        return F.mse_loss(outputs_B1.float().squeeze(-1), targets_B.float())
