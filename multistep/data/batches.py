"""Length-bucketed batches in an order that a cursor can resume.

Every epoch is shuffled anew from (seed, epoch). Within windows of a few thousand rows the rows are sorted by length and cut into
batches of a fixed number of examples, so that every example weighs the same; then the batches are shuffled. A position is two
integers, so stopping anywhere and going on gives the same batches.
"""

from __future__ import annotations

import numpy as np

_WINDOW_BATCHES = 64


class Batches:
    """Batches of row numbers. `lengths_N` in tokens (only their order matters); `batch_size` in examples."""

    def __init__(self, lengths_N: np.ndarray, batch_size: int, seed: int):
        if len(lengths_N) == 0:
            raise ValueError("Batches needs at least one row")
        self.lengths_N = np.asarray(lengths_N)
        self.batch_size = min(batch_size, len(lengths_N))
        self.seed = seed
        self._epoch = -1
        self._plan: list[np.ndarray] = []

    @property
    def per_epoch(self) -> int:
        """Batches an epoch; a last short batch is merged into its neighbour."""
        return max(1, round(len(self.lengths_N) / self.batch_size))

    def at(self, position: int) -> np.ndarray:
        """The rows of batch `position` counted from the start of training."""
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            self._plan = self._cut(np.random.default_rng([self.seed, epoch]))
            self._epoch = epoch
        return self._plan[index]

    def _cut(self, rng: np.random.Generator) -> list[np.ndarray]:
        order = rng.permutation(len(self.lengths_N))
        window = self.batch_size * _WINDOW_BATCHES
        for start in range(0, len(order), window):
            part = order[start : start + window]
            order[start : start + window] = part[np.argsort(self.lengths_N[part], kind="stable")]
        plan = np.array_split(order, self.per_epoch)
        return [plan[i] for i in rng.permutation(len(plan))]


def by_length(lengths_N: np.ndarray, batch_tokens: int, batch_rows: int = 0) -> list[np.ndarray]:
    """All rows once, shortest first, in batches of at most `batch_tokens` padded tokens (one row at least) and, unless 0,
    `batch_rows` rows: for encoding."""
    order = np.argsort(lengths_N, kind="stable")
    batches, current = [], []
    for row in order:
        full = len(current) == batch_rows > 0 or int(lengths_N[row]) * (len(current) + 1) > batch_tokens
        if current and full:
            batches.append(np.array(current))
            current = []
        current.append(int(row))
    if current:
        batches.append(np.array(current))
    return batches
