"""What tuning of a finished model's writing does with a trial: measure what stands, try another way.

A way is asked for one request after the other first, as a server would be: one that is clearly too slow is refused after a few, one
that breaks the limit before its texts are judged. Texts are compared with those of what stands on the same records.
Shapes: N records, S statistics of a metric.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from multistep.budget import Clock
from multistep.controllers.decoding import CHEAPER, DecodingProblem
from multistep.data.cells import Record
from multistep.engines import Agreement, agree_texts
from multistep.metrics.texts import LANGUAGE_METRICS, compare_rows, judge_rows, measure_rows, statistics
from multistep.metrics.verdicts import looked, slow
from multistep.policy import Entry, Latency, Policy, admit, front, one_by_one
from multistep.predictors.ways import Way, one_text, read_way, words
from multistep.standing import Stood, ways
from multistep.strategy import Profile, Trial, TryWay
from multistep.tune.segment import Record as JournalRecord
from multistep.types import Apart, Cost, Looked, Outcome, Slow, Verdict
from multistep.writing import Neural

FIRST = 3  # requests, after which a way that is clearly too slow is stopped
CLEARLY = 1.5  # times the limit, by the fastest of them
LATENCY_SHARE = 0.01  # of the budget: timing single requests ends after it, with 20 at least
PASS_SHARE = 1 / 60  # of the budget: writing all judged records as what stands does
JUDGED = (50, 2000)  # records
_SAMPLE = 32  # records, by which a pass is estimated
AGREED = 64  # records on which an engine has to agree

Run = Generator[JournalRecord, None, Outcome]
Ship = Callable[[Way, dict[str, Any], Policy], None]


class Engines(Protocol):
    """What the model could write with, beside our own engine."""

    def runtimes(self) -> list[tuple[str, dict[str, Any]]]:
        """By name."""
        ...

    def writer(self, engine: Mapping[str, Any]) -> Neural:
        """The model on this engine; empty: on our own. Raises UserError."""
        ...


class OurOwn:
    """No engine but ours."""

    def __init__(self, neural: Neural):
        self._neural = neural

    def runtimes(self) -> list[tuple[str, dict[str, Any]]]:
        return []

    def writer(self, engine: Mapping[str, Any]) -> Neural:
        return self._neural


class LanguagePrediction:
    """The bench of tuning how a model writes. `records`: what is judged, the first so many of it. `data`: what they are, in words."""

    def __init__(
        self, neural: Neural, problem: DecodingProblem, records: Sequence[Record], data: str, clock: Clock,
        stop: Callable[[], int], ship: Ship, machine: Mapping[str, Any] | None = None, engines: Engines | None = None,
    ):  # fmt: skip
        self.engines = engines or OurOwn(neural)
        self.neural, self.problem, self.records, self.clock, self.stop = neural, problem, list(records), clock, stop
        self.data, self.machine = data, dict(machine or {})
        self.stood = Stood()
        self.judged = 0
        self._ship = ship
        self._rows: dict[str, np.ndarray] = {}

    def run(self, trial: Trial) -> Run:
        match trial.action:
            case Profile():
                return self._measure(trial)
            case TryWay() as action:
                return self._try(trial, action)
        raise AssertionError(f"{trial.action.kind} is no way to write")

    # ------------------------------------------------------------------ standing

    def apply(self, trial: Trial, outcome: Outcome) -> bool:
        """Take an outcome into the standing; whether another way stands. Depends on the outcome alone, so it replays."""
        if isinstance(trial.action, Profile):
            self.judged = int(outcome.facts["judged"])
        self.stood, taken = ways(self.stood, trial, outcome)
        return taken

    @property
    def incumbent(self) -> Entry:
        return self.stood.entry

    def standing(self) -> dict[str, Any] | None:
        return self.stood.incumbent

    def families(self) -> dict[str, str]:
        return {}

    def ship(self, policy: Policy | None = None) -> None:
        self._ship(read_way(self.incumbent.predictor), self.incumbent.engine, policy or self.policy())

    def policy(self, skipped: Sequence[Mapping[str, str]] = ()) -> Policy:
        """All that was found so far. `skipped`: what was not begun, and why."""
        p, now = self.problem, self.stood
        best = front(now.entries, p.metric, LANGUAGE_METRICS[p.metric].higher_is_better)
        return Policy(
            metric=p.metric, limit=p.limit, rows=self.judged, data=self.data, default=now.entries[0].name,
            pick=now.entry.name, rule=now.rule, entries=now.entries, front=best, refused=(*now.refused, *map(dict, skipped)),
            machine=self.machine,
        )  # fmt: skip

    # ------------------------------------------------------------------ trials

    def _measure(self, trial: Trial) -> Run:
        started, way, engine = time.monotonic(), self.problem.default, self.problem.engine
        latency = self._latency(way, engine)
        begun = time.perf_counter()
        sample = self.records[:_SAMPLE]
        self._write(way, engine, sample)
        row_s = (time.perf_counter() - begun) / len(sample)
        affordable = int(PASS_SHARE * self.problem.budget / max(1e-9, row_s))
        self.judged = min(len(self.records), JUDGED[1], max(JUDGED[0], affordable))
        yield "Noted", {"trial": trial.id, "what": "timed", "facts": {"ms": latency.mean, "judged": self.judged}}
        outcome = self._outcome(way, engine, latency, None, started)
        found = [{"name": name, "runtime": runtime} for name, runtime in self.engines.runtimes()]
        return outcome.with_(facts={**outcome.facts, "judged": self.judged, "engines": found})

    def _agreement(self, way: Way, engine: dict[str, Any]) -> Agreement:
        """With our own engine, in the same way."""
        own, other = self.engines.writer({}), self.engines.writer(engine)
        own.decoding = other.decoding = way
        metric = self.problem.metric
        return agree_texts(own, other, self.records[:AGREED], metric if any(r.targets for r in self.records) else None)

    def _try(self, trial: Trial, action: TryWay) -> Run:
        started, limit, way, engine = time.monotonic(), self.problem.limit, action.way, _kept(action)
        yield (
            "Noted",
            {"trial": trial.id, "what": "decoding", "facts": {**way.model_dump(mode="json"), "engine": engine}},
        )
        if limit is not None and (first := self._first(way, engine)) > CLEARLY * limit.ms:
            by = Slow(statistic="fastest", ms=first, n=FIRST, limit_ms=limit.ms, times=CLEARLY)
            return self._refused(way, engine, slow(by), first, started)
        if engine and engine != self.incumbent.engine:
            agreement = self._agreement(way, engine)
            yield "Noted", {"trial": trial.id, "what": "agreement", "facts": agreement.model_dump()}
            if not agreement.ok:
                by = Apart(same=agreement.same, points=agreement.points, words=agreement.words)
                verdict = Verdict(accept=False, rule=agreement.words, by=by)
                return self._refused(way, engine, verdict, 0.0, started)
        if action.share < 1:
            return self._looked(way, engine, action.share, started)
        latency = self._latency(way, engine)
        if limit is not None and not latency.within(limit):
            took = getattr(latency, limit.statistic)
            by = Slow(statistic=limit.statistic, ms=took, n=latency.n, limit_ms=limit.ms)
            return self._refused(way, engine, slow(by), latency.mean, started)
        verdict = self._verdict(way, engine, latency, trial)
        return self._outcome(way, engine, latency, verdict, started)

    def _looked(self, way: Way, engine: dict[str, Any], share: float, started: float) -> Outcome:
        """What it is worth on a part of the records: a search drops it or looks at more of them. What was written is kept for that."""
        count = max(2, round(share * self.judged))
        metric, rows_NS = self.problem.metric, self._statistics(way, engine, count)
        begun = time.perf_counter()
        self._write(way, engine, self.records[:1])
        ms = 1000 * (time.perf_counter() - begun)
        verdict = looked(Looked(at=count, of=self.judged))
        return Outcome(
            metrics={metric: measure_rows(metric, rows_NS, self.problem.seed)}, verdict=verdict,
            cost=Cost(wall_s=time.monotonic() - started), facts={"looked": named(way, engine), "ms": ms},
        )  # fmt: skip

    def _verdict(self, way: Way, engine: dict[str, Any], latency: Latency, trial: Trial) -> Verdict:
        metric, seed, limit, now = self.problem.metric, self.problem.seed, self.problem.limit, self.incumbent
        new_NS, old_NS = self._statistics(way, engine), self._statistics(read_way(now.predictor), now.engine)
        better = judge_rows(metric, new_NS, old_NS, seed, trial.alpha)
        compared, saves = compare_rows(metric, new_NS, old_NS, seed), trial.stage in CHEAPER
        best, anchor = self.stood.best(metric, LANGUAGE_METRICS[metric].higher_is_better, limit), None
        if best.name != now.name:
            anchor = compare_rows(metric, new_NS, self._statistics(read_way(best.predictor), best.engine), seed)
        made_up = LANGUAGE_METRICS[metric].zero_one and not saves  # an engine was found to write the same
        return admit(better, compared, latency, now.latency, limit, anchor, saves, made_up)

    def _outcome(
        self, way: Way, engine: dict[str, Any], latency: Latency, verdict: Verdict | None, started: float
    ) -> Outcome:
        entry = self._entry(way, engine, latency)
        return Outcome(
            state=entry["name"], metrics=entry["metrics"], verdict=verdict,
            cost=Cost(wall_s=time.monotonic() - started), facts={"entry": entry, "ms": latency.mean},
        )  # fmt: skip

    def _refused(self, way: Way, engine: dict[str, Any], verdict: Verdict, ms: float, started: float) -> Outcome:
        cost = Cost(wall_s=time.monotonic() - started)
        return Outcome(verdict=verdict, cost=cost, facts={"refused": named(way, engine), "ms": ms})

    def _entry(self, way: Way, engine: dict[str, Any], latency: Latency) -> dict[str, Any]:
        value = measure_rows(self.problem.metric, self._statistics(way, engine), self.problem.seed)
        entry = Entry(
            name=named(way, engine), predictor=way.model_dump(mode="json"), engine=engine,
            metrics={self.problem.metric: value}, latency=latency,
        )  # fmt: skip
        return entry.model_dump(mode="json")

    # ------------------------------------------------------------------ writing

    def _write(self, way: Way, engine: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
        writer = self.engines.writer(engine)
        writer.decoding = way
        return [str(p.value) for p in writer.write(records)]

    def _statistics(self, way: Way, engine: dict[str, Any], count: int | None = None) -> np.ndarray:
        """[N,S] of the first `count` judged records, or of all; each is written once in a process for each way."""
        name, count = named(way, engine), self.judged if count is None else count
        done = len(self._rows.get(name, ()))
        if done < count:
            records = self.records[done:count]
            texts = self._write(way, engine, records)
            new_NS = statistics(self.problem.metric, texts, [r.targets for r in records])
            self._rows[name] = np.concatenate([self._rows[name], new_NS]) if done else new_NS
        return self._rows[name][:count]

    def _first(self, way: Way, engine: Mapping[str, Any]) -> float:
        """Milliseconds of the fastest of the first few requests, each alone."""
        took = []
        for record in self.records[:FIRST]:
            start = time.perf_counter()
            self._write(way, engine, [record])
            took.append(1000 * (time.perf_counter() - start))
        return min(took)

    def _latency(self, way: Way, engine: Mapping[str, Any]) -> Latency:
        return one_by_one(lambda r: self._write(way, engine, [r]), self.records, LATENCY_SHARE * self.problem.budget)


def named(way: Way, engine: Mapping[str, Any]) -> str:
    """'4 beams on ctranslate2-fp32, 1 thread'."""
    if not engine:
        return words(way)
    lookup = f"-lookup{engine['lookup']}" if engine.get("lookup") else ""
    threads = f", {engine['threads']} thread" + "s" * (engine["threads"] > 1) if engine.get("threads") else ""
    return f"{words(way)} on {engine['runtime']}-{engine['dtype']}{lookup}{threads}"


def _kept(action: TryWay) -> dict[str, Any]:
    """The engine, where the way makes use of it: draws and several texts of a request are our own engine's."""
    return dict(action.engine) if one_text(action.way) else {}
