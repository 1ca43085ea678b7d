"""The language scripts against a make-believe machine: they end inside the budget, and what the first beams took decides on the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from multistep.config import FitConfig
from multistep.controllers import Reserve, Scripted, Skip
from multistep.controllers.language import LANGUAGE_CONTROLLERS, go_on
from multistep.controllers.language_plan import LanguageProblem
from multistep.controllers.script import Target
from multistep.metrics.verdicts import better
from multistep.predictors.decoding import Greedy
from multistep.strategy import (
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
)
from multistep.tasks.writing import Writing
from multistep.types import Comparison, Cost, MetricValue, Outcome

ROWS = {"train": 20_000, "control": 500, "calibration": 500, "test": 1000}
GREEDY_S = 1.0  # writing the calibration rows
READS: dict[str, Any] = {"translate": "pairs", "lm": "stream"}
NO_GAIN = better((Comparison(metric="bleu", candidate=30, incumbent=30, difference=0, stderr=0.1, p=0.6, n=500),))


@dataclass
class Machine:
    """Runs trials on paper. A beam costs `beam_s` over the calibration rows; whatever is tried is accepted, or where it `loses`, no look
    finds a gain."""

    budget: float
    beam_s: float
    kind: str = "translate"
    loses: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    spent: float = 0.0
    reserved: float = 0.0
    standing: dict[str, Any] = field(default_factory=dict)
    asked: list[Trial | Skip] = field(default_factory=list)

    def run(self, trial: Trial) -> Outcome:
        cost_s, facts = 0.1, {}
        match trial.action:
            case Profile():
                shape = Shape(reads=READS[self.kind], width=128, layers=4, vocabulary=6000)
                facts = {
                    "shape": shape.model_dump(), "reads": shape.reads, "optimizer": "muon", "choice": "", "bf16": False, "tokens_s": 1e4,
                    "batch_rows": 90, "batch_tokens": 3000, "train_tokens": 10**6, "given": False, "characters": self.kind == "lm",
                    "new_tokens": 50, "judge_s": GREEDY_S, "calibration_s": GREEDY_S, "judged_rows": 500, "test_rows": 1000,
                    "test_s": 5 * 2 * GREEDY_S, "why_no_model": "",
                }  # fmt: skip
            case Diagnose():
                cost_s = 0.0  # it reads what is there
            case FitWriter():
                cost_s = GREEDY_S
                self.standing = {"kind": "ngram" if self.kind == "lm" else "writer"}
            case TrainWriter():
                cost_s = trial.share
                self.standing = {"kind": "ngram" if self.kind == "lm" else "model", "decoding": Greedy().model_dump()}
                facts = {"standing": self.standing}
            case Decode(decoding=decoding):
                cost_s = self.width(decoding.model_dump()) * self.beam_s
                self.standing = {"kind": "model", "decoding": decoding.model_dump()}
            case Average():
                cost_s = 1.3 * GREEDY_S  # a judgement, and more than was thought
            case Mix() | Recount():
                cost_s = 2.6 * GREEDY_S
            case ReadTest():
                cost_s = 2 * self.width(self.standing.get("decoding")) * self.beam_s
        self.spent += cost_s
        remaining = max(0.0, self.budget - self.spent - self.reserved)
        judged = self.loses and trial.commit and not isinstance(trial.action, Profile | Diagnose | ReadTest)
        return Outcome(
            state=trial.id, metrics=self.metrics, cost=Cost(wall_s=cost_s), facts=facts, remaining=remaining, incumbent=self.standing,
            verdict=NO_GAIN if judged else None, families={"ngram": "02-incumbent", "model": "03-trunk"},
        )  # fmt: skip

    def width(self, decoding: dict[str, Any] | None) -> float:
        return float((decoding or {}).get("beams", GREEDY_S / self.beam_s))


def driven(
    budget: float, beam_s: float, name: str = "staged", kind: Any = "translate", loses: bool = False, **given: Any
) -> Machine:
    problem = LanguageProblem(
        task=Writing(kind=kind), metric="bleu" if kind == "translate" else "bits_per_byte", config=FitConfig(data="x.csv", task=kind, **given),
        rows=ROWS, bytes={split: 60 * n for split, n in ROWS.items()}, budget=budget, unit="seconds",
    )  # fmt: skip
    return drive(Scripted(LANGUAGE_CONTROLLERS[name](problem)), Machine(budget, beam_s, kind, loses))


def drive(controller: Scripted, machine: Machine) -> Machine:
    while (ask := controller.ask()) is not None:
        if isinstance(ask, Reserve):
            machine.reserved = ask.amount
            continue
        machine.asked.append(ask)
        if isinstance(ask, Trial):
            controller.tell(ask, machine.run(ask))
    return machine


@pytest.mark.parametrize("name", LANGUAGE_CONTROLLERS)
@pytest.mark.parametrize("budget", [60.0, 300.0, 900.0])
@pytest.mark.parametrize("beam_s", [0.5, 1.0, 2.0])
def test_a_run_ends_inside_its_budget(budget: float, beam_s: float, name: str) -> None:
    machine = driven(budget, beam_s, name)
    assert machine.spent <= budget
    assert isinstance(machine.asked[-1], Trial) and isinstance(machine.asked[-1].action, ReadTest)


@pytest.mark.parametrize(
    "name, budget", [("staged", 60.0), ("staged", 120.0), ("race", 60.0), ("random", 120.0), ("reactive", 300.0)]
)
def test_there_is_time_to_count_the_held_out_text(budget: float, name: str) -> None:
    machine = driven(budget, 1.0, name, kind="lm")
    stages = [a.stage for a in machine.asked if isinstance(a, Trial)]
    assert any(isinstance(a, Trial) and isinstance(a.action, TrainWriter) for a in machine.asked)
    assert stages[-3:] == ["recount", "diagnose", "test"] and machine.spent <= budget


def test_a_schedule_that_was_given_is_the_trunks() -> None:
    def trained(name: str, **given: Any) -> list[tuple[str, str]]:
        asked = [a for a in driven(600.0, 1.0, name, kind="lm", **given).asked if isinstance(a, Trial)]
        trained = [(a.stage, a.action) for a in asked if a.stage != "race"]
        return [(stage, action.schedule.kind) for stage, action in trained if isinstance(action, TrainWriter)]

    assert trained("staged") == [("trunk", "constant"), ("cool-down", "linear")]
    assert trained("staged", schedule={"kind": "cosine"}) == [("trunk", "cosine")]
    assert trained("fixed", schedule={"kind": "one_cycle"}) == [("trunk", "one_cycle")]


def test_more_budget_ends_where_the_target_stands() -> None:
    problem = LanguageProblem(
        task=Writing(kind="lm"), metric="bits_per_byte", config=FitConfig(data="x.csv", task="lm"), rows=ROWS,
        bytes={split: 60 * n for split, n in ROWS.items()}, budget=900.0, unit="seconds",
        target=Target(metric="bits_per_byte", value=2.0, higher_is_better=False),
    )  # fmt: skip
    for value, legs in ((1.9, 1), (2.1, 4)):
        metrics = {"bits_per_byte": MetricValue(value, 0.01)}
        asked = drive(Scripted(go_on(problem)), Machine(900.0, 1.0, "lm", metrics=metrics)).asked
        assert [a.stage for a in asked].count("trunk") == legs
        assert any(isinstance(a, Skip) and a.stage == "training" for a in asked) == (legs == 1)


def test_what_the_first_beams_took_decides_on_the_next() -> None:
    def tried(machine: Machine) -> list[float]:
        actions = [a.action for a in machine.asked if isinstance(a, Trial)]
        return [machine.width(a.decoding.model_dump()) for a in actions if isinstance(a, Decode)]

    assert tried(driven(900.0, 0.2)) == [4, 8, 8]  # cheap beams: the wider ones, then a length penalty for them
    slow = driven(900.0, 3.0)
    assert 8 not in tried(slow) and tried(slow)[0] == 4
    assert any(isinstance(a, Skip) and a.stage == "decode" and "8 beams take about" in a.why for a in slow.asked)
