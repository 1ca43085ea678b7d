"""Tuning of answers judges on equal terms: what stands out of fold where it was fitted to the rows that judge, a promise on rows of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from multistep.budget import Clock, parse_budget
from multistep.controllers.answering import AnsweringProblem
from multistep.metrics import measure
from multistep.policy import Limit
from multistep.predictors import (
    Affine,
    Blend,
    Conformal,
    Costs,
    Predictor,
    Single,
    Temperature,
    Thresholds,
)
from multistep.predictors.conformal import fit_conformal
from multistep.predictors.fit import baseline, cross_fitted, fit_again, is_fitted
from multistep.predictors.isotonic import fit_isotonic
from multistep.predictors.recipe import Recipe, fit_recipe, recipe_of
from multistep.predictors.temperature import fit_temperature
from multistep.predictors.thresholds import fit_thresholds
from multistep.predictors.vector import fit_vector
from multistep.report.policy import explain_policy
from multistep.strategy import Profile, Promise, Trial, TryRecipe
from multistep.tasks import Classify, Multilabel, Regress
from multistep.tune import answering as bench
from multistep.tune.answering import Answering, Before, Rows
from multistep.types import Outcome

TEN = Classify(labels=tuple("abcdefghij"))
A, B = Single(model="linear"), Single(model="encoder")
N = 90  # rows, of which the last thirty are set aside where there is a promise
OWN = "the run's own calibration half"


def drawn(seed: int = 0, worth: float = 1.0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Few rows of many classes: two models of some worth, much too sure of themselves."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 10, N)
    logits = {m: 4.0 * (worth * np.eye(10)[targets] + rng.normal(size=(N, 10))) for m in ("linear", "encoder")}
    return logits, targets


class Known:
    """Models whose outputs are known. Texts are row numbers."""

    def __init__(self, logits: Mapping[str, np.ndarray]):
        self._all = logits

    def text_model(self, name: str, engine: Mapping[str, Any]) -> Any:
        outputs = self._all[name]

        class Model:
            def logits(self, texts: Sequence[str]) -> np.ndarray:
                return outputs[[int(t) for t in texts]]

        return Model()

    def runtimes(self) -> list[tuple[str, dict[str, Any]]]:
        return []


def answering(
    default: Predictor, logits: Mapping[str, np.ndarray], targets: np.ndarray, *, seen: bool = True, coverage: float | None = None,
    metric: str = "accuracy", limit: Limit | None = None, made_for: str = "accuracy", **more: Any,
) -> Answering:  # fmt: skip
    count = N if coverage is None else N - N // 3
    problem = AnsweringProblem(
        task=TEN, metric=metric, models=("linear", "encoder"), default=default, engine={}, limit=limit, budget=60.0, rows=count,
        coverage=coverage, **more,
    )  # fmt: skip
    rows = Rows([str(i) for i in range(count)], targets[:count], OWN)
    aside = None if coverage is None else Rows([str(i) for i in range(count, N)], targets[count:], OWN)
    return Answering(
        Known(logits), problem, rows, aside, Clock(parse_budget("60s")), lambda: 0, lambda standing, policy: None, {"cores": 2},
        Before(made_for, OWN, seen),
    )  # fmt: skip


def lives(works: Answering, stage: str, action: Any, alpha: float = 0.1) -> Outcome:
    trial = Trial(id=stage, stage=stage, action=action, why="", alpha=alpha)
    steps = works.run(trial)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            works.apply(trial, end.value)
            return end.value


def found(fitted: Predictor | None) -> Predictor:
    assert fitted is not None
    return fitted


# ---------------------------------------------------------------------------------------------- what stands


def made(logits: Mapping[str, np.ndarray], targets: np.ndarray) -> list[Predictor]:
    """Of every make: what `fit` or an earlier tuning leaves, all of its numbers fitted to all rows."""
    recipes = [
        Recipe(models=("linear",), calibration=how, decision=decision)
        for how in ("temperature", "vector", "isotonic")
        for decision in ("likeliest", "thresholds")
    ]
    recipes += [Recipe(models=("linear", "encoder")), Recipe(models=("encoder",), first="linear", again=0.4)]
    fitted = [found(fit_recipe(r, TEN, logits, targets, "f1_macro", 0)) for r in recipes]
    return [*fitted, Costs(inner=fitted[0], matrix=(1 - np.eye(10)).tolist())]


@pytest.mark.parametrize("place", range(9))
def test_what_stands_is_judged_out_of_fold_on_rows_that_it_was_fitted_to(place: int) -> None:
    logits, targets = drawn(worth=0.2)
    default = made(logits, targets)[place]
    names = ("f1_macro", "log_loss")
    in_sample = measure(names, TEN, baseline(TEN, default, logits, targets))
    outcome = lives(answering(default, logits, targets, made_for="f1_macro", metric="f1_macro"), "measure", Profile())
    again = cross_fitted(TEN, lambda z, y: fit_again(TEN, default, z, y, "f1_macro", 0), logits, targets, 0)
    assert again is not None and outcome.metrics["f1_macro"] == measure(names, TEN, again)["f1_macro"]
    assert outcome.metrics["log_loss"].value > in_sample["log_loss"].value, "it was too good"
    if default.kind == "thresholds":
        assert outcome.metrics["f1_macro"].value < in_sample["f1_macro"].value - 0.03
    entry = outcome.facts["entry"]
    assert entry["predictor"] == default.model_dump(mode="json"), (
        "what stands is as it was; only its judgement is another"
    )
    assert entry["facts"]["out_of_fold"] and entry["facts"]["fitted"] == {"for": "f1_macro", "to": OWN}


def test_what_stands_is_judged_as_it_is_on_rows_that_are_new_to_it() -> None:
    old, new = drawn(1), drawn(2)
    default = found(fit_vector(TEN, A, *old))
    works = answering(default, *new, seen=False)
    outcome = lives(works, "measure", Profile())
    assert outcome.metrics["log_loss"] == measure(("log_loss",), TEN, baseline(TEN, default, *new))["log_loss"]
    assert not outcome.facts["entry"]["facts"]["out_of_fold"]
    assert "out of fold" not in explain_policy(works.policy().model_dump(mode="json"))


def test_equal_makes_are_equal_whoever_stands() -> None:
    """The same recipe, fitted to the same rows, as what stands and as a candidate."""
    logits, targets = drawn()
    default = found(fit_vector(TEN, A, logits, targets))
    works = answering(default, logits, targets)
    stands = lives(works, "measure", Profile())
    again = lives(works, "models", TryRecipe(recipe=Recipe(models=("linear",), calibration="vector")))
    assert again.metrics == stands.metrics
    assert again.verdict is not None and again.verdict.evidence[0].difference == 0
    said = explain_policy(works.policy().model_dump(mode="json"))
    assert "as it stands may have been fitted to these rows: it was judged out of fold" in said


def test_a_resumed_tuning_judges_what_stands_as_the_first_process_did() -> None:
    logits, targets = drawn()
    default = found(fit_vector(TEN, A, logits, targets))
    first, second = (answering(default, logits, targets) for _ in range(2))
    outcome = lives(first, "measure", Profile())
    second.apply(Trial(id="measure", stage="measure", action=Profile(), why=""), outcome)
    assert (second._known(second.incumbent).logits_NK == first._known(first.incumbent).logits_NK).all()


# ---------------------------------------------------------------------------------------------- fitted again


@pytest.mark.parametrize("place", range(9))
def test_fitted_again_to_the_same_rows_it_is_the_same_and_to_others_another(place: int) -> None:
    logits, targets = drawn()
    default = made(logits, targets)[place]
    assert fit_again(TEN, default, logits, targets, "f1_macro", 0) == default
    some = {m: z[:60] for m, z in logits.items()}
    part = fit_again(TEN, default, some, targets[:60], "f1_macro", 0)
    assert part != default and part.kind == default.kind and part.models() == default.models()
    assert is_fitted(default) and not is_fitted(A) and not is_fitted(Costs(inner=A, matrix=((0.0,),)))


def test_nests_are_fitted_again_and_a_promise_is_left_out() -> None:
    logits, targets = drawn()
    inner = found(fit_thresholds(TEN, found(fit_temperature(TEN, A, logits, targets)), logits, targets, "f1_macro", 0))
    nest = found(fit_temperature(TEN, inner, logits, targets))
    assert recipe_of(nest, TEN, logits) is None
    wild = Temperature(
        inner=Thresholds(inner=Temperature(inner=A, temperature=9.0), offsets=(1.0,) * 10), temperature=7.0
    )
    again = fit_again(TEN, wild, logits, targets, "f1_macro", 0)
    assert again == fit_again(TEN, nest, logits, targets, "f1_macro", 0)
    assert (
        fit_again(TEN, Conformal(inner=wild, coverage=0.9, least=0.1, rows=9), logits, targets, "f1_macro", 0) == again
    )
    unfit = fit_again(TEN, wild, logits, targets, "accuracy", 0)  # which has no use for thresholds: they stay
    assert isinstance(unfit, Temperature) and isinstance(unfit.inner, Thresholds)
    assert unfit.inner.offsets == (1.0,) * 10 and unfit.inner.inner == fit_temperature(TEN, A, logits, targets)


def test_lines_of_numbers_are_fitted_again() -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(size=N)
    logits = {"linear": (2 * targets + 1)[:, None]}
    again = fit_again(Regress(), Affine(inner=A, slope=9.0, intercept=9.0), logits, targets, "mse", 0)
    assert isinstance(again, Affine) and (again.slope, again.intercept) == pytest.approx((0.5, -0.5))


def test_of_several_labels_all_are_fitted_again() -> None:
    task = Multilabel(labels=("a", "b", "c"))
    rng = np.random.default_rng(0)
    z_NK = rng.normal(size=(N, 3))
    targets = rng.random((N, 3)) < 1 / (1 + np.exp(-z_NK))
    for fitted in (fit_vector(task, A, {"linear": z_NK}, targets), fit_isotonic(task, A, {"linear": z_NK}, targets)):
        assert fit_again(task, found(fitted), {"linear": z_NK}, targets, "f1_macro", 0) == fitted


def test_the_share_of_a_cascade_that_stands_is_known() -> None:
    """It was taken for none: what was tried around it was the cheap model alone."""
    logits, targets = drawn()
    recipe = Recipe(models=("encoder",), first="linear", again=0.4, decision="thresholds")
    default = found(fit_recipe(recipe, TEN, logits, targets, "f1_macro", 0))
    assert recipe_of(default, TEN, logits) == recipe
    wrapped = Conformal(inner=default, coverage=0.9, least=0.1, rows=9)
    stands = lives(answering(wrapped, logits, targets, metric="f1_macro", made_for="f1_macro"), "measure", Profile())
    assert Recipe.parse(stands.facts["entry"]["facts"]["recipe"]) == recipe


def test_a_member_without_weight_is_no_reason_not_to_judge_a_blend_out_of_fold() -> None:
    logits, targets = drawn(worth=2.0)
    logits["linear"] = np.random.default_rng(5).normal(size=logits["linear"].shape)
    default = Blend(members=(Temperature(inner=A, temperature=2.0), B), weights=(0.5, 0.5))
    again = fit_again(TEN, default, logits, targets, "accuracy", 0)
    assert isinstance(again, Blend) and again.weights[0] < 0.01
    outcome = lives(answering(default, logits, targets), "measure", Profile())
    assert (
        outcome.metrics["accuracy"].value
        == measure(("accuracy",), TEN, baseline(TEN, B, logits, targets))["accuracy"].value
    )


# ---------------------------------------------------------------------------------------------- promises


def promised(works: Answering) -> tuple[Conformal, Outcome]:
    outcome = lives(works, "promise", Promise(coverage=0.9))
    predictor = bench._PREDICTOR.validate_python(outcome.facts["entry"]["predictor"])
    assert isinstance(predictor, Conformal)
    return predictor, outcome


@pytest.mark.parametrize("place", range(9))
def test_a_promise_rests_on_rows_that_fitted_nothing_of_what_makes_it(place: int) -> None:
    logits, targets = drawn()
    default = made(logits, targets)[place]  # to the rows of the promise too
    works = answering(default, logits, targets, coverage=0.9, made_for="f1_macro")
    lives(works, "measure", Profile())
    found, outcome = promised(works)
    rest = {m: z[:60] for m, z in logits.items()}
    assert found.inner == fit_again(TEN, default, rest, targets[:60], "f1_macro", 0) != default and found.rows == 30
    p_N = TEN.probabilities(found.combine(TEN, {m: z[60:] for m, z in logits.items()}))[np.arange(30), targets[60:]]
    assert found.least == np.sort(p_N)[30 - 28], "and on those alone"
    facts = outcome.facts["entry"]["facts"]
    assert facts["fitted_again"] and "its numbers were fitted again" in works.policy().rule

    other = targets.copy()  # what makes the promise does not depend on the answers that it rests on
    other[60:] = (other[60:] + 1) % 10
    works = answering(default, logits, other, coverage=0.9, made_for="f1_macro")
    lives(works, "measure", Profile())
    another, _ = promised(works)
    assert another.inner == found.inner and another.least < found.least


def test_what_is_promised_is_kept_where_what_stands_was_fitted_to_few_rows() -> None:
    """Isotonic regression knows its rows by heart: there the right label is likelier than anywhere else."""
    kept, by_heart = [], []
    for seed in range(40):
        logits, targets = drawn(seed, worth=0.3)
        default = found(fit_isotonic(TEN, A, logits, targets))
        works = answering(default, logits, targets, coverage=0.9)
        lives(works, "measure", Profile())
        promise, _ = promised(works)
        aside = {m: z[60:] for m, z in logits.items()}
        fresh, right = drawn(1000 + seed, worth=0.3)
        for predictor, where in ((promise, kept), (fit_conformal(TEN, default, aside, targets[60:], 0.9), by_heart)):
            among_NK = predictor.candidates(TEN, predictor.combine(TEN, fresh))
            where.append(float(among_NK[np.arange(N), right].mean()))
    error = float(np.std(kept) / np.sqrt(len(kept)))
    assert np.mean(kept) > 0.9 - 2 * error > np.mean(by_heart)


def test_new_rows_need_no_other_predictor_for_a_promise() -> None:
    default = found(fit_vector(TEN, A, *drawn(1)))
    works = answering(default, *drawn(2), seen=False, coverage=0.9)
    lives(works, "measure", Profile())
    promise, outcome = promised(works)
    assert promise.inner == default and not outcome.facts["entry"]["facts"]["fitted_again"]
    assert outcome.facts["entry"]["facts"]["fitted"] == {"for": "accuracy", "to": OWN}
