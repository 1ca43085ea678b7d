"""The searches over strategies against a make-believe training: they end inside the budget, replay, are told in any order, compare only
what has decayed, and find what there is to find."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from multistep.controllers import Reserve, Scripted, Skip, Target, Wait
from multistep.controllers.members import Member
from multistep.controllers.module import MODULE_CONTROLLERS, ModuleProblem
from multistep.controllers.reactive import moved
from multistep.controllers.searches import SEARCHES
from multistep.controllers.space import settled, space_of, value_of
from multistep.objectives import CrossEntropy
from multistep.optimizers import SGD, AdamW
from multistep.strategy import Average, Profile, ReadTest, TrainModule, Trial
from multistep.types import Comparison, MetricValue, Outcome, Verdict

PRIOR = AdamW.rates["scratch"].prior
EVERYWHERE = pytest.mark.parametrize("name", MODULE_CONTROLLERS)


def problem(budget: float = 6000, target: Target | None = None, **more: Any) -> ModuleProblem:
    return ModuleProblem.parse({
        "objective": {"kind": "cross_entropy"}, "metric": "accuracy", "optimizer": {"kind": "adamw"}, "regime": "scratch", "schedule": None,
        "batch_size": 32, "micro_batch": 0, "clip": 1.0, "dropout": None, "bf16": False, "budget": budget, "unit": "updates",
        "rows": {"train": 6000, "validation": 500, "test": 500}, "choice": "a test", "higher_is_better": True, "target": target, **more,
    })  # fmt: skip


@dataclass
class Machine:
    """Scores what is trained by how near its rate is to the best one, and by how long it was trained; `noise`: of a score's error."""

    problem: ModuleProblem
    best_rate: float = PRIOR
    ceiling: float = 0.9
    pace: float = 300.0  # updates
    diverges_above: float = math.inf
    overfits_after: float = math.inf  # updates
    heals: bool = True  # by stronger regularization
    lost_after: float = math.inf  # of the budget, every member of a population
    update_s: float = 0.0
    judge_s: float = 0.0
    spent: float = 0.0
    reserved: dict[str, float] = field(default_factory=dict)
    trained: dict[str, tuple[float, float]] = field(default_factory=dict)  # state -> updates, score
    incumbent: str | None = None
    trials: list[Trial] = field(default_factory=list)

    def run(self, trial: Trial) -> Outcome:
        self.trials.append(trial)
        if isinstance(trial.action, Profile):
            facts = {
                "update_s": self.update_s,
                "judge_s": self.judge_s,
                "test_s": 0.0,
                "tokens_an_update": 1,
                "parameters": 1,
            }
            return Outcome(facts=facts, remaining=self.remaining)
        if isinstance(trial.action, ReadTest):
            return Outcome(remaining=self.remaining)
        if isinstance(trial.action, Average):
            return Outcome(ok=False, failure="too short", remaining=self.remaining)
        facts: dict[str, Any] = {}
        updates = 0.0
        score = 0.1
        if isinstance(trial.action, TrainModule):
            self.spent += trial.share
            action = trial.action
            if action.optimizer.lr > self.diverges_above or (
                trial.stage == "population" and self.spent > self.lost_after
            ):
                return Outcome(ok=False, failure="training diverged", remaining=self.remaining)
            updates = trial.share + (self.trained[trial.start][0] if trial.start else 0.0)
            off = math.log(action.optimizer.lr / self.best_rate)
            score = 0.1 + (self.ceiling - 0.1) * math.exp(-(off**2) / 8) * (1 - math.exp(-updates / self.pace))
            if updates > self.overfits_after:
                regular = value_of(action, "objective.label_smoothing") > 0 or value_of(action, "dropout") > 0
                score -= 0.0 if regular and self.heals else 0.1
            facts = {"train_loss": 1 / (1 + updates)}
        self.trained[trial.id] = (updates, score)
        if trial.against is not None:
            facts["against_verdict"] = self.verdict(score, trial.against, trial.alpha).model_dump()
        verdict = None
        if trial.commit and self.incumbent is not None:
            verdict = self.verdict(score, self.incumbent, trial.alpha)
        if trial.commit and (verdict is None or verdict.accept):
            self.incumbent = trial.id
        return Outcome(
            state=trial.id, metrics={"accuracy": MetricValue(score, 0.01)}, verdict=verdict, facts=facts, remaining=self.remaining,
        )  # fmt: skip

    @property
    def remaining(self) -> float:
        return max(0.0, self.problem.budget - self.spent - sum(self.reserved.values()))

    def verdict(self, score: float, rival: str, alpha: float) -> Verdict:
        gain, stderr = score - self.trained[rival][1], 0.01
        p = 0.5 * math.erfc(gain / stderr / 2**0.5)
        compared = Comparison(
            metric="accuracy", candidate=score, incumbent=score - gain, difference=gain, stderr=stderr, p=p, n=500
        )
        return Verdict(accept=gain > 0 and p <= alpha, rule="a normal error", evidence=(compared,))


def live(name: str, machine: Machine, seed: int | None = None) -> tuple[list[Any], dict[str, Outcome]]:
    """What is asked, and what each trial was told; with a seed those that are outstanding are told in any order."""
    script, asks, outstanding, told = Scripted(MODULE_CONTROLLERS[name](machine.problem)), [], [], {}
    pick = random.Random(seed)
    while True:
        ask = script.ask()
        assert len(asks) < 300, "it does not end"
        if ask is None:
            assert not outstanding
            return asks, told
        if isinstance(ask, Wait):
            trial = outstanding.pop(0 if seed is None else pick.randrange(len(outstanding)))
            told[trial.id] = machine.run(trial)
            script.tell(trial, told[trial.id])
            continue
        asks.append(ask)
        if isinstance(ask, Reserve):
            machine.reserved[ask.name] = ask.amount
        if isinstance(ask, Trial):
            outstanding.append(ask)


@EVERYWHERE
@pytest.mark.parametrize("budget", [20, 300, 1500, 6000, 1e6])
def test_it_ends_inside_the_budget_and_reads_test_last(name: str, budget: float) -> None:
    machine = Machine(problem(budget))
    asks, _ = live(name, machine)
    assert machine.spent <= budget * (1 + 1e-6)
    assert isinstance(asks[-1], Trial) and isinstance(asks[-1].action, ReadTest)
    assert sum(isinstance(t.action, ReadTest) for t in machine.trials) == 1
    ids = [t.id for t in machine.trials]
    assert len(set(ids)) == len(ids)
    if budget >= 1500:
        assert machine.spent >= 0.6 * budget or name == "reactive", "what is not spent is not learnt"
    if budget == 20 and name != "fixed":
        assert machine.spent == 0 and any(isinstance(a, Skip) and "updates" in a.why for a in asks)


@EVERYWHERE
def test_told_the_same_it_asks_the_same(name: str) -> None:
    machine = Machine(problem(), best_rate=3 * PRIOR)
    asks, told = live(name, machine)
    script, again, outstanding = Scripted(MODULE_CONTROLLERS[name](machine.problem)), [], []
    while (ask := script.ask()) is not None:
        if isinstance(ask, Wait):
            trial = outstanding.pop(0)
            script.tell(trial, Outcome(**json.loads(told[trial.id].model_dump_json())))  # as the journal has it
            continue
        again.append(ask)
        if isinstance(ask, Trial):
            outstanding.append(ask)
    assert again == asks


@EVERYWHERE
@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_in_which_workers_come_back_changes_nothing_but_levels(name: str, seed: int) -> None:
    """What stands when a trial is judged is another one then, and so is what its comparison pays."""
    asks, _ = live(name, Machine(problem(), best_rate=2 * PRIOR))
    shuffled, _ = live(name, Machine(problem(), best_rate=2 * PRIOR), seed=seed)
    alike = [[a.with_(alpha=0.5) if isinstance(a, Trial) else a for a in part] for part in (asks, shuffled)]
    assert alike[0] == alike[1]


@pytest.mark.parametrize("name", ["halving", "population"])
def test_several_are_outstanding(name: str) -> None:
    script = Scripted(MODULE_CONTROLLERS[name](problem()))
    machine, outstanding, most = Machine(problem()), [], 0
    while (ask := script.ask()) is not None:
        if isinstance(ask, Wait):
            trial = outstanding.pop()
            script.tell(trial, machine.run(trial))
        elif isinstance(ask, Trial):
            outstanding.append(ask)
            most = max(most, len(outstanding))
    assert most >= 4


@EVERYWHERE
@pytest.mark.parametrize("best", [PRIOR / 6, PRIOR, 6 * PRIOR])
def test_only_what_has_decayed_is_compared(name: str, best: float) -> None:
    machine = Machine(problem(), best_rate=best, overfits_after=2000)
    live(name, machine)
    ends = {t.id: t.action.schedule(1.0) for t in machine.trials if isinstance(t.action, TrainModule)}
    judged = [t for t in machine.trials if t.id in ends and (t.commit or t.against)]
    assert judged
    for trial in judged:
        assert ends[trial.id] == pytest.approx(0.0), trial.id
        assert trial.against is None or ends[trial.against] == pytest.approx(0.0), trial.id
        if trial.start in ends:  # a branch goes on from a trunk, never from a branch
            assert ends[trial.start] == 1.0, trial.id


@pytest.mark.parametrize("name", [*SEARCHES, "staged"])
def test_a_prior_that_is_far_off_is_left(name: str) -> None:
    """Six times too low: what fixed gets is beaten by every search."""
    fixed, machine = Machine(problem(), best_rate=6 * PRIOR), Machine(problem(), best_rate=6 * PRIOR)
    live("fixed", fixed)
    live(name, machine)
    assert machine.incumbent is not None and fixed.incumbent is not None
    assert machine.trained[machine.incumbent][1] > fixed.trained[fixed.incumbent][1] + 0.05


@pytest.mark.parametrize("name", [*SEARCHES, "staged", "race", "fixed"])
def test_a_target_ends_training(name: str) -> None:
    target = Target(metric="accuracy", value=0.5, higher_is_better=True)
    whole, machine = Machine(problem()), Machine(problem(target=target))
    live(name, whole)
    asks, told = live(name, machine)
    reached = [a for a in asks if isinstance(a, Skip) and a.stage == "training"]
    assert len(reached) == 1 and "above 0.5" in reached[0].why
    if name != "fixed":
        assert machine.spent < whole.spent
    first = next(
        t.id for t in machine.trials if t.commit and told[t.id].metrics and told[t.id].metrics["accuracy"].value >= 0.51
    )
    trained = [t.id for t in machine.trials if isinstance(t.action, TrainModule)]
    assert trained[-1] >= first and isinstance(machine.trials[-1].action, ReadTest)


def test_halving_pauses_and_thaws() -> None:
    machine = Machine(problem(), best_rate=PRIOR)
    live("halving", machine)
    trunks = [t for t in machine.trials if t.stage == "halving"]
    starts = [t.start for t in trunks if t.start is not None]
    assert len(trunks) > len(starts) > 0, "those of later rungs go on from those of earlier ones"
    assert set(starts) <= {t.id for t in trunks}
    assert len(set(starts)) == len(starts)


def test_population_forks_the_best() -> None:
    machine = Machine(problem(20_000), best_rate=3 * PRIOR)
    live("population", machine)
    starts = [t.start for t in machine.trials if t.stage == "population" and t.start is not None]
    assert len(set(starts)) < len(starts), "a trunk was copied"


def test_population_keeps_its_best_where_all_members_are_lost() -> None:
    machine = Machine(problem(20_000), lost_after=12_000)
    live("population", machine)
    last = [t for t in machine.trials if isinstance(t.action, TrainModule)][-1]
    assert last.stage == "cool-down" and last.start in machine.trained and machine.spent > 15_000
    assert next(t.start for t in machine.trials if t.stage == "average") == last.id


def test_reactive_goes_down_where_it_diverges() -> None:
    machine = Machine(problem(), best_rate=PRIOR / 3, diverges_above=PRIOR / 2)
    live("reactive", machine)
    rates = [t.action.optimizer.lr for t in machine.trials if isinstance(t.action, TrainModule)]
    assert rates[0] == PRIOR and rates[1] == pytest.approx(PRIOR / 3)
    assert machine.incumbent is not None and machine.trained[machine.incumbent][1] > 0.5


def test_reactive_tries_a_correction_beside_going_on_and_keeps_it_only_when_it_helps() -> None:
    machine = Machine(problem(), pace=50, overfits_after=1500)
    live("reactive", machine)
    words = [t.why for t in machine.trials if t.stage == "reactive"]
    tried = [w for w in words if "smoother targets" in w]
    assert tried, words
    fork_of_corrections(machine)
    smooth = [t for t in machine.trials if t.why.startswith("run (label_smoothing")]
    assert smooth, "it was committed: training goes on with it"


def fork_of_corrections(machine: Machine) -> None:
    """Every correction begins where what went on as before began, is as long, and is another setting; and so are their cool-downs."""
    steps = [(t, machine.trials[n + 1]) for n, t in enumerate(machine.trials) if t.stage == "reactive"]
    moved = [(t, cool) for t, cool in steps if t.why.endswith("in place of going on as before")]
    assert moved
    for other, cool in moved:
        stays, cooled = [s for s in steps if s[0].start == other.start and s[0].why.endswith(": on as before")][-1]
        assert other.share == stays.share and other.action != stays.action
        assert cool.share == cooled.share and cool.start == other.id and cooled.start == stays.id
        assert cool.against == cooled.id


@pytest.mark.parametrize("budget", [485, 596, 1500, 3000])
@pytest.mark.parametrize("best", [PRIOR, 4 * PRIOR])
def test_a_correction_has_the_time_of_what_it_is_held_against_or_is_not_tried(budget: float, best: float) -> None:
    machine = Machine(problem(budget), pace=30, best_rate=best)
    live("reactive", machine)
    fork_of_corrections(machine)


@pytest.mark.parametrize("given", [True, False])
def test_reactive_moves_no_rate_that_was_given_and_none_further_than_is_searched(given: bool) -> None:
    fixed: dict[str, Any] = {"optimizer": {"kind": "adamw", "lr": PRIOR}} if given else {}
    machine = Machine(problem(**fixed), diverges_above=PRIOR / 100)
    asks, _ = live("reactive", machine)
    rates = [t.action.optimizer.lr for t in machine.trials if isinstance(t.action, TrainModule)]
    assert rates == pytest.approx([PRIOR] if given else [PRIOR, PRIOR / 3, PRIOR / 8])
    (end,) = [a for a in asks if isinstance(a, Skip) and a.stage == "reactive"]
    assert "no lower one may be tried" in end.why


def test_a_setting_moves_no_further_than_is_searched() -> None:
    strategy = TrainModule(optimizer=AdamW(lr=PRIOR), objective=CrossEntropy(label_smoothing=0.15))
    ground: Any = SimpleNamespace(space=lambda: space_of(strategy, batches=True), prior=lambda: strategy)

    def at(path: str, value: float, times: float, plus: float = 0.0) -> float | None:
        return moved(ground, Member("m", {path: value}), path, times, plus)

    assert moved(ground, Member("m", {}), "optimizer.lr", 2.0) == 2 * PRIOR
    assert at("optimizer.lr", 6 * PRIOR, 2.0) == pytest.approx(8 * PRIOR)
    assert at("optimizer.lr", 8 * PRIOR, 2.0) is None
    assert at("objective.label_smoothing", 0.15, 1.0, 0.1) == 0.2 and at("batch_size", 32, 2.0) == 64
    assert at("batch_size", 64, 2.0) is None
    assert moved(ground, Member("m", {}), "dropout", 1.0, 0.1) is None, "this module has none"


def test_halving_keeps_the_best_end_whatever_becomes_of_its_member() -> None:
    machine = Machine(problem(), pace=100, overfits_after=600, heals=False)
    live("halving", machine)
    ends = {t.id: machine.trained[t.id][1] for t in machine.trials if t.stage == "cool-down"}
    averaged = {t.start for t in machine.trials if t.stage == "average"}
    assert [ends[str(state)] for state in averaged] == [max(ends.values())]
    assert list(ends.values())[-1] < max(ends.values()), "what was trained longest is not the best"


def test_reactive_stops_when_nothing_helps() -> None:
    machine = Machine(problem(20_000), pace=30)
    asks, _ = live("reactive", machine)
    ends = [a for a in asks if isinstance(a, Skip) and a.stage == "reactive"]
    assert len(ends) == 1 and "no correction is left" in ends[0].why
    assert machine.spent < 20_000


def test_the_space_is_what_nobody_has_fixed() -> None:
    strategy = TrainModule(optimizer=AdamW(lr=1e-3), objective=CrossEntropy(), dropout=0.1)
    paths = {a.path: a for a in space_of(strategy, batches=True).axes}
    assert set(paths) == {
        "optimizer.lr",
        "optimizer.weight_decay",
        "dropout",
        "objective.label_smoothing",
        "batch_size",
    }
    assert (paths["optimizer.lr"].low, paths["optimizer.lr"].high) == pytest.approx((1.25e-4, 8e-3))
    assert not paths["batch_size"].live and paths["optimizer.lr"].live
    assert {a.path for a in space_of(strategy, fixed=["dropout", "optimizer.lr"]).axes} == {
        "optimizer.weight_decay", "objective.label_smoothing",
    }  # fmt: skip
    bare = strategy.with_(optimizer=AdamW(lr=1e-3, weight_decay=0.0))
    assert space_of(strategy, batches=True).nearest(bare) == {
        "optimizer.lr": 1e-3, "optimizer.weight_decay": 1e-4, "dropout": 0.1, "objective.label_smoothing": 0.0, "batch_size": 32,
    }  # fmt: skip
    drawn = space_of(strategy, batches=True).draw(random.Random(0))
    moved = settled(strategy, drawn)
    assert value_of(moved, "optimizer.lr") == drawn["optimizer.lr"] and moved.batch_size == drawn["batch_size"]
    assert not [a for a in space_of(TrainModule(optimizer=SGD(lr=0.1))).axes if a.path == "dropout"]


def test_a_nudge_moves_live_settings_and_stays_inside() -> None:
    strategy = TrainModule(optimizer=AdamW(lr=1e-3), objective=CrossEntropy(), dropout=0.1)
    space = space_of(strategy, batches=True)
    point, draw = space.draw(random.Random(1)), random.Random(2)
    for _ in range(50):
        new = space.nudge(point, strategy, draw)
        assert new["batch_size"] == point["batch_size"]
        for axis in space.axes:
            assert axis.low <= new[axis.path] <= axis.high
        assert settled(strategy, new).same_but_live(settled(strategy, point))
        point = new
