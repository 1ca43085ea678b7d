"""Metrics as a value and the pull of each row on it.

The standard error of the value is that of the mean of the pulls: exact for means, the infinitesimal jackknife for the
rest (for the area under the curve it is DeLong's). Two predictors are compared through the difference of their pulls.
Sources: Efron 1982, "The jackknife, the bootstrap and other resampling plans"; DeLong et al. 1988, "Comparing the
areas under two or more correlated receiver operating characteristic curves"; Guo et al. 2017, "On calibration of modern
neural networks" (calibration error).
Differs from the sources: a correlation with a constant is 0, not undefined; auroc leaves out classes that have no row,
or every row.
Shapes: N rows, K classes or labels.
"""

from __future__ import annotations

import math

import numpy as np

from multistep.metrics.base import Scored, TaskLike, log_softmax

BINS = 15  # of the calibration error


def _mean(x_N: np.ndarray) -> tuple[float, np.ndarray]:
    value = float(x_N.mean())
    return value, x_N - value


def accuracy(task: TaskLike, s: Scored) -> tuple[float, np.ndarray]:
    return _mean((s.decisions == s.targets).astype(np.float64))


def exact_match(task: TaskLike, s: Scored) -> tuple[float, np.ndarray]:
    return _mean((s.decisions == s.targets).all(axis=1).astype(np.float64))


def log_loss(task: TaskLike, s: Scored) -> tuple[float, np.ndarray]:
    return _mean(task.nll_N(s.logits_NK, s.targets))


def mse(task: TaskLike, s: Scored) -> tuple[float, np.ndarray]:
    return _mean((s.decisions - s.targets) ** 2)


def mae(task: TaskLike, s: Scored) -> tuple[float, np.ndarray]:
    return _mean(np.abs(s.decisions - s.targets))


def rmse(task: TaskLike, s: Scored) -> tuple[float, np.ndarray]:
    square, pull_N = mse(task, s)
    root = math.sqrt(square)
    return root, pull_N / (2.0 * root) if root > 0 else 0.0 * pull_N


def r2(task: TaskLike, s: Scored) -> tuple[float, np.ndarray]:
    error, error_pull_N = mse(task, s)
    variance, variance_pull_N = _mean((s.targets - s.targets.mean()) ** 2)
    if variance == 0:
        return float(error == 0), 0.0 * error_pull_N
    return 1.0 - error / variance, -error_pull_N / variance + error * variance_pull_N / variance**2


def pearson(task: TaskLike, s: Scored) -> tuple[float, np.ndarray]:
    sd_x, sd_y = s.decisions.std(), s.targets.std()
    if not (sd_x > 0 and sd_y > 0):
        return 0.0, np.zeros(len(s.targets))
    x_N, y_N = (s.decisions - s.decisions.mean()) / sd_x, (s.targets - s.targets.mean()) / sd_y
    value = float((x_N * y_N).mean())
    return value, x_N * y_N - value * (x_N**2 + y_N**2) / 2.0


def _above(x_N: np.ndarray, v_N: np.ndarray) -> np.ndarray:
    """For each row, the mean over all rows of v where x is larger; ties count half."""
    _, level_N = np.unique(x_N, return_inverse=True)
    at_level = np.bincount(level_N, weights=v_N)
    return (v_N.sum() - np.cumsum(at_level) + at_level / 2.0)[level_N] / len(x_N)


def spearman(task: TaskLike, s: Scored) -> tuple[float, np.ndarray]:
    """Pearson's of the mid-ranks; a row pulls also by moving the ranks of the others."""
    ones_N = np.ones(len(s.targets))
    r_N, q_N = 0.5 - _above(s.decisions, ones_N), 0.5 - _above(s.targets, ones_N)  # ranks in -1/2..1/2
    cov, var_r, var_q = (r_N * q_N).mean(), (r_N**2).mean(), (q_N**2).mean()
    if not (var_r > 0 and var_q > 0):
        return 0.0, np.zeros(len(s.targets))
    pull_cov = r_N * q_N + _above(s.decisions, q_N) + _above(s.targets, r_N)
    pull_r, pull_q = r_N**2 + 2.0 * _above(s.decisions, r_N), q_N**2 + 2.0 * _above(s.targets, q_N)
    value = float(cov / math.sqrt(var_r * var_q))
    pull_N = pull_cov / math.sqrt(var_r * var_q) - value * (pull_r / var_r + pull_q / var_q) / 2.0
    return value, pull_N - pull_N.mean()


def auroc(task: TaskLike, s: Scored) -> tuple[float, np.ndarray]:
    """Binary: of the second label. More: mean of one class against the rest, where both sides have rows."""
    if task.kind == "multilabel":
        score_NK, is_NK = s.logits_NK, s.targets
    else:
        score_NK, is_NK = log_softmax(s.logits_NK), s.targets[:, None] == np.arange(task.n_outputs)
        if task.n_outputs == 2:
            score_NK, is_NK = score_NK[:, 1:], is_NK[:, 1:]
    n, areas, pull_N = len(s.targets), [], np.zeros(len(s.targets))
    for score_N, is_N in zip(score_NK.T, is_NK.T, strict=True):
        share = is_N.mean()
        if 0 < share < 1:
            won_N = np.where(is_N, 1.0 - share - _above(score_N, 1.0 - is_N), _above(score_N, 1.0 * is_N))
            won_N = won_N / np.where(is_N, 1.0 - share, share)  # the part of the other side that this row beats
            area = float(won_N[is_N].mean())
            areas.append(area)
            pull_N += (won_N - area) / np.where(is_N, share, 1.0 - share)
    if not areas:
        return 0.5, np.zeros(n)
    return float(np.mean(areas)), pull_N / len(areas)


def calibration(task: TaskLike, s: Scored) -> tuple[float, np.ndarray]:
    """Sum over bins of |stated probability - what came true|: of the answer (classify), of each label (multilabel)."""
    p_NK = task.probabilities(s.logits_NK)
    if task.kind == "multilabel":
        said_NM, true_NM = p_NK, s.targets
    else:
        said_NM = np.take_along_axis(p_NK, s.decisions[:, None], axis=1)
        true_NM = (s.decisions == s.targets)[:, None]
    bin_NM = np.minimum((np.nan_to_num(said_NM) * BINS).astype(np.int64), BINS - 1)
    gap_NM = said_NM - true_NM
    gap_b = np.bincount(bin_NM.ravel(), weights=gap_NM.ravel(), minlength=BINS)
    return _mean((np.sign(gap_b)[bin_NM] * gap_NM).mean(axis=1))
