"""The scikit-learn estimators: labels of every type come back as they were, and what cannot be learned is refused by its row."""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from test_sklearn import QUICK, rows

from multistep.predictors import Predictor, Single, Temperature, Thresholds
from multistep.sklearn import TextClassifier, TextRegressor
from multistep.types import UserError


@pytest.fixture(scope="module")
def fitted() -> TextClassifier:
    return TextClassifier(**QUICK).fit(*rows(40))


# ---------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "classes",
    [
        np.array(["b", "a"]), np.array(["b", "a"], dtype=object), np.array([" a", "a"]), np.array(["", "a"]),
        np.array([3, -1]), np.array([0, 1], dtype=np.int8), np.array([True, False]), np.array([2.0, 1.0]),
        np.array(["nan", "None"]), np.array(["nan", "1"]),
        np.array(["1", "1.0"]), np.array(["01", "1"]), np.array(["[1]", '"'], dtype=object), np.array(["b\ud83d", "b?"]),
    ],
)  # fmt: skip
def test_labels_come_back_as_they_are(classes: np.ndarray) -> None:
    texts, k = rows(40)
    est = TextClassifier(**QUICK).fit(texts, classes[k])
    assert est.classes_.dtype == classes.dtype
    np.testing.assert_array_equal(est.classes_, np.unique(classes))
    said = est.predict(texts)
    assert said.dtype == classes.dtype and (said == classes[k]).mean() > 0.9 and est.score(texts, classes[k]) > 0.9


@pytest.mark.parametrize(
    "make", [list, tuple, pd.Series, lambda y: pd.Series(y, dtype="category"), lambda y: y[:, None]]
)
def test_labels_and_texts_in_any_container(make: Callable[[Any], Any]) -> None:
    texts, k = rows(40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a column where a row of labels is wanted
        est = TextClassifier(**QUICK).fit(make(np.array(texts)), make(np.array(["no", "yes"])[k]))
    assert (
        est.classes_.tolist() == ["no", "yes"]
        and est.score(pd.DataFrame({"t": texts}), np.array(["no", "yes"])[k]) > 0.9
    )


def test_the_order_of_many_whole_numbers() -> None:
    """As texts 10 comes before 2; columns go by the numbers."""
    texts, y = rows(240, classes=12)
    est = TextClassifier(**QUICK).fit(texts, y)
    assert est.classes_.tolist() == list(range(12)) and est.score(texts, y) > 0.9
    proba, decision = est.predict_proba(texts), est.decision_function(texts)
    assert proba.shape == decision.shape == (240, 12)
    np.testing.assert_allclose(proba.sum(axis=1), 1.0)
    np.testing.assert_array_equal(est.classes_[proba.argmax(axis=1)], est.predict(texts))
    np.testing.assert_array_equal(est.classes_[decision.argmax(axis=1)], est.predict(texts))


def several(n: int = 80) -> tuple[list[str], np.ndarray]:
    """Texts with any of three words, and which of them as an indicator; a fourth column is empty."""
    rng = np.random.default_rng(0)
    y = (rng.random((n, 4)) < 0.5) & [True, True, True, False]
    names = ("fire", "water", "wind", "never")
    texts = [
        " ".join([w for w, yes in zip(names, some, strict=True) if yes] + [f"and {i}"]) for i, some in enumerate(y)
    ]
    return texts, y.astype(np.int64)


@pytest.mark.parametrize("make", [np.asarray, sparse.csr_matrix, lambda y: y.tolist(), lambda y: y.astype(bool)])
def test_several_labels_as_an_indicator(make: Callable[[Any], Any]) -> None:
    texts, y = several()
    est = TextClassifier(**QUICK).fit(texts, make(y))
    said = est.predict(texts)
    assert est.classes_.tolist() == [0, 1, 2, 3] and said.shape == (80, 4) and (said == y).mean() > 0.9
    proba, decision = est.predict_proba(texts), est.decision_function(texts)
    np.testing.assert_array_equal(decision > 0, said > 0)
    assert not proba[:, 3].any() and np.isfinite(decision).all()  # a label that no row has
    assert est.score(texts, make(y)) == pytest.approx((said == y).all(axis=1).mean())


def test_several_labels_as_tuples() -> None:
    texts, y = several()
    names = np.array(["fire", "water", "wind", "never"])
    labels = [tuple(names[some > 0].tolist()) for some in y]
    est = TextClassifier(**QUICK).fit(texts, labels)
    assert est.classes_.tolist() == ["fire", "water", "wind"]
    said = est.predict(["fire wind 5", "water 6"])
    assert said.tolist() == [("fire", "wind"), ("water",)]
    right = [set(one) == set(other) for one, other in zip(est.predict(texts), labels, strict=True)]
    assert est.score(texts, labels) == np.mean(right) > 0.7
    assert est.score(["fire 1", "fire 2"], [("fire",), ("fire", "unheard")], sample_weight=[3, 1]) == 0.75
    assert TextClassifier(**QUICK).fit(texts, pd.Series(labels)).classes_.tolist() == est.classes_.tolist()


@pytest.mark.parametrize("calm", [1.0, 2.5])
@pytest.mark.parametrize("classes", [2, 3])
def test_decisions_follow_from_the_decision_function(classes: int, calm: float) -> None:
    """Also where the run moved the decision away from the likeliest class."""
    texts, y = rows(90, classes=classes, noise=0.5)
    est = TextClassifier(**QUICK).fit(texts, y)
    neutral = est.predict(texts)
    moved: Predictor = Thresholds(inner=Single(model="linear"), offsets=(0.0, 1.5, -1.5)[:classes])
    est.run_.bundle.predictor = Temperature(inner=moved, temperature=calm)
    said, decision = est.predict(texts), est.decision_function(texts)
    assert (said != neutral).any()
    np.testing.assert_array_equal(said, decision > 0 if classes == 2 else decision.argmax(axis=1))
    if classes == 2:  # log-odds, moved by the difference of the offsets
        p = est.predict_proba(texts)
        np.testing.assert_allclose(decision - 1.5 / calm, np.log(p[:, 1] / p[:, 0]), atol=1e-9)


def test_decisions_of_several_labels_follow_too() -> None:
    texts, y = several()
    est = TextClassifier(**QUICK).fit(texts, y)
    neutral = est.predict(texts)
    moved: Predictor = Thresholds(inner=Single(model="linear"), offsets=(0.001, 0.5, 0.999))
    est.run_.bundle.predictor = Temperature(inner=moved, temperature=2.0)
    assert (est.predict(texts) != neutral).any()
    np.testing.assert_array_equal(est.predict(texts), est.decision_function(texts) > 0)


def test_numbers() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(("poor", "fair", "good"), k=3)) + f" {i}" for i in range(150)]
    y = np.array([t.count("good") - t.count("poor") + 10 for t in texts], dtype=np.float32)
    est = TextRegressor(**QUICK).fit(pd.Series(texts), y)
    assert est.predict(texts).dtype == np.float64 and est.score(texts, y) > 0.8
    assert cross_val_score(TextRegressor(**QUICK), texts, y, cv=2, scoring="r2").min() > 0.6
    again = pickle.loads(pickle.dumps(est))
    np.testing.assert_array_equal(again.predict(texts), est.predict(texts))
    assert "mse" in again.explain()


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("X", "says"),
    [
        ("one text", "one text"), (np.ones((40, 3)), r"shape \(40, 3\)"),
        (np.ones(40), r"X\[0\] is a float, not a text"), (["a"] * 5 + [None] * 35, r"X\[5\] is missing"),
        (pd.Series(["a", "b", float("nan")]), r"X\[2\] is missing"),
        (pd.Series(["a", pd.NA], dtype="string"), r"X\[1\] is missing"), (["a", b"b"], r"X\[1\] is a bytes"),
        ([["a"], ["b", "c"]], r"X\[0\] is a list"), (pd.DataFrame({"a": ["x"], "b": ["y"]}), r"shape \(1, 2\)"),
        (sparse.eye(40).tocsr(), "sparse"), (iter(["a", "b"]), r"shape \(\)"), ([], "0 sample"),
    ],
)  # fmt: skip
def test_what_is_no_texts_is_refused(fitted: TextClassifier, X: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TextClassifier(**QUICK).fit(X, [0, 1] * 20)
    with pytest.raises(ValueError, match=says):
        fitted.predict(X)


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (None, "requires y"), ([0, 1], "inconsistent numbers of samples"), (["a"] * 40, "only one class, .*'a'"),
        (["a"] * 39 + [None], r"y\[39\] is missing"), (["a"] * 39 + [float("nan")], r"y\[39\] is missing"),
        (np.array([0.0] * 39 + [np.nan]), r"y\[39\] is missing"), (np.linspace(0, 1, 40), "Unknown label type"),
        ([f"id {i}" for i in range(40)], "40 classes in 40 rows"),
        (np.arange(80).reshape(40, 2), "1d array|should be"), ([("a",)] * 39 + ["a"], "tuple for every row"),
        ([("a",)] * 40, "only one class"), ([()] * 40, "no label at all"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_learned_are_refused(y: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TextClassifier(**QUICK).fit(rows(40)[0], y)


@pytest.mark.parametrize(
    ("y", "says"),
    [
        (None, "requires y"), ([1.0] * 40, "nothing to learn"),
        ([1.0, 2.0] * 19 + [3.0, float("nan")], r"y\[39\] is missing"),
        ([1.0, 2.0] * 19 + [3.0, float("inf")], "infinity"), (["a"] * 40, "could not convert"),
        (np.ones((40, 2)), "1d array"), ([1.0, 2.0] * 19 + [3.0, 1e40], "beyond"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_learned_are_refused(y: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        TextRegressor(**QUICK).fit(rows(40)[0], y)
    assert "texts.jsonl" not in str(refusal.value)


@pytest.mark.parametrize("n", [2, 9])
def test_too_few_rows_are_refused(n: int) -> None:
    texts, y = rows(n)
    with pytest.raises(UserError, match=f"n_samples = {n + 1}, of which {n} have text. At least 10"):
        TextClassifier(**QUICK).fit([*texts, "  "], [*y, 0])


def test_ten_rows_are_enough() -> None:
    texts, y = rows(10)
    est = TextClassifier(**QUICK).fit(texts, y)
    assert est.predict(texts).shape == (10,) and "accuracy" in est.explain()
    texts, y = rows(10, classes=10)
    assert np.isfinite(TextRegressor(**QUICK).fit(texts, y).predict(texts)).all()


def test_texts_without_a_word_have_answers_too() -> None:
    texts, y = rows(40)
    est = TextClassifier(**QUICK).fit([*texts, " ", ""], np.array(["a", "b"])[[*y, 0, 1]])
    assert est.run_.records()[1]["report"]["empty"]["count"] == 2  # left out, and said
    assert set(est.predict(["", "\n", "half \ud83d of it", "nul \0"])) <= {"a", "b"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budget": "soon"}, "not a budget"), ({"metric": "f2"}, "metric"),
        ({"overrides": ("out=elsewhere",)}, "parameter or set by fit"),
        ({"overrides": ("batchsize=3",)}, "batch_size"), ({"controller": "none"}, "controller"),
        ({"random_state": -1}, "seed"),
    ],
)  # fmt: skip
def test_parameters_are_checked_by_fit_and_not_before(given: dict[str, Any], says: str) -> None:
    est = TextClassifier(**{**QUICK, **given})
    with pytest.raises(ValueError, match=says):
        est.fit(*rows(40))


def test_weights_are_not_taken() -> None:
    with pytest.raises(TypeError, match="sample_weight"):
        TextClassifier(**QUICK).fit(*rows(40), sample_weight=np.ones(40))  # pyright: ignore[reportCallIssue]


def test_before_fit() -> None:
    for ask in (TextClassifier().predict, TextClassifier().predict_proba, TextRegressor().predict):
        with pytest.raises(NotFittedError):
            ask(["a"])
    with pytest.raises(NotFittedError):
        TextClassifier().explain()
