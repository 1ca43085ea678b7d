"""What looks may cost: levels, groups that are outstanding together, extensions of a run, the split that judges, and what is a gain at all."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import test_language_controller
from test_controllers import Machine, problem
from test_searches import Machine as ModuleMachine
from test_searches import live as live_module
from test_searches import problem as module_problem

from multistep.controllers import Reserve, Target
from multistep.controllers.begin import begin
from multistep.controllers.plan import Plan
from multistep.controllers.wealth import BEGIN, EARN, FLOOR, Wealth
from multistep.metrics.verdicts import better
from multistep.predictors import Single
from multistep.strategy import Average, Decode, Predict, TrainWriter, Trial
from multistep.types import Comparison, MetricValue, Outcome, Verdict


def test_looks_that_find_nothing_have_to_be_surer_every_time() -> None:
    wealth, levels = Wealth(), []
    for _ in range(6):
        levels.append(wealth.level())
        wealth.settle(levels[-1], found=False)
    assert levels[0] == 0.1 and all(a > b for a, b in itertools.pairwise(levels))
    before = wealth.level()
    wealth.settle(before, found=True)
    assert wealth.level() > before


GROUPS = {
    "one by one": [(1, 1.0)] * 60,
    "long shots": [(1, 0.25)] * 60,
    "a rung of halving": [(16, 0.25), (8, 0.25), (4, 0.25), (2, 1.0)],
    "many at once": [(50, 1.0)],
}


@pytest.mark.parametrize("name", GROUPS)
def test_false_gains_stay_as_few_as_promised(name: str) -> None:
    """4,000 runs of looks at nothing: on average BEGIN false gains, EARN for each of them, and the levels of looks that have nothing left to
    pay with. The account is exact: what was false is what was spent."""
    draw, false, given, left, broke = random.Random(0), 0, 0.0, 0.0, 0.0
    for _ in range(4000):
        wealth = Wealth()
        for among, stake in GROUPS[name]:
            level = wealth.level(stake, among)
            broke += among * level if wealth.amount == FLOOR else 0.0
            for _ in range(among):
                found = draw.random() <= level
                false += found
                before = wealth.amount
                wealth.settle(level, found)
                given += wealth.amount - before - (EARN if found else -level / (1 - level))
        left += wealth.amount
    runs, noise = 4000, 4 * (false / 4000**2) ** 0.5
    assert false / runs == pytest.approx((BEGIN - left / runs + given / runs) / (1 - EARN), abs=noise)
    assert false / runs <= (BEGIN + 1.05 * broke / runs) / (1 - EARN) + noise
    assert false / runs > 0.1, "it does look"


def test_what_is_outstanding_together_can_be_paid() -> None:
    asks, _ = live_module("halving", ModuleMachine(module_problem(1e6)))
    cooled = [a if isinstance(a, Trial) and a.stage == "cool-down" else None for a in asks]
    groups = [list(g) for is_group, g in itertools.groupby(cooled, key=lambda a: a is not None) if is_group]
    assert len(groups[0]) == 16
    assert sum(t.alpha / (1 - t.alpha) for t in groups[0] if t is not None) <= BEGIN + 1e-4
    wealth = Wealth()
    assert wealth.level(among=1) == 0.1 and wealth.level(0.25, among=2) == 0.025, "few can be paid at their stake"
    assert wealth.level(0.25, among=16) < 0.025


def test_more_budget_brings_no_more_wealth() -> None:
    """A machine on which nothing is better: what was paid in the run is paid when it is given more."""
    machine, given = Machine(problem(600.0), accepts=False), problem(600.0)
    past = [{"kind": "Started"}, {"kind": "Finished"}, {"kind": "Resumed", "budget": {"amount": 1200.0}}]
    controller, trials = begin(given, "staged", past), []
    while (ask := controller.ask()) is not None:
        if isinstance(ask, Reserve):
            machine.reserved[ask.name] = ask.amount
        elif isinstance(ask, Trial):
            if ask.id.startswith("2-") and not any(t.id.startswith("2-") for t in trials):
                machine.spent = 0.0
            trials.append(ask)
            controller.tell(ask, machine.run(ask))
    first = [t for t in trials if not t.id.startswith("2-") and t.commit]
    trunk = next(t for t in trials if t.id.startswith("2-") and t.stage == "trunk")
    assert first[0].alpha == 0.1
    assert trunk.alpha < min(t.alpha for t in first if t.stage == "trunk"), "it goes on from what was left"


def asked(machine: test_language_controller.Machine, *kinds: type) -> list[Trial]:
    return [a for a in machine.asked if isinstance(a, Trial) and a.commit and isinstance(a.action, kinds)]


def test_ways_to_write_pay_from_the_rows_that_judge_them() -> None:
    machine = test_language_controller.driven(900.0, 0.2, loses=True)
    (trunk, *_), (first, second, *_) = asked(machine, TrainWriter), asked(machine, Decode)
    assert trunk.alpha < 0.1, "cheap writers were looked at on control"
    assert first.alpha == 0.1 > second.alpha
    machine = test_language_controller.driven(900.0, 0.2, kind="lm", loses=True)
    stages = {t.stage: t.alpha for t in machine.asked if isinstance(t, Trial)}
    once = Wealth()
    once.settle(0.1, found=False)
    assert (stages["mix"], stages["recount"]) == (0.1, once.level())


# ---------------------------------------------------------------------------------------------- what is a gain

GAIN = better(
    (Comparison(metric="f1_macro", candidate=0.8, incumbent=0.7, difference=0.1, stderr=0.01, p=0.001, n=500),)
)
NONE = GAIN.with_(accept=False)


@pytest.mark.parametrize(
    ("facts", "verdict", "taken"),
    [
        ({}, GAIN, True), ({}, NONE, False), ({"family_verdict": GAIN}, GAIN, True), ({"family_verdict": NONE}, GAIN, False),
        ({"diagnosis": {"name": "overfitting"}}, None, False), ({"diagnosis": {"name": "overfitting"}}, GAIN, False),
    ],
)  # fmt: skip
def test_only_what_is_committed_is_a_gain(facts: dict[str, Any], verdict: Verdict | None, taken: bool) -> None:
    """It earns, and it may be the target."""
    plan = Plan(problem().with_(target=Target(metric="f1_macro", value=0.5, higher_is_better=True)))
    trial = plan.asked("average", Average(which="ema"), "a test", start="07-trunk")
    before = plan.purse["control"].amount
    dumped = {k: v.model_dump() if isinstance(v, Verdict) else v for k, v in facts.items()}
    outcome = Outcome(
        state="08-average", metrics={"f1_macro": MetricValue(0.8, 0.01)}, verdict=verdict, facts={"family": "encoder", **dumped},
    )  # fmt: skip
    plan.took(trial, outcome)
    assert bool(plan.reached) == taken
    assert (plan.purse["control"].amount > before) == taken
    if verdict is not None and not taken:
        assert plan.purse["control"].amount < before, "it is paid for"


def test_a_predictor_that_is_taken_is_a_gain_of_its_own_split() -> None:
    plan = Plan(problem())
    trial = plan.asked(
        "predict", Predict(what="calibrate", base=Single(model="linear")), "a test", judges="calibration"
    )
    plan.took(trial, Outcome(state="x", verdict=GAIN, facts={"predictor": {}}), "calibration")
    assert plan.purse["calibration"].amount > BEGIN and "control" not in plan.purse
