"""Any number of labels, none included; each is a yes or no of its own.

Shapes: N rows, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import field_validator

from multistep.types import Prediction, Spec, UserError, nearest


class Multilabel(Spec):
    kind: Literal["multilabel"] = "multilabel"
    labels: tuple[str, ...]

    @field_validator("labels")
    @classmethod
    def _different(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if not labels or len(set(labels)) < len(labels):
            raise ValueError("give one label or more, all different")
        return labels

    @property
    def n_outputs(self) -> int:
        return len(self.labels)

    @property
    def default_metric(self) -> str:
        return "f1_micro"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("f1_micro", "f1_macro", "exact_match", "auroc", "log_loss", "calibration_error")

    def encode(self, labels: Sequence[Any]) -> np.ndarray:
        """bool [N, K]. Raises UserError naming a label that is not known, or a row that is not a list of labels."""
        place = {label: k for k, label in enumerate(self.labels)}
        targets = np.zeros((len(labels), len(self.labels)), dtype=bool)
        for row, several in enumerate(labels):
            if not isinstance(several, list | tuple | set | frozenset):
                raise UserError(f"label {several!r}: a multilabel row needs a list of labels. Write [{several!r}].")
            for label in several:
                if str(label) not in place:
                    raise UserError(
                        f"label {label!r}: not one the model was trained on.{nearest(str(label), self.labels)}"
                    )
                targets[row, place[str(label)]] = True
        return targets

    def probabilities(self, logits_NK: np.ndarray) -> np.ndarray:
        return np.exp(-np.logaddexp(0.0, -logits_NK))  # 1 / (1 + exp(-z)) without overflow

    def decide(self, logits_NK: np.ndarray) -> np.ndarray:
        return logits_NK > 0  # p > 0.5

    def nll_N(self, logits_NK: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Binary cross-entropy in nats, the mean over labels."""
        return (np.logaddexp(0.0, logits_NK) - targets * logits_NK).mean(axis=1)

    def predictions(self, logits_NK: np.ndarray, decisions: np.ndarray) -> list[Prediction]:
        """Confidence: the probability that every yes and no is right, were the labels independent."""
        p_NK = self.probabilities(logits_NK)
        sure_N = np.where(decisions, p_NK, 1.0 - p_NK).prod(axis=1)
        return [
            Prediction(
                tuple(label for label, yes in zip(self.labels, yes_K, strict=True) if yes),
                sure,
                dict(zip(self.labels, p_K, strict=True)),
            )
            for yes_K, sure, p_K in zip(decisions.tolist(), sure_N.tolist(), p_NK.tolist(), strict=True)
        ]
