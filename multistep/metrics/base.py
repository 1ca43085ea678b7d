"""What metrics read and what a metric is.

Every metric is one of two forms.
- *influence*: the value and, for each row, how much that row pulls the value (for a mean: its score minus the mean).
- *counts*: a function of true positives, predictions and support per class (F1 and its kin).
Shapes: N rows, K classes, labels or (regress) the one value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from multistep.types import Prediction, TaskKind


class TaskLike(Protocol):
    """What metrics and predictors read of a task (multistep.tasks)."""

    @property
    def kind(self) -> TaskKind: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def n_outputs(self) -> int: ...
    def probabilities(self, logits_NK: np.ndarray) -> np.ndarray: ...
    def decide(self, logits_NK: np.ndarray) -> np.ndarray: ...
    def nll_N(self, logits_NK: np.ndarray, targets: np.ndarray) -> np.ndarray: ...
    def predictions(self, logits_NK: np.ndarray, decisions: np.ndarray) -> list[Prediction]: ...


class Scored(NamedTuple):
    """What a predictor gave on a split, beside what was right."""

    targets: np.ndarray
    logits_NK: np.ndarray
    decisions: np.ndarray


class Counts(NamedTuple):
    """Per class, with any leading shape: [..., K]. `every`: absent classes count too (as scikit-learn's multilabel)."""

    tp: np.ndarray
    predicted: np.ndarray
    support: np.ndarray
    every: bool


Influence = Callable[[TaskLike, Scored], tuple[float, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    higher_is_better: bool
    needs: Literal["decisions", "probabilities"]
    tasks: tuple[TaskKind, ...]
    influence: Influence | None = None
    of: Callable[[Counts], np.ndarray] | None = None  # the counts form


def log_softmax(logits_NK: np.ndarray) -> np.ndarray:
    shifted = logits_NK - logits_NK.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
