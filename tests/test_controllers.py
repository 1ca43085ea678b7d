"""Controllers against a make-believe machine: they end, stay inside the budget, replay, and ask for what the evidence says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from multistep.config import FitConfig
from multistep.controllers import CONTROLLERS, Problem, Reserve, Scripted, Skip
from multistep.controllers.more import more
from multistep.predictors import Single
from multistep.strategy import Average, FineTune, FitHead, FitLinear, Predict, Profile, ReadTest, Refit, Trial
from multistep.text import NgramFeatures
from multistep.types import Comparison, Cost, MetricValue, Outcome, TaskKind, Unit, Verdict

SCRIPTS = {**CONTROLLERS, "more": more}
ROWS = {"train": 4000, "control": 500, "calibration": 500, "test": 1000}


def problem(
    budget: float = 300.0,
    unit: Unit = "seconds",
    task: TaskKind = "classify",
    rows: dict[str, int] | None = None,
    **config: Any,
) -> Problem:
    rows = {**ROWS, **(rows or {})}
    return Problem(
        task=task,
        n_outputs=1 if task == "regress" else 4,
        metric={"classify": "f1_macro", "multilabel": "f1_micro", "regress": "mse"}[task],
        rows=rows,
        characters={split: 100 * n for split, n in rows.items()},
        budget=budget,
        unit=unit,
        config=FitConfig(data="x.csv", **config),
        linear=(NgramFeatures(), NgramFeatures(unit="char")),
    )


@dataclass
class Machine:
    """Runs trials on paper. Trials with a share spend `thrift` of it; the others what encoding takes."""

    problem: Problem
    encoder: str = "some/encoder"  # or "scratch", "none"
    tokens_s: float = 20_000.0
    thrift: float = 1.0
    better_rate: float | None = None  # a probe is accepted when its learning rate is this many times the first one's
    diagnosis: bool = False  # the trunk overfits
    accepts: bool = True  # every other comparison
    spent: float = 0.0
    reserved: dict[str, float] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)
    incumbent: dict[str, Any] | None = None
    first_rate: float = 0.0

    def remaining(self) -> float:
        return max(0.0, self.problem.budget - self.spent - sum(self.reserved.values()))

    def encode_s(self, split: str) -> float:
        return self.problem.rows[split] * 30 / self.tokens_s

    def run(self, trial: Trial) -> Outcome:
        action, accept = trial.action, self.accepts
        facts: dict[str, Any] = {}
        cost_s = 0.05 if not trial.share else self.thrift * trial.share
        match action:
            case Profile():
                facts = self.profile()
            case FitLinear():
                cost_s = min(cost_s, 0.5)
                facts = {"family": "linear", "rows": action.max_rows or self.problem.rows["train"], "strength": 0.5}
            case FitHead():
                cost_s = min(cost_s, self.encode_s("train") + self.encode_s("control"))
                facts = {"family": "encoder", "rows": action.max_rows or self.problem.rows["train"]}
            case FineTune():
                if trial.stage == "race":
                    self.first_rate = self.first_rate or action.optimizer.lr
                    accept = action.optimizer.lr == pytest.approx((self.better_rate or 0) * self.first_rate)
                facts = {"family": "encoder"}
                if self.diagnosis and trial.watch_gap:
                    facts |= {"diagnosis": {"name": "overfitting"}, "progress": 0.5}
                    cost_s *= 0.5
            case Average():
                facts, cost_s = {"family": "encoder"}, self.encode_s("control")
            case Predict():
                facts, cost_s = {"predictor": action.base.model_dump()}, 0.1
                if action.what == "blend":
                    cost_s = self.encode_s("calibration")
            case Refit():
                facts, cost_s = {"of": action.of}, 0.6
            case ReadTest():
                cost_s = self.encode_s("test")
        family = facts.get("family")
        verdict = (
            self.verdict(accept)
            if trial.commit and self.incumbent and not isinstance(action, Profile | ReadTest)
            else None
        )
        if family in self.families or trial.against:
            facts["family_verdict"] = facts["against_verdict"] = self.verdict(accept).model_dump()
        if family and trial.commit and "diagnosis" not in facts:
            if accept or family not in self.families:
                self.families[family] = trial.id
            if accept or self.incumbent is None:
                self.incumbent = Single(model=family).model_dump()
        if self.problem.unit == "seconds":
            self.spent += cost_s
        elif isinstance(action, FineTune):
            self.spent += trial.share * (0.5 if "diagnosis" in facts else 1.0)
        return Outcome(
            state=trial.id,
            metrics={self.problem.metric: MetricValue(0.8, 0.01)},
            verdict=verdict,
            cost=Cost(wall_s=cost_s),
            remaining=self.remaining(),
            facts=facts,
            incumbent=self.incumbent,
            families=dict(self.families),
        )

    def profile(self) -> dict[str, Any]:
        if self.encoder == "none":
            return {"encoder": "none", "why_no_encoder": "model=none was given"}
        return {
            "encoder": self.encoder, "mean_tokens": {"32": 25.0, "64": 30.0, "128": 30.0, "256": 30.0, "512": 30.0},
            "p95_tokens": 50.0, "n_layers": 6, "hidden": 384, "precision": "fp32",
            "forward_tokens_s": self.tokens_s if self.problem.unit == "seconds" else 0.0,
        }  # fmt: skip

    def verdict(self, accept: bool) -> Verdict:
        comparison = Comparison(
            metric=self.problem.metric, candidate=0.8, incumbent=0.7, difference=0.1, stderr=0.01, p=0.01, n=500
        )
        return Verdict(accept=accept, rule="as the scenario says", evidence=(comparison,))


SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "spends little": {"thrift": 0.3},
    "tiny": {"problem": problem(5.0), "tokens_s": 1000.0},
    "a second": {"problem": problem(1.0)},
    "slow machine": {"problem": problem(60.0), "tokens_s": 2000.0},
    "a day": {"problem": problem(86400.0), "tokens_s": 1e6},
    "many rows": {"problem": problem(120.0, rows={"train": 2_000_000, "test": 50_000})},
    "few rows": {"problem": problem(60.0, rows={"train": 10, "control": 3, "calibration": 3, "test": 4})},
    "no encoder": {"encoder": "none"},
    "from scratch": {"encoder": "scratch"},
    "from scratch, slowly": {"encoder": "scratch", "problem": problem(30.0), "tokens_s": 2000.0},
    "regress": {"problem": problem(task="regress")},
    "multilabel": {"problem": problem(task="multilabel")},
    "updates": {"problem": problem(5000, "updates")},
    "few updates": {"problem": problem(20, "updates")},
    "tokens": {"problem": problem(2e6, "tokens")},
    "scratch, updates": {"problem": problem(3000, "updates"), "encoder": "scratch"},
    "none, updates": {"problem": problem(3000, "updates"), "encoder": "none"},
    "higher rate wins": {"better_rate": 2.0},
    "lower rate wins": {"better_rate": 0.5},
    "overfits": {"diagnosis": True},
    "overfits, updates": {"diagnosis": True, "problem": problem(5000, "updates")},
    "nothing is better": {"accepts": False},
    "rate and layers given": {"problem": problem(optimizer={"lr": 1e-4}, layers=2, max_length=64)},
    "no test": {"problem": problem(rows={"test": 0})},
}
EVERYWHERE = pytest.mark.parametrize("name", SCRIPTS)
ALWAYS = pytest.mark.parametrize("scenario", SCENARIOS)


@dataclass
class Story:
    machine: Machine
    asks: list[Any] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    left: list[float] = field(default_factory=list)  # of the budget, when each was asked

    def trials(self, stage: str = "") -> list[Trial]:
        return [a for a in self.asks if isinstance(a, Trial) and stage in ("", a.stage)]

    def skips(self, stage: str) -> list[Skip]:
        return [a for a in self.asks if isinstance(a, Skip) and a.stage == stage]


def live(name: str, scenario: str) -> Story:
    machine = Machine(**{"problem": problem(), **SCENARIOS[scenario]})
    if name == "more" and machine.encoder != "none":  # a finished run: something stands already
        machine.families = {"linear": "01-incumbent", "encoder": "07-trunk"}
        machine.incumbent = Single(model="encoder").model_dump()
    elif name == "more":
        machine.families, machine.incumbent = {"linear": "01-incumbent"}, Single(model="linear").model_dump()
    controller, story = Scripted(SCRIPTS[name](machine.problem)), Story(machine)
    while (ask := controller.ask()) is not None:
        assert len(story.asks) < 100, "it does not end"
        story.asks.append(ask)
        story.left.append(machine.remaining())
        if isinstance(ask, Reserve):
            machine.reserved[ask.name] = ask.amount
        elif isinstance(ask, Trial):
            story.outcomes.append(machine.run(ask))
            controller.tell(ask, story.outcomes[-1])
    assert controller.ask() is None, "it stays at its end"
    return story


@EVERYWHERE
@ALWAYS
def test_asks_make_sense(name: str, scenario: str) -> None:
    story = live(name, scenario)
    ids = [t.id for t in story.trials()]
    assert len(set(ids)) == len(ids)
    known: set[str] = {"01-incumbent", "07-trunk"} if name == "more" else set()
    for ask in story.asks:
        assert json.loads(ask.model_dump_json()) == ask.model_dump(mode="json")
        if isinstance(ask, Skip):
            assert ask.stage and ask.why
        if isinstance(ask, Trial):
            assert ask.why and ask.stage
            assert {ask.start, ask.against} - {None} <= known, "it starts from what there is"
            known.add(ask.id)
    if name != "more":
        assert [t.stage for t in story.trials()[:2]] == ["incumbent", "profile"]


@EVERYWHERE
@ALWAYS
def test_told_the_same_it_asks_the_same(name: str, scenario: str) -> None:
    story = live(name, scenario)
    again, outcomes = Scripted(SCRIPTS[name](story.machine.problem)), iter(story.outcomes)
    for ask in story.asks:
        assert again.ask() == ask
        if isinstance(ask, Trial):
            outcome = Outcome(**json.loads(next(outcomes).model_dump_json()))  # as the journal has it
            again.tell(ask, outcome)
    assert again.ask() is None


@EVERYWHERE
@ALWAYS
def test_it_stays_inside_the_budget(name: str, scenario: str) -> None:
    story = live(name, scenario)
    for ask, left in zip(story.asks, story.left, strict=True):
        if isinstance(ask, Trial):
            assert ask.share <= left + 1e-3, f"{ask.id} asks for {ask.share} of {left}"
        if isinstance(ask, Trial) and isinstance(ask.action, FineTune) and story.machine.problem.unit != "seconds":
            assert ask.share > 0
    if scenario not in ("tiny", "a second"):  # there, what must be done takes longer
        assert story.machine.spent <= story.machine.problem.budget * (1 + 1e-6)


@EVERYWHERE
@ALWAYS
def test_the_end_is_reserved_before_training_and_given_back(name: str, scenario: str) -> None:
    story = live(name, scenario)
    places = [i for i, a in enumerate(story.asks) if isinstance(a, Reserve) and a.name == "finish"]
    if story.machine.problem.unit != "seconds":
        assert not places
        return
    trained = [i for i, a in enumerate(story.asks) if isinstance(a, Trial) and isinstance(a.action, FitHead | FineTune)]
    assert story.asks[places[0]].amount > 0 and story.asks[places[-1]].amount == 0
    assert all(places[0] < i < places[-1] for i in trained)
    assert not any(amount for amount in story.machine.reserved.values())


@EVERYWHERE
@ALWAYS
def test_test_is_read_once_and_last(name: str, scenario: str) -> None:
    story = live(name, scenario)
    reads = [t for t in story.trials() if isinstance(t.action, ReadTest)]
    if scenario == "no test":
        assert not reads and isinstance(story.asks[-1], Skip) and story.asks[-1].stage == "test"
    else:
        assert len(reads) == 1 and story.asks[-1] is reads[0]


@pytest.mark.parametrize("name", ["staged", "more"])
@pytest.mark.parametrize("scenario", ["few updates", "tiny", "a second", "no encoder", "none, updates"])
def test_what_cannot_be_finished_is_not_begun(name: str, scenario: str) -> None:
    story = live(name, scenario)
    assert not any(isinstance(t.action, FineTune) for t in story.trials())
    assert any(isinstance(a, Skip) for a in story.asks)
    if scenario == "few updates":
        assert "20 updates" in story.skips("trunk")[0].why


@pytest.mark.parametrize(
    "stage, trials", [("linear", {"linear"}), ("race", {"race"}), ("average", {"average"}), ("predict", {"predict"})]
)
def test_a_stage_may_be_left_out(stage: str, trials: set[str]) -> None:
    SCENARIOS["without"] = {"problem": problem(skip=(stage,)), "better_rate": 2.0}
    whole, story = live("staged", "plain"), live("staged", "without")
    assert trials <= {t.stage for t in whole.trials()} and not trials & {t.stage for t in story.trials()}
    assert [s.why for s in story.skips(stage)] == [f"left out: skip={stage} was given"]


@pytest.mark.parametrize("name", ["staged", "race"])
@pytest.mark.parametrize("scenario, ratio", [("plain", 1.0), ("higher rate wins", 2.0), ("lower rate wins", 0.5)])
def test_the_trunk_takes_the_rate_that_won(name: str, scenario: str, ratio: float) -> None:
    story = live(name, scenario)
    probes, (trunk,) = story.trials("race"), story.trials("trunk")
    rates = [t.action.optimizer.lr for t in [*probes, trunk] if isinstance(t.action, FineTune)]
    assert rates[-1] == pytest.approx(ratio * rates[0])
    assert len(probes) >= 2 and not any(t.commit for t in probes)
    assert len({(t.share, t.start) for t in probes}) == 1, "all probes get the same"
    assert probes[1].against == probes[0].id
    assert sum(t.share for t in probes) < 0.3 * story.machine.problem.budget and trunk.commit


@pytest.mark.parametrize("name", ["staged", "race"])
def test_a_given_rate_is_not_raced(name: str) -> None:
    story = live(name, "rate and layers given")
    assert not story.trials("race") and "was given" in story.skips("race")[0].why
    (trunk,) = story.trials("trunk")
    assert isinstance(trunk.action, FineTune)
    assert (trunk.action.optimizer.lr, trunk.action.layers, trunk.action.max_length) == (1e-4, 2, 64)


@pytest.mark.parametrize("name", ["staged", "more"])
@pytest.mark.parametrize("scenario", ["overfits", "overfits, updates"])
@pytest.mark.parametrize("accepts", [True, False])
def test_overfitting_forks_the_trunk(name: str, scenario: str, accepts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENARIOS, "here", {**SCENARIOS[scenario], "accepts": accepts})
    story = live(name, "here")
    (trunk,), (changed,), (same,) = (story.trials(s) for s in ("trunk", "regularize", "go on"))
    assert changed.start == same.start == trunk.id and changed.share == same.share > 0
    assert isinstance(trunk.action, FineTune) and isinstance(changed.action, FineTune)
    assert same.action == trunk.action and changed.action.same_but_live(trunk.action)
    assert changed.action.optimizer.weight_decay > trunk.action.optimizer.weight_decay
    assert changed.action.dropout > trunk.action.dropout
    averaged = {t.start for t in story.trials("average")}
    assert averaged <= {same.id if accepts else changed.id}


@EVERYWHERE
def test_the_objective_is_the_tasks(name: str) -> None:
    for scenario, kind in (("plain", "cross_entropy"), ("multilabel", "binary_cross_entropy"), ("regress", "mse")):
        actions = [t.action for t in live(name, scenario).trials() if isinstance(t.action, FineTune)]
        assert actions and {a.objective.kind for a in actions} == {kind}


@pytest.mark.parametrize("name", ["staged", "race", "more"])
def test_prediction_is_tuned_around_what_stands(name: str) -> None:
    story = live(name, "plain")
    whats = [t.action.what for t in story.trials() if isinstance(t.action, Predict)]
    assert whats == ["blend", "calibrate", "thresholds"]
    assert all(t.action.base is not None for t in story.trials() if isinstance(t.action, Predict))
    assert [t.action.what for t in live(name, "regress").trials() if isinstance(t.action, Predict)] == [
        "blend",
        "calibrate",
    ]
    assert live(name, "few rows").skips("predict")


@pytest.mark.parametrize("name", CONTROLLERS)
def test_only_a_trunk_is_stopped_early(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decays to zero is compared at its end: stopped on the way it would not have decayed."""
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(5000, "updates", patience=3)})
    tuned = [t for t in live(name, "here").trials() if isinstance(t.action, FineTune)]
    assert tuned and {t.patience for t in tuned if t.stage != "trunk"} <= {0}
    if name in ("staged", "race", "fixed"):
        assert [t.patience for t in tuned if t.stage == "trunk"] == [3]


def test_a_scratch_encoder_is_trained_whole_and_without_a_head() -> None:
    story = live("staged", "from scratch")
    (trunk,) = story.trials("trunk")
    assert isinstance(trunk.action, FineTune) and trunk.action.trains == "all" and trunk.start is None
    assert trunk.action.dropout > 0 and not story.trials("head")


def test_more_goes_on_from_the_best_encoder() -> None:
    story = live("more", "plain")
    (trunk,) = story.trials("trunk")
    assert trunk.start == "07-trunk" and not story.trials("incumbent") and not story.trials("race")


@pytest.mark.parametrize("tokens_s, short", [(1_300.0, True), (2_000.0, True), (2_500.0, False), (9_000.0, False)])
def test_a_training_that_sees_train_less_than_twice_has_no_averages(tokens_s: float, short: bool) -> None:
    SCENARIOS["here"] = {"problem": problem(), "tokens_s": tokens_s}
    story = live("staged", "here")
    assert len(story.trials("trunk")) == 1 and bool(story.trials("average")) != short
    assert ["less than 2 times" in s.why for s in story.skips("average")] == [True] * short
