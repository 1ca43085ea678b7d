"""Binary cross-entropy of K independent labels, in nats per label (mean over labels and examples). Outputs are logits.

    loss = -mean(w_k t log s(z) + (1-t) log(1 - s(z)))        s: the logistic function, t: 0 or 1

Label smoothing e moves both targets towards one half: t <- (1-e) t + e/2. Positive weights w (None: all 1) say what a label that
is there counts against one that is not: about (rows without it) / (rows with it) balances the two.
Shapes: B examples, K labels; one label may be [B] or [B,1], outputs and targets each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from multistep.objectives.base import BaseObjective
from multistep.objectives.shapes import aligned, positive, row_means
from multistep.types import Tunable

if TYPE_CHECKING:
    from torch import Tensor


class BinaryCrossEntropy(BaseObjective):
    good_for: ClassVar[str] = (
        "several labels at once, or yes and no from one output; positive_weights where yes is rare"
    )

    kind: Literal["binary_cross_entropy"] = "binary_cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1), Tunable(0.0, 0.2, live=True)] = 0.0
    positive_weights: (
        Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)] | None
    ) = None

    def loss(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Mean over the batch and the labels. `targets_BK`: bool or 0/1."""
        import torch.nn.functional as F

        z_BK, y_BK = aligned(logits_BK, targets_BK)
        smooth_BK = y_BK * (1 - self.label_smoothing) + self.label_smoothing / 2
        w_K = None
        if self.positive_weights is not None:
            w_K = positive(self.positive_weights, 1 if z_BK.ndim == 1 else z_BK.shape[1], "positive_weights", z_BK)
        return F.binary_cross_entropy_with_logits(z_BK, smooth_BK, pos_weight=w_K)

    def each(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Mean nats per label of every example [B]."""
        import torch.nn.functional as F

        z_BK, y_BK = aligned(logits_BK, targets_BK)
        return row_means(F.binary_cross_entropy_with_logits(z_BK, y_BK, reduction="none"))
