"""Ridge regression of one-hot targets on dense features: what each row would be called by a model that has not seen it, at the price of
one fit.

    minimise |Y - X W - 1 b|^2 + l2 |W|^2;   left out, row i is off by (y_i - f_i) / (1 - h_i),
    h_i = 1/N + x_i (X'X + l2 I)^-1 x_i' of the centred features

A convex head is solved once for all rows and all strengths by one eigendecomposition [D,D]; the strength is that of the least
leave-one-out error. Scores become probabilities by one temperature, fitted on them.
Source: Allen 1974, "The relationship between variable selection and data augmentation and a method for prediction" (PRESS); Rifkin and
Lippert 2007, "Notes on regularized least squares" (many strengths at the price of one).
Shapes: N rows, D features, K outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean eigenvalue of X'X


class Ridge(NamedTuple):
    """Weights [D,K] and bias [K] in float64; `left_out_NK`: what each row of train gets from the other rows."""

    weights_DK: np.ndarray
    bias_K: np.ndarray
    left_out_NK: np.ndarray
    l2: float

    def scores(self, features_ND: np.ndarray) -> np.ndarray:
        return features_ND.astype(np.float64) @ self.weights_DK + self.bias_K


def fit_ridge(features_ND: np.ndarray, target_NK: np.ndarray, l2s: tuple[float, ...] = ()) -> Ridge:
    """`l2s`: strengths as they are; none: `STRENGTHS`, in units of the data. Raises ValueError with fewer than three rows."""
    n, d = features_ND.shape
    if n < 3:
        raise ValueError(f"fit_ridge needs three rows or more, got {n}")
    x_ND, y_NK = features_ND.astype(np.float64), np.asarray(target_NK, np.float64)
    mean_D, mean_K = x_ND.mean(0), y_NK.mean(0)
    x_ND, y_NK = x_ND - mean_D, y_NK - mean_K
    value_D, turn_DD = np.linalg.eigh(x_ND.T @ x_ND)
    value_D = np.maximum(value_D, 0.0)
    x_ND = x_ND @ turn_DD  # on its axes
    square_ND, right_DK = x_ND**2, x_ND.T @ y_NK
    best: tuple[float, float, np.ndarray, np.ndarray] | None = None
    for l2 in l2s or tuple(s * max(float(value_D.sum()) / d, 1e-12) for s in STRENGTHS):
        weights_DK = right_DK / (value_D + l2)[:, None]
        lever_N = np.minimum(1 / n + square_ND @ (1 / (value_D + l2)), 1 - 1e-9)
        off_NK = (y_NK - x_ND @ weights_DK) / (1 - lever_N)[:, None]
        error = float((off_NK**2).mean())
        if best is None or error < best[0]:
            best = error, l2, weights_DK, off_NK
    assert best is not None
    _, l2, weights_DK, off_NK = best
    weights_DK = turn_DD @ weights_DK
    return Ridge(weights_DK, mean_K - mean_D @ weights_DK, y_NK + mean_K - off_NK, l2)


def one_hot(targets: np.ndarray, n_outputs: int) -> np.ndarray:
    """[N,K] of classes [N]; of labels [N,K] and numbers [N] their own values."""
    if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer):
        return np.eye(n_outputs)[targets]
    return np.asarray(targets, np.float64).reshape(len(targets), -1)


def sharpness(score_NK: np.ndarray, target_NK: np.ndarray, exclusive: bool) -> float:
    """What to multiply scores with, so that they are logits of least loss. `exclusive`: one label a row (softmax), else each by itself."""
    from scipy.optimize import minimize_scalar

    def loss(log_factor: float) -> float:
        z_NK = logits(score_NK, float(np.exp(log_factor)), exclusive)
        if exclusive:
            shifted = z_NK - z_NK.max(1, keepdims=True)
            return float((np.log(np.exp(shifted).sum(1)) - (shifted * target_NK).sum(1)).mean())
        return float((np.logaddexp(0.0, z_NK) - z_NK * target_NK).mean())

    found = minimize_scalar(loss, bounds=(-3.0, 5.0), method="bounded", options={"xatol": 0.05})
    return float(np.exp(found.x))  # pyright: ignore[reportAttributeAccessIssue]


def logits(score_NK: np.ndarray, factor: float, exclusive: bool) -> np.ndarray:
    """Scores of one-hot targets as logits: of softmax, or of a sigmoid a label, where a half is undecided."""
    return factor * (score_NK if exclusive else 2 * score_NK - 1)
