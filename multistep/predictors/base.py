"""What the members share: the engine they are served by, outputs that are computed when they are asked for, a search in one dimension.

Shapes: N rows, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

Logits = Mapping[str, np.ndarray]  # model name -> [N, K]


class Engine(Protocol):
    """Runs models by name."""

    def logits(self, model: str, texts: Sequence[str]) -> np.ndarray:
        """float [N, K]"""
        ...


class Asked(Mapping[str, np.ndarray]):
    """The outputs of an engine's models on some texts. A model runs when it is asked for, on the rows that are asked for, once."""

    def __init__(self, engine: Engine, names: Sequence[str], texts: Sequence[str]):
        self._engine, self._names, self._texts = engine, tuple(names), texts
        self._take = np.arange(len(texts))
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # outputs [N,K] and which rows have them [N]

    def rows(self, take: np.ndarray) -> Asked:
        """The same for some of the rows; what is computed is shared."""
        part = Asked(self._engine, self._names, self._texts)
        part._take, part._known = self._take[take], self._known
        return part

    def __getitem__(self, model: str) -> np.ndarray:
        if model not in self._names:
            raise KeyError(model)
        known = self._known.get(model)
        missing = self._take if known is None else self._take[~known[1][self._take]]
        if len(missing) or known is None:
            found = self._engine.logits(model, [self._texts[int(i)] for i in missing])
            if known is None:
                known = (np.zeros((len(self._texts), found.shape[1])), np.zeros(len(self._texts), dtype=bool))
                self._known[model] = known
            known[0][missing], known[1][missing] = found, True
        return known[0][self._take]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def some(logits: Logits, rows: np.ndarray) -> Logits:
    """The outputs of some rows."""
    return logits.rows(rows) if isinstance(logits, Asked) else {m: z[rows] for m, z in logits.items()}


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
