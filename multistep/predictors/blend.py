"""A weighted mean of members: of log-probabilities (classify), of logits (multilabel), of values (regress).

Source: Heskes 1998, "Selecting weighting factors in logarithmic opinion pools".
Differs from the source: members are calibrated first; more than two are added one at a time.
Only the members' outputs are blended, so their own thresholds do not count: wrap the blend in thresholds instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import model_validator

from multistep.metrics import TaskLike, log_softmax
from multistep.predictors.base import Logits, golden
from multistep.predictors.temperature import fit_temperature
from multistep.types import Spec

if TYPE_CHECKING:
    from multistep.predictors import Predictor


class Blend(Spec):
    kind: Literal["blend"] = "blend"
    members: tuple[Predictor, ...]
    weights: tuple[float, ...]

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if not self.members or len(self.weights) != len(self.members):
            raise ValueError("give one weight for each member")
        if not (min(self.weights) >= 0 and abs(sum(self.weights) - 1.0) < 1e-6):
            raise ValueError("weights must not be negative and must sum to 1")
        return self

    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(model for member in self.members for model in member.models()))

    def combine(self, task: TaskLike, logits: Logits) -> np.ndarray:
        parts = [_part(task, member, logits) for member in self.members]
        return np.sum([w * part_NK for w, part_NK in zip(self.weights, parts, strict=True)], axis=0)

    def decide(self, task: TaskLike, logits: Logits) -> tuple[np.ndarray, np.ndarray]:
        combined_NK = self.combine(task, logits)
        return combined_NK, task.decide(combined_NK)

    def stages(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return np.full(len(logits[self.models()[0]]), "+".join(self.models()), dtype=object)


def _part(task: TaskLike, member: Predictor, logits: Logits) -> np.ndarray:
    z_NK = member.combine(task, logits)
    return log_softmax(z_NK) if task.kind == "classify" else z_NK


def fit_blend(task: TaskLike, members: Sequence[Predictor], logits: Logits, targets: np.ndarray) -> Blend:
    """Weights of least loss (squared error for regression), each member after its own temperature."""
    calm = [_calibrated(task, member, logits, targets) for member in members]
    parts = [_part(task, member, logits) for member in calm]
    sum_NK, weights = parts[0], [1.0]
    for part_NK in parts[1:]:
        before_NK = sum_NK  # bound now: the loss below is called within this turn only

        def loss(w: float, a_NK: np.ndarray = before_NK, b_NK: np.ndarray = part_NK) -> float:
            return float(task.nll_N((1.0 - w) * a_NK + w * b_NK, targets).mean())

        w = min((0.0, golden(loss, 0.0, 1.0), 1.0), key=loss)
        sum_NK = (1.0 - w) * before_NK + w * part_NK
        weights = [*((1.0 - w) * v for v in weights), w]
    return Blend(members=tuple(calm), weights=tuple(weights))


def _calibrated(task: TaskLike, member: Predictor, logits: Logits, targets: np.ndarray) -> Predictor:
    if member.kind == "thresholds":
        member = member.inner
    return fit_temperature(task, member, logits, targets) or member
