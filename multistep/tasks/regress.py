"""A number. The one output is the number itself, in the label's units.

`mean` and `scale` are those of the training targets; models that learn standardized targets read them, none here.
Shapes: N rows, K = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from multistep.types import Prediction, Spec, UserError


class Regress(Spec):
    kind: Literal["regress"] = "regress"
    labels: tuple[str, ...] = Field(default=(), max_length=0)
    mean: float = Field(default=0.0, allow_inf_nan=False)
    scale: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)

    @property
    def n_outputs(self) -> int:
        return 1

    @property
    def default_metric(self) -> str:
        return "mse"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("mse", "rmse", "mae", "r2", "pearson", "spearman")

    def encode(self, labels: Sequence[Any]) -> np.ndarray:
        """float64 [N]. Raises UserError naming a label that is not a finite number."""
        return np.array([_number(label) for label in labels], dtype=np.float64)

    def probabilities(self, logits_NK: np.ndarray) -> np.ndarray:
        """The numbers as they are: there are no probabilities here."""
        return logits_NK

    def decide(self, logits_NK: np.ndarray) -> np.ndarray:
        return logits_NK[:, 0]

    def nll_N(self, logits_NK: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Squared error, in the label's units squared."""
        return (logits_NK[:, 0] - targets) ** 2

    def predictions(self, logits_NK: np.ndarray, decisions: np.ndarray) -> list[Prediction]:
        return [Prediction(value) for value in decisions.tolist()]


def _number(label: Any) -> float:
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"label {label!r}: regression needs a finite number. Mend the row, or use the task classify.")
    return number
