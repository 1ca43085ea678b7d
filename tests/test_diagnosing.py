"""The stage that diagnoses, against the make-believe machine: always there, before the test, and dear only where the clock can pay."""

from __future__ import annotations

import pytest
from test_controllers import SCENARIOS, SCRIPTS, live, problem

from multistep.controllers import Reserve, diagnosing
from multistep.controllers.plan import Plan
from multistep.strategy import Diagnose, FineTune, Trial


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_run_ends_with_a_diagnosis_and_the_test(name: str, scenario: str) -> None:
    story = live(name, scenario)
    asked = [a for a in story.asks if isinstance(a, Trial)]
    (trial,) = story.trials("diagnose")
    assert isinstance(trial.action, Diagnose) and asked[-2 if scenario != "no test" else -1] is trial
    assert bool(trial.action.by) != bool(story.skips("diagnose")), "measured, or why not"
    if story.machine.problem.unit != "seconds":
        assert trial.action.by


@pytest.mark.parametrize(("scenario", "by"), [("plain", "head"), ("no encoder", "linear"), ("from scratch", "linear")])
def test_the_family_that_stands_is_asked(scenario: str, by: str) -> None:
    (trial,) = live("staged", scenario).trials("diagnose")
    assert isinstance(trial.action, Diagnose) and trial.action.by == by


@pytest.mark.parametrize("dear", [False, True])
def test_the_price_is_set_aside_where_it_is_small(dear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = problem().budget
    price = (1.01 if dear else 0.99) * diagnosing.SHARE * budget
    monkeypatch.setattr(diagnosing, "price_s", lambda plan, by: price)
    story = live("staged", "plain")
    kept = [a.amount for a in story.asks if isinstance(a, Reserve) and a.name == "diagnose"]
    assert kept == ([] if dear else [pytest.approx(price, abs=0.01), 0.0])
    places = [i for i, a in enumerate(story.asks) if isinstance(a, Reserve) and a.name == "diagnose"]
    trained = [i for i, a in enumerate(story.asks) if isinstance(a, Trial) and isinstance(a.action, FineTune)]
    assert dear or all(places[0] < i < places[1] for i in trained)


def test_what_cannot_be_paid_is_skipped_with_its_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosing, "price_s", lambda plan, by: 1e6)
    story = live("staged", "plain")
    (skipped,), (trial,) = story.skips("diagnose"), story.trials("diagnose")
    assert "1000000.0 s" in skipped.why and trial.action == Diagnose()


def test_the_price_grows_with_rows_and_outputs_up_to_a_limit() -> None:
    def price(rows: int, by: diagnosing.By) -> float:
        plan = Plan(problem(rows={"train": rows}))
        plan.facts = {"encoder": "e", "hidden": 384, "forward_tokens_s": 1e5, "mean_tokens": {"32": 20.0}}
        plan.max_length = 32
        return diagnosing.price_s(plan, by)

    assert price(1000, "head") < price(10_000, "head") < price(20_000, "head") == price(10**6, "head")
    assert price(1000, "linear") < price(10**6, "linear")
    assert diagnosing.price_s(Plan(problem(100, "updates")), "head") == 0.0
