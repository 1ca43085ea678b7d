"""What a search may move of a strategy: its `Tunable` settings, around the calibrated prior.

An axis is one setting by its path ("optimizer.lr"); a point gives some of them a number. The learning rate is searched within a factor
of eight each way of its prior, the others within their own limits. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any, TypeVar, get_args

from pydantic import BaseModel

from multistep.strategy import Training
from multistep.types import Spec, Tunable

Point = Mapping[str, float]
T = TypeVar("T", bound=Training)

RATE_FACTOR = 8.0  # each way
NUDGE = 1.25  # of a setting on a logarithmic scale, each way; a tenth of the range of another
SEARCHED = ("optimizer.lr", "optimizer.weight_decay", "dropout", "objective.label_smoothing")


class Axis(Spec):
    """One setting. `values`: a choice among these in place of the range."""

    path: str
    low: float
    high: float
    log: bool = False
    live: bool = False
    values: tuple[float, ...] = ()

    def at(self, share: float) -> float:
        """The setting at so much of its range, 0..1."""
        if self.values:
            return self.values[min(len(self.values) - 1, int(share * len(self.values)))]
        if self.log:
            return _rounded(self.low * (self.high / self.low) ** share)
        return _rounded(self.low + (self.high - self.low) * share)

    def inside(self, value: float) -> float:
        """The nearest setting that may be taken."""
        return min(self.high, max(self.low, value))

    def moved(self, value: float, up: bool) -> float:
        """A neighbour, inside of the range."""
        if self.log:
            value = max(value, self.low) * (NUDGE if up else 1 / NUDGE)
        else:
            value += (0.1 if up else -0.1) * (self.high - self.low)
        return _rounded(self.inside(value))


class Space(Spec):
    """The axes of a search."""

    axes: tuple[Axis, ...]

    def draw(self, random: Random) -> dict[str, float]:
        """Any point, every axis evenly over its scale."""
        return {axis.path: axis.at(random.random()) for axis in self.axes}

    def nearest(self, strategy: Training) -> dict[str, float]:
        """The point at which a strategy is, or the nearest to it."""
        return {axis.path: axis.inside(value_of(strategy, axis.path)) for axis in self.axes}

    def suggest(self, trial: Any) -> dict[str, float]:
        """A point that a trial of Optuna proposes."""
        found = {}
        for a in self.axes:
            if a.values:
                found[a.path] = trial.suggest_categorical(a.path, list(a.values))
            else:
                found[a.path] = _rounded(trial.suggest_float(a.path, a.low, a.high, log=a.log))
        return found

    def nudge(self, point: Point, prior: Training, random: Random) -> dict[str, float]:
        """A neighbour: every live setting one step up or down. What is not live stays, so that a training goes on with it."""
        here = {axis.path: point.get(axis.path, value_of(prior, axis.path)) for axis in self.axes}
        return {
            **here, **{a.path: a.moved(here[a.path], random.random() < 0.5) for a in self.axes if a.live},
        }  # fmt: skip


def space_of(prior: Training, fixed: Iterable[str] = (), batches: bool = False) -> Space:
    """The searched settings that this strategy has and that nobody has fixed. `batches`: half and twice the batch too."""
    axes = []
    for path in SEARCHED:
        if path == "optimizer.lr" and prior.optimizer.closure:
            continue  # a solved step has its own length
        if path in fixed or (found := _tunable(prior, path.split("."))) is None:
            continue
        low, high, log, live = found
        if path == "optimizer.lr":
            rate = prior.optimizer.lr
            low, high = max(low, rate / RATE_FACTOR), min(high, rate * RATE_FACTOR)
        if low < high:
            axes.append(Axis(path=path, low=low, high=high, log=log, live=live))
    if batches and "batch_size" not in fixed and prior.batch_size >= 8:
        size = prior.batch_size
        axes.append(Axis(path="batch_size", low=size // 2, high=2 * size, values=(size // 2, size, 2 * size)))
    return Space(axes=tuple(axes))


def value_of(strategy: Training, path: str) -> float:
    """What a strategy has there; 0 where that is None."""
    found: Any = strategy.model_dump()
    for key in path.split("."):
        found = found[key]
    return float(found or 0.0)


def settled(strategy: T, point: Point) -> T:
    """The strategy with a point's settings."""
    data = strategy.model_dump()
    for path, value in point.items():
        *above, key = path.split(".")
        owner = data
        for step in above:
            owner = owner[step]
        owner[key] = int(value) if key == "batch_size" else value
    return type(strategy).model_validate(data)


def said(point: Point) -> str:
    """'lr 0.0003, dropout 0.1' for the journal; 'the prior' for an empty point."""
    return ", ".join(f"{path.rpartition('.')[2]} {value:.3g}" for path, value in point.items()) or "the prior"


def _tunable(spec: BaseModel, path: Sequence[str]) -> Tunable | None:
    """How the setting there may be moved; None where this member has no such setting, or has none set."""
    info = type(spec).model_fields.get(path[0])
    if info is None:
        return None
    value = dict(spec)[path[0]]
    if len(path) > 1:
        return _tunable(value, path[1:]) if isinstance(value, BaseModel) else None
    if value is None:
        return None
    # of `Annotated[float, ...] | None` the marks are inside
    marks = [*info.metadata, *(m for a in get_args(info.annotation) for m in getattr(a, "__metadata__", ()))]
    return next((m for m in marks if isinstance(m, Tunable)), None)


def _rounded(value: float) -> float:
    """Three digits: what a journal says is what was run."""
    return float(f"{value:.3g}")
