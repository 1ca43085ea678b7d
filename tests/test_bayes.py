"""What the estimator of `bayes` is told: of the prior where the prior is, and of what diverged."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from test_searches import PRIOR, Machine, live, problem

from multistep.controllers.space import value_of

LIMIT = 1.5 * PRIOR  # above it everything diverges


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that are made."""
    made, create = [], optuna.create_study

    def kept(**settings: Any) -> Any:
        made.append(create(**settings))
        return made[-1]

    monkeypatch.setattr(optuna, "create_study", kept)
    return made


def test_the_estimator_is_told_of_the_prior_where_the_prior_is(studies: list[Any]) -> None:
    machine = Machine(problem(), best_rate=3 * PRIOR)
    live("bayes", machine)
    begun: list[Any] = [t.action for t in machine.trials if t.stage == "bayes" and t.start is None]
    told = studies[0].trials
    assert len(begun) == len(told) > 2 and value_of(begun[0], "optimizer.lr") == PRIOR
    for action, trial in zip(begun, told, strict=True):
        assert trial.params == {path: pytest.approx(value_of(action, path), rel=0.01) for path in trial.params}


def test_what_diverges_is_as_bad_as_the_worst_that_was_measured(studies: list[Any]) -> None:
    """Of what failed the estimator reads nothing, and would go on there."""
    live("bayes", Machine(problem(20_000), diverges_above=LIMIT))
    told, measured = studies[0].trials, list[float]()
    assert all(t.state != optuna.trial.TrialState.FAIL for t in told), "the prior came to its end, so all can be told"
    diverged = [t for t in told if t.params["optimizer.lr"] > LIMIT]
    assert len(diverged) >= 2 and len(told) - len(diverged) >= 2
    for trial in told:
        if trial in diverged:
            assert trial.state == optuna.trial.TrialState.COMPLETE and trial.value == min(measured)
        else:
            measured += [*trial.intermediate_values.values(), *([] if trial.value is None else [trial.value])]


def test_where_nothing_was_measured_yet_what_diverges_is_passed_over(studies: list[Any]) -> None:
    live("bayes", Machine(problem(20_000), diverges_above=0.0))
    assert {t.state for t in studies[0].trials} == {optuna.trial.TrialState.FAIL}
