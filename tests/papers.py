"""Runs on paper: a journal as `tune` writes it, by works that make their numbers up, but make verdicts of them by the rules. No torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from multistep import journal
from multistep.budget import Budget, Clock
from multistep.config import FitConfig
from multistep.controllers import Problem
from multistep.controllers.begin import AnyProblem
from multistep.journal import Journal
from multistep.metrics.verdicts import better, mcnemar_p, not_worse, paired_t
from multistep.predictors import Single
from multistep.session import controller_of
from multistep.standing import Of, Stood, after
from multistep.strategy import Average, FineTune, FitHead, FitLinear, Predict, Profile, ReadTest, Refit, Trial
from multistep.text import NgramFeatures
from multistep.tune import tune
from multistep.types import Comparison, Cost, Interrupted, MetricValue, Outcome, Verdict

N = 400
ROWS = {"train": 4000, "control": N, "calibration": N, "test": 1000}
TOKENS_S = 20_000.0
Run = Generator[tuple[str, dict[str, Any]], None, Outcome]


def problem(budget: Budget, controller: str = "staged", **config: Any) -> Problem:
    return Problem(
        task="classify", n_outputs=4, metric="accuracy", rows=ROWS, characters={k: 100 * n for k, n in ROWS.items()},
        budget=budget.amount, unit=budget.unit, linear=(NgramFeatures(), NgramFeatures(unit="char")),
        config=FitConfig(data="x.csv", controller=controller, **config),  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def counted(wins: int, losses: int, incumbent: float = 0.8) -> Comparison:
    """As `metrics.judge.compare` finds it for scores of 0 and 1."""
    mean = (wins - losses) / N
    stderr = math.sqrt((wins + losses - N * mean * mean) / (N - 1) / N)
    return Comparison(
        metric="accuracy", candidate=incumbent + mean, incumbent=incumbent, difference=mean, stderr=stderr,
        p=mcnemar_p(wins, losses), n=N, test="mcnemar", wins=wins, losses=losses,
    )  # fmt: skip


def lost(gain: float, stderr: float = 0.01, incumbent: float = 0.6) -> Comparison:
    return Comparison(
        metric="log_loss", candidate=incumbent - gain, incumbent=incumbent, difference=gain, stderr=stderr,
        p=paired_t(gain, stderr, N), n=N, test="t",
    )  # fmt: skip


def _gain(rng: random.Random, alpha: float) -> Verdict:
    first = counted(rng.randrange(10, 40), rng.randrange(10, 40))
    found = better((first,), alpha)
    return found if found.accept else better((first, lost(rng.uniform(-0.02, 0.03))), alpha)


def _harm(rng: random.Random, alpha: float) -> Verdict:
    return not_worse((counted(rng.randrange(10, 40), rng.randrange(10, 40)),), alpha)


class PaperWorks:
    """The bench of a run on labelled texts. `seconds`: what its clock shows."""

    def __init__(self, clock: Clock, seconds: list[float], stop: Callable[[], int], seed: int, encoder: str):
        self.clock, self.seconds, self.stop, self.seed, self.encoder = clock, seconds, stop, seed, encoder
        self.stood = Stood()
        self.of: Of = "labels"

    def run(self, trial: Trial) -> Run:
        rng, action = random.Random(f"{self.seed} {trial.id}"), trial.action
        if isinstance(action, ReadTest):
            metrics = {"accuracy": MetricValue(0.81, 0.012)}
            yield "TestRead", {"trial": trial.id, "rows": ROWS["test"], "metrics": metrics}
            yield from self._pay(trial, 1.0)
            return Outcome(metrics=metrics, cost=Cost(wall_s=1.0))
        if isinstance(action, Profile):
            yield from self._pay(trial, 0.5)
            return Outcome(facts=self._profile(), cost=Cost(wall_s=0.5))
        share = trial.share if isinstance(action, FineTune) else 0.0
        counts = {"updates": round(share) if self.clock.budget.unit == "updates" else round(20 * share)}
        for n in range(2 if share else 0):
            yield (
                "Measured",
                {"trial": trial.id, "update": n * counts["updates"], "tokens": 0, "loss_nats": 1.0 / (n + 1), "lr": 1e-4 * (2 - n),
                 "grad_norm": 1.0, "progress": n / 2},
            )  # fmt: skip
        self.clock.spend(counts["updates"] if share else 0, 500 if share else 0)
        yield from self._pay(trial, share if self.clock.budget.unit == "seconds" and share else 0.25)
        cost = Cost(wall_s=share or 0.25, updates=counts["updates"] if share else 0, tokens=500 if share else 0)
        return self._judged(trial, rng, cost)

    def _pay(self, trial: Trial, seconds: float) -> Generator[tuple[str, dict[str, Any]]]:
        self.seconds[0] += seconds
        yield "Noted", {"trial": trial.id, "what": "paid", "facts": {"seconds": seconds}}

    def _profile(self) -> dict[str, Any]:
        if self.encoder == "none":
            return {"encoder": "none", "why_no_encoder": "model=none was given"}
        tokens_s = TOKENS_S if self.clock.budget.unit == "seconds" else 0.0
        return {
            "encoder": self.encoder, "mean_tokens": {"32": 25.0, "64": 30.0, "128": 30.0, "256": 30.0, "512": 30.0},
            "p95_tokens": 50.0, "n_layers": 6, "hidden": 384, "precision": "fp32", "forward_tokens_s": tokens_s,
        }  # fmt: skip

    def _judged(self, trial: Trial, rng: random.Random, cost: Cost) -> Outcome:
        facts: dict[str, Any] = {}
        match trial.action:
            case FitLinear():
                facts = {"family": "linear", "rows": ROWS["train"], "strength": 0.1}
            case FitHead() | FineTune() | Average():
                facts = {"family": "encoder", "rows": ROWS["train"]}
            case Predict() as action:
                facts = {
                    "predictor": {
                        "kind": "temperature",
                        "inner": action.base.model_dump(mode="json"),
                        "temperature": 1.5,
                    }
                }
            case Refit() as action:
                return Outcome(state=trial.id, verdict=_harm(rng, trial.alpha), cost=cost, facts={"of": action.of})
        best = self.stood.families.get(str(facts.get("family")))
        mean_of = trial.action.members if isinstance(trial.action, Average) else ()
        for name, rival in (("family", best), ("against", trial.against)):
            if rival is not None:
                found = (_harm if rival in mean_of else _gain)(rng, trial.alpha)
                facts |= {f"{name}_verdict": found.model_dump(), f"{name}_rival": rival}
        verdict = None
        if trial.commit and self.stood.incumbent is not None:
            in_its_place = best in mean_of and best in self.stood.states()
            verdict = (_harm if in_its_place else _gain)(rng, trial.alpha)
        metrics = {"accuracy": MetricValue(0.8 + rng.random() / 20, 0.01)}
        return Outcome(state=trial.id, metrics=metrics, verdict=verdict, cost=cost, facts=facts)

    def apply(self, trial: Trial, outcome: Outcome) -> bool:
        self.stood, committed = after(self.of, self.stood, trial, outcome)
        return committed

    def ship(self) -> None: ...

    def standing(self) -> dict[str, Any] | None:
        return self.stood.incumbent

    def families(self) -> dict[str, str]:
        return dict(self.stood.families)


def live(
    path: Path, given: AnyProblem, total: Budget, stop_at: int = -1, past: Sequence[dict[str, Any]] = (), seed: int = 0,
    encoder: str = "some/encoder", finish: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Live a run on paper, or go on with one, until so many records are written or to its end; the whole journal."""
    book, before = Journal(path), list(past)
    seconds = [before[-1]["clock"]["wall_s"] if before else 0.0]
    clock = Clock(total, now=lambda: seconds[0], started=0.0)
    if before:
        told = [r["clock"] for r in before if r["kind"] == "Told"]
        clock.updates, clock.tokens = (told[-1][k] if told else 0 for k in ("updates", "tokens"))
        before.append(
            book.append("Resumed", clock=clock.save(), budget=total, extended=before[-1]["kind"] == "Finished")
        )
    else:
        config = {"data": "x.csv", "task": "classify", "metric": "accuracy"}
        book.append(
            "Started", clock=clock.save(), config=config, budget=total, metric="accuracy", versions={}, machine={}
        )
        book.append("Data", clock=clock.save(), report={"rows": ROWS}, fingerprint="")
    name = given.config.controller if isinstance(given, Problem) else ""
    controller = controller_of(given, name, book, clock, before)
    works = PaperWorks(clock, seconds, lambda: 15 if 0 <= stop_at <= len(journal.read(path)) else 0, seed, encoder)
    try:
        for _ in tune(works, controller, book, before):
            seconds[0] += 0.01
        if finish:
            book.append("Finished", clock=clock.save(), wall_s=clock.wall_s)
    except Interrupted:
        pass
    book.close()
    return journal.read(path)


BASE = Single(model="linear")
