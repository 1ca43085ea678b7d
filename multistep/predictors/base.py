"""What the members share: the engine they are served by and a search in one dimension."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

Logits = Mapping[str, np.ndarray]  # model name -> [N, K]


class Engine(Protocol):
    """Runs models by name."""

    def logits(self, model: str, texts: Sequence[str]) -> np.ndarray:
        """float [N, K]"""
        ...


def golden(loss: Callable[[float], float], low: float, high: float, steps: int = 24) -> float:
    """The place of the minimum of a function with one valley, to (high - low) * 0.618^steps."""
    ratio = (5.0**0.5 - 1.0) / 2.0
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    loss_left, loss_right = loss(left), loss(right)
    for _ in range(steps):
        if loss_left <= loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - ratio * (high - low)
            loss_left = loss(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + ratio * (high - low)
            loss_right = loss(right)
    return (low + high) / 2.0
