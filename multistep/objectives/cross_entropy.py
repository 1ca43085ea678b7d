"""Cross-entropy between a class and its softmax, in nats per example.

    loss = sum_n w[y_n] (1 - p_n)^gamma nll_n / sum_n w[y_n]        p_n: what the model gives the right class

Class weights w (None: all 1) say what a class counts; gamma > 0 (focal) makes sure answers count less; label smoothing e mixes the
target with the uniform distribution, t <- (1-e) t + e/K, each class of it at its own weight, as torch does.
Sources: Szegedy et al. 2016, arXiv 1512.00567 (smoothing); Lin et al. 2017, arXiv 1708.02002 (focal).
Differs from the source: several classes, by softmax, in place of Lin's sigmoid; smoothing and focal may be used together.
Shapes: B examples, K classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from multistep.objectives.base import BaseObjective
from multistep.objectives.shapes import IGNORED, class_ids, positive
from multistep.types import Tunable

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_MISS = 1e-12  # below it a power of 1 - p has no finite slope when gamma < 1


class CrossEntropy(BaseObjective):
    good_for: ClassVar[str] = (
        "one class of two or more; class weights or focal_gamma where the rare classes matter most"
    )

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1), Tunable(0.0, 0.2, live=True)] = 0.0
    class_weights: (
        Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=2)] | None
    ) = None
    focal_gamma: Annotated[float, Field(ge=0, le=10), Tunable(0.0, 5.0)] = 0.0

    def loss(self, logits_BK: Tensor, targets_B: Tensor) -> Tensor:
        """Mean over the batch by class weights. `targets_B`: integers in 0..K-1, or -100, which does not count."""
        import torch.nn.functional as F

        z_BK, y_B, e = logits_BK.float(), class_ids(targets_B), self.label_smoothing
        w_K = None if self.class_weights is None else positive(self.class_weights, z_BK.shape[1], "class_weights", z_BK)
        if not self.focal_gamma and bool((y_B != IGNORED).any()):
            return F.cross_entropy(z_BK, y_B, w_K, label_smoothing=e)
        loss_B = F.cross_entropy(z_BK, y_B, w_K, label_smoothing=e, reduction="none")  # 0 where a target does not count
        if self.focal_gamma:
            miss_B = -(-F.cross_entropy(z_BK, y_B, reduction="none")).expm1()  # 1 - p without cancellation
            loss_B = loss_B * miss_B.clamp_min(_LEAST_MISS) ** self.focal_gamma
        return loss_B.sum() / self.weights(y_B).sum().clamp_min(_LEAST_MISS)

    def each(self, logits_BK: Tensor, targets_B: Tensor) -> Tensor:
        """Nats of every example [B]; of one with many targets (pixels, tokens) their mean, but for those that torch ignores (-100)."""
        import torch.nn.functional as F

        y_B = class_ids(targets_B)
        loss_B = F.cross_entropy(logits_BK.float(), y_B, reduction="none")
        if loss_B.ndim == 1:
            return loss_B
        counted_B = (y_B != IGNORED).flatten(1).sum(1)
        return loss_B.flatten(1).sum(1) / counted_B.clamp_min(1)

    def count(self, targets_B: Tensor) -> float:
        """The sum of the targets' class weights, of those that count."""
        return float(self.weights(targets_B).sum())

    def weights(self, targets_B: Tensor) -> Tensor:
        """What every target counts, in the targets' shape; nothing where it is one that torch ignores."""
        import torch

        y_B = class_ids(targets_B)
        counted_B = (y_B != IGNORED).float()
        if self.class_weights is None:
            return counted_B
        return torch.tensor(self.class_weights, device=y_B.device)[y_B.clamp_min(0)] * counted_B
