"""One label of several. Two labels are two outputs like any other number.

Shapes: N rows, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import field_validator

from multistep.metrics import log_softmax
from multistep.types import Prediction, Spec, UserError, nearest


class Classify(Spec):
    kind: Literal["classify"] = "classify"
    labels: tuple[str, ...]

    @field_validator("labels")
    @classmethod
    def _two_different(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError("give two different labels or more")
        return labels

    @property
    def n_outputs(self) -> int:
        return len(self.labels)

    @property
    def default_metric(self) -> str:
        return "accuracy"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("accuracy", "f1_macro", "mcc", "auroc", "log_loss", "calibration_error")

    def encode(self, labels: Sequence[Any]) -> np.ndarray:
        """int64 [N], places in `self.labels`. Raises UserError naming a label that is not among them."""
        place = {label: k for k, label in enumerate(self.labels)}
        for label in labels:
            if str(label) not in place:
                raise UserError(f"label {label!r}: not one the model was trained on.{nearest(str(label), self.labels)}")
        return np.array([place[str(label)] for label in labels], dtype=np.int64)

    def probabilities(self, logits_NK: np.ndarray) -> np.ndarray:
        return np.exp(log_softmax(logits_NK))

    def decide(self, logits_NK: np.ndarray) -> np.ndarray:
        return logits_NK.argmax(axis=1)

    def nll_N(self, logits_NK: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Cross-entropy in nats."""
        return -np.take_along_axis(log_softmax(logits_NK), targets[:, None], axis=1)[:, 0]

    def predictions(self, logits_NK: np.ndarray, decisions: np.ndarray) -> list[Prediction]:
        """Confidence: the probability of the label given, also where a threshold chose another than the likeliest."""
        return [
            Prediction(self.labels[k], p_K[k], dict(zip(self.labels, p_K, strict=True)))
            for k, p_K in zip(decisions.tolist(), self.probabilities(logits_NK).tolist(), strict=True)
        ]
