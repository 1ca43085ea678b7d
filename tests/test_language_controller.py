"""The language scripts against a make-believe machine: they end inside the budget, and what the first beams took decides on the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from multistep.config import FitConfig
from multistep.controllers import Reserve, Scripted, Skip
from multistep.controllers.language import COOL_AGAIN, COOL_SHARE, LANGUAGE_CONTROLLERS, go_on
from multistep.controllers.language_plan import LanguageProblem, Plan, trained
from multistep.controllers.members import Member
from multistep.controllers.reactive import moved
from multistep.controllers.script import Target
from multistep.metrics.verdicts import better
from multistep.optimizers import AdamW
from multistep.predictors.decoding import Greedy
from multistep.schedules import Constant
from multistep.standing import Stood, language
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
)
from multistep.tasks.writing import Writing
from multistep.types import Comparison, Cost, MetricValue, Outcome

ROWS = {"train": 20_000, "control": 500, "calibration": 500, "test": 1000}
GREEDY_S = 1.0  # writing the calibration rows
READS: dict[str, Any] = {"translate": "pairs", "lm": "stream"}
NO_GAIN = better((Comparison(metric="bleu", candidate=30, incumbent=30, difference=0, stderr=0.1, p=0.6, n=500),))
TRAINED: dict[str, Any] = {"state": "03-trunk", "settings": {"optimizer.lr": 1.2e-2, "dropout": 0.3}}


@dataclass
class Machine:
    """Runs trials on paper. A beam costs `beam_s` over the calibration rows; whatever is tried is accepted, or where it `loses`, no look
    finds a gain."""

    budget: float
    beam_s: float
    kind: str = "translate"
    loses: bool = False
    trained: dict[str, Any] | None = None  # what more budget goes on from
    ended: dict[str, Any] = field(default_factory=dict)  # facts of a trunk that did not come to its end
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
                    "test_s": 5 * 2 * GREEDY_S, "why_no_model": "", "trained": self.trained,
                }  # fmt: skip
            case Diagnose():
                cost_s = 0.0  # it reads what is there
            case FitWriter():
                cost_s = GREEDY_S
                self.standing = {"kind": "ngram" if self.kind == "lm" else "writer"}
            case TrainWriter():
                cost_s = trial.share
                self.standing = {"kind": "ngram" if self.kind == "lm" else "model", "decoding": Greedy().model_dump()}
                facts = {"standing": self.standing, **(self.ended if trial.stage == "trunk" else {})}
                if trial.against is not None:
                    facts["against_verdict"] = NO_GAIN.model_dump()
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


def problem(budget: float, kind: Any, control: int = ROWS["control"], **given: Any) -> LanguageProblem:
    return LanguageProblem(
        task=Writing(kind=kind), metric="bleu" if kind == "translate" else "bits_per_byte", config=FitConfig(data="x.csv", task=kind, **given),
        rows={**ROWS, "control": control}, bytes={split: 60 * n for split, n in ROWS.items()}, budget=budget, unit="seconds",
    )  # fmt: skip


def driven(
    budget: float, beam_s: float, name: str = "staged", kind: Any = "translate", loses: bool = False, control: int = ROWS["control"],
    ended: dict[str, Any] | None = None, **given: Any,
) -> Machine:  # fmt: skip
    script = LANGUAGE_CONTROLLERS[name](problem(budget, kind, control, **given))
    return drive(Scripted(script), Machine(budget, beam_s, kind, loses, ended=ended or {}))


def given_more(
    budget: float = 3000.0, kind: Any = "translate", ended: dict[str, Any] | None = None, trained: dict[str, Any] | None = None,
    **given: Any,
) -> Machine:  # fmt: skip
    """A finished run with so much more."""
    machine = Machine(budget, 1.0, kind, trained=trained, ended=ended or {})
    return drive(Scripted(go_on(problem(budget, kind, **given))), machine)


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
    target = Target(metric="bits_per_byte", value=2.0, higher_is_better=False)
    for value, legs in ((1.9, 1), (2.1, 4)):
        machine = Machine(900.0, 1.0, "lm", metrics={"bits_per_byte": MetricValue(value, 0.01)}, trained=TRAINED)
        asked = drive(Scripted(go_on(problem(900.0, "lm").with_(target=target))), machine).asked
        assert [a.stage for a in asked].count("trunk") == legs
        assert any(isinstance(a, Skip) and a.stage == "training" for a in asked) == (legs == 1)
        first = next(a for a in asked if isinstance(a, Trial) and a.stage == "trunk")
        assert first.start == "03-trunk" and rate(first) == 1.2e-2


def test_what_the_first_beams_took_decides_on_the_next() -> None:
    def tried(machine: Machine) -> list[float]:
        actions = [a.action for a in machine.asked if isinstance(a, Trial)]
        return [machine.width(a.decoding.model_dump()) for a in actions if isinstance(a, Decode)]

    assert tried(driven(900.0, 0.2)) == [4, 8, 8]  # cheap beams: the wider ones, then a length penalty for them
    slow = driven(900.0, 3.0)
    assert 8 not in tried(slow) and tried(slow)[0] == 4
    assert any(isinstance(a, Skip) and a.stage == "decode" and "8 beams take about" in a.why for a in slow.asked)


# ---------------------------------------------------------------------------------------------- more budget, what ended a trunk, few records


def trainings(machine: Machine) -> list[Trial]:
    return [a for a in machine.asked if isinstance(a, Trial) and isinstance(a.action, TrainWriter)]


def rate(trial: Trial) -> float:
    assert isinstance(trial.action, TrainWriter)
    return trial.action.optimizer.lr


def skipped(machine: Machine, stage: str) -> str:
    return "; ".join(a.why for a in machine.asked if isinstance(a, Skip) and a.stage == stage)


@pytest.mark.parametrize("name", ["staged", "race", "fixed", "halving", "reactive"])
def test_a_run_that_trained_nothing_trains_with_more_as_it_would_have(name: str) -> None:
    """As a first run with that budget does: race, trunk and cool-down, or whatever its controller has."""

    def asked(machine: Machine) -> list[Any]:
        return [(t.stage, t.action, t.start is None, t.watch_gap) for t in trainings(machine)]

    later = asked(given_more(controller=name))
    assert later == asked(driven(3000.0, 1.0, name, controller=name)) and later[0][2]
    if name == "staged":
        assert [stage for stage, *_ in later] == ["race", "race", "race", "trunk", "cool-down"]
        assert "(< 30)" in skipped(given_more(10.0), "trunk")


def test_more_budget_trains_with_what_was_found() -> None:
    """At the race's rate, with a search's settings; what was given is not moved."""
    prior = trainings(given_more())[0]
    found = trainings(given_more(trained=TRAINED))
    assert [(t.stage, rate(t), t.start) for t in found] == [
        ("trunk", 1.2e-2, "03-trunk"), ("cool-down", 1.2e-2, found[0].id),
    ]  # fmt: skip
    assert rate(prior) == 6e-3
    for trial in found:
        assert isinstance(trial.action, TrainWriter) and isinstance(prior.action, TrainWriter)
        assert trial.action.dropout == trial.action.made.dropout == 0.3 and trial.action.shape == prior.action.shape
    given = trainings(given_more(trained=TRAINED, optimizer={"lr": 2e-3}, dropout=0.1))
    assert [rate(t) for t in given] == [2e-3, 2e-3] and all(t.action.dropout is None for t in given)


OVERFITS = {"diagnosis": {"name": "overfitting"}, "best_progress": 0.5, "best_lr": 1e-3}
DIVERGED = {"diagnosis": {"name": "divergence"}, "best_progress": 0.0, "best_lr": 6e-6}


@pytest.mark.parametrize("ended", [OVERFITS, {**OVERFITS, "diagnosis": None, "stopped": {}}])
@pytest.mark.parametrize("first", [True, False])
def test_a_trunk_that_ends_early_is_cooled_from_its_best_state(ended: dict[str, Any], first: bool) -> None:
    ended = {key: value for key, value in ended.items() if value is not None}
    machine = driven(3000.0, 1.0, ended=ended) if first else given_more(trained=TRAINED, ended=ended)
    trunk, cooled = trainings(machine)[-2:]
    assert (trunk.stage, cooled.stage) == ("trunk", "cool-down") and cooled.start == trunk.id and rate(cooled) == 1e-3
    assert cooled.share == pytest.approx(COOL_AGAIN * 0.5 * trunk.share / (1 - COOL_SHARE), abs=0.01)
    averages = [a for a in machine.asked if isinstance(a, Trial) and isinstance(a.action, Average)]
    assert [a.start for a in averages] == [cooled.id, cooled.id]


@pytest.mark.parametrize("first", [True, False])
def test_a_trunk_that_diverged_leaves_nothing_to_cool_down_or_to_average(first: bool) -> None:
    machine = driven(3000.0, 1.0, ended=DIVERGED) if first else given_more(trained=TRAINED, ended=DIVERGED)
    stages = [a.stage for a in machine.asked if isinstance(a, Trial)]
    assert "trunk" in stages and not {"cool-down", "average"} & set(stages)
    assert "diverged" in skipped(machine, "cool-down") and "time" not in skipped(machine, "cool-down")


def test_more_budget_does_not_go_on_from_what_diverged() -> None:
    shape = Shape(reads="pairs", width=64, layers=2)
    trial = Trial(id="05-trunk", stage="trunk", action=TrainWriter(shape=shape), commit=False, watch_gap=True)
    facts: dict[str, Any] = {"standing": {"kind": "model", "state": "05-trunk"}, "family": "model"}
    before = Stood(families={"trunk": "03-trunk"})
    for ended, goes_on in ((DIVERGED, "03-trunk"), (OVERFITS, "05-trunk"), ({}, "05-trunk")):
        stood, committed = language(before, trial, Outcome(state="05-trunk", facts={**facts, **ended}))
        assert stood.families == {"trunk": goes_on} and not committed


def test_what_was_trained_is_told_from_what_was_given() -> None:
    shape = Shape(reads="pairs", name="org/model")
    strategy = TrainWriter(shape=shape, optimizer=AdamW(lr=2e-3, weight_decay=0.3), dropout=0.2)
    trials = [
        Trial(id="02-given", stage="given", action=AsGiven(shape=shape)), Trial(id="03-halving", stage="halving", action=strategy),
        Trial(id="04-cool-down", stage="cool-down", action=strategy.with_(optimizer=AdamW(lr=1e-3)), start="03-halving"),
        Trial(id="05-average", stage="average", action=Average(which="ema"), start="04-cool-down"),
    ]  # fmt: skip
    made = {trial.id: (trial, Outcome(state=trial.id)) for trial in trials}
    assert trained(made, {}) is None and trained(made, {"model": "02-given"}) is None
    found = trained(made, {"model": "05-average"})
    assert found is not None and found["state"] == "05-average"
    assert found["settings"]["optimizer.lr"] == 2e-3 and found["settings"]["dropout"] == 0.2, (
        "the rate before it decayed"
    )
    first = trained(made, {"model": "02-given", "trunk": "03-halving"})
    assert first is not None and first["state"] == "03-halving" and first["settings"]["optimizer.weight_decay"] == 0.3
    made["03-halving"] = trials[1], Outcome(state="03-halving", facts={"restarts": 1, "lr_scale": 0.1})
    again = trained(made, {"model": "05-average"})
    assert again is not None and again["settings"]["optimizer.lr"] == pytest.approx(2e-4), (
        "an average carries no scale on"
    )
    carried = trained(made, {"trunk": "03-halving"})
    assert carried is not None and carried["settings"]["optimizer.lr"] == pytest.approx(2e-3), "the state carries it"


@pytest.mark.parametrize(
    "kind, control, least", [("translate", 20, 21), ("translate", 21, 0), ("lm", 20, 0), ("lm", 4, 0), ("lm", 3, 4)]
)
def test_too_few_control_records_race_no_rates(kind: str, control: int, least: int) -> None:
    machine = driven(3000.0, 1.0, kind=kind, control=control)
    raced = [t for t in trainings(machine) if t.stage == "race"]
    assert bool(raced) == (not least) and any(t.stage == "trunk" for t in trainings(machine))
    assert (f"{control} control records (< {least})" in skipped(machine, "race")) == bool(least)


@pytest.mark.parametrize(
    "shape, own",
    [
        (Shape(reads="pairs", width=64, layers=2, dropout=0.1), 0.1), (Shape(reads="spans", name="org/encoder"), 0.0),
        (Shape(reads="stream", width=64, layers=2), None), (Shape(reads="pairs", name="org/model"), None),
    ],
)  # fmt: skip
def test_dropout_is_searched_where_the_model_has_it(shape: Shape, own: float | None) -> None:
    def moves(**given: Any) -> float | None:
        plan = Plan(problem(3000.0, "translate", **given))
        plan.facts = {"shape": shape.model_dump(), "optimizer": "adamw", "batch_rows": 8, "bf16": False}
        more = moved(plan, Member("m", {}), "dropout", 1.0, 0.1)
        assert (more is not None) == any(axis.path == "dropout" for axis in plan.space().axes)
        if more is not None:
            action = plan.at({"dropout": more}, Constant())
            assert action.made.dropout == more and action.shape == shape
        return more

    assert moves() == (None if own is None else pytest.approx(own + 0.1))
    assert moves(dropout=0.1) is None


def test_more_budget_gives_back_what_the_run_kept_for_its_end() -> None:
    first = Scripted(go_on(problem(3000.0, "translate"))).ask()
    assert first == Reserve(name="end", amount=0.0)
