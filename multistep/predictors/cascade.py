"""A cheap predictor answers where it is sure; the others are asked again of a costly one.

Sure: the probability that the first states for its answer is at least `below`. Both have to be calibrated, so that what they state
can be compared; the probabilities of a row are those of the member that answered it.
Sources: Viola & Jones 2001, "Rapid object detection using a boosted cascade of simple features"; Chow 1970, "On optimum recognition
error and reject tradeoff".
Differs from the sources: two members, either of which may be a cascade; the threshold is a quantile of what the first states on the
calibration rows, so that the share that is asked again, and with it the cost, is what was asked for.
Shapes: N rows, K outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from multistep.metrics import TaskLike, log_softmax
from multistep.predictors.base import Logits, some
from multistep.types import Spec

if TYPE_CHECKING:
    from multistep.predictors import Predictor


class Cascade(Spec):
    kind: Literal["cascade"] = "cascade"
    first: Predictor
    second: Predictor
    below: Annotated[float, Field(ge=0, le=1)]

    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.first.models(), *self.second.models())))

    def combine(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return self.decide(task, logits)[0]

    def decide(self, task: TaskLike, logits: Logits) -> tuple[np.ndarray, np.ndarray]:
        z_NK, decisions = self.first.decide(task, logits)
        again = self._again(task, z_NK)
        if len(again):
            z_MK, decided = self.second.decide(task, some(logits, again))
            z_NK, decisions = _compared(task, z_NK), decisions.copy()
            z_NK[again], decisions[again] = _compared(task, z_MK), decided
        return z_NK, decisions

    def stages(self, task: TaskLike, logits: Logits) -> np.ndarray:
        found = self.first.stages(task, logits)
        again = self._again(task, self.first.combine(task, logits))
        if len(again):
            found[again] = self.second.stages(task, some(logits, again))
        return found

    def share(self, task: TaskLike, logits: Logits) -> float:
        """Of these rows that it asks again."""
        z_NK = self.first.combine(task, logits)
        return len(self._again(task, z_NK)) / len(z_NK)

    def _again(self, task: TaskLike, z_NK: np.ndarray) -> np.ndarray:
        return np.flatnonzero(sure_N(task, z_NK) < self.below)


def sure_N(task: TaskLike, z_NK: np.ndarray) -> np.ndarray:
    """The probability of the likeliest answer of each row: of a label, or that every yes and no is right."""
    if task.kind == "regress":
        raise ValueError("cascade: regression states no probability to go by")
    p_NK = task.probabilities(z_NK)
    return np.maximum(p_NK, 1 - p_NK).prod(axis=1) if task.kind == "multilabel" else p_NK.max(axis=1)


def _compared(task: TaskLike, z_NK: np.ndarray) -> np.ndarray:
    return log_softmax(z_NK) if task.kind == "classify" else z_NK.copy()


def fit_cascade(task: TaskLike, first: Predictor, second: Predictor, logits: Logits, again: float) -> Cascade:
    """The cascade that asks the second for the share `again` of these rows, those of which the first is least sure."""
    sure = np.sort(sure_N(task, first.combine(task, logits)))
    count = round(again * len(sure))
    below = 1.0 if count >= len(sure) else 0.0 if count == 0 else float(sure[count - 1] + sure[count]) / 2
    return Cascade(first=first, second=second, below=min(1.0, below))
