"""The core types: read this first. No torch here.

A *trial* runs an *action* (a strategy, a predictor, a measurement) from a state; what came of it is an *outcome*;
a controller turns outcomes into the next trial. Everything in this file is frozen data that survives JSON.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

TaskKind = Literal["classify", "multilabel", "regress"]
Unit = Literal["seconds", "updates", "tokens"]


class UserError(ValueError):
    """Bad input. The message names the thing and the mend; the CLI prints it and exits with 2."""


class Interrupted(Exception):
    """SIGINT or SIGTERM came; everything is saved. `signal` is its number."""

    def __init__(self, signal: int):
        super().__init__(f"interrupted by signal {signal}")
        self.signal = signal


def nearest(word: str, known: Sequence[str]) -> str:
    """' Did you mean "x"?' for the known word closest to `word`, or a list of them all when nothing is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(sorted(known))}."


class Tunable(NamedTuple):
    """Marks a numeric field that a controller may move. `live`: without losing optimizer state."""

    low: float
    high: float
    log: bool = False
    live: bool = False


class Spec(BaseModel):
    """Frozen, JSON-able configuration. An unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str = "") -> Self:
        """Validate `data`; raises UserError with one line that names the key, the value and the mend."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(_first_problem(cls, error, where)) from None

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return type(self).model_validate({**self.model_dump(), **changes})


def _first_problem(cls: type[BaseModel], error: ValidationError, where: str) -> str:
    problem = error.errors()[0]
    if isinstance(cause := problem.get("ctx", {}).get("error"), UserError):
        return str(cause)
    path = [str(p) for p in problem["loc"]]
    key = ".".join(([where] if where else []) + path)
    if problem["type"] == "extra_forbidden":
        owner = _owner(cls, path[:-1])
        return f"unknown key {key!r}.{nearest(path[-1], list(owner.model_fields))}"
    if problem["type"] == "missing":
        return f"{key!r} is missing."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key!r}: {message} (got {problem['input']!r})."


def _owner(cls: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """The model class whose field the error path points into (members of unions are named by their `kind`)."""
    candidates = [cls]
    for step in path:
        of_kind = [m for m in candidates if "kind" in m.model_fields and m.model_fields["kind"].default == step]
        candidates = of_kind or [m for c in candidates for m in _models_below(c, step)] or candidates
    return candidates[0]


def _models_below(cls: type[BaseModel], step: str) -> list[type[BaseModel]]:
    if step in cls.model_fields:
        return _models_in(cls.model_fields[step].annotation)
    every = [m for f in cls.model_fields.values() for m in _models_in(f.annotation)]
    return [m for m in every if "kind" in m.model_fields and m.model_fields["kind"].default == step]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [m for a in getattr(annotation, "__args__", ()) for m in _models_in(a)]


# ---------------------------------------------------------------------------------------------- data and answers


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `label` is a str (classify), a tuple of str (multilabel), a float (regress) or None (unlabelled)."""

    text: str
    label: Any = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer. `confidence` is a probability in 0..1 (None for regression); `scores` maps labels to probabilities. `stage`: what of
    a cascade answered. `candidates`: the labels of which one is right with the promised probability, where that was asked for: with
    any number but one of them the answer is withheld."""

    value: Any
    confidence: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    stage: str = ""
    candidates: tuple[str, ...] | None = None

    @property
    def abstains(self) -> bool:
        return self.candidates is not None and len(self.candidates) != 1


class MetricValue(NamedTuple):
    value: float
    stderr: float


# ---------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class Measure:
    """What one update of the loop yields. `event` names something out of the ordinary ("nonfinite", "spike", "out of memory" ...)."""

    update: int
    tokens: int
    examples: int
    loss_nats: float
    lr: float
    grad_norm: float
    event: str = ""
    rows: tuple[int, ...] = ()  # the batch, named only when there is an event
    micro_batch: int = 0  # examples at once with which memory ran out: only with that event


class Cost(Spec):
    """What a trial spent. `wall_s` is a measurement; updates and tokens are exact."""

    wall_s: float = 0.0
    updates: int = 0
    tokens: int = 0


# ---------------------------------------------------------------------------------------------- decisions


class Comparison(Spec):
    """A paired comparison of a candidate with the incumbent over the same examples. Differences: candidate - incumbent,
    signed so that higher is better. `p` is one-sided: the chance of such a gain if there were none. `test`: where it comes from (paired
    t, exact McNemar, swapped pairs); `wins`, `losses`: of McNemar, the examples that only the candidate, only the incumbent has right;
    `p_worse`: of swapped pairs, the chance of such a loss: draws that come out the same are in both, so it is not 1 - p."""

    metric: str
    candidate: float
    incumbent: float
    difference: float
    stderr: float
    p: float
    n: int
    test: Literal["", "t", "mcnemar", "swap"] = ""
    wins: int | None = None
    losses: int | None = None
    p_worse: float | None = None


class Gain(Spec):
    """Better beyond noise on the first comparison; or it does not look worse on it, and is on the second better beyond noise at half of
    alpha. `least`: the gain on the first that rows which are too few for less may decide on; 0: they are enough."""

    kind: Literal["gain"] = "gain"
    alpha: float
    least: float = 0.0


class NotWorse(Spec):
    """Not worse beyond noise on any of the comparisons, each at `alpha`: more to learn from is taken unless it harms."""

    kind: Literal["not_worse"] = "not_worse"
    alpha: float


class Finite(Spec):
    """Whether all of the candidate's and of the incumbent's numbers are finite; one of them is not."""

    kind: Literal["finite"] = "finite"
    what: Literal["outputs", "losses"]
    candidate: bool
    incumbent: bool


class Admitted(Spec):
    """Of ways to predict: inside the limit, and better (what `quality` makes of `gain`), or the same and cheaper. Times: of a request, in
    milliseconds, for the candidate and for what stood; on average, and at the limit's statistic. `saves`: it is a look that pays nothing,
    so it is taken for nothing but being cheaper. `made_up`: where answers are right or wrong one row more, on which the two differ, is made
    up, so that a few on which they agree are no certainty."""

    kind: Literal["admitted"] = "admitted"
    quality: Gain | Finite | None
    gain: tuple[Comparison, ...]
    mean_ms: tuple[float, float]
    at_ms: tuple[float, float] | None = None  # None: there is no limit
    statistic: str = ""
    limit_ms: float | None = None
    saves: bool = False
    made_up: bool = False


class Slow(Spec):
    """A request takes longer than so many times the limit, by this statistic of `n` requests."""

    kind: Literal["slow"] = "slow"
    statistic: str
    ms: float
    n: int
    limit_ms: float
    times: float = 1.0


class Apart(Spec):
    """An engine's texts are not those of our own: the share that is the same, and the metric's loss in points, where it is known."""

    kind: Literal["apart"] = "apart"
    same: float
    points: float | None
    words: str


class Wanted(Spec):
    """Taken because it was asked for, whatever its numbers."""

    kind: Literal["wanted"] = "wanted"
    words: str


class Looked(Spec):
    """A look at a part of what judges, by which a search goes on or not: nothing is taken."""

    kind: Literal["looked"] = "looked"
    at: int
    of: int


By = Annotated[Gain | Finite | Admitted | Slow | Apart | Wanted | Looked | NotWorse, Field(discriminator="kind")]


class Verdict(Spec):
    """The decision on a candidate, the rule that made it in words, and the numbers the rule read. `by`: the rule as data, by which
    `metrics.verdicts.derived` makes the verdict again."""

    accept: bool
    rule: str
    evidence: tuple[Comparison, ...] = ()
    by: By | None = None


class Outcome(Spec):
    """What came of a trial: the only thing a controller learns. Scores are on the control or calibration split."""

    ok: bool = True
    failure: str = ""
    state: str | None = None  # the state or predictor id that the trial left
    metrics: dict[str, MetricValue] = Field(default_factory=dict)
    verdict: Verdict | None = None
    cost: Cost = Cost()
    remaining: float = 0.0  # of the budget, in its unit, after this trial
    facts: dict[str, Any] = Field(default_factory=dict)  # what else was measured (throughput, train loss, events ...)
    incumbent: dict[str, Any] | None = None  # the predictor that stands after this trial
    families: dict[str, str] = Field(default_factory=dict)  # the best state of each family after this trial
