"""Confident learning: which rows are likely to carry a wrong label, and how many there are.

    t_k = mean of p(k) over the rows labelled k;   a row counts as j, the likeliest of all k with p(k) >= t_k;
    joint[i, j] of given i and counted j, each row of it scaled to the rows labelled i;   share = what is off the diagonal

`p` are out-of-fold probabilities: of a model that has not seen the row. Rows off the diagonal are suspects, ranked by how far p of the
given label is below that of the likely one; as many are named as the joint says there are.
Source: Northcutt, Jiang, Chuang 2021, "Confident learning: estimating uncertainty in dataset labels", JAIR 70 (its joint, and pruning
by noise rate ranked by margin).
Differs from the source: one ranking over all pairs of labels; the share has a standard error, by resampling rows.
Shapes: N rows, K labels, M suspects.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 100


class Suspects(NamedTuple):
    """Rows [M] (places in the input) with the likely label [M], the most suspicious first; the estimated share of wrong labels."""

    rows_M: np.ndarray
    likely_M: np.ndarray
    share: float
    stderr: float


def counted_as(p_NK: np.ndarray, given_N: np.ndarray) -> np.ndarray:
    """The label [N] that each row is confidently counted as; -1 where none reaches its threshold."""
    k = p_NK.shape[1]
    rows_K = np.bincount(given_N, minlength=k)
    sum_K = np.bincount(given_N, weights=p_NK[np.arange(len(p_NK)), given_N], minlength=k)
    threshold_K = np.where(rows_K > 0, sum_K / np.maximum(rows_K, 1), np.inf)
    reached_NK = np.where(p_NK >= threshold_K - 1e-12, p_NK, -1.0)
    return np.where(reached_NK.max(1) >= 0, reached_NK.argmax(1), -1)


def share_off(given_N: np.ndarray, counted_N: np.ndarray, weight_N: np.ndarray, k: int) -> float:
    """The share of wrong labels: in each label the counted rows that count as another, scaled to all rows of it."""
    rows_K = np.bincount(given_N, weights=weight_N, minlength=k)
    sure_N = weight_N * (counted_N >= 0)
    sure_K = np.bincount(given_N, weights=sure_N, minlength=k)
    off_K = np.bincount(given_N, weights=sure_N * (counted_N != given_N), minlength=k)
    return float((rows_K * off_K / np.maximum(sure_K, 1e-12)).sum() / max(1e-12, rows_K.sum()))


def suspects(p_NK: np.ndarray, given_N: np.ndarray, seed: int = 0) -> Suspects:
    """Raises ValueError unless there is one given label a row."""
    if p_NK.ndim != 2 or len(p_NK) != len(given_N) or len(given_N) == 0:
        raise ValueError(f"suspects: probabilities {p_NK.shape} do not fit {len(given_N)} labels")
    n, k = p_NK.shape
    counted_N = counted_as(p_NK, given_N)
    share = share_off(given_N, counted_N, np.ones(n), k)
    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(n, np.full(n, 1 / n)).astype(np.float64) for _ in range(RESAMPLES)]
    stderr = float(np.std([share_off(given_N, counted_N, w_N, k) for w_N in drawn], ddof=1))
    off_M = np.flatnonzero((counted_N >= 0) & (counted_N != given_N))
    margin_M = p_NK[off_M, given_N[off_M]] - p_NK[off_M, counted_N[off_M]]
    rows_M = off_M[np.argsort(margin_M, kind="stable")][: max(1, round(share * n))]
    return Suspects(rows_M, counted_N[rows_M], share, stderr)
