"""Train's rows with their words changed anew every epoch: token ids are made when a batch is asked for, never kept as hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from multistep.augment import Augment
from multistep.data.batches import Batches
from multistep.evaluate import Rows

_KEPT = 4096  # token ids of so many rows are kept, so that a batch is counted and loaded from one tokenization


class AugmentedRows:
    """Like `rows`, as `train` reads them; lengths, by which batches are made, are those of the texts as they are."""

    cut: ClassVar[int] = 0  # no layer is skipped

    def __init__(
        self, rows: Rows, texts: Sequence[str], augment: Augment, tokenize: Callable[[Sequence[str]], list[np.ndarray]]
    ):
        self.lengths_N = rows.lengths_N
        self._rows, self._texts, self._augment, self._tokenize = rows, texts, augment, tokenize
        self._seed = 0
        self._epoch_N = np.zeros(len(texts), dtype=np.int64)  # in which each row was last drawn
        self._made: dict[tuple[int, int, int], np.ndarray] = {}  # by seed, epoch and row

    def order(self, batch_size: int, seed: int) -> _Drawn:
        return _Drawn(self, self._rows.order(batch_size, seed), seed)

    def drawn(self, rows: np.ndarray, seed: int, epoch: int) -> None:
        """These rows are asked for next, as they are in this epoch."""
        self._seed, self._epoch_N[rows] = seed, epoch

    def ids(self, rows: np.ndarray) -> list[np.ndarray]:
        """Token ids of these rows, in the epoch in which each was last drawn."""
        keys = [(self._seed, int(self._epoch_N[r]), int(r)) for r in rows]
        if len(self._made) > _KEPT:
            self._made.clear()
        if missing := [key for key in keys if key not in self._made]:
            texts = [self._augment.text(self._texts[row], seed, epoch, row) for seed, epoch, row in missing]
            self._made |= dict(zip(missing, self._tokenize(texts), strict=True))
        return [self._made[key] for key in keys]

    def tokens(self, rows: np.ndarray) -> int:
        return sum(map(len, self.ids(rows)))

    def load(self, rows: np.ndarray) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((ids [B,T], mask [B,T]), targets) of these rows."""
        targets = self._rows.targets
        assert targets is not None
        part = Rows(self.ids(rows), self._rows.pad_id, self._rows.device, targets[torch.from_numpy(rows)])
        return part.load(np.arange(len(rows)))

    def outputs(self, model: Any, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """The model's outputs [B,K] for inputs that `load` gave."""
        return model(*inputs)


class _Drawn:
    """The order of the rows; drawing a batch notes the epoch of its rows."""

    def __init__(self, data: AugmentedRows, order: Batches, seed: int):
        self._data, self._order, self._seed = data, order, seed

    def at(self, position: int) -> np.ndarray:
        """The rows of batch `position`, counted from the start of training."""
        rows = self._order.at(position)
        self._data.drawn(rows, self._seed, position // self._order.per_epoch)
        return rows
