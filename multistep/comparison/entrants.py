"""Who takes part in a comparison, the one knob that each of them may tune, and how its value is looked for. No torch.

Every optimizer has one knob: its learning rate (for prodigy the multiplier of its estimate, for newton and lbfgs the length of the
step), for newton_cg the damping. A knob that was given is not tuned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from multistep.config import KINDS, OptimizerConfig
from multistep.optimizers.base import Rate, Regime
from multistep.schedules import Constant, Linear, Schedule
from multistep.types import Spec, UserError, nearest

RATE_STEP = 3.0  # between neighbouring rates; a calibrated range is five to a hundred times wide
DAMPING_STEP = 10.0
DAMPING = Rate(0.1, 1e-4, 10.0, "the default of the optimizer; the range of Martens 2010, section 4.1, is of this kind")


class Entrant(Spec):
    """An optimizer as it takes part. `name` is how it was asked for and how its rows are known."""

    name: str
    config: OptimizerConfig
    batch_size: int  # examples
    whole: bool  # whether a batch is all of train
    knob: str  # "lr" or "damping"; "" when its value was given
    prior: float
    low: float
    high: float

    @property
    def step(self) -> float:
        return DAMPING_STEP if self.knob == "damping" else RATE_STEP

    def at(self, value: float) -> Any:
        """The optimizer with its knob at this value."""
        if self.knob == "damping":
            settings = {**self.config.model_dump(), "damping": value}
            return OptimizerConfig.model_validate(settings).at(self.config.lr or 1.0)
        return self.config.at(value)

    def schedule(self, given: Schedule) -> Schedule:
        """The one that all follow, but for two: schedule_free averages in place of a decay, and a solved step on all of train has no
        noise to be averaged away."""
        if self.config.kind == "schedule_free":
            return Constant(warmup=given.warmup if isinstance(given, Linear) else Linear().warmup)
        if self.config.member.closure:
            return Constant(warmup=0.0) if self.whole else Linear(warmup=0.0)
        return given


def entrants(
    given: str | Sequence[str | Mapping[str, Any]],
    batch_size: int,
    rows: int,
    regime: Regime,
    scale: Mapping[str, float],
) -> list[Entrant]:
    """The optimizers by name ("adamw"), with a batch of their own ("lbfgs@all", "newton_cg@512"), or as a dictionary of settings
    with `kind`, perhaps `batch_size` and `name`. `scale`: what the priors of a kind are multiplied by (1 for those not in it).

    Raises UserError for one that is not known, naming the nearest, or that is there twice.
    """
    words = [w.strip() for w in given.split(",") if w.strip()] if isinstance(given, str) else list(given)
    found = [_entrant(w, batch_size, rows, regime, scale) for w in words]
    if len(found) < 2:
        raise UserError("optimizers: a comparison needs two or more. Write them like adamw,muon,sgd.")
    names = [e.name for e in found]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise UserError(f"optimizers: {twice!r} is there twice. Give one of them another 'name', or leave it out.")
    return found


def _entrant(
    given: str | Mapping[str, Any], batch_size: int, rows: int, regime: Regime, scale: Mapping[str, float]
) -> Entrant:
    if isinstance(given, str):
        kind, _, batch = given.partition("@")
        settings: dict[str, Any] = {"kind": kind, "name": given, **({"batch_size": batch} if batch else {})}
    else:
        settings = {"name": str(given.get("kind")), **given}
    name, kind = str(settings.pop("name")), settings.get("kind")
    if kind not in KINDS:
        raise UserError(f"optimizers: {kind!r} is not known.{nearest(str(kind), list(KINDS))}")
    size = _batch(settings.pop("batch_size", batch_size), rows, name)
    try:
        config = OptimizerConfig.model_validate(settings)
    except ValueError as error:
        cause = error.errors()[0].get("ctx", {}).get("error") if hasattr(error, "errors") else None  # pyright: ignore
        raise UserError(f"optimizers: {name}: {cause or error}") from None
    damped = kind == "newton_cg" and settings.get("globalization", "line_search") == "line_search"
    rate, by = (DAMPING, 1.0) if damped else (config.member.rates[regime], scale.get(str(kind), 1.0))
    was_given = settings.get("damping") if damped else config.lr
    knob = "" if was_given is not None else "damping" if damped else "lr"
    if damped and was_given is not None:  # what `at` is then told is the length of the step
        was_given = config.lr or 1.0
    prior = was_given if was_given is not None else rate.prior * by
    return Entrant(
        name=name, config=config, batch_size=size, whole=size >= rows, knob=knob, prior=prior, low=rate.low * by,
        high=rate.high * by,
    )  # fmt: skip


def _batch(given: Any, rows: int, name: str) -> int:
    if given == "all":
        return rows
    if not str(given).isdigit() or int(given) < 1:
        raise UserError(f"optimizers: {name}: {given!r} is no batch size. Write a number of examples, or 'all'.")
    return min(int(given), rows)


# ---------------------------------------------------------------------------------------------- the search


def next_value(entrant: Entrant, tried: Sequence[tuple[float, float]]) -> float:
    """Where to look next, after (value, score) pairs, higher better, -inf for a run that diverged: the prior first; then a step up and
    on from the best one so far; with both neighbours known, half a step toward the better side."""
    if not tried:
        return entrant.prior
    best = max(tried, key=lambda pair: pair[1])[0]
    careful = 1.0 if entrant.knob == "damping" else -1.0
    if all(math.isinf(score) for _, score in tried):  # all diverged: go on to where it is safer
        best = (max if careful > 0 else min)(value for value, _ in tried)
        return best * entrant.step**careful
    known = dict(tried)
    for factor in (entrant.step, 1 / entrant.step, entrant.step**0.5, entrant.step**-0.5):
        other = min(max(best * factor, entrant.low), entrant.high)
        apart = min(abs(math.log(other / value)) for value in known)
        if apart > 0.45 * math.log(entrant.step):
            return other
    above = [v for v in known if v > best]
    return math.sqrt(best * (min(above) if above else max(v for v in known if v < best)))


def chosen(entrant: Entrant, tried: Sequence[tuple[float, float]]) -> tuple[float, str]:
    """The value to train with, and a word when the search ended at its edge."""
    if not tried:
        return entrant.prior, "given"
    value, score = max(tried, key=lambda pair: pair[1])
    values = [v for v, _ in tried]
    if math.isinf(score):
        return next_value(entrant, tried), "every probe diverged"
    if len(values) > 1 and value in (min(values), max(values)):
        end = "highest" if value == max(values) else "lowest"
        limit = entrant.high if value == max(values) else entrant.low
        return value, f"the {end} tried" + (", where its range ends" if abs(math.log(value / limit)) < 1e-6 else "")
    return value, ""
