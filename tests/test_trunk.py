"""How many layers the time buys, at what rate, how long they are trained, and how often."""

from __future__ import annotations

from typing import Any

import pytest
from test_controllers import SCENARIOS, Machine, live, problem

from multistep.controllers.plan import Plan
from multistep.controllers.trunk import AGAIN_EPOCHS, MEMBERS, TRUNK_EPOCHS, TRUNK_UPDATES
from multistep.strategy import Average, FineTune, FitHead


@pytest.mark.parametrize("name", ["staged", "race", "fixed"])
@pytest.mark.parametrize(
    "tokens_s, layers, lr",
    [(200_000.0, 6, 2e-4), (35_000.0, 6, 2e-4), (17_000.0, 3, 3e-4), (12_000.0, 3, 3e-4), (8_000.0, 2, 6e-4), (6_000.0, 1, 6e-4)],
)  # fmt: skip
def test_the_less_time_the_fewer_layers_and_the_higher_their_rate(
    name: str, tokens_s: float, layers: int, lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(60.0), "tokens_s": tokens_s})
    story = live(name, "here")
    (head,), (trunk,) = story.trials("head"), story.trials("trunk")
    assert isinstance(head.action, FitHead) and isinstance(trunk.action, FineTune)
    assert trunk.action.layers == layers
    assert trunk.action.optimizer.lr == pytest.approx(lr)
    assert head.action.cut <= 6 - layers, "states are never kept above what is trained"


def test_the_deeper_a_training_goes_the_lower_its_rate() -> None:
    plan = Plan(problem())
    plan.facts = Machine(problem=problem()).profile()
    rates = [plan.prior_lr(depth) for depth in range(1, 7)]
    assert rates[:3] == pytest.approx([6e-4, 6e-4, 3e-4]) and rates[5] == pytest.approx(2e-4)
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 5
    plan.facts |= {"n_layers": 0}  # it cannot be cut: all of it is trained
    assert plan.prior_lr(0) == pytest.approx(2e-4)


@pytest.mark.parametrize("name", ["staged", "more"])
def test_what_one_training_does_not_need_goes_into_others_and_the_mean_of_all(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(1200.0, rows={"train": 9000})})
    story = live(name, "here")
    (trunk,), again, (mean,) = story.trials("trunk"), story.trials("again"), story.trials("average")
    assert isinstance(trunk.action, FineTune) and 1 <= len(again) < MEMBERS
    plan = Plan(story.machine.problem)
    plan.facts, plan.max_length = story.machine.profile(), trunk.action.max_length
    for n, trial in enumerate(again, 1):
        assert trial.action == trunk.action.with_(reshuffle=n) and trial.start == trunk.start and not trial.commit
    for trial in (trunk, *again):
        assert AGAIN_EPOCHS <= plan.epochs(trial.share, trunk.action.layers) <= TRUNK_EPOCHS + 0.01
    assert mean.action == Average(which="mean", members=(trunk.id, *(t.id for t in again))) and mean.start == trunk.id
    assert mean.commit and mean.alpha <= 0.01, "it takes the place of the first unless it harms"
    assert "is one already" in story.skips("average")[-1].why


def test_where_a_training_was_not_better_the_mean_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(1200.0, rows={"train": 9000}), "accepts": False})
    (mean,) = live("staged", "here").trials("average")
    assert isinstance(mean.action, Average) and mean.action.which == "mean" and mean.alpha > 0.01


@pytest.mark.parametrize(
    "here",
    [
        {"problem": problem(1200.0, patience=3)}, {"problem": problem(1200.0, schedule={"kind": "plateau"})},
        {"problem": problem(1200.0, skip=("average",))}, {"problem": problem(1200.0, rows={"control": 10})},
        {"problem": problem(1200.0), "encoder": "scratch"}, {"problem": problem(9000, "updates")}, {"problem": problem(60.0)},
    ],
)  # fmt: skip
def test_one_training_where_the_mean_of_several_has_no_place(
    here: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCENARIOS, "here", here)
    story = live("staged", "here")
    assert len(story.trials("trunk")) == 1 and not story.trials("again")


def test_little_data_is_seen_often_enough_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(1200.0, rows={"train": 2000})})
    story = live("staged", "here")
    (trunk,) = story.trials("trunk")
    plan = Plan(story.machine.problem)
    plan.facts, plan.max_length = story.machine.profile(), trunk.action.max_length
    assert plan.updates(trunk.share, trunk.action.layers) == pytest.approx(TRUNK_UPDATES, rel=0.01)
