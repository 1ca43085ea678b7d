"""A scale and an offset for each output, so that stated probabilities come true class by class. The answers do not change.

    z'_k = scale_k z_k + offset_k        fitted by least log-loss, near the one temperature that is best for all

Source: Guo et al. 2017, "On calibration of modern neural networks" (vector scaling).
Differs from the source: a normal prior of standard deviation SPREAD around the best temperature and offset 0, since 2K numbers are
many for a calibration split; multilabel too.
Shapes: N rows, K outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from multistep.metrics import TaskLike
from multistep.predictors.base import Logits
from multistep.predictors.temperature import fit_temperature
from multistep.types import Spec

if TYPE_CHECKING:
    from multistep.predictors import Predictor

SPREAD = 0.5  # of a scale as a multiple of the common one, and of an offset in nats


class Vector(Spec):
    kind: Literal["vector"] = "vector"
    inner: Predictor
    scales: tuple[float, ...]
    offsets: tuple[float, ...]

    def models(self) -> tuple[str, ...]:
        return self.inner.models()

    def combine(self, task: TaskLike, logits: Logits) -> np.ndarray:
        if task.kind == "regress" or not len(self.scales) == len(self.offsets) == task.n_outputs:
            raise ValueError(
                f"vector: {len(self.scales)} scales and {len(self.offsets)} offsets do not fit the task {task.kind}"
            )
        return self.inner.combine(task, logits) * np.array(self.scales) + np.array(self.offsets)

    def decide(self, task: TaskLike, logits: Logits) -> tuple[np.ndarray, np.ndarray]:
        return self.combine(task, logits), self.inner.decide(task, logits)[1]

    def stages(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return self.inner.stages(task, logits)


def fit_vector(task: TaskLike, inner: Predictor, logits: Logits, targets: np.ndarray) -> Vector | None:
    """The most probable scales and offsets; a calibration inside is replaced. None for regression."""
    from scipy.optimize import minimize

    if task.kind == "regress":
        return None
    if inner.kind == "temperature" or inner.kind == "vector":
        inner = inner.inner
    common = fit_temperature(task, inner, logits, targets)
    assert common is not None
    z_NK = inner.combine(task, logits) / common.temperature
    n, k = z_NK.shape
    right_NK = np.asarray(targets, dtype=np.float64) if task.kind == "multilabel" else np.eye(k)[targets]

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        moved_NK = z_NK * (1 + x[:k]) + x[k:]
        wrong_NK = (task.probabilities(moved_NK) - right_NK) / (n * (k if task.kind == "multilabel" else 1))
        slope = np.concatenate([(wrong_NK * z_NK).sum(0), wrong_NK.sum(0)]) + x / (SPREAD**2 * n)
        return float(task.nll_N(moved_NK, targets).mean() + (x @ x) / (2 * SPREAD**2 * n)), slope

    x = minimize(loss, np.zeros(2 * k), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    return Vector(inner=inner, scales=tuple((1 + x[:k]) / common.temperature), offsets=tuple(x[k:]))
