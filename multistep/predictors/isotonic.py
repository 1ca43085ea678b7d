"""A rising step function from the stated probability to the observed one, a class at a time. The answers do not change.

Of two classes one function serves both; of more, each class against the rest, divided by their sum. Between the steps the function
is linear; it stays as far from 0 and 1 as the number of rows can tell.
Source: Zadrozny & Elkan 2002, "Transforming classifier scores into accurate multiclass probability estimates".
Shapes: N rows, K outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from pydantic import model_validator

from multistep.metrics import TaskLike
from multistep.predictors.base import Logits
from multistep.types import Spec

if TYPE_CHECKING:
    from multistep.predictors import Predictor

Curve = tuple[tuple[float, ...], tuple[float, ...]]  # probabilities as stated (rising), and as they come true


class Isotonic(Spec):
    kind: Literal["isotonic"] = "isotonic"
    inner: Predictor
    curves: tuple[Curve, ...]  # one an output; of two classes that of the second

    @model_validator(mode="after")
    def _rising(self) -> Self:
        for stated, true in self.curves:
            if len(stated) != len(true) or not stated or not all(0 < p < 1 for p in true):
                raise ValueError(
                    "a curve needs as many probabilities that come true, above 0 and below 1, as are stated"
                )
            if list(stated) != sorted(stated) or list(true) != sorted(true):
                raise ValueError("a curve must rise")
        return self

    def models(self) -> tuple[str, ...]:
        return self.inner.models()

    def combine(self, task: TaskLike, logits: Logits) -> np.ndarray:
        wanted = 1 if task.kind == "classify" and task.n_outputs == 2 else task.n_outputs
        if task.kind == "regress" or len(self.curves) != wanted:
            raise ValueError(f"isotonic: {len(self.curves)} curves do not fit the task {task.kind}")
        p_NK = task.probabilities(self.inner.combine(task, logits))
        if wanted == 1 and task.kind == "classify":
            p_N = np.interp(p_NK[:, 1], *self.curves[0])
            return np.log(np.stack([1 - p_N, p_N], axis=1))
        moved_NK = np.stack([np.interp(p_NK[:, k], *curve) for k, curve in enumerate(self.curves)], axis=1)
        if task.kind == "multilabel":
            return np.log(moved_NK) - np.log1p(-moved_NK)
        return np.log(moved_NK / moved_NK.sum(axis=1, keepdims=True))

    def decide(self, task: TaskLike, logits: Logits) -> tuple[np.ndarray, np.ndarray]:
        return self.combine(task, logits), self.inner.decide(task, logits)[1]

    def stages(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return self.inner.stages(task, logits)


def fit_isotonic(task: TaskLike, inner: Predictor, logits: Logits, targets: np.ndarray) -> Isotonic | None:
    """The curves of least squared error; a calibration inside is replaced. None for regression."""
    if task.kind == "regress":
        return None
    if inner.kind == "temperature" or inner.kind == "vector" or inner.kind == "isotonic":
        inner = inner.inner
    p_NK = task.probabilities(inner.combine(task, logits))
    if task.kind == "multilabel":
        right_NK = np.asarray(targets, dtype=np.float64)
    else:
        right_NK = np.eye(task.n_outputs)[targets]
    outputs = [1] if task.kind == "classify" and task.n_outputs == 2 else range(task.n_outputs)
    return Isotonic(inner=inner, curves=tuple(_curve(p_NK[:, k], right_NK[:, k]) for k in outputs))


def _curve(stated_N: np.ndarray, right_N: np.ndarray) -> Curve:
    from sklearn.isotonic import IsotonicRegression

    least = 1 / (len(stated_N) + 2)
    found = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip").fit(stated_N, right_N)
    return tuple(found.X_thresholds_.tolist()), tuple(found.y_thresholds_.tolist())
