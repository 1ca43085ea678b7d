"""What tuning of a finished run's answers does with a trial: measure models and engines, try a recipe, make a promise.

A recipe is fitted as a whole and judged out of fold; its latency is that of single requests, in turns with what stands.
Shapes: N rows, K outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from pydantic import TypeAdapter

from multistep import engines
from multistep.budget import Clock
from multistep.controllers.answering import CHEAPER, AnsweringProblem
from multistep.evaluate import Engine, TextModel
from multistep.metrics import Scored
from multistep.metrics.verdicts import looked
from multistep.policy import Entry, Latency, Policy, admit, front, one_by_one, side_by_side
from multistep.predictors import Predictor, Single, predict
from multistep.predictors.base import Logits
from multistep.predictors.conformal import fit_conformal
from multistep.predictors.fit import baseline, cross_fitted, fit_again, is_fitted
from multistep.predictors.recipe import Recipe, prepare, recipe_of
from multistep.standing import Stood, answers
from multistep.strategy import Profile, Promise, Serving, Trial, TryRecipe
from multistep.tune.quality import Quality
from multistep.tune.segment import Record
from multistep.types import Cost, Looked, Outcome, Verdict, Wanted

LATENCY_SHARE = 0.01  # of the budget: timing single requests ends after it, with 20 at least
TIMED = 200  # requests at most
AGREED = 256  # rows on which an engine has to agree
TOGETHER, BATCHES = 128, (1, 8, 32, 64)  # texts, of which so many are answered together

Run = Generator[Record, None, Outcome]
_PREDICTOR: TypeAdapter[Predictor] = TypeAdapter(Predictor)


class Standing(NamedTuple):
    """What would be served: a predictor, and what the encoder runs on."""

    predictor: Predictor
    engine: dict[str, Any]


Ship = Callable[[Standing, Policy], None]


class Models(Protocol):
    """The models of a finished run, by name."""

    def text_model(self, name: str, engine: Mapping[str, Any]) -> TextModel:
        """The model ("linear", "encoder", "encoder@32"), the encoder on this engine; empty: as it was trained. Raises UserError."""
        ...

    def runtimes(self) -> list[tuple[str, dict[str, Any]]]:
        """What else the encoder could run on here, by name."""
        ...


@dataclass
class Rows:
    """Texts with what is right, mixed by the seed. `words`: what they are."""

    texts: list[str]
    targets: np.ndarray
    words: str


class Before(NamedTuple):
    """What made the predictor that stands before the tuning: the metric that its thresholds serve, the rows that it was fitted to, in words;
    `seen`: those here, the ones set aside included, are or may be among them."""

    metric: str
    data: str
    seen: bool


class Answering:
    """The bench of tuning how a run answers. `rows`: to fit and judge on; `aside`: for the promise alone; `before`: how what stands came to
    be."""

    def __init__(
        self, models: Models, problem: AnsweringProblem, rows: Rows, aside: Rows | None, clock: Clock, stop: Callable[[], int],
        ship: Ship, machine: Mapping[str, Any], before: Before,
    ):  # fmt: skip
        self.models, self.problem, self.rows, self.aside, self.clock, self.stop = (
            models,
            problem,
            rows,
            aside,
            clock,
            stop,
        )
        self.machine, self.before = dict(machine), before
        self.stood = Stood()
        self.quality = Quality(problem)
        self.serving: dict[str, Any] = {}
        self._ship = ship
        self._logits: dict[tuple[str, str], np.ndarray] = {}
        self._scored: dict[str, Scored] = {}

    def run(self, trial: Trial) -> Run:
        match trial.action:
            case Profile():
                return self._measure(trial)
            case TryRecipe() as action:
                return self._try(trial, action)
            case Promise() as action:
                return self._promise(trial, action)
            case Serving():
                return self._serving(trial)
        raise AssertionError(f"{trial.action.kind} is no way to answer")

    # ------------------------------------------------------------------ standing

    def apply(self, trial: Trial, outcome: Outcome) -> bool:
        """Take an outcome into the standing; whether something else stands. Depends on the outcome alone, so it replays."""
        self.serving = outcome.facts.get("serving", self.serving)
        self.stood, taken = answers(self.stood, trial, outcome)
        return taken

    @property
    def incumbent(self) -> Entry:
        return self.stood.entry

    def standing(self) -> dict[str, Any] | None:
        return self.stood.incumbent

    def families(self) -> dict[str, str]:
        return {}

    def ship(self, policy: Policy | None = None) -> None:
        now = self.incumbent
        self._ship(Standing(_PREDICTOR.validate_python(now.predictor), now.engine), policy or self.policy())

    def policy(self, skipped: Sequence[Mapping[str, str]] = ()) -> Policy:
        """All that was found so far. `skipped`: what was not begun, and why."""
        q, now = self.quality, self.stood
        return Policy(
            metric=q.name, limit=self.problem.limit, rows=len(self.rows.texts), data=self.rows.words, default=now.entries[0].name,
            pick=now.entry.name, rule=now.rule, entries=now.entries, front=front(now.entries, q.name, q.higher_is_better),
            refused=(*now.refused, *map(dict, skipped)), machine=self.machine, serving=self.serving,
        )  # fmt: skip

    # ------------------------------------------------------------------ trials

    def _measure(self, trial: Trial) -> Run:
        """What stands; the latency of every model alone; which engines agree, and theirs."""
        started, p = time.monotonic(), self.problem
        as_it_is = Standing(p.default, p.engine)
        latency = one_by_one(self._answer(as_it_is), self._requests(), self._seconds())
        ms = {m: self._model_ms(m, p.engine) for m in p.models}
        yield "Noted", {"trial": trial.id, "what": "timed", "facts": {"ms": latency.mean, "models": ms}}
        found, refused = [], []
        for name, runtime in self.models.runtimes() if "encoder" in p.models else []:
            if runtime == p.engine:
                continue
            reference, other = self._model("encoder", {}), self._model("encoder", runtime)
            agreement = engines.agree(reference, other, self.rows.texts[:AGREED], p.task)
            yield "Noted", {"trial": trial.id, "what": "agreement", "facts": {"engine": name, **agreement.model_dump()}}
            if agreement.ok:
                found.append({"name": name, "runtime": runtime, "ms": self._model_ms("encoder", runtime)})
            else:
                refused.append({"name": name, "why": agreement.words})
        scored = self._as_it_stands()
        recipe = recipe_of(p.default, p.task, self._outputs(p.default.models(), p.engine))
        fitted = {"for": self.before.metric, "to": self.before.data}
        facts: dict[str, Any] = {"fitted": fitted, "out_of_fold": self.before.seen and is_fitted(p.default)}
        if recipe is not None:
            facts["recipe"] = recipe.model_dump(mode="json")
        entry = self._entry("as it stands", as_it_is, scored, latency, facts)
        return Outcome(
            state=entry.name, metrics=entry.metrics, cost=_wall(started),
            facts={"entry": entry.model_dump(mode="json"), "models": ms, "engines": found, "refused": refused},
        )  # fmt: skip

    def _try(self, trial: Trial, action: TryRecipe) -> Run:
        started, p, now = time.monotonic(), self.problem, self.incumbent
        engine = action.engine or now.engine
        outputs = self._outputs(action.recipe.names(), engine)
        if action.share < 1:
            return self._looked(action, outputs, started)
        found = prepare(action.recipe, p.task, outputs, self.rows.targets, self.quality.fitted_for, p.seed)
        if found is None:
            return Outcome(ok=False, failure=f"{action.recipe}: nothing to offer here", cost=_wall(started))
        yield "Noted", {"trial": trial.id, "what": "fitted", "facts": found.facts}
        new = Standing(found.predictor, engine if _encodes(action.recipe) else {})
        old = Standing(_PREDICTOR.validate_python(now.predictor), now.engine)
        latency, now_takes = side_by_side(self._answer(new), self._answer(old), self._requests(), self._seconds())
        same = now.facts.get("recipe") == action.recipe.model_dump(mode="json") and (
            self.before.seen or now.name != self.stood.entries[0].name
        )
        verdict = self._verdict(trial, found.scored, latency, now_takes, agreed=bool(action.engine) and same)
        fitted = {"for": self.quality.fitted_for, "to": self.rows.words}
        made = {**found.facts, "recipe": action.recipe.model_dump(mode="json"), "fitted": fitted}
        entry = self._entry(_name(action.recipe, new.engine), new, found.scored, latency, made)
        facts = {"entry": entry.model_dump(mode="json"), "ms": latency.mean, "beside_ms": now_takes.mean}
        return Outcome(state=entry.name, metrics=entry.metrics, verdict=verdict, cost=_wall(started), facts=facts)

    def _verdict(self, trial: Trial, new: Scored, latency: Latency, now_takes: Latency, agreed: bool) -> Verdict:
        """`agreed`: it is what stands on another engine, which was found to give the same. Of all else that they agree on a few rows says
        little."""
        q, limit, now = self.quality, self.problem.limit, self.incumbent
        best, anchor = self.stood.best(q.name, q.higher_is_better, limit), None
        if best.name != now.name:
            anchor = q.compared(new, self._known(best), not agreed)
        quality, compared = q.judged(new, self._known(now), trial.alpha), q.compared(new, self._known(now), not agreed)
        made_up = q.right_or_wrong and not agreed
        return admit(quality, compared, latency, now_takes, limit, anchor, trial.stage in CHEAPER, made_up)

    def _looked(self, action: TryRecipe, outputs: Mapping[str, np.ndarray], started: float) -> Outcome:
        """What it is worth on a part of the rows: a search drops it or looks at more of them."""
        count, p = max(2, round(action.share * len(self.rows.texts))), self.problem
        some = {name: logits_NK[:count] for name, logits_NK in outputs.items()}
        found = prepare(action.recipe, p.task, some, self.rows.targets[:count], self.quality.fitted_for, p.seed)
        if found is None:
            return Outcome(ok=False, failure=f"{action.recipe}: nothing to offer here", cost=_wall(started))
        verdict = looked(Looked(at=count, of=len(self.rows.texts)))
        measured = self.quality.measured(
            Scored(self.rows.targets[:count], found.scored.logits_NK, found.scored.decisions)
        )
        return Outcome(metrics=measured, verdict=verdict, cost=_wall(started), facts={"looked": str(action.recipe)})

    def _promise(self, trial: Trial, action: Promise) -> Run:
        started, p, now = time.monotonic(), self.problem, self.incumbent
        assert self.aside is not None, "a promise needs rows set aside for it"
        inner = _PREDICTOR.validate_python(now.predictor)
        fitted, note = now.facts.get("fitted"), ""
        outputs = self._outputs(inner.models(), now.engine)
        if now.name == self.stood.entries[0].name and self.before.seen and is_fitted(inner):
            inner = self._fitted_again(outputs, self.rows.targets)  # it was fitted to the rows set aside too
            fitted = {"for": self.before.metric, "to": self.rows.words}
            note = ", without which its numbers were fitted again"
        aside = {m: self._model(m, now.engine).logits(self.aside.texts) for m in inner.models()}
        found = fit_conformal(p.task, inner, aside, self.aside.targets, action.coverage)
        sizes = found.candidates(p.task, found.combine(p.task, outputs)).sum(axis=1)
        facts = {
            "coverage": action.coverage, "rests_on": found.rows, "withheld": float((sizes != 1).mean()), "candidates": float(sizes.mean()),
            "fitted_again": bool(note), "recipe": now.facts.get("recipe"), "fitted": fitted,
        }  # fmt: skip
        yield "Noted", {"trial": trial.id, "what": "promised", "facts": facts}
        rule = (
            f"asked for: on {found.rows} rows set aside{note}; it withholds {facts['withheld']:.1%} of the answers, "
            f"{facts['candidates']:.2f} candidates a row"
        )
        new = Standing(found, now.engine)
        entry = self._entry(f"{now.name}, promise {action.coverage:g}", new, self._known(now), now.latency, facts)
        return Outcome(
            state=entry.name, metrics=entry.metrics, verdict=Verdict(accept=True, rule=rule, by=Wanted(words=rule)), cost=_wall(started),
            facts={"entry": entry.model_dump(mode="json")},
        )  # fmt: skip

    def _serving(self, trial: Trial) -> Run:
        """Texts a second of what stands; the fewest texts together, and the fewest threads, that are within a tenth of the best. Of the
        numbers of threads that keep the limit for a request alone, or else of the one that comes nearest."""
        started, now, limit = time.monotonic(), self.incumbent, self.problem.limit
        predictor = _PREDICTOR.validate_python(now.predictor)
        texts, found, alone_ms = self.rows.texts[:TOGETHER], {}, dict[int, float]()
        for threads in sorted({1, max(1, int(self.machine.get("cores") or 1))}):
            engine = {**now.engine, "threads": threads} if now.engine else {}
            models = {m: self._model(m, engine) for m in predictor.models()}
            if limit is not None:
                alone_ms[threads] = getattr(self._alone(predictor, Engine(models, threads)), limit.statistic)
            for batch in BATCHES:
                runner, begun = Engine(models, threads, batch), time.perf_counter()
                for at in range(0, len(texts), batch):
                    predict(self.problem.task, predictor, runner, texts[at : at + batch])
                found[threads, batch] = len(texts) / (time.perf_counter() - begun)
        allowed = found
        if limit is not None:
            most = max(limit.ms, min(alone_ms.values()))
            allowed = {pair: speed for pair, speed in found.items() if alone_ms[pair[0]] <= most}
        best = max(allowed.values())
        threads, batch = min(pair for pair, speed in allowed.items() if speed >= 0.9 * best)
        told = {f"{t} threads, {b} together": round(s, 1) for (t, b), s in found.items()}
        serving = {"threads": threads, "batch": batch, "texts_s": told}
        if limit is not None:
            serving["alone_ms"] = {f"{t} threads": round(ms, 3) for t, ms in alone_ms.items()}
        yield "Noted", {"trial": trial.id, "what": "served", "facts": serving}
        return Outcome(cost=_wall(started), facts={"serving": serving})

    # ------------------------------------------------------------------ measuring

    def _model(self, name: str, engine: Mapping[str, Any]) -> TextModel:
        return self.models.text_model(name, engine)

    def _outputs(self, names: Sequence[str], engine: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Logits [N,K] of models on the judged rows; computed once in a process."""
        for name in names:
            key = (name, repr(engine) if name.startswith("encoder") else "")
            if key not in self._logits:
                self._logits[key] = self._model(name, engine).logits(self.rows.texts)
        return {m: self._logits[m, repr(engine) if m.startswith("encoder") else ""] for m in names}

    def _known(self, entry: Entry) -> Scored:
        """What an entry does on the judged rows; of one that an earlier process tried, made again as it was made then."""
        if entry.name not in self._scored:
            self._scored[entry.name] = self._judged_again(entry)
        return self._scored[entry.name]

    def _judged_again(self, entry: Entry) -> Scored:
        if entry.name == self.stood.entries[0].name:
            return self._as_it_stands()
        predictor, p = _PREDICTOR.validate_python(entry.predictor), self.problem
        outputs, found = self._outputs(predictor.models(), entry.engine), None
        if (recipe := entry.facts.get("recipe")) is not None:
            found = prepare(Recipe.parse(recipe), p.task, outputs, self.rows.targets, self.quality.fitted_for, p.seed)
        return found.scored if found is not None else baseline(p.task, predictor, outputs, self.rows.targets)

    def _as_it_stands(self) -> Scored:
        """What stood before, on the judged rows: as it is, or where it may have been fitted to them out of fold, as all candidates are."""
        p, targets = self.problem, self.rows.targets
        outputs, scored = self._outputs(p.default.models(), p.engine), None
        if self.before.seen and all(np.isfinite(z).all() for z in outputs.values()):
            scored = cross_fitted(p.task, self._fitted_again, outputs, targets, p.seed)
        return baseline(p.task, p.default, outputs, targets) if scored is None else scored

    def _fitted_again(self, outputs: Logits, targets: np.ndarray) -> Predictor:
        """What stood before, its numbers fitted to these rows alone."""
        p = self.problem
        return fit_again(p.task, p.default, outputs, targets, self.before.metric, p.seed)

    def _entry(
        self, name: str, standing: Standing, scored: Scored, latency: Latency, facts: Mapping[str, Any]
    ) -> Entry:
        self._scored[name] = scored
        return Entry(
            name=name, predictor=standing.predictor.model_dump(mode="json"), engine=standing.engine,
            metrics=self.quality.measured(scored), latency=latency, facts=dict(facts),
        )  # fmt: skip

    def _answer(self, standing: Standing) -> Callable[[str], Any]:
        """Answers one request, as a server does."""
        models = {m: self._model(m, standing.engine) for m in standing.predictor.models()}
        engine = Engine(models)
        return lambda text: predict(self.problem.task, standing.predictor, engine, [text])

    def _alone(self, predictor: Predictor, engine: Engine) -> Latency:
        return one_by_one(
            lambda text: predict(self.problem.task, predictor, engine, [text]), self._requests(), self._seconds()
        )

    def _model_ms(self, name: str, engine: Mapping[str, Any]) -> float:
        alone = self._answer(Standing(Single(model=name), dict(engine)))
        return one_by_one(alone, self._requests(), self._seconds()).mean

    def _requests(self) -> list[str]:
        return self.rows.texts[:TIMED]

    def _seconds(self) -> float:
        return LATENCY_SHARE * self.problem.budget


def _encodes(recipe: Recipe) -> bool:
    return any(m.startswith("encoder") for m in recipe.names())


def _name(recipe: Recipe, engine: Mapping[str, Any]) -> str:
    return f"{recipe} on {engine['runtime']}-{engine['dtype']}" if engine else str(recipe)


def _wall(started: float) -> Cost:
    return Cost(wall_s=time.monotonic() - started)
