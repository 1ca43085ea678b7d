"""Regression: a straight line over the inner value. Mends a model that is too timid or off by a constant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from multistep.metrics import TaskLike
from multistep.predictors.base import Logits
from multistep.types import Spec

if TYPE_CHECKING:
    from multistep.predictors import Predictor


class Affine(Spec):
    kind: Literal["affine"] = "affine"
    inner: Predictor
    slope: float = Field(default=1.0, allow_inf_nan=False)
    intercept: float = Field(default=0.0, allow_inf_nan=False)

    def models(self) -> tuple[str, ...]:
        return self.inner.models()

    def combine(self, task: TaskLike, logits: Logits) -> np.ndarray:
        if task.kind != "regress":
            raise ValueError(f"affine: made for regression, got the task {task.kind}")
        return self.slope * self.inner.combine(task, logits) + self.intercept

    def decide(self, task: TaskLike, logits: Logits) -> tuple[np.ndarray, np.ndarray]:
        combined_NK = self.combine(task, logits)
        return combined_NK, task.decide(combined_NK)

    def stages(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return self.inner.stages(task, logits)


def fit_affine(task: TaskLike, inner: Predictor, logits: Logits, targets: np.ndarray) -> Affine | None:
    """Least squares; an inner line is replaced. None unless the task is regression. Over a constant: slope 1."""
    if task.kind != "regress":
        return None
    if inner.kind == "affine":
        inner = inner.inner
    x_N = inner.combine(task, logits)[:, 0]
    variance = float(x_N.var())
    slope = float(((x_N - x_N.mean()) * (targets - targets.mean())).mean()) / variance if variance > 0 else 1.0
    return Affine(inner=inner, slope=slope, intercept=float(targets.mean()) - slope * float(x_N.mean()))
