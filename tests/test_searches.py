"""The searches over strategies against a make-believe training: they end inside the budget, replay, are told in any order, compare only
what has decayed, and find what there is to find."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from multistep.controllers import Scripted, Skip, Target, Wait
from multistep.controllers.module import MODULE_CONTROLLERS, ModuleProblem
from multistep.controllers.searches import SEARCHES
from multistep.controllers.space import settled, space_of, value_of
from multistep.controllers.wealth import BEGIN, EARN, Wealth
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
    spent: float = 0.0
    trained: dict[str, tuple[float, float]] = field(default_factory=dict)  # state -> updates, score
    incumbent: str | None = None
    trials: list[Trial] = field(default_factory=list)

    def run(self, trial: Trial) -> Outcome:
        self.trials.append(trial)
        if isinstance(trial.action, Profile):
            facts = {"update_s": 0.0, "judge_s": 0.0, "test_s": 0.0, "tokens_an_update": 1, "parameters": 1}
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
            if action.optimizer.lr > self.diverges_above:
                return Outcome(ok=False, failure="training diverged", remaining=self.remaining)
            updates = trial.share + (self.trained[trial.start][0] if trial.start else 0.0)
            off = math.log(action.optimizer.lr / self.best_rate)
            score = 0.1 + (self.ceiling - 0.1) * math.exp(-(off**2) / 8) * (1 - math.exp(-updates / self.pace))
            if updates > self.overfits_after:
                regular = value_of(action, "objective.label_smoothing") > 0 or value_of(action, "dropout") > 0
                score -= 0.0 if regular else 0.1
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
        return max(0.0, self.problem.budget - self.spent)

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
def test_the_order_in_which_workers_come_back_changes_nothing(name: str) -> None:
    asks, _ = live(name, Machine(problem(), best_rate=2 * PRIOR))
    shuffled, _ = live(name, Machine(problem(), best_rate=2 * PRIOR), seed=1)
    plain = [(a.id, a.start, a.share) for a in asks if isinstance(a, Trial) and not a.commit]
    assert plain == [(a.id, a.start, a.share) for a in shuffled if isinstance(a, Trial) and not a.commit]


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
    pairs = [t for t in machine.trials if t.stage == "reactive" and " or not" in t.why]
    for stays, moved in zip(pairs[::2], pairs[1::2], strict=True):
        assert stays.start == moved.start and stays.share == moved.share
        assert stays.action != moved.action
    smooth = [t for t in machine.trials if t.why.startswith("run (label_smoothing")]
    assert smooth, "it was committed: training goes on with it"


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


def test_looks_that_find_nothing_have_to_be_surer_every_time() -> None:
    wealth, levels = Wealth(), []
    for _ in range(6):
        levels.append(wealth.level())
        wealth.settle(levels[-1], found=False)
    assert levels[0] == 0.1 and all(a > b for a, b in itertools.pairwise(levels))
    before = wealth.level()
    wealth.settle(before, found=True)
    assert wealth.level() > before


def test_false_gains_stay_as_few_as_promised() -> None:
    """2,000 runs of 60 looks at nothing: on average BEGIN false gains, and EARN for each of them."""
    draw, false = random.Random(0), 0
    for _ in range(2000):
        wealth = Wealth()
        for _ in range(60):
            level = wealth.level()
            found = draw.random() <= level
            false += found
            wealth.settle(level, found)
    floor = 60 * 0.005  # what a run that has spent everything may still look for
    assert false / 2000 <= (BEGIN + floor) / (1 - EARN) + 0.05
    assert false / 2000 > 0.1, "it does look"
