"""What prediction may cost and what was chosen for it: limits, measured entries, the Pareto front, the rule of acceptance. No torch.

An entry is one way to predict (a predictor on an engine) with its quality on held-out rows and the latency of one request on
this machine. A policy is the entries that were measured, the one that was picked and why; it is kept in `multistep.json`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import Field

from multistep.metrics.verdicts import admitted
from multistep.types import Admitted, Comparison, Finite, Gain, MetricValue, Spec, UserError, Verdict

_WARM_UP = 3
_LIMIT = re.compile(r"(p50|p95|p99|mean)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s)")

Statistic = Literal["p50", "p95", "p99", "mean"]
T = TypeVar("T")


class Limit(Spec):
    """What one request may take, at this quantile of requests or on average."""

    statistic: Statistic = "p95"
    ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @classmethod
    def read(cls, text: str) -> Self:
        """Of "p95=20ms". Raises UserError."""
        found = _LIMIT.fullmatch(text.strip())
        if found is None or float(found[2]) == 0:
            raise UserError(f"latency: {text!r} is no limit. Give one such as p95=20ms, p50=5ms, p99=1s or mean=3ms.")
        return cls(statistic=found[1], ms=float(found[2]) * (1000 if found[3] == "s" else 1))  # pyright: ignore[reportArgumentType]

    def __str__(self) -> str:
        return f"{self.statistic} {self.ms:g} ms"


class Latency(Spec):
    """Of `n` requests answered one after the other, each alone."""

    p50: float
    p95: float
    p99: float
    mean: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        ms = 1000 * np.asarray(seconds)
        p50, p95, p99 = (float(np.quantile(ms, q)) for q in (0.5, 0.95, 0.99))
        return cls(p50=p50, p95=p95, p99=p99, mean=float(ms.mean()), n=len(ms))

    def within(self, limit: Limit | None) -> bool:
        return limit is None or getattr(self, limit.statistic) <= limit.ms


class Entry(Spec):
    """One way to predict, measured. `predictor`: how answers are made of the models' outputs or how texts are written; `engine`: what
    the models run on. Both as JSON."""

    name: str
    predictor: dict[str, Any]
    engine: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, MetricValue]
    latency: Latency
    facts: dict[str, Any] = Field(default_factory=dict)
    rule: str = ""  # why it was taken or not


class Policy(Spec):
    metric: str
    limit: Limit | None
    rows: int  # that were judged
    data: str  # what they are
    default: str  # the entry that stood before
    pick: str
    rule: str
    entries: tuple[Entry, ...]
    front: tuple[str, ...]
    refused: tuple[dict[str, str], ...] = ()  # name, why: what was not measured or not allowed
    machine: dict[str, Any] = Field(default_factory=dict)
    serving: dict[str, Any] = Field(default_factory=dict)  # threads, batch, texts_s: as a busy server runs the pick

    def entry(self, name: str) -> Entry:
        return next(e for e in self.entries if e.name == name)


def front(entries: Sequence[Entry], metric: str, higher_is_better: bool) -> tuple[str, ...]:
    """The entries than which none is both faster and better, the fastest first."""
    sign = 1.0 if higher_is_better else -1.0
    best, kept = -np.inf, []
    for e in sorted(entries, key=lambda e: (e.latency.mean, -sign * e.metrics[metric].value)):
        if (value := sign * e.metrics[metric].value) > best:
            best = value
            kept.append(e.name)
    return tuple(kept)


def one_by_one(call: Callable[[T], Any], requests: Sequence[T], seconds: float, least: int = 20) -> Latency:
    """The latency of requests that come one after the other, the first few left out; ends after `seconds`, with at least so many."""
    for request in requests[:_WARM_UP]:
        call(request)
    took: list[float] = []
    begun = time.perf_counter()
    for request in requests:
        start = time.perf_counter()
        call(request)
        took.append(time.perf_counter() - start)
        if len(took) >= least and time.perf_counter() - begun > seconds:
            break
    return Latency.of(took)


def side_by_side(
    new: Callable[[T], Any], old: Callable[[T], Any], requests: Sequence[T], seconds: float, least: int = 20
) -> tuple[Latency, Latency]:
    """The latencies of two ways to answer, request by request in turns: what the machine does meanwhile happens to both."""
    for request in requests[:_WARM_UP]:
        new(request)
        old(request)
    took: list[tuple[float, float]] = []
    begun = time.perf_counter()
    for place, request in enumerate(requests):
        start = time.perf_counter()
        (new, old)[place % 2](request)
        middle = time.perf_counter()
        (old, new)[place % 2](request)
        end = time.perf_counter()
        first, second = middle - start, end - middle
        took.append((second, first) if place % 2 else (first, second))
        if len(took) >= least and end - begun > seconds:
            break
    return Latency.of([new_s for new_s, _ in took]), Latency.of([old_s for _, old_s in took])


def admit(
    better: Verdict, compared: Comparison, candidate: Latency, incumbent: Latency, limit: Limit | None,
    best: Comparison | None = None, saves: bool = False, made_up: bool = False,
) -> Verdict:  # fmt: skip
    """Whether a candidate takes the incumbent's place: it has to keep the limit, and be better, or the same and cheaper. `better`: the
    paired verdict on quality; `compared`: the paired comparison on the metric; `best`: that with the best that has stood, so that many
    small losses do not add up; `saves`: only what is cheaper is looked for; `made_up`: answers are right or wrong, and one row more, on which
    the two differ, is made up, so that a few on which they agree are no certainty."""
    by = Admitted(
        quality=better.by if isinstance(better.by, Gain | Finite) else None, gain=better.evidence,
        mean_ms=(candidate.mean, incumbent.mean), saves=saves, made_up=made_up,
    )  # fmt: skip
    if limit is not None:
        at_ms = (getattr(candidate, limit.statistic), getattr(incumbent, limit.statistic))
        by = by.with_(statistic=limit.statistic, limit_ms=limit.ms, at_ms=at_ms)
    return admitted(better, (compared,) if best is None else (compared, best), by)
