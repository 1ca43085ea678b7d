"""Candidates from the calibration split: a predictor fitted on all rows, and what it does on rows it was not fitted on.

The second is what may be judged: parameters fitted on four fifths decide the other fifth, five times (cross-fitting),
so that a candidate that only learned the noise of the split does not look better than it is. What stands is judged in the same way
where it was fitted to these rows (`fit_again`). Nothing here decides.
Measured: thresholds fitted to pure noise pass a test at 0.1 in about 0.12 of the splits, since the folds share rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from multistep.metrics import Scored, TaskLike
from multistep.metrics.power import FEWEST_ROWS
from multistep.predictors import (
    Affine,
    Blend,
    Cascade,
    Conformal,
    Costs,
    Isotonic,
    Predictor,
    Single,
    Temperature,
    Thresholds,
    Vector,
)
from multistep.predictors.affine import fit_affine
from multistep.predictors.base import Logits
from multistep.predictors.blend import fit_blend
from multistep.predictors.cascade import fit_cascade
from multistep.predictors.isotonic import fit_isotonic
from multistep.predictors.temperature import fit_temperature
from multistep.predictors.thresholds import fit_thresholds
from multistep.predictors.vector import fit_vector

FOLDS = 5

Fit = Callable[[Logits, np.ndarray], Predictor | None]


class Candidate(NamedTuple):
    predictor: Predictor  # fitted on all rows
    scored: Scored  # each row decided with parameters fitted on others
    facts: dict[str, Any]


def baseline(task: TaskLike, predictor: Predictor, logits: Mapping[str, np.ndarray], targets: np.ndarray) -> Scored:
    """What `predictor`, as it is, does on the split."""
    return Scored(targets, *predictor.decide(task, logits))


def calibrate(
    task: TaskLike, inner: Predictor, logits: Mapping[str, np.ndarray], targets: np.ndarray, seed: int
) -> Candidate | None:
    """A temperature; for regression a straight line."""

    def fit(some: Logits, right: np.ndarray) -> Predictor | None:
        return fit_temperature(task, inner, some, right) or fit_affine(task, inner, some, right)

    return _candidate(task, fit, logits, targets, seed)


def thresholds(
    task: TaskLike, inner: Predictor, logits: Mapping[str, np.ndarray], targets: np.ndarray, metric: str, seed: int
) -> Candidate | None:
    """Decision thresholds for `metric`; None where it has no use for them."""

    def fit(some: Logits, right: np.ndarray) -> Predictor | None:
        return fit_thresholds(task, inner, some, right, metric, seed)

    return _candidate(task, fit, logits, targets, seed)


def blend(
    task: TaskLike, members: Sequence[Predictor], logits: Mapping[str, np.ndarray], targets: np.ndarray, seed: int
) -> Candidate | None:
    """A blend of two members or more, with a temperature of its own; None when a member would get no weight."""

    def fit(some: Logits, right: np.ndarray) -> Predictor | None:
        mixed = fit_blend(task, members, some, right)
        return fit_temperature(task, mixed, some, right) or mixed

    if len(members) < 2 or len(targets) < FEWEST_ROWS or min(fit_blend(task, members, logits, targets).weights) < 0.01:
        return None
    return _candidate(task, fit, logits, targets, seed)


def cross_fitted(
    task: TaskLike, fit: Fit, logits: Mapping[str, np.ndarray], targets: np.ndarray, seed: int
) -> Scored | None:
    """Every row decided by a predictor fitted on the other folds. None when `fit` has nothing to offer."""
    fold_N = _folds(task, targets, seed)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for fold in range(FOLDS):
        here, rest = np.flatnonzero(fold_N == fold), fold_N != fold
        predictor = fit({m: z[rest] for m, z in logits.items()}, targets[rest])
        if predictor is None:
            return None
        parts.append((here, *predictor.decide(task, {m: z[here] for m, z in logits.items()})))
    order = np.concatenate([here for here, _, _ in parts]).argsort()
    logits_NK, decisions = (np.concatenate([part[i] for part in parts])[order] for i in (1, 2))
    return Scored(targets, logits_NK, decisions)


def _folds(task: TaskLike, targets: np.ndarray, seed: int) -> np.ndarray:
    """Fold of each row; each class (classify) or range of values (regress) is spread evenly."""
    order = np.random.default_rng(seed).permutation(len(targets))
    if task.kind != "multilabel":
        order = order[targets[order].argsort(kind="stable")]
    fold_N = np.empty(len(targets), dtype=np.int64)
    fold_N[order] = np.arange(len(targets)) % FOLDS
    return fold_N


def _candidate(
    task: TaskLike, fit: Fit, logits: Mapping[str, np.ndarray], targets: np.ndarray, seed: int
) -> Candidate | None:
    if len(targets) < FEWEST_ROWS or not all(np.isfinite(z).all() for z in logits.values()):
        return None
    predictor = fit(logits, targets)
    scored = cross_fitted(task, fit, logits, targets, seed) if predictor is not None else None
    if predictor is None or scored is None:
        return None
    return Candidate(predictor, scored, fitted_numbers(task, predictor))


def fitted_numbers(task: TaskLike, predictor: Predictor) -> dict[str, Any]:
    """The fitted numbers, outermost first, for the journal."""
    if predictor.kind == "temperature":
        return {"temperature": predictor.temperature, **fitted_numbers(task, predictor.inner)}
    if predictor.kind == "affine":
        return {"slope": predictor.slope, "intercept": predictor.intercept}
    if predictor.kind == "cascade":
        return {"below": predictor.below, **fitted_numbers(task, predictor.second)}
    if predictor.kind == "vector":
        return {
            "scales": [min(predictor.scales), max(predictor.scales)],
            "offsets": [min(predictor.offsets), max(predictor.offsets)],
        }
    if predictor.kind == "isotonic":
        return {"steps": [len(true) for _, true in predictor.curves]}
    if predictor.kind == "blend":
        return {"models": list(predictor.models()), "weights": list(predictor.weights)}
    if predictor.kind == "thresholds":
        neutral = 0.5 if task.kind == "multilabel" else 0.0
        moved = {label: v for label, v in zip(task.labels, predictor.offsets, strict=True) if v != neutral}
        return {"moved": len(moved), "farthest": max(moved.items(), key=lambda m: abs(m[1] - neutral), default=None)}
    return {}


# ---------------------------------------------------------------------------------------------- what stands


def fit_again(
    task: TaskLike, predictor: Predictor, logits: Logits, targets: np.ndarray, metric: str, seed: int
) -> Predictor:
    """A predictor of the same make, its numbers fitted to these rows in place of those that it has. What was not fitted to rows stays: its
    models, prices, the share that a cascade asks again. `metric`: the one that its thresholds serve; they stay where it has no use for
    any. A promise is left out: it rests on rows of its own."""

    def again(inner: Predictor) -> Predictor:
        return fit_again(task, inner, logits, targets, metric, seed)

    match predictor:
        case Single():
            return predictor
        case Conformal():
            return again(predictor.inner)
        case Costs():
            return Costs(inner=again(predictor.inner), matrix=predictor.matrix)
        case Temperature():
            inner = again(predictor.inner)
            return fit_temperature(task, inner, logits, targets) or inner
        case Vector():
            inner = again(predictor.inner)
            return fit_vector(task, inner, logits, targets) or inner
        case Isotonic():
            inner = again(predictor.inner)
            return fit_isotonic(task, inner, logits, targets) or inner
        case Affine():
            inner = again(predictor.inner)
            return fit_affine(task, inner, logits, targets) or inner
        case Thresholds():
            inner = again(predictor.inner)
            found = fit_thresholds(task, inner, logits, targets, metric, seed)
            return found or Thresholds(inner=inner, offsets=predictor.offsets)
        case Blend():
            return fit_blend(task, [again(m) for m in predictor.members], logits, targets)
        case Cascade():
            share = predictor.share(task, logits)
            return fit_cascade(task, again(predictor.first), again(predictor.second), logits, share)


def is_fitted(predictor: Predictor) -> bool:
    """Whether any of its numbers come from rows, those of a promise aside."""
    if predictor.kind == "conformal" or predictor.kind == "costs":
        return is_fitted(predictor.inner)
    return predictor.kind != "single"
