"""What a run on labelled texts does with a trial: which action runs, what its outcome changes, what is shipped."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from multistep.bundle import write_bundle
from multistep.predictors import Predictor
from multistep.standing import Stood, labels
from multistep.strategy import Average, Diagnose, FineTune, FitHead, FitLinear, Predict, Profile, ReadTest, Refit, Trial
from multistep.tune.actions import (
    Bench,
    Run,
    run_average,
    run_head,
    run_linear,
    run_mean,
    run_predict,
    run_soup,
    run_test,
)
from multistep.tune.diagnose import run_diagnose
from multistep.tune.fine_tune import run_fine_tune
from multistep.tune.profile import run_profile
from multistep.tune.refit import run_refit
from multistep.types import Outcome

_PREDICTOR: TypeAdapter[Predictor] = TypeAdapter(Predictor)


class TextWorks:
    """The bench of a text run, as `tune` drives it."""

    def __init__(self, bench: Bench):
        self.bench, self.clock, self.stop = bench, bench.clock, bench.stop
        self.past: list[tuple[Trial, Outcome]] = []

    def standing(self) -> dict[str, Any] | None:
        return self.bench.incumbent.model_dump(mode="json") if self.bench.incumbent is not None else None

    def families(self) -> dict[str, str]:
        return dict(self.bench.families)

    def run(self, trial: Trial) -> Run:
        bench = self.bench
        match trial.action:
            case Profile() as action:
                return run_profile(bench, trial, action)
            case FitLinear() as action:
                return run_linear(bench, trial, action)
            case FitHead() as action:
                return run_head(bench, trial, action)
            case FineTune() as action:
                return run_fine_tune(bench, trial, action)
            case Average(which="soup") as action:
                return run_soup(bench, trial, action)
            case Average(which="mean") as action:
                return run_mean(bench, trial, action)
            case Average() as action:
                return run_average(bench, trial, action)
            case Predict() as action:
                return run_predict(bench, trial, action)
            case Refit() as action:
                return run_refit(bench, trial, action)
            case Diagnose() as action:
                return run_diagnose(bench, trial, action, self.past, Stood(self.standing(), self.families()))
            case ReadTest() as action:
                return run_test(bench, trial, action)
        raise AssertionError(f"{trial.action.kind} is not for texts")

    def apply(self, trial: Trial, outcome: Outcome) -> bool:
        """Take an outcome into the run's standing; whether the incumbent changed. Depends on the outcome alone, so it replays."""
        bench, facts = self.bench, outcome.facts
        bench.micro_batch = facts.get("micro_batch", bench.micro_batch)
        self.past.append((trial, outcome))
        if isinstance(trial.action, Profile):
            bench.bf16 = facts.get("precision") == "bf16"
            bench.work.adopt(facts)
            return False
        if isinstance(trial.action, FitHead | FineTune):
            bench.work.use_length(trial.action.max_length)
        stood, committed = labels(Stood(self.standing(), bench.families, refits=bench.refits), trial, outcome)
        bench.families, bench.refits = dict(stood.families), dict(stood.refits)
        bench.incumbent = None if stood.incumbent is None else _PREDICTOR.validate_python(stood.incumbent)
        return committed

    def ship(self) -> None:
        """Put the incumbent into the run's model/ folder."""
        bench, work = self.bench, self.bench.work
        assert bench.incumbent is not None
        states = bench.served()
        models = {m: work.text_model(m, states[m], bench.bf16) for m in bench.incumbent.models()}
        columns = work.dataset.columns.model_dump(mode="json")
        extra = {
            "columns": columns,
            "states": {m: states[m] for m in models},
            "base_model": work.source,
            "metric": bench.metric,
        }
        write_bundle(work.out / "model", work.task, bench.incumbent, models, work.tokenizer, work.max_length, extra)
