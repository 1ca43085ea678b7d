"""R-Drop: two forward passes under two dropouts, whose predictions should agree.

    loss = (L(1) + L(2)) / 2 + alpha/4 (KL(1 || 2) + KL(2 || 1))        L: the inner objective

Costs two passes for one. Without dropout the passes are the same and this is the inner objective.
Source: Liang et al. 2021, arXiv 2106.14448.
Differs from the source: half of its sum, so that the loss keeps its size and alpha its meaning; the input is not doubled within one
batch but run twice; binary labels too (each label a distribution of two). KL is the mean over what the inner objective counts.
Shapes: B examples, K classes or labels, T positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from multistep.objectives.base import BaseObjective
from multistep.objectives.binary_cross_entropy import BinaryCrossEntropy
from multistep.objectives.cross_entropy import CrossEntropy
from multistep.objectives.distill import Distill
from multistep.objectives.next_token import NextToken
from multistep.objectives.seq2seq import Seq2Seq
from multistep.objectives.shapes import IGNORED, aligned, row_means
from multistep.objectives.wrapper import Wrapper
from multistep.types import Tunable

if TYPE_CHECKING:
    from torch import Tensor, nn


class RDrop(Wrapper):
    good_for: ClassVar[str] = "models with dropout that overfit, when there is time for twice the passes"

    kind: Literal["r_drop"] = "r_drop"
    alpha: Annotated[float, Field(ge=0, le=100), Tunable(0.1, 10.0, log=True)] = 1.0

    @model_validator(mode="after")
    def _has_probabilities(self) -> Self:
        core = self.inner.core()
        if not isinstance(core, CrossEntropy | BinaryCrossEntropy | Distill | NextToken | Seq2Seq):
            raise ValueError(
                f"r_drop compares classes or tokens, and {type(core).__name__} has none: wrap cross_entropy, say"
            )
        return self

    def of(self, forward: Callable[[], Tensor], targets: Any, model: nn.Module) -> Tensor:
        """The loss of two forward passes."""
        one: list[Tensor] = []
        two: list[Tensor] = []  # an inner wrapper may make several passes: the first of each are compared
        loss = (
            self.inner.of(_kept(forward, one), targets, model) + self.inner.of(_kept(forward, two), targets, model)
        ) / 2
        return loss + self.alpha / 4 * divergence(self.inner.core(), one[0], two[0], targets)


def divergence(core: BaseObjective, a: Tensor, b: Tensor, targets: Any) -> Tensor:
    """KL(a || b) + KL(b || a), the mean over what `core` counts."""
    a, b = a.float(), b.float()
    if isinstance(core, BinaryCrossEntropy):
        (a, _), (b, _) = aligned(a, targets), aligned(b, targets)
        kl_B = row_means((a.sigmoid() - b.sigmoid()) * (a - b))
        return kl_B.mean()
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)  # both directions at once
    if isinstance(core, NextToken | Seq2Seq):
        counts_BT = targets != IGNORED
        return kl.masked_fill(~counts_BT, 0.0).sum() / counts_BT.sum().clamp_min(1)
    if isinstance(core, CrossEntropy):
        weight_B = core.weights(targets)
        return (kl * weight_B).sum() / weight_B.sum().clamp_min(1e-12)
    return kl.mean()


def _kept(forward: Callable[[], Tensor], into: list[Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        into.append(forward())
        return into[-1]

    return run
