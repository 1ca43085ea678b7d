"""Decide elsewhere than at the likeliest label, for metrics that the likeliest label does not serve (F1, recall, MCC).

classify: `offsets` are added to the log-probabilities before the largest is taken. multilabel: they are the
probabilities above which each label is said. The probabilities themselves do not change.
Fitted by coordinate search: for one class at a time the metric is computed exactly, from counts, at every offset where
some row changes its answer. A class may move only as far as its rows vouch for, and a move must pay: one row's worth of
the metric for each unit of log-odds. No move ever makes the metric worse on the rows it was fitted on.
Sources: Lipton et al. 2014, "Optimal thresholding of classifiers to maximize F1 measure"; Fan & Lin 2007, "A study on
threshold selection for multi-label classification" (cyclic optimization).
Differs from the sources: the limit by support and the price of a move.
Shapes: N rows, K classes or labels, M places where a row changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np

from multistep.metrics import METRICS, Counts, TaskLike, check_metric, log_softmax
from multistep.predictors.base import Logits
from multistep.types import Spec

if TYPE_CHECKING:
    from multistep.predictors import Predictor

FARTHEST = 3.0  # log-odds
PRIOR_ROWS = 10.0  # a class of so many rows may move half as far
SWEEPS = 3
_ROOM = 1e-9  # keeps a threshold off the very score of a row when no other row bounds it


class Thresholds(Spec):
    kind: Literal["thresholds"] = "thresholds"
    inner: Predictor
    offsets: tuple[float, ...]

    def models(self) -> tuple[str, ...]:
        return self.inner.models()

    def combine(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return self.inner.combine(task, logits)

    def decide(self, task: TaskLike, logits: Logits) -> tuple[np.ndarray, np.ndarray]:
        if task.kind == "regress" or len(self.offsets) != task.n_outputs:
            raise ValueError(f"thresholds: {len(self.offsets)} offsets do not fit the task {task.kind}")
        z_NK, offset_K = self.combine(task, logits), np.array(self.offsets)
        if task.kind == "multilabel":
            return z_NK, task.probabilities(z_NK) > offset_K
        return z_NK, (log_softmax(z_NK) + offset_K).argmax(axis=1)

    def stages(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return self.inner.stages(task, logits)


def fit_thresholds(
    task: TaskLike, inner: Predictor, logits: Logits, targets: np.ndarray, metric: str, seed: int
) -> Thresholds | None:
    """Offsets that serve `metric`; inner thresholds are replaced. None where the likeliest label already suits it
    (accuracy, f1_micro of one label) or where it reads no decisions. `seed` orders the classes of each sweep."""
    found = METRICS[check_metric(metric, task.kind)]
    if found.of is None or (task.kind == "classify" and found.name == "f1_micro"):
        return None
    if inner.kind == "thresholds":
        inner = inner.inner
    rng = np.random.default_rng(seed)
    search = _search_labels if task.kind == "multilabel" else _search_classes
    offset_K = search(inner.combine(task, logits), targets, found.of, rng)
    return Thresholds(inner=inner, offsets=tuple(offset_K.tolist()))


def _limits(support_K: np.ndarray) -> np.ndarray:
    return FARTHEST * support_K / (support_K + PRIOR_ROWS)


def _best_place(need_M: np.ndarray, value_M1: np.ndarray, limit: float, price: float) -> float:
    """Where in -limit..limit to put an offset. need_M (sorted) are the places where a row changes; value_M1[m] holds
    between the m-th and the next. Ties and small gains go to the place nearest 0."""
    edges = np.concatenate([[-limit], need_M, [limit]])
    low, high = edges[:-1], edges[1:]
    # in the middle of the stretch, or at 0 when 0 is well inside
    place = np.where((low < -_ROOM) & (high > _ROOM), 0.0, (low + high) / 2.0)
    value = np.where(high - low > 2.0 * _ROOM, value_M1 - price * np.abs(place), -np.inf)
    return float(place[int(value.argmax())])


def _search_classes(
    z_NK: np.ndarray, targets: np.ndarray, of: Callable[[Counts], np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    logp_NK = log_softmax(z_NK)
    n, n_classes = logp_NK.shape
    rows, ones_K = np.arange(n), np.eye(n_classes)
    support_K = np.bincount(targets, minlength=n_classes)
    limit_K, offset_K = _limits(support_K), np.zeros(n_classes)
    for _ in range(SWEEPS):
        before_K = offset_K.copy()
        for k in rng.permutation(n_classes):
            others_NK = logp_NK + offset_K
            others_NK[:, k] = -np.inf
            rival_N = others_NK.argmax(axis=1)
            need_N = others_NK[rows, rival_N] - logp_NK[:, k]  # above this offset the row is said to be k
            near_M = np.flatnonzero(np.abs(need_N) < limit_K[k])
            if len(near_M) == 0:
                continue
            near_M = near_M[need_N[near_M].argsort()]
            said_N = np.where(need_N <= -limit_K[k], k, rival_N)  # at the low end of the offset's range
            hit_N = said_N == targets
            rival_M, target_M = rival_N[near_M], targets[near_M]
            change_MK = ones_K[k] - ones_K[rival_M]
            hit_MK = ones_K[k] * (target_M == k)[:, None] - ones_K[rival_M] * (target_M == rival_M)[:, None]
            counts = Counts(
                tp=_running(np.bincount(targets[hit_N], minlength=n_classes), hit_MK),
                predicted=_running(np.bincount(said_N, minlength=n_classes), change_MK),
                support=support_K[None],
                every=False,
            )
            offset_K[k] = _best_place(need_N[near_M], of(counts), float(limit_K[k]), 1.0 / n)
        if np.array_equal(before_K, offset_K):
            break
    return offset_K


def _search_labels(
    z_NK: np.ndarray, targets: np.ndarray, of: Callable[[Counts], np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    n, n_labels = z_NK.shape
    support_K = targets.sum(axis=0)
    limit_K, cut_K = _limits(support_K), np.zeros(n_labels)  # cuts are in log-odds: said where z > cut
    for _ in range(SWEEPS):
        before_K = cut_K.copy()
        for k in rng.permutation(n_labels):
            near_M = np.flatnonzero(np.abs(z_NK[:, k]) < limit_K[k])
            if len(near_M) == 0:
                continue
            near_M = near_M[z_NK[near_M, k].argsort()]
            said_NK = z_NK > cut_K
            said_NK[:, k] = z_NK[:, k] > -limit_K[k]  # at the low end every near row is said; going up they drop out
            drop_MK, drop_hit_MK = np.zeros((2, len(near_M), n_labels))
            drop_MK[:, k], drop_hit_MK[:, k] = -1.0, -1.0 * targets[near_M, k]
            counts = Counts(
                tp=_running((said_NK & targets).sum(axis=0), drop_hit_MK),
                predicted=_running(said_NK.sum(axis=0), drop_MK),
                support=support_K[None],
                every=True,
            )
            cut_K[k] = _best_place(z_NK[near_M, k], of(counts), float(limit_K[k]), 1.0 / n)
        if np.array_equal(before_K, cut_K):
            break
    return 1.0 / (1.0 + np.exp(-cut_K))


def _running(start_K: np.ndarray, change_MK: np.ndarray) -> np.ndarray:
    """[M + 1, K]: counts before any row has changed, after the first, ..."""
    return np.cumsum(np.concatenate([start_K[None], change_MK]), axis=0)
