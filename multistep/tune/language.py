"""What a language run does with a trial: profile, fit a cheap writer, train, average, decode, mix, read the test.

Candidates are compared on the same records of the control half: by the texts that they write, or by what the right answers cost
them where the metric is read off losses; where texts do not tell them apart, by losses if both have them and records are enough.
Shapes: N records, S statistics of a metric.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from multistep.budget import Clock
from multistep.controllers.language_plan import LanguageProblem, fewest, higher_is_better, trained
from multistep.data.cells import Record
from multistep.metrics.judge import compare_losses, not_finite
from multistep.metrics.texts import judge_rows, measure_rows, statistics
from multistep.metrics.verdicts import better, large_gain
from multistep.metrics.words import f1
from multistep.models.ngram import NGram
from multistep.other_writers import Mixed, Spans, measured, mixed_nats
from multistep.predictors.decoding import Greedy, Sample
from multistep.schedules import Plateau
from multistep.spans import best_least
from multistep.standing import Stood, language
from multistep.state import TrainState, write_folder
from multistep.strategy import (
    AsGiven,
    Average,
    Decode,
    Diagnose,
    FitWriter,
    Mix,
    Profile,
    ReadTest,
    Recount,
    Shape,
    TrainWriter,
    Trial,
)  # fmt: skip
from multistep.tasks.writing import LOSSES
from multistep.tune.diagnose import diagnose_writer
from multistep.tune.measuring import Profiler
from multistep.tune.segment import Record as JournalRecord
from multistep.tune.speakers import Speakers
from multistep.tune.training import averaged, run_training
from multistep.tune.watch import Acts, Looks, acts_of, checks
from multistep.types import Cost, MetricValue, Outcome, Verdict
from multistep.writing import Speaker

_SHARES = [n / 20 for n in range(1, 21)]  # of the neural model in a mixture

Run = Generator[JournalRecord, None, Outcome]


class Answers(NamedTuple):
    """What a candidate gave on the judged records: statistics of the metric [N,S] and losses [N,3], where it has them."""

    rows_NS: np.ndarray
    losses_N3: np.ndarray | None


class LanguageWorks:
    """The bench of a language run, as `tune` drives it."""

    def __init__(self, speakers: Speakers, problem: LanguageProblem, clock: Clock, stop: Callable[[], int]):
        self.speakers, self.problem, self.clock, self.stop = speakers, problem, clock, stop
        self.incumbent: dict[str, Any] | None = None
        self.best: dict[str, str] = {}  # family -> state
        self.micro_batch = 0  # examples at once that fitted into memory when a trial's did not; 0: no limit was met
        self.past: list[tuple[Trial, Outcome]] = []
        self._answers: dict[tuple[str, str], Answers] = {}
        self._longest_span = 0
        self._ship: Callable[[dict[str, Any]], None] | None = None

    def run(self, trial: Trial) -> Run:
        match trial.action:
            case Profile():
                return self._profile(trial)
            case FitWriter() as action:
                return self._fit(trial, action)
            case AsGiven() as action:
                return self._as_given(trial, action)
            case TrainWriter() as action:
                return self._train(trial, action)
            case Average() as action:
                return self._average(trial, action)
            case Decode() as action:
                return self._decode(trial, action)
            case Mix() as action:
                return self._mix(trial, action)
            case Recount():
                return self._recount(trial)
            case Diagnose():
                s, p = self.speakers, self.problem
                return diagnose_writer(
                    trial, self.past, Stood(self.incumbent, self.best), s.config, s.out, s.data.report, p.metric,
                    higher_is_better(p.metric), self.clock.budget, has_model=bool(s.facts.get("shape")),
                )  # fmt: skip
            case ReadTest():
                return self._test(trial)
        raise AssertionError(f"{trial.action.kind} is not for texts that are written")

    # ------------------------------------------------------------------ standing

    def apply(self, trial: Trial, outcome: Outcome) -> bool:
        """Take an outcome into the run's standing; whether the incumbent changed. Depends on the outcome alone, so it replays."""
        self.micro_batch = outcome.facts.get("micro_batch", self.micro_batch)
        self.past.append((trial, outcome))
        if isinstance(trial.action, Profile):
            self.speakers.facts = dict(outcome.facts)
            return False
        stood, committed = language(Stood(self.incumbent, self.best), trial, outcome)
        self.incumbent, self.best = stood.incumbent, dict(stood.families)
        return committed

    def standing(self) -> dict[str, Any] | None:
        return self.incumbent

    def families(self) -> dict[str, str]:
        return dict(self.best)

    def ship_with(self, ship: Callable[[dict[str, Any]], None]) -> None:
        """How the incumbent is put where it is served from."""
        self._ship = ship

    def ship(self) -> None:
        assert self.incumbent is not None and self._ship is not None
        self._ship(self.incumbent)

    # ------------------------------------------------------------------ judging

    @property
    def by_losses(self) -> bool:
        return self.problem.metric in LOSSES

    def answers(self, speaker: Speaker, split: str) -> Answers:
        s = self.speakers
        records = s.judged(split, texts=not self.by_losses)
        losses = speaker.losses(records, s.data.stream)
        if self.by_losses:
            assert losses is not None, "a writer without losses has no place in this run"
            return Answers(losses, losses)
        texts = [str(p.value) for p in speaker.write(records)]
        return Answers(statistics(self.problem.metric, texts, [r.targets for r in records]), losses)

    def _deciding(self) -> int:
        """Records of control that training is judged on."""
        return len(self.speakers.judged("control", texts=not self.by_losses))

    def known(self, standing: Mapping[str, Any], split: str, speaker: Speaker | None = None) -> Answers:
        """Computed once for what stands or stood. What was counted with the judged text too is judged as what it was before."""
        if speaker is None:
            standing = standing.get("judged_as") or standing
        key = (repr(sorted(standing.items(), key=lambda item: item[0])), split)
        if key not in self._answers:
            self._answers[key] = self.answers(speaker or self.speakers.speaker(dict(standing)), split)
        return self._answers[key]

    def verdict(self, candidate: Answers, incumbent: Answers, alpha: float) -> Verdict:
        seed = self.problem.config.seed
        found = judge_rows(self.problem.metric, candidate.rows_NS, incumbent.rows_NS, seed, alpha)
        if found.accept or self.by_losses or candidate.losses_N3 is None or incumbent.losses_N3 is None:
            return found
        losses = candidate.losses_N3[:, 0], incumbent.losses_N3[:, 0]
        if not found.evidence or found.evidence[0].difference < 0 or large_gain(found.evidence[0]):
            return found
        return not_finite("losses", *losses) or better((found.evidence[0], compare_losses(*losses)), alpha)

    def measured(self, answers: Answers) -> dict[str, MetricValue]:
        seed = self.problem.config.seed
        found = {self.problem.metric: measure_rows(self.problem.metric, answers.rows_NS, seed)}
        if answers.losses_N3 is not None:
            found["bits_per_byte"] = measure_rows("bits_per_byte", answers.losses_N3, seed)
        return found

    def _decided(
        self, trial: Trial, standing: dict[str, Any], family: str, speaker: Speaker, started: float,
        facts: Mapping[str, Any] = {}, split: str = "control", updates: int = 0, tokens: int = 0,
    ) -> Outcome:  # fmt: skip
        answers = self.known(standing, split, speaker)
        found: dict[str, Any] = {**facts, "standing": standing, "family": family, "judged": len(answers.rows_NS)}
        if trial.against is not None:
            rival = {**standing, "state": trial.against}
            against = self.verdict(answers, self.known(rival, split), trial.alpha)
            found |= {"against_verdict": against.model_dump(), "against_rival": trial.against}
        if trial.commit and (before := self.best.get(family)) is not None and split == "control":
            best = self.verdict(answers, self.known({**standing, "state": before}, split), trial.alpha)
            found |= {"family_verdict": best.model_dump(), "family_rival": before}
        verdict = None
        if trial.commit and self.incumbent is not None:
            verdict = self.verdict(answers, self.known(self.incumbent, split), trial.alpha)
        cost = Cost(wall_s=time.monotonic() - started, updates=updates, tokens=tokens)
        return Outcome(state=trial.id, metrics=self.measured(answers), verdict=verdict, cost=cost, facts=found)

    # ------------------------------------------------------------------ cheap writers, pretrained models

    def _fit(self, trial: Trial, action: FitWriter) -> Run:
        started = time.monotonic()
        writer, found = self.speakers.fit(action)
        self.speakers.keep_writer(trial.id, writer)
        family = "ngram" if isinstance(writer, NGram) else "writer"
        standing: dict[str, Any] = {"kind": family, "state": trial.id}
        if family == "ngram":
            standing["decoding"] = self._default_decoding()
        yield "Noted", {"trial": trial.id, "what": "fitted", "facts": {"writer": action.writer, **found}}
        return self._decided(trial, standing, family, self.speakers.speaker(standing), started)

    def _default_decoding(self) -> dict[str, Any]:
        """A language model draws, since its likeliest text goes round in circles; all else is written greedily."""
        new_tokens, seed = self.speakers.facts["new_tokens"], self.problem.config.seed
        if self.problem.task.kind != "lm":
            return Greedy(max_new_tokens=new_tokens).model_dump()
        return Sample(temperature=0.8, top_p=0.95, max_new_tokens=new_tokens, seed=seed).model_dump()

    def _standing(self, state: str, shape: Shape, model: Any = None) -> dict[str, Any]:
        """What a state would be as the incumbent. Of spans also the longest answer of train and, where some questions have none, the
        confidence below which there is none, fitted on the calibration half."""
        if shape.reads == "spans":
            s = self.speakers
            speaker = s.spans(s.model(shape, state) if model is None else model, shape)
            speaker.longest, least = self._longest(speaker), 0.0
            if any(not t.strip() for r in s.data.train for t in r.targets):
                records = s.judged("calibration", texts=True)
                least = best_least(
                    speaker.write(records), records, lambda text, targets: max(f1(text, t) for t in targets)
                )
            return {"kind": "spans", "state": state, "longest": speaker.longest, "least": least}
        standing = self.incumbent or {}  # a model that stands is compared at its way of writing
        decoding = standing["decoding"] if standing.get("kind") == "model" else self._default_decoding()
        return {"kind": "model", "state": state, "decoding": decoding}

    def _longest(self, speaker: Spans) -> int:
        if not self._longest_span:
            self._longest_span = speaker.rows(self.speakers.data.train).longest
        return self._longest_span

    def _as_given(self, trial: Trial, action: AsGiven) -> Run:
        started = time.monotonic()
        assert action.shape is not None
        plain = action.shape.with_(lora=None)
        write_folder(self.speakers.folder(trial.id), {"shape": plain.model_dump()}, {})
        yield "Noted", {"trial": trial.id, "what": "given", "facts": {"model": action.shape.name}}
        standing = self._standing(trial.id, plain)
        return self._decided(trial, standing, plain.family, self.speakers.speaker(standing), started)

    # ------------------------------------------------------------------ training

    def _train(self, trial: Trial, action: TrainWriter) -> Run:
        started, s = time.monotonic(), self.speakers
        state = TrainState(s.model(action.made, trial.start))
        state.counters.seed = self.problem.config.seed
        data, cut = s.rows(state.model, action, s.data.train)
        if any(c["rows"] for c in cut.values()):
            said = ", ".join(f"{c['rows']:,} {what} by {c['tokens']:,} tokens" for what, c in cut.items() if c["rows"])
            rule = f"longer than {action.shape.context} tokens and cut, of {len(s.data.train):,} rows of train: {said}"
            yield "Noted", {"trial": trial.id, "what": "cut", "facts": {"rule": rule, **cut}}
        acts, silent = acts_of(self._deciding(), Acts(trial.watch_gap, 0, None), fewest(self.problem.metric))
        if silent:
            yield "Noted", {"trial": trial.id, "what": "looks", "facts": silent}
        watch = self._watch(trial, action, acts.overfitting)
        facts, spent = yield from run_training(
            trial, action, state, data, watch, s.out / "states", self.clock, self.stop,
            {"shape": action.shape.model_dump()}, micro_batch=self.micro_batch,
        )  # fmt: skip
        facts["epochs"] = state.counters.examples / max(1, len(data))
        facts["tokens_s"] = spent["tokens"] / max(1e-9, time.monotonic() - started)
        standing = self._standing(trial.id, action.shape, state.model)
        return self._decided(
            trial, standing, action.shape.family, self._speaker(state.model, action.shape, standing), started,
            facts, updates=spent["updates"], tokens=spent["tokens"],
        )  # fmt: skip

    def _speaker(self, model: Any, shape: Shape, standing: Mapping[str, Any]) -> Speaker:
        if shape.reads == "spans":
            return self.speakers.spans(model, shape, standing["longest"], standing["least"])
        return self.speakers.neural(model, shape, self.speakers.decoding(dict(standing)))

    def _watch(self, trial: Trial, action: TrainWriter, rises: bool) -> Looks | None:
        """Looks, for the diagnosis too; `rises`: they end a training that overfits."""
        plateau = action.schedule if isinstance(action.schedule, Plateau) else None
        if not (trial.watch_gap or trial.patience or plateau) or action.shape.reads == "spans":
            return None
        look_s = float(self.speakers.facts["look_s"])
        at = checks(trial.share, look_s) if self.clock.budget.unit == "seconds" else checks()
        records = self.speakers.watched()
        return Looks(
            self.speakers.folder(f"{trial.id}.best"), lambda state: self._each(state.model, action.shape, records), at,
            overfitting=rises, patience=trial.patience, plateau=plateau,
        )  # fmt: skip

    def _each(self, model: Any, shape: Shape, records: Sequence[Record]) -> np.ndarray:
        """Nats a token of every record [N]."""
        losses_N3 = self.speakers.neural(model, shape).losses(records, self.speakers.data.stream)
        return losses_N3[:, 0] / np.maximum(1, losses_N3[:, 1])

    def _average(self, trial: Trial, action: Average) -> Run:
        started, s = time.monotonic(), self.speakers
        assert trial.start is not None
        values = averaged(s.out / "states", trial.start, action.which)
        if values is None:
            return Outcome(ok=False, failure="the segment was too short for a tail", cost=_wall(started))
        shape = s.shape_of(trial.start)
        write_folder(s.folder(trial.id), {"shape": shape.model_dump(), "start": trial.start}, values)
        yield "Noted", {"trial": trial.id, "what": "averaged", "facts": {"which": action.which}}
        standing = self._standing(trial.id, shape)
        return self._decided(trial, standing, shape.family, s.speaker(standing), started)

    # ------------------------------------------------------------------ prediction

    def _decode(self, trial: Trial, action: Decode) -> Run:
        started = time.monotonic()
        assert self.incumbent is not None
        yield "Noted", {"trial": trial.id, "what": "decoding", "facts": action.decoding.model_dump()}
        standing = {**self.incumbent, "decoding": action.decoding.model_dump()}
        return self._decided(trial, standing, "decoding", self.speakers.speaker(standing), started, split="calibration")

    def _mix(self, trial: Trial, action: Mix) -> Run:
        """The share is fitted on one half of the judged records for the other, and on all of them for what ships."""
        started, s = time.monotonic(), self.speakers
        assert trial.start is not None
        standing = {
            "kind": "mixed", "state": trial.start, "ngram": action.ngram, "share": 0.5, "decoding": self._default_decoding(),
        }  # fmt: skip
        speaker = s.speaker(standing)
        assert isinstance(speaker, Mixed)
        records = s.judged("calibration", texts=False)
        neural_T, counted_T, owner_T = speaker.parts(records, s.data.stream)
        half_T = owner_T < len(records) // 2
        mixed_T = np.empty_like(neural_T)
        for fitted in (half_T, ~half_T):
            share = _best_share(neural_T[fitted], counted_T[fitted])
            mixed_T[~fitted] = mixed_nats(neural_T[~fitted], counted_T[~fitted], share)
        share = standing["share"] = _best_share(neural_T, counted_T)
        kept = owner_T >= 0
        losses_N3 = speaker.losses(records, s.data.stream)
        losses_N3[:, 0] = np.bincount(owner_T[kept], mixed_T[kept], len(records))
        key = (repr(sorted(standing.items(), key=lambda item: item[0])), "calibration")
        self._answers[key] = Answers(losses_N3, losses_N3)
        yield "Noted", {"trial": trial.id, "what": "fitted", "facts": {"share of the neural model": share}}
        return self._decided(trial, standing, "mixed", speaker, started, split="calibration")

    def _recount(self, trial: Trial) -> Run:
        started, s = time.monotonic(), self.speakers
        assert self.incumbent is not None
        key = "ngram" if self.incumbent["kind"] == "mixed" else "state"
        before = self.incumbent.get("judged_as") or self.incumbent
        standing = {**self.incumbent, key: trial.id, "judged_as": before}
        s.keep_writer(trial.id, s.count("train", "control"))
        speaker = s.speaker(standing)
        yield "Noted", {"trial": trial.id, "what": "counted", "facts": {"splits": ["train", "control"]}}
        outcome = self._decided(trial, standing, "recount", speaker, started, split="calibration")
        if outcome.verdict is not None and outcome.verdict.accept:
            s.keep_writer(trial.id, s.count("train", "control", "calibration"))
            yield (
                "Noted",
                {"trial": trial.id, "what": "counted", "facts": {"splits": ["train", "control", "calibration"]}},
            )
        return outcome.with_(cost=_wall(started))

    def _test(self, trial: Trial) -> Run:
        started, s = time.monotonic(), self.speakers
        assert self.incumbent is not None
        records, whole = list(s.records["test"]), len(s.records["test"])
        most = int(s.facts.get("test_rows") or whole)
        if most < whole:
            records = [records[i] for i in sorted(np.random.default_rng(0).permutation(whole)[:most].tolist())]
        found = measured(s.speaker(self.incumbent), s.task, self.problem.metric, records, s.data.stream)
        yield "TestRead", {"trial": trial.id, "of": whole, "rows": len(records), "metrics": found}
        return Outcome(metrics=found, cost=_wall(started))

    # ------------------------------------------------------------------ profile

    def _profile(self, trial: Trial) -> Run:
        """Tokenizer, lengths, and under a budget of time what an update, a look and a text cost; the shape of the model; what was trained."""
        started, s = time.monotonic(), self.speakers
        stands = trained({trial.id: (trial, outcome) for trial, outcome in self.past}, self.best)
        shape = None if stands is None else s.shape_of(stands["state"])
        sized_for = float(s.facts.get("sized_for", self.problem.budget))
        if stands is None:  # what a finished run that trained nothing is given counts for the size of its model too
            sized_for = max(sized_for, self.clock.remaining())
        s.facts = facts = Profiler(s, self.problem.with_(budget=sized_for), shape).facts()
        counts = [o.cost.wall_s for t, o in self.past if isinstance(t.action, FitWriter) and t.action.writer == "ngram"]
        facts |= {"sized_for": sized_for, "trained": stands, "deciding": self._deciding(), "count_s": sum(counts)}
        yield "Noted", {"trial": trial.id, "what": "profiled", "facts": facts}
        for what in ("size", "optimizer"):
            if rule := facts.get({"size": "size", "optimizer": "choice"}[what]):
                yield "Noted", {"trial": trial.id, "what": what, "facts": {"rule": rule}}
        return Outcome(facts=facts, cost=_wall(started))


def _best_share(a_T: np.ndarray, b_T: np.ndarray) -> float:
    return min(_SHARES, key=lambda share: float(mixed_nats(a_T, b_T, share).sum()))


def _wall(started: float) -> Cost:
    return Cost(wall_s=time.monotonic() - started)
