"""Logits divided by one number, so that stated probabilities come true. The answers do not change.

Source: Guo et al. 2017, "On calibration of modern neural networks".
Differs from the source: multilabel too (one temperature for all labels). Not for regression: it has no probabilities.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from multistep.metrics import TaskLike
from multistep.predictors.base import Logits, golden
from multistep.types import Spec

if TYPE_CHECKING:
    from multistep.predictors import Predictor

LARGEST = 20.0  # and 1/20 the smallest


class Temperature(Spec):
    kind: Literal["temperature"] = "temperature"
    inner: Predictor
    temperature: float = Field(gt=0.0, allow_inf_nan=False)

    def models(self) -> tuple[str, ...]:
        return self.inner.models()

    def combine(self, task: TaskLike, logits: Logits) -> np.ndarray:
        if task.kind == "regress":
            raise ValueError("temperature: regression has no probabilities to calibrate")
        return self.inner.combine(task, logits) / self.temperature

    def decide(self, task: TaskLike, logits: Logits) -> tuple[np.ndarray, np.ndarray]:
        return self.combine(task, logits), self.inner.decide(task, logits)[1]

    def stages(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return self.inner.stages(task, logits)


def fit_temperature(task: TaskLike, inner: Predictor, logits: Logits, targets: np.ndarray) -> Temperature | None:
    """The temperature of least log-loss; an inner temperature is replaced. None for regression."""
    if task.kind == "regress":
        return None
    if inner.kind == "temperature":
        inner = inner.inner
    z_NK = inner.combine(task, logits)

    def loss(log_t: float) -> float:
        return float(task.nll_N(z_NK / math.exp(log_t), targets).mean())

    log_t = golden(loss, -math.log(LARGEST), math.log(LARGEST))
    return Temperature(inner=inner, temperature=math.exp(log_t) if loss(log_t) < loss(0.0) else 1.0)
