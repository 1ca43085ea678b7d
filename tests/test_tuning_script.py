"""The script that tunes answers, on a machine of paper: what it asks, and what it leaves out."""

from __future__ import annotations

from typing import Any

import pytest

from multistep.controllers.answering import AnsweringProblem, answering
from multistep.controllers.choices import CHOOSERS
from multistep.controllers.script import Scripted, Skip
from multistep.predictors import Single, Thresholds
from multistep.predictors.recipe import Recipe
from multistep.strategy import Profile, Promise, Serving, Trial, TryRecipe
from multistep.tasks import Classify, Regress
from multistep.types import Outcome, Verdict


def problem(**changes: Any) -> AnsweringProblem:
    given: dict[str, Any] = {
        "task": Classify(labels=("a", "b", "c")), "metric": "accuracy", "models": ("linear", "encoder"),
        "default": Single(model="encoder"), "engine": {}, "limit": None, "budget": 60.0, "rows": 300,
    }  # fmt: skip
    return AnsweringProblem(**{**given, **changes})


def driven(
    p: AnsweringProblem, ms: dict[str, float], takes: Any = lambda recipe: False, remaining: float = 50.0
) -> list[Any]:
    """What the script asks for, told that every recipe for which `takes` says so is taken."""
    from multistep.predictors.recipe import recipe_of

    controller, asked = Scripted(answering(p)), []
    recipe = recipe_of(p.default, p.task, {})
    standing: dict[str, Any] = {"engine": p.engine, "recipe": recipe and recipe.model_dump(mode="json")}
    while (ask := controller.ask()) is not None:
        asked.append(ask)
        if not isinstance(ask, Trial):
            continue
        facts: dict[str, Any] = {"models": ms, "engines": []}
        verdict = None
        if isinstance(ask.action, TryRecipe):
            verdict = Verdict(accept=bool(takes(ask.action.recipe)), rule="told so")
            if verdict.accept:
                standing = {**standing, "recipe": ask.action.recipe.model_dump(mode="json")}
        controller.tell(ask, Outcome(verdict=verdict, facts=facts, remaining=remaining, incumbent=standing))
    return asked


def recipes(asked: list[Any]) -> list[Any]:
    return [a.action.recipe for a in asked if isinstance(a, Trial) and isinstance(a.action, TryRecipe)]


def test_shares_of_a_cascade_go_up_until_one_is_taken() -> None:
    asked = recipes(driven(problem(), {"linear": 1.0, "encoder": 10.0}, lambda r: r.again == 0.3))
    assert [r.again for r in asked if r.first] == [0.1, 0.2, 0.3]


def test_no_cascade_where_the_cheap_model_is_not_cheap() -> None:
    asked = driven(problem(), {"linear": 6.0, "encoder": 10.0})
    assert not any(r.first for r in recipes(asked))
    assert any(isinstance(a, Skip) and a.stage == "cascade" for a in asked)


def test_what_can_only_be_cheaper_pays_for_no_look() -> None:
    asked = driven(problem(), {"linear": 1.0, "encoder": 10.0})
    tried = [a for a in asked if isinstance(a, Trial) and isinstance(a.action, TryRecipe)]
    cascades = [a.alpha for a in tried if a.stage == "cascade"]
    assert cascades and set(cascades) == {0.1}
    assert next(a.alpha for a in tried if a.stage != "cascade") == 0.1


@pytest.mark.parametrize("controller", CHOOSERS)
def test_every_controller_searches_ways_to_answer(controller: str) -> None:
    p, ms = (
        problem(metric="f1_macro", controller=controller, models=("linear", "encoder", "encoder@32")),
        {"linear": 1.0, "encoder": 10.0},
    )

    def tries() -> list[Trial]:
        asked = driven(p, ms, lambda recipe: recipe.calibration == "vector")
        return [a for a in asked if isinstance(a, Trial) and isinstance(a.action, TryRecipe)]

    found = tries()
    assert found == tries()
    recipes = [(t.action.recipe, t.action.share) for t in found if isinstance(t.action, TryRecipe)]
    assert len(set(map(str, recipes))) == len(recipes), "nothing twice"
    assert bool(recipes) == (controller != "fixed")
    if controller == "reactive":
        assert recipes[0][0] == Recipe(models=("encoder",), calibration="temperature"), "a neighbour of what stands"


def test_thresholds_are_tried_for_metrics_that_want_them() -> None:
    def decisions(metric: str) -> set[str]:
        asked = driven(problem(metric=metric), {"linear": 1.0, "encoder": 10.0})
        return {r.decision for r in recipes(asked)}

    assert decisions("accuracy") == {"likeliest"} and decisions("f1_macro") == {"likeliest", "thresholds"}


def test_regression_has_lines_and_no_cascades() -> None:
    asked = recipes(driven(problem(task=Regress(), metric="mse"), {"linear": 1.0, "encoder": 10.0}))
    assert {r.calibration for r in asked} == {"none", "affine"} and not any(r.first for r in asked)


@pytest.mark.parametrize("controller", ["staged", *CHOOSERS])
def test_few_rows_decide_nothing(controller: str) -> None:
    ms = {"linear": 1.0, "encoder": 10.0}
    asked = driven(problem(rows=20, controller=controller), ms)
    assert [type(a.action) for a in asked if isinstance(a, Trial)] == [Profile, Serving]
    assert [a.why for a in asked if isinstance(a, Skip)] == ["all: 20 rows are too few to decide on (< 21)"]
    assert bool(recipes(driven(problem(rows=21, controller=controller), ms))) == (controller != "fixed")


@pytest.mark.parametrize(("rows", "share"), [(30, 1.0), (45, 1.0), (84, 0.25)])
def test_halving_never_looks_at_fewer_rows_than_can_be_fitted(rows: int, share: float) -> None:
    asked = driven(problem(rows=rows, controller="halving"), {"linear": 1.0, "encoder": 10.0})
    tried = [a.action for a in asked if isinstance(a, Trial) and isinstance(a.action, TryRecipe)]
    assert len(tried) >= 4 and {t.share for t in tried} == {
        share
    }  # those of the first rung: nothing was told of their merits


@pytest.mark.parametrize(
    ("metric", "costs"), [("accuracy", None), ("log_loss", None), ("cost", ((0.0, 9.0, 9.0),) * 3)]
)
def test_thresholds_made_for_another_metric_do_not_stand_in_the_way(metric: str, costs: Any) -> None:
    """They cannot be fitted for this one, so that no candidate around them could be made."""
    stands = Thresholds(inner=Single(model="encoder"), offsets=(0.1, 0.0, -0.1))
    asked = recipes(driven(problem(default=stands, metric=metric, costs=costs), {"linear": 1.0, "encoder": 10.0}))
    assert asked[0].decision == ("likeliest" if costs is None else "costs")
    assert len(asked) > 4 and not any(r.decision == "thresholds" for r in asked)


def test_a_promise_comes_last() -> None:
    asked = [a for a in driven(problem(coverage=0.9), {"linear": 1.0, "encoder": 10.0}) if isinstance(a, Trial)]
    assert [type(a.action) for a in asked[-2:]] == [Promise, Serving]  # what is promised is what is served
    assert sum(isinstance(a.action, Promise) for a in asked) == 1


def test_nothing_is_tried_that_the_clock_cannot_pay_for() -> None:
    asked = driven(problem(), {"linear": 1.0, "encoder": 10.0}, remaining=-1.0)
    assert not recipes(asked)
