"""Cross-entropy between a class and its softmax, in nats per example.

Label smoothing e mixes the target with the uniform distribution (Szegedy et al. 2016): t <- (1-e) t + e/K.
Shapes: B examples, K classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from multistep.types import Spec, Tunable

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Spec):
    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1), Tunable(0.0, 0.2, live=True)] = 0.0

    def loss(self, logits_BK: Tensor, targets_B: Tensor) -> Tensor:
        """Mean over the batch. `targets_B`: int64 in 0..K-1."""
        import torch.nn.functional as F

        return F.cross_entropy(logits_BK.float(), targets_B, label_smoothing=self.label_smoothing)
