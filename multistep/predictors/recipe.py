"""How a predictor is to be made, before its numbers are known: which models, how calibrated, how decided. Fitted as a whole, so that
cross-fitting it judges all of its numbers on rows that none of them was fitted on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from multistep.metrics import METRICS, Scored, TaskLike, check_metric
from multistep.metrics.power import FEWEST_ROWS
from multistep.predictors import Predictor, Single
from multistep.predictors.affine import fit_affine
from multistep.predictors.base import Logits
from multistep.predictors.blend import fit_blend
from multistep.predictors.cascade import fit_cascade
from multistep.predictors.costs import Costs
from multistep.predictors.fit import Candidate, cross_fitted, fitted_numbers
from multistep.predictors.isotonic import fit_isotonic
from multistep.predictors.temperature import fit_temperature
from multistep.predictors.thresholds import fit_thresholds
from multistep.predictors.vector import fit_vector
from multistep.types import Spec

Calibration = Literal["none", "temperature", "vector", "isotonic", "affine"]
Decision = Literal["likeliest", "thresholds", "costs"]


class Recipe(Spec):
    """`models`: one, or several to blend. `first`: a cheap model that answers where it is sure; the share `again` of the rows is asked
    again of the others. `costs`: [right, said], for decisions by cost."""

    models: Annotated[tuple[str, ...], Field(min_length=1)]
    calibration: Calibration = "temperature"
    decision: Decision = "likeliest"
    first: str | None = None
    again: Annotated[float, Field(ge=0, le=1)] = 0.0
    costs: tuple[tuple[float, ...], ...] | None = None

    def names(self) -> tuple[str, ...]:
        """The models that it takes."""
        return tuple(dict.fromkeys((*(() if self.first is None else (self.first,)), *self.models)))

    def __str__(self) -> str:
        said = "+".join(self.models)
        if self.first is not None:
            said = f"{self.first}, then {self.again:.0%} by {said}"
        words = [w for w in (self.calibration, self.decision) if w not in ("none", "likeliest")]
        return f"{said} ({', '.join(words)})" if words else said


def fit_recipe(
    recipe: Recipe, task: TaskLike, logits: Logits, targets: np.ndarray, metric: str, seed: int
) -> Predictor | None:
    """The predictor, its numbers fitted on these rows. None where a part of it has nothing to offer: a member of a blend without
    weight, thresholds that the metric has no use for, a calibration that the task does not have."""
    found = _of_models(recipe, task, logits, targets)
    if found is None:
        return None
    if recipe.first is not None:
        first = _calibrated(recipe.calibration, task, Single(model=recipe.first), logits, targets)
        if first is None:
            return None
        found = fit_cascade(task, first, found, logits, recipe.again)
    match recipe.decision:
        case "likeliest":
            return found
        case "thresholds":
            return fit_thresholds(task, found, logits, targets, metric, seed)
        case "costs":
            return None if task.kind != "classify" or recipe.costs is None else Costs(inner=found, matrix=recipe.costs)


def _of_models(recipe: Recipe, task: TaskLike, logits: Logits, targets: np.ndarray) -> Predictor | None:
    members = [Single(model=m) for m in recipe.models]
    if len(members) == 1:
        return _calibrated(recipe.calibration, task, members[0], logits, targets)
    mixed = fit_blend(task, members, logits, targets)
    return None if min(mixed.weights) < 0.01 else _calibrated(recipe.calibration, task, mixed, logits, targets)


def _calibrated(
    how: Calibration, task: TaskLike, inner: Predictor, logits: Logits, targets: np.ndarray
) -> Predictor | None:
    match how:
        case "none":
            return inner
        case "temperature":
            return fit_temperature(task, inner, logits, targets)
        case "vector":
            return fit_vector(task, inner, logits, targets)
        case "isotonic":
            return fit_isotonic(task, inner, logits, targets)
        case "affine":
            return fit_affine(task, inner, logits, targets)


def recipe_of(predictor: Predictor, task: TaskLike, logits: Logits) -> Recipe | None:
    """How a predictor was made, as far as a recipe can say it: None for blends of blends and cascades of cascades. What share a cascade
    asks again is counted on these rows."""
    decision, costs = "likeliest", None
    if predictor.kind == "conformal":
        predictor = predictor.inner
    if predictor.kind == "thresholds":
        decision, predictor = "thresholds", predictor.inner
    elif predictor.kind == "costs":
        decision, costs, predictor = "costs", predictor.matrix, predictor.inner
    if predictor.kind == "cascade":
        first, inner = (recipe_of(member, task, logits) for member in (predictor.first, predictor.second))
        if first is None or inner is None or len(first.models) != 1 or inner.first is not None:
            return None
        again = predictor.share(task, logits)
        return inner.with_(first=first.models[0], again=again, decision=decision, costs=costs)
    calibration = "none"
    if predictor.kind == "temperature" or predictor.kind == "vector" or predictor.kind == "isotonic":
        calibration, predictor = predictor.kind, predictor.inner
    elif predictor.kind == "affine":
        calibration, predictor = "affine", predictor.inner
    members = predictor.members if predictor.kind == "blend" else (predictor,)
    names = [m.inner if m.kind == "temperature" else m for m in members]
    if not all(m.kind == "single" for m in names):
        return None
    models = tuple(m.model for m in names if m.kind == "single")
    return Recipe(models=models, calibration=calibration, decision=decision, costs=costs)


def calibrations(task: TaskLike) -> tuple[Calibration, ...]:
    return ("affine",) if task.kind == "regress" else ("temperature", "vector", "isotonic")


def wants_thresholds(task: TaskLike, metric: str) -> bool:
    """Whether the metric reads decisions that the likeliest label does not serve."""
    found = METRICS[check_metric(metric, task.kind)]
    return found.of is not None and not (task.kind == "classify" and found.name == "f1_micro")


def prepare(
    recipe: Recipe, task: TaskLike, logits: Mapping[str, np.ndarray], targets: np.ndarray, metric: str, seed: int
) -> Candidate | None:
    """The predictor fitted on all rows, and what it does on rows that it was not fitted on. None where it has nothing to offer."""
    logits = {m: logits[m] for m in recipe.names()}
    if len(targets) < FEWEST_ROWS or not all(np.isfinite(z).all() for z in logits.values()):
        return None

    def fit(some: Logits, right: np.ndarray) -> Predictor | None:
        return fit_recipe(recipe, task, some, right, metric, seed)

    predictor = fit(logits, targets)
    scored: Scored | None = cross_fitted(task, fit, logits, targets, seed) if predictor is not None else None
    if predictor is None or scored is None:
        return None
    return Candidate(predictor, scored, fitted_numbers(task, predictor))
