"""The labels of which one is right with a promised probability; an answer is withheld where they are not one.

A label is a candidate where the model gives it at least `least`. `least` comes from rows that nothing else was fitted on: then the
right label is among the candidates with at least the promised probability, over such rows and new ones, whatever the model is worth.
Source: Sadinle, Lei & Wasserman 2019, "Least ambiguous set-valued classifiers with bounded error levels"; the quantile with its
finite-sample correction is that of Vovk, Gammerman & Shafer 2005, "Algorithmic learning in a random world".
Shapes: N rows, K classes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from multistep.metrics import TaskLike
from multistep.predictors.base import Logits
from multistep.types import Spec, UserError

if TYPE_CHECKING:
    from multistep.predictors import Predictor


class Conformal(Spec):
    kind: Literal["conformal"] = "conformal"
    inner: Predictor
    coverage: Annotated[float, Field(gt=0, lt=1)]  # what is promised
    least: Annotated[float, Field(ge=0, le=1)]
    rows: Annotated[int, Field(ge=1)]  # that the promise rests on

    def models(self) -> tuple[str, ...]:
        return self.inner.models()

    def combine(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return self.inner.combine(task, logits)

    def decide(self, task: TaskLike, logits: Logits) -> tuple[np.ndarray, np.ndarray]:
        return self.inner.decide(task, logits)

    def stages(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return self.inner.stages(task, logits)

    def candidates(self, task: TaskLike, z_NK: np.ndarray) -> np.ndarray:
        """[N,K]: which labels may be right."""
        return task.probabilities(z_NK) >= self.least


def fit_conformal(task: TaskLike, inner: Predictor, logits: Logits, targets: np.ndarray, coverage: float) -> Conformal:
    """The promise, on rows that neither the models nor `inner` were fitted on. Raises UserError where they are too few for it, or the
    task has no classes."""
    if task.kind != "classify":
        raise UserError(f"coverage: a promise is made for one label of several; the task is {task.kind}.")
    if inner.kind == "conformal":
        inner = inner.inner
    n = len(targets)
    rank = math.ceil((n + 1) * coverage)
    if rank > n:
        needed = math.ceil(coverage / (1 - coverage) - 1e-9)
        raise UserError(
            f"coverage: {n} rows are set aside for it, a promise of {coverage:g} needs {needed}. Give more data or promise less."
        )
    p_N = task.probabilities(inner.combine(task, logits))[np.arange(n), targets]
    return Conformal(inner=inner, coverage=coverage, least=float(np.sort(p_N)[n - rank]), rows=n)
