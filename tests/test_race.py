"""The race of learning rates: a rate that diverged never wins, whatever the weights are worth that it was put back to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from papers import counted, problem

from multistep.budget import parse_budget
from multistep.controllers.plan import Plan
from multistep.controllers.script import Scripted
from multistep.controllers.trunk import race_rates
from multistep.metrics.verdicts import better
from multistep.strategy import Trial
from multistep.types import Outcome

GAIN, NONE = better((counted(60, 10),)), better((counted(10, 12),))
DIVERGED = {"diagnosis": {"name": "divergence"}}
Probes = Mapping[float, tuple[bool, dict[str, Any]]]  # factor of the prior -> whether it wins its comparison, facts


def chosen(probes: Probes) -> float:
    """The factor of the prior rate that the race goes on with."""
    plan, found = Plan(problem(parse_budget("300s"))), []
    plan.facts = {
        "encoder": "some/encoder", "mean_tokens": {str(n): 30.0 for n in (32, 64, 128, 256, 512)}, "p95_tokens": 50.0, "n_layers": 6,
        "hidden": 384, "precision": "fp32", "forward_tokens_s": 1e5,
    }  # fmt: skip
    plan.max_length = plan.choose_length()[0]
    plan.choose_depth()
    prior = plan.prior().optimizer.lr

    def steps() -> Any:
        found.append((yield from race_rates(plan, plan.prior(), None)))

    controller = Scripted(steps())
    while (ask := controller.ask()) is not None:
        assert isinstance(ask, Trial), ask
        wins, facts = probes[round(ask.action.optimizer.lr / prior, 3)]  # pyright: ignore[reportAttributeAccessIssue]
        facts = {**facts, "against_verdict": (GAIN if wins else NONE).model_dump()}
        controller.tell(ask, Outcome(state=ask.id, facts=facts, remaining=250.0))
    return found[0] / prior


@pytest.mark.parametrize(
    ("probes", "wins"),
    [
        ({1: (False, {}), 2: (False, {}), 0.5: (False, {})}, 1),
        ({1: (False, {}), 2: (True, {}), 4: (False, {})}, 2),
        ({1: (False, {}), 2: (True, DIVERGED), 0.5: (True, {})}, 0.5),
        ({1: (False, {}), 2: (True, DIVERGED), 0.5: (False, {})}, 1),
        ({1: (False, DIVERGED), 2: (True, DIVERGED), 0.5: (False, {})}, 0.5),
    ],
)
def test_a_rate_that_diverged_does_not_win(probes: Probes, wins: float) -> None:
    assert chosen(probes) == pytest.approx(wins)
