"""Budgets between those where one training fits and those where several do: no search trains nothing there, nor does a target."""

from __future__ import annotations

import pytest
from test_searches import EVERYWHERE, Machine, live, problem

from multistep.controllers import Target
from multistep.strategy import TrainModule


@EVERYWHERE
@pytest.mark.parametrize("budget", [150, 300, 560, 600, 670, 1000])
def test_where_a_training_fits_there_is_one(name: str, budget: float) -> None:
    timed = problem(budget / 15, unit="seconds")
    for machine in (Machine(problem(budget)), Machine(timed, update_s=0.05, judge_s=0.4)):
        live(name, machine)
        assert any(isinstance(t.action, TrainModule) for t in machine.trials), machine.problem.unit


def test_a_target_takes_no_training_away() -> None:
    machine = Machine(problem(140, target=Target(metric="accuracy", value=0.99, higher_is_better=True)))
    live("staged", machine)
    assert sum(t.share for t in machine.trials) > 130
