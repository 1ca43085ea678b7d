"""Say what costs least on average, where mistakes have prices. The probabilities do not change.

Source: Elkan 2001, "The foundations of cost-sensitive learning": of the labels the one of least expected cost is said.
Shapes: N rows, K classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import model_validator

from multistep.metrics import TaskLike
from multistep.predictors.base import Logits
from multistep.types import Spec, UserError, nearest

if TYPE_CHECKING:
    from multistep.predictors import Predictor


class Costs(Spec):
    kind: Literal["costs"] = "costs"
    inner: Predictor
    matrix: tuple[tuple[float, ...], ...]  # [right, said]: what it costs to say this where that is right

    @model_validator(mode="after")
    def _square(self) -> Self:
        if any(len(row) != len(self.matrix) for row in self.matrix) or not np.isfinite(self.matrix).all():
            raise ValueError("the cost matrix must be square and of finite numbers")
        return self

    def models(self) -> tuple[str, ...]:
        return self.inner.models()

    def combine(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return self.inner.combine(task, logits)

    def decide(self, task: TaskLike, logits: Logits) -> tuple[np.ndarray, np.ndarray]:
        if task.kind != "classify" or len(self.matrix) != task.n_outputs:
            raise ValueError(f"costs: a matrix of {len(self.matrix)} labels does not fit the task {task.kind}")
        z_NK = self.combine(task, logits)
        return z_NK, (task.probabilities(z_NK) @ np.array(self.matrix)).argmin(axis=1)

    def stages(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return self.inner.stages(task, logits)


def cost_N(matrix: Any, targets: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """What each row's answer costs."""
    return np.asarray(matrix, dtype=np.float64)[targets, decisions]


def read_costs(path: str | Path, labels: tuple[str, ...]) -> tuple[tuple[float, ...], ...]:
    """Of a JSON file {"right label": {"label said": cost}}; what is not named costs 1, and 0 where it is right. Raises UserError."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"costs: {path}: {(error.strerror or str(error)).lower()}.") from None
    except (ValueError, RecursionError):
        raise UserError(f'costs: {path}: not JSON. Give {{"right label": {{"label said": cost}}}}.') from None
    if not isinstance(data, dict) or not all(isinstance(row, dict) for row in data.values()):
        raise UserError(f'costs: {path}: not of the form {{"right label": {{"label said": cost}}}}.')
    matrix = 1.0 - np.eye(len(labels))
    place = {label: k for k, label in enumerate(labels)}
    for right, row in data.items():
        for said, cost in row.items():
            for label in (right, said):
                if label not in place:
                    raise UserError(f"costs: {path}: {label!r} is no label of the model.{nearest(label, labels)}")
            if isinstance(cost, bool) or not isinstance(cost, int | float) or not np.isfinite(cost):
                raise UserError(f"costs: {path}: the cost of saying {said!r} for {right!r} is {cost!r}, not a number.")
            matrix[place[right], place[said]] = cost
    return tuple(tuple(row) for row in matrix.tolist())
