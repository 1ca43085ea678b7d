"""Binary cross-entropy of K independent labels, in nats per label (mean over labels and examples).

Label smoothing e moves both targets towards one half: t <- (1-e) t + e/2. Shapes: B examples, K labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from multistep.types import Spec, Tunable

if TYPE_CHECKING:
    from torch import Tensor


class BinaryCrossEntropy(Spec):
    kind: Literal["binary_cross_entropy"] = "binary_cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1), Tunable(0.0, 0.2, live=True)] = 0.0

    def loss(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Mean over the batch and the labels. `targets_BK`: bool or 0/1."""
        import torch.nn.functional as F

        smooth_BK = targets_BK.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits_BK.float(), smooth_BK)
