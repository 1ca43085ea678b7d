"""Metrics that are functions of counts per class: F1, precision, recall, Matthews' correlation; and counts resampled.

Equal rows are grouped into cells of a table, so that resampling 5,000 rows of 77 classes costs milliseconds.
Definitions are scikit-learn's; a share of nothing is 0. The swap test is approximate randomization: in each row the
answers of two predictors change places with chance 1/2. It is McNemar's test carried over to more than means.
Source: Yeh 2000, "More accurate tests for the statistical significance of result differences".
Differs from the source: nothing known.
Shapes: K classes, U cells, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from multistep.metrics.base import Counts, TaskLike

RESAMPLES = 300  # of the bootstrap
SWAPS = 499  # of the swap test: the smallest p is 1/500


def confusion(targets: np.ndarray, decisions: np.ndarray, n_classes: int) -> np.ndarray:
    """int64 [K, K]: row = what was right, column = what was said."""
    return np.bincount(targets * n_classes + decisions, minlength=n_classes**2).reshape(n_classes, n_classes)


def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.zeros(np.shape(top)), where=bottom > 0)


def _macro(x: np.ndarray, c: Counts) -> np.ndarray:
    """Mean over classes; those neither right nor said anywhere are left out."""
    if c.every:
        return x.mean(axis=-1)
    present = (c.predicted + c.support) > 0
    return (x * present).sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)


def f1(c: Counts) -> np.ndarray:
    return ratio(2.0 * c.tp, c.predicted + c.support)


def f1_macro(c: Counts) -> np.ndarray:
    return _macro(f1(c), c)


def f1_micro(c: Counts) -> np.ndarray:
    return ratio(2.0 * c.tp.sum(axis=-1), (c.predicted + c.support).sum(axis=-1))


def f1_weighted(c: Counts) -> np.ndarray:
    return ratio((f1(c) * c.support).sum(axis=-1), c.support.sum(axis=-1))


def precision_macro(c: Counts) -> np.ndarray:
    return _macro(ratio(1.0 * c.tp, c.predicted), c)


def recall_macro(c: Counts) -> np.ndarray:
    return _macro(ratio(1.0 * c.tp, c.support), c)


def mcc(c: Counts) -> np.ndarray:
    n = c.support.sum(axis=-1, dtype=np.float64)
    top = c.tp.sum(axis=-1) * n - (1.0 * c.predicted * c.support).sum(axis=-1)
    spread_said = n**2 - (1.0 * c.predicted**2).sum(axis=-1)
    spread_true = n**2 - (1.0 * c.support**2).sum(axis=-1)
    return ratio(top, np.sqrt(np.maximum(spread_said * spread_true, 0.0)))


@dataclass(frozen=True, slots=True)
class Cells:
    """A table: cell u stands for `count_U` rows with the same target and the same decision of each predictor."""

    n_classes: int
    multilabel: bool
    targets: np.ndarray
    decisions: tuple[np.ndarray, ...]
    count_U: np.ndarray

    def counts(self, which: int, w_BU: np.ndarray) -> Counts:
        """Counts [B, K] of the predictor `which` when cell u weighs w_BU rows."""
        said = self.decisions[which]
        if self.multilabel:
            w_BU = w_BU.astype(np.float64)
            tp, predicted, support = (w_BU @ t.astype(np.float64) for t in (self.targets & said, said, self.targets))
        else:
            tp = self._by_class(w_BU * (said == self.targets), said)
            predicted, support = self._by_class(w_BU, said), self._by_class(w_BU, self.targets)
        return Counts(tp, predicted, support, self.multilabel)

    def _by_class(self, w_BU: np.ndarray, class_U: np.ndarray) -> np.ndarray:
        n_tables = len(w_BU)
        at = np.arange(n_tables)[:, None] * self.n_classes + class_U
        sums = np.bincount(at.ravel(), weights=w_BU.ravel(), minlength=n_tables * self.n_classes)
        return sums.reshape(n_tables, self.n_classes)

    def once(self, which: int) -> Counts:
        """Counts [1, K] of the rows as they are."""
        return self.counts(which, self.count_U[None])

    def resample(self, seed: int) -> np.ndarray:
        """[RESAMPLES, U]: how often each cell comes up when the rows are drawn again with replacement."""
        n = int(self.count_U.sum())
        return np.random.default_rng(seed).multinomial(n, self.count_U / n, size=RESAMPLES)


def cells_of(task: TaskLike, targets: np.ndarray, *decisions: np.ndarray) -> Cells:
    """Group equal rows. Multilabel rows are seldom equal and stay single."""
    if task.kind == "multilabel":
        return Cells(task.n_outputs, True, targets, decisions, np.ones(len(targets), dtype=np.int64))
    code = targets
    for said in decisions:
        code = code * task.n_outputs + said
    _, first, count_U = np.unique(code, return_index=True, return_counts=True)
    return Cells(task.n_outputs, False, targets[first], tuple(said[first] for said in decisions), count_U)


def swap_differences(cells: Cells, of: Callable[[Counts], np.ndarray], seed: int) -> np.ndarray:
    """[SWAPS] differences (first predictor - second) when in each row the two change places with chance 1/2."""
    a, b = cells.decisions
    differ = (a != b).any(axis=1) if cells.multilabel else a != b
    part = Cells(
        cells.n_classes, cells.multilabel, cells.targets[differ], (a[differ], b[differ]), cells.count_U[differ]
    )
    moved = np.random.default_rng(seed).binomial(part.count_U, 0.5, size=(SWAPS, len(part.count_U)))
    first, second, out, back = cells.once(0), cells.once(1), part.counts(0, moved), part.counts(1, moved)
    tp, predicted = back.tp - out.tp, back.predicted - out.predicted
    return of(Counts(first.tp + tp, first.predicted + predicted, first.support, first.every)) - of(
        Counts(second.tp - tp, second.predicted - predicted, second.support, second.every)
    )
