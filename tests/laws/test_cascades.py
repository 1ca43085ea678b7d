"""Cascades, calibrations class by class, costs and promises: what each must do, against independent references where there are any."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from multistep.metrics import TaskLike, judge
from multistep.predictors import Asked, Cascade, Conformal, Costs, Isotonic, Single, Temperature, Vector, predict
from multistep.predictors.cascade import fit_cascade, sure_N
from multistep.predictors.conformal import fit_conformal
from multistep.predictors.costs import cost_N, read_costs
from multistep.predictors.fit import baseline
from multistep.predictors.isotonic import fit_isotonic
from multistep.predictors.recipe import Recipe, prepare
from multistep.predictors.temperature import fit_temperature
from multistep.predictors.vector import fit_vector
from multistep.tasks import Classify, Multilabel, Regress
from multistep.types import UserError

A, B = Single(model="linear"), Single(model="encoder")
THREE = Classify(labels=("a", "b", "c"))
TWO = Classify(labels=("no", "yes"))
MANY = Multilabel(labels=("a", "b", "c"))


def drawn(task: TaskLike, n: int, seed: int, scale: float = 1.0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A weak and a strong model's logits, and targets drawn from the strong one's probabilities."""
    rng = np.random.default_rng(seed)
    z_NK = 2.0 * rng.normal(size=(n, task.n_outputs))
    if task.kind == "multilabel":
        targets = rng.random(z_NK.shape) < 1 / (1 + np.exp(-z_NK))
    else:
        targets = (z_NK + rng.gumbel(size=z_NK.shape)).argmax(axis=1)
    weak_NK = 0.6 * (z_NK + 1.5 * rng.normal(size=z_NK.shape))
    return {"linear": scale * weak_NK, "encoder": scale * z_NK}, targets


class Counting:
    """An engine that says which texts each model was asked for. The texts are row numbers."""

    def __init__(self, logits: dict[str, np.ndarray]):
        self._logits = logits
        self.asked: dict[str, list[int]] = {m: [] for m in logits}

    def logits(self, model: str, texts: Sequence[str]) -> np.ndarray:
        rows = [int(t) for t in texts]
        self.asked[model] += rows
        return self._logits[model][rows]


@pytest.mark.parametrize("task", [THREE, MANY], ids=lambda t: t.kind)
@pytest.mark.parametrize("again", [0.0, 0.25, 1.0])
def test_a_cascade_asks_the_costly_model_for_the_share_that_was_asked_for(task: TaskLike, again: float) -> None:
    logits, _ = drawn(task, 200, 0)
    cascade = fit_cascade(task, A, B, logits, again)
    engine = Counting(logits)
    answers = predict(task, cascade, engine, [str(i) for i in range(200)])
    assert sorted(engine.asked["linear"]) == list(range(200))
    assert len(engine.asked["encoder"]) == round(again * 200) == sum(a.stage == "encoder" for a in answers)
    z, decisions = cascade.decide(task, logits)
    sure, own = sure_N(task, logits["linear"]), A.decide(task, logits)
    unsure = np.zeros(200, dtype=bool)
    unsure[engine.asked["encoder"]] = True
    if 0 < again < 1:
        assert sure[unsure].max() < cascade.below <= sure[~unsure].min()
    assert (decisions[unsure] == B.decide(task, logits)[1][unsure]).all()
    assert (decisions[~unsure] == own[1][~unsure]).all()
    assert task.probabilities(z)[unsure] == pytest.approx(task.probabilities(logits["encoder"])[unsure])
    assert task.probabilities(z)[~unsure] == pytest.approx(task.probabilities(logits["linear"])[~unsure])


def test_a_row_is_answered_alike_alone_and_in_company() -> None:
    logits, _ = drawn(THREE, 60, 1)
    cascade = Cascade(
        first=A, second=Cascade(first=Temperature(inner=B, temperature=2.0), second=A, below=0.5), below=0.6
    )
    together = predict(THREE, cascade, Counting(logits), [str(i) for i in range(60)])
    alone = [predict(THREE, cascade, Counting(logits), [str(i)])[0] for i in range(60)]
    assert [(p.value, p.stage) for p in together] == [(p.value, p.stage) for p in alone]
    assert {p.stage for p in together} == {"linear", "encoder"}  # rows come back to the first, which is not run again
    engine = Counting(logits)
    predict(THREE, cascade, engine, [str(i) for i in range(60)])
    assert sorted(engine.asked["linear"]) == list(range(60))


def test_outputs_are_computed_once_and_only_where_they_are_asked_for() -> None:
    logits, _ = drawn(THREE, 10, 0)
    engine = Counting(logits)
    asked = Asked(engine, ("linear", "encoder"), [str(i) for i in range(10)])
    part = asked.rows(np.array([3, 5])).rows(np.array([1]))
    assert (part["encoder"] == logits["encoder"][[5]]).all() and engine.asked["encoder"] == [5]
    assert (asked["encoder"] == logits["encoder"]).all()
    assert sorted(engine.asked["encoder"]) == list(range(10)) and engine.asked["linear"] == []
    with pytest.raises(KeyError):
        asked["other"]


def test_a_cascade_is_not_for_regression() -> None:
    with pytest.raises(ValueError, match="regression"):
        Cascade(first=A, second=B, below=0.5).decide(
            Regress(), {"linear": np.zeros((2, 1)), "encoder": np.zeros((2, 1))}
        )


@pytest.mark.parametrize("task", [TWO, THREE, MANY], ids=["two", "three", "multilabel"])
def test_vector_scaling_is_never_worse_than_a_temperature_on_its_own_rows(task: TaskLike) -> None:
    for seed in range(4):
        logits, targets = drawn(task, 300, seed, scale=3.0)
        logits = {m: z + np.arange(task.n_outputs) for m, z in logits.items()}  # a bias that no temperature mends
        common, each = fit_temperature(task, A, logits, targets), fit_vector(task, A, logits, targets)
        assert common is not None and each is not None
        one, many = (float(task.nll_N(p.combine(task, logits), targets).mean()) for p in (common, each))
        assert many < one - 0.003
        assert (each.decide(task, logits)[1] == A.decide(task, logits)[1]).all()  # the answers stay
        assert fit_vector(task, each, logits, targets) == each  # not nested


def test_vector_scaling_finds_what_is_there() -> None:
    logits, targets = drawn(THREE, 20_000, 0)
    off = {"encoder": (logits["encoder"] - np.array([1.0, 0.0, -1.0])) * 2.0}
    found = fit_vector(THREE, B, off, targets)
    assert isinstance(found, Vector)
    assert np.array(found.scales) == pytest.approx([0.5, 0.5, 0.5], abs=0.03)
    assert np.diff(found.offsets) == pytest.approx([-1.0, -1.0], abs=0.06)


def test_isotonic_is_that_of_scikit_learn() -> None:
    from sklearn.isotonic import IsotonicRegression

    logits, targets = drawn(TWO, 400, 0, scale=4.0)
    found = fit_isotonic(TWO, A, logits, targets)
    assert isinstance(found, Isotonic)
    p_N = TWO.probabilities(logits["linear"])[:, 1]
    reference = IsotonicRegression(y_min=1 / 402, y_max=401 / 402, out_of_bounds="clip").fit(p_N, targets)
    new = np.linspace(-9, 9, 200)
    new_NK = {"linear": np.stack([-new, new], axis=1)}
    assert TWO.probabilities(found.combine(TWO, new_NK))[:, 1] == pytest.approx(
        reference.predict(TWO.probabilities(new_NK["linear"])[:, 1])
    )


@pytest.mark.parametrize("task", [TWO, THREE, MANY], ids=["two", "three", "multilabel"])
def test_isotonic_mends_what_is_bent(task: TaskLike) -> None:
    logits, targets = drawn(task, 3000, 0)
    bent = {"encoder": np.sign(logits["encoder"]) * np.abs(logits["encoder"]) ** 3}
    found, common = fit_isotonic(task, B, bent, targets), fit_temperature(task, B, bent, targets)
    assert found is not None and common is not None
    fresh, right = drawn(task, 3000, 1)
    fresh = {"encoder": np.sign(fresh["encoder"]) * np.abs(fresh["encoder"]) ** 3}
    loss, loss_of_one = (float(task.nll_N(p.combine(task, fresh), right).mean()) for p in (found, common))
    assert np.isfinite(loss) and loss < loss_of_one
    p_NK = task.probabilities(found.combine(task, fresh))
    assert task.kind == "multilabel" or p_NK.sum(axis=1) == pytest.approx(np.ones(3000))


def test_costs_decide_as_counting_them_out_does() -> None:
    logits, targets = drawn(THREE, 200, 0)
    matrix = ((0.0, 1.0, 8.0), (2.0, 0.0, 1.0), (1.0, 3.0, -1.0))
    _, said = Costs(inner=B, matrix=matrix).decide(THREE, logits)
    for row, p_K in enumerate(THREE.probabilities(logits["encoder"])):
        expected = [sum(p_K[right] * matrix[right][k] for right in range(3)) for k in range(3)]
        assert said[row] == int(np.argmin(expected))
    likeliest = B.decide(THREE, logits)[1]
    assert cost_N(matrix, targets, said).mean() < cost_N(matrix, targets, likeliest).mean()


def test_costs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"a": {"b": 5}, "c": {"c": -1}}))
    assert read_costs(path, THREE.labels) == ((0.0, 5.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, -1.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "not of the form"),
        ('{"a": 3}', "not of the form"),
        ("{", "not JSON"),
        ('{"a": {"bb": 3}}', "'bb' is no label"),
        ('{"d": {"a": 3}}', "'d' is no label"),
        ('{"a": {"b": "3"}}', "not a number"),
        ('{"a": {"b": NaN}}', "not a number"),
        ('{"a": {"b": true}}', "not a number"),
    ],
)
def test_bad_costs_are_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_costs(tmp_path / "costs.json", THREE.labels)
    with pytest.raises(UserError, match="no such file"):
        read_costs(tmp_path / "none.json", THREE.labels)


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_a_promise_is_kept_whatever_the_model_is_worth(coverage: float) -> None:
    """On average over many draws of the rows that it rests on, and not by much more than it says."""
    kept, size = [], 0
    for seed in range(200):
        logits, targets = drawn(THREE, 400, seed, scale=0.1 if seed % 2 else 5.0)
        rest = {m: z[:100] for m, z in logits.items()}
        found = fit_conformal(THREE, B, rest, targets[:100], coverage)
        among_NK = found.candidates(THREE, logits["encoder"][100:])
        kept.append(float(among_NK[np.arange(300), targets[100:]].mean()))
        size = found.rows
    assert size == 100
    error = np.std(kept) / np.sqrt(len(kept))
    assert coverage - 3 * error <= np.mean(kept) <= coverage + 1 / 101 + 3 * error


def test_an_answer_is_withheld_where_the_candidates_are_not_one() -> None:
    logits = {"linear": np.log(np.array([[0.9, 0.06, 0.04], [0.5, 0.45, 0.05], [0.34, 0.33, 0.33]]))}
    found = predict(THREE, Conformal(inner=A, coverage=0.9, least=0.4, rows=99), Counting(logits), ["0", "1", "2"])
    assert [p.candidates for p in found] == [("a",), ("a", "b"), ()]
    assert [p.abstains for p in found] == [False, True, True]


def test_a_promise_that_the_rows_cannot_carry_is_refused() -> None:
    logits, targets = drawn(THREE, 98, 0)
    with pytest.raises(UserError, match="99"):
        fit_conformal(THREE, B, logits, targets, 0.99)
    assert fit_conformal(THREE, B, *drawn(THREE, 99, 0), 0.99).least >= 0
    with pytest.raises(UserError, match="one label of several"):
        fit_conformal(MANY, B, *drawn(MANY, 99, 0), 0.9)


RECIPES = [
    Recipe(models=("encoder",), calibration="vector"),
    Recipe(models=("linear", "encoder"), calibration="isotonic", decision="thresholds"),
    Recipe(models=("encoder",), first="linear", again=0.3),
    Recipe(models=("linear", "encoder"), first="linear", again=0.5, decision="thresholds"),
    Recipe(models=("encoder",), decision="costs", costs=((0.0, 1.0, 9.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0))),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_is_judged_on_rows_that_none_of_its_numbers_saw(recipe: Recipe) -> None:
    logits, targets = drawn(THREE, 300, 0)
    noise = np.random.default_rng(3)  # so that each model knows something that the other does not
    logits = {m: logits["encoder"] + 1.5 * noise.normal(size=z.shape) for m, z in logits.items()}
    found = prepare(recipe, THREE, logits, targets, "f1_macro", 0)
    assert found is not None and (found.scored.targets == targets).all()
    mixed = np.random.default_rng(0).permutation(
        targets
    )  # nothing is left to learn: no numbers fitted to it may look good
    learnt = prepare(recipe, THREE, logits, mixed, "f1_macro", 0)
    if learnt is not None:
        gain_N = np.log(3) - THREE.nll_N(learnt.scored.logits_NK, mixed)
        assert gain_N.mean() < 3 * gain_N.std() / np.sqrt(len(mixed))
    again = prepare(recipe, THREE, logits, targets, "f1_macro", 0)
    assert again is not None and again.predictor == found.predictor
    assert Recipe.parse(json.loads(recipe.model_dump_json())) == recipe


def test_recipes_without_anything_to_offer_give_none() -> None:
    logits, targets = drawn(THREE, 300, 0)
    useless = {"encoder": logits["encoder"], "linear": np.random.default_rng(0).normal(size=(300, 3))}
    assert prepare(Recipe(models=("encoder", "linear")), THREE, useless, targets, "accuracy", 0) is None
    assert prepare(Recipe(models=("encoder",), decision="thresholds"), THREE, logits, targets, "accuracy", 0) is None
    assert prepare(Recipe(models=("encoder",), calibration="affine"), THREE, logits, targets, "accuracy", 0) is None
    few = {m: z[:10] for m, z in logits.items()}
    assert prepare(Recipe(models=("encoder",)), THREE, few, targets[:10], "accuracy", 0) is None


def test_a_cascade_keeps_the_accuracy_of_its_costly_member_at_part_of_its_cost() -> None:
    logits, targets = drawn(THREE, 2000, 0)
    cheap = prepare(Recipe(models=("encoder",), first="linear", again=0.6), THREE, logits, targets, "accuracy", 0)
    assert cheap is not None
    whole = baseline(THREE, B, logits, targets)
    alone = baseline(THREE, A, logits, targets)
    assert judge("accuracy", THREE, cheap.scored, alone).accept
    assert judge("accuracy", THREE, cheap.scored, whole).evidence[0].difference > -0.03
