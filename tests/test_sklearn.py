"""The scikit-learn estimators: its own checks, its tools around them, folders, pickles, seeds, signals."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import runs
from scipy import sparse
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import SkipTestWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, TunedThresholdClassifierCV, cross_val_score, cross_validate
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_estimator

from multistep import api, metrics
from multistep.sklearn import EXPECTED_FAILED_CHECKS, TextClassifier, TextRegressor, _remove
from multistep.types import Interrupted, UserError, Verdict

QUICK: dict[str, Any] = {"budget": "20 updates", "model": "none"}  # n-grams alone: twentieths of a second
WORDS = ("alpha", "beta", "river", "stone", "cloud", "paper", "glass", "wood")


def rows(n: int = 60, classes: int = 2, noise: float = 0.0, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Texts whose class shows in one word, and the classes as numbers; `noise`: the share of wrong ones."""
    rng = random.Random(seed)
    right = [i % classes for i in range(n)]
    texts = [f"{rng.choice(WORDS)} is{'abcdefghijklmnop'[k]} {rng.choice(WORDS)} {i}" for i, k in enumerate(right)]
    return texts, np.array([rng.randrange(classes) if rng.random() < noise else k for k in right])


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders of this test are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# ---------------------------------------------------------------------------------------------- scikit-learn's own checks


class Written:
    """Matrices of numbers are written as words, so that scikit-learn's checks reach an estimator of texts."""

    def fit(self: Any, X: Any, y: Any) -> Any:
        self._width = width(X)
        return super().fit(write(X), y)  # pyright: ignore[reportAttributeAccessIssue]

    def _scored(self: Any, X: Any) -> Any:
        if "run_" in vars(self) and width(X) not in (None, self._width):
            raise ValueError("other columns than in fit")
        return super()._scored(write(X))  # pyright: ignore[reportAttributeAccessIssue]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # pyright: ignore[reportAttributeAccessIssue]
        tags.input_tags.two_d_array, tags.input_tags.one_d_array = True, False
        return tags


def width(X: Any) -> int | None:
    shape = X.shape if sparse.issparse(X) else np.asarray(X).shape
    return shape[1] if len(shape) == 2 else None


def write(X: Any) -> Any:
    """A text a row: for each column and threshold which side the number is on, then the numbers; else X as it is."""
    if sparse.issparse(X) or width(X) is None:
        return X
    cuts = np.linspace(-2, 2, 9)

    def words(row: np.ndarray) -> list[str]:
        sides = [
            f"{chr(97 + j)}{'over' if v > cut else 'under'}{k}" for j, v in enumerate(row) for k, cut in enumerate(cuts)
        ]
        return [*sides, *map(str, row)]

    return [" ".join(words(row)) for row in np.asarray(X)]


class WrittenClassifier(Written, TextClassifier):
    pass


class WrittenRegressor(Written, TextRegressor):
    pass


@pytest.mark.parametrize("estimator", [TextClassifier(**QUICK), TextRegressor(**QUICK)])
def test_check_estimator(estimator: Any) -> None:
    with pytest.warns(SkipTestWarning, match="Can't test estimator"):  # the tags say that X is no matrix
        results = check_estimator(estimator, expected_failed_checks=dict(EXPECTED_FAILED_CHECKS))
    assert results and {r["status"] for r in results} == {"passed"}


@pytest.mark.parametrize("estimator", [WrittenClassifier(**QUICK), WrittenRegressor(**QUICK)])
def test_check_estimator_with_its_matrices_written_as_texts(estimator: Any) -> None:
    results = check_estimator(
        estimator, expected_failed_checks=dict(EXPECTED_FAILED_CHECKS), on_skip=None, on_fail=None
    )
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert not failed
    assert {r["check_name"] for r in results if r["status"] == "xfail"} == set(EXPECTED_FAILED_CHECKS)
    assert {r["check_name"] for r in results if r["status"] == "skipped"} <= {"check_array_api_input"}
    assert len([r for r in results if r["status"] == "passed"]) > 40


def test_tags_tell_what_repeats() -> None:
    tags = get_tags(TextClassifier(budget="200 updates"))
    assert tags.input_tags.string and tags.input_tags.one_d_array and not tags.input_tags.two_d_array
    assert tags.classifier_tags is not None and tags.classifier_tags.multi_label and not tags.non_deterministic
    assert get_tags(TextRegressor()).non_deterministic  # seconds
    assert get_tags(TextRegressor(budget="1e5 tokens", random_state=None)).non_deterministic


# ---------------------------------------------------------------------------------------------- its tools around them


def test_in_a_pipeline_and_folds() -> None:
    texts, y = rows()
    pipe = make_pipeline(FunctionTransformer(lambda X: [t.upper() for t in X]), TextClassifier(**QUICK))
    assert cross_val_score(pipe, texts, y, cv=3).min() > 0.9
    pipe.fit(texts, y)
    np.testing.assert_array_equal(pipe.classes_, [0, 1])
    again: Any = clone(pipe)
    np.testing.assert_array_equal(again.fit(texts, y).predict_proba(texts), pipe.predict_proba(texts))


def test_search_over_its_parameters() -> None:
    texts, y = rows(noise=0.1)
    grid = {"text__metric": ["accuracy", "f1_macro"], "text__overrides": [(), ("batch_size=8",)]}
    search = GridSearchCV(Pipeline([("text", TextClassifier(**QUICK))]), grid, cv=2, error_score="raise")  # pyright: ignore[reportArgumentType]
    search.fit(pd.Series(texts), y)
    assert search.best_score_ > 0.6 and search.predict(texts[:2]).shape == (2,)
    config = search.best_estimator_.named_steps["text"].run_.records()[0]["config"]
    assert config["metric"] == search.best_params_["text__metric"]


def test_several_processes_find_what_one_finds() -> None:
    texts, y = rows()
    found = [
        cross_validate(TextClassifier(**QUICK), texts, y, cv=2, n_jobs=jobs, return_estimator=True) for jobs in (1, 2)
    ]
    for one, other in zip(found[0]["estimator"], found[1]["estimator"], strict=True):  # the second came as pickles
        np.testing.assert_array_equal(one.predict_proba(texts), other.predict_proba(texts))


def test_several_threads() -> None:
    texts, y = rows()
    with joblib.parallel_config(backend="threading"):
        assert cross_val_score(TextClassifier(**QUICK), texts, y, cv=2, n_jobs=2, error_score=np.nan).min() > 0.9


def test_thresholds_calibration_and_votes() -> None:
    texts, y = rows(n=120, noise=0.2)
    names = np.array(["no", "yes"])[y]
    tuned = TunedThresholdClassifierCV(TextClassifier(**QUICK), cv=2, scoring="balanced_accuracy").fit(texts, names)
    assert tuned.score(texts, names) > 0.7 and 0 < tuned.best_threshold_ < 1
    for method in ("sigmoid", "temperature"):
        calibrated = CalibratedClassifierCV(TextClassifier(**QUICK), method=method, cv=2).fit(texts, names)
        assert calibrated.predict_proba(texts).shape == (120, 2) and calibrated.score(texts, names) > 0.7
    tfidf = make_pipeline(TfidfVectorizer(), LogisticRegression())
    vote = VotingClassifier([("a", TextClassifier(**QUICK)), ("b", tfidf)], voting="soft").fit(texts, names)
    assert vote.score(texts, names) > 0.7 and set(vote.predict(texts)) == {"no", "yes"}


# ---------------------------------------------------------------------------------------------- folders, copies, seeds


def dumped(est: TextClassifier) -> TextClassifier:
    file = io.BytesIO()
    joblib.dump(est, file)
    file.seek(0)
    return joblib.load(file)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, dumped, lambda est: pickle.loads(pickle.dumps(est))])
def test_a_copy_has_a_folder_of_its_own(again: Callable[[Any], Any], temporary: Path) -> None:
    texts, y = rows(40)
    est = TextClassifier(**QUICK).fit(texts, y)
    proba, words, first = est.predict_proba(texts), est.explain(), est.run_.out
    other = again(est)
    assert other.run_.out != first and other.get_params() == est.get_params()
    del est
    gc.collect()
    assert not first.exists() and list(temporary.iterdir()) == [other.run_.out]
    np.testing.assert_array_equal(other.predict_proba(texts), proba)
    assert other.explain() == words
    np.testing.assert_array_equal(again(other).predict_proba(texts), proba)  # a copy of a copy
    assert again(clone(other)).get_params() == other.get_params()  # one without a run


def test_a_copy_takes_the_encoder_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "judge", lambda *a, **k: Verdict(accept=True, rule="whatever comes last"))
    texts, y = rows(80)
    encoder = runs.tiny_encoder(tmp_path / "encoder")
    est = TextClassifier(budget="60 updates", model=str(encoder), overrides=("batch_size=8", "optimizer.lr=2e-3"))
    other = dumped(est.fit(texts, y))
    assert "encoder" in other.run_.bundle.engine.models
    np.testing.assert_array_equal(other.predict_proba(texts), est.predict_proba(texts))


def test_the_temporary_folder_goes_with_the_run(temporary: Path) -> None:
    texts, y = rows(40)
    est = TextClassifier(**QUICK).fit(texts, y)
    first = est.run_.out
    assert {p.name for p in first.iterdir()} == {"model", "journal.jsonl", "config.yaml"}  # no texts, no states
    est.fit(texts, y)
    gc.collect()
    assert list(temporary.iterdir()) == [est.run_.out] and est.run_.out != first
    run = est.run_
    del est
    gc.collect()
    assert run.predict(texts[:1])[0].value in ("0", "1")  # whoever holds the run holds the folder
    del run
    gc.collect()
    assert not list(temporary.iterdir())


def test_nothing_is_left_behind() -> None:
    """Not in a process that ends with a fitted estimator, either; and multistep alone imports no scikit-learn."""
    script = """if True:
        import sys, multistep
        assert "sklearn" not in sys.modules
        from multistep.sklearn import TextClassifier
        est = TextClassifier(budget="20 updates", model="none").fit([f"{w} {i}" for i in range(20) for w in "ab"], [0, 1] * 20)
        print(est.run_.out, est.run_.out.exists())
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    folder, existed = done.stdout.split()
    assert existed == "True" and not Path(folder).exists()


def test_a_forked_child_leaves_the_folder(tmp_path: Path) -> None:
    _remove(tmp_path, owner=os.getpid() + 1)
    assert tmp_path.exists()
    _remove(tmp_path, owner=os.getpid())
    assert not tmp_path.exists()


def test_a_fit_that_fails_leaves_nothing(temporary: Path) -> None:
    texts, y = rows(40)
    with pytest.raises(UserError, match="metric"):
        TextClassifier(**QUICK, metric="mse").fit(texts, y)
    assert not list(temporary.iterdir())


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    texts, y = rows(40)
    out = tmp_path / "runs" / "mine"
    est = TextClassifier(**QUICK, out=out).fit(texts, y)
    assert est.run_.out == out and [p.value for p in api.load(out).predict(texts[:2])] == ["0", "1"]
    with pytest.raises(UserError, match="holds a run"):
        est.fit(texts, y)
    more = est.run_.resume("+20 updates")
    assert [r["kind"] for r in more.records()].count("Finished") == 2
    del est, more
    gc.collect()
    assert (out / "model" / "multistep.json").exists()


def test_no_row_is_held_back_for_a_test_that_nobody_reads() -> None:
    texts, y = rows(40)
    est = TextClassifier(**QUICK).fit(texts, y)
    records = est.run_.records()
    assert not [r for r in records if r["kind"] == "TestRead"] and est.run_.summary()["metrics"] == {}
    skipped = [r["why"] for r in records if r["kind"] == "Skipped" and r["stage"] == "test"]
    assert skipped == ["there is no test split"]
    splits = {k: v["rows"] for k, v in next(r for r in records if r["kind"] == "Data")["report"]["splits"].items()}
    assert splits["test"] == 0 and sum(splits.values()) == 40
    assert "No test data has been read." in (est.run_.out / "model" / "README.md").read_text(encoding="utf-8")
    asked = TextClassifier(**{**QUICK, "overrides": (*QUICK.get("overrides", ()), "test=true")}).fit(texts, y)
    assert [r["rows"] for r in asked.run_.records() if r["kind"] == "TestRead"]


def test_seeds() -> None:
    texts, y = rows(40)

    def seed(state: Any) -> int:
        return TextClassifier(**QUICK, random_state=state).fit(texts, y).run_.records()[0]["config"]["seed"]

    assert seed(3) == seed(np.int64(3)) == 3
    assert seed(np.random.RandomState(0)) == seed(np.random.RandomState(0))
    assert seed(None) != seed(None)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_stops_a_search_and_not_one_fit(
    number: int, raised: type[BaseException], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise Interrupted(number)

    monkeypatch.setattr(api, "fit", stop)
    texts, y = rows(40)
    with pytest.raises(raised):
        cross_val_score(TextClassifier(**QUICK), texts, y, cv=2)  # which goes on after an Exception
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "model/../../elsewhere"])
def test_a_loaded_estimator_writes_into_its_own_folder_alone(name: str) -> None:
    with pytest.raises(UserError, match="outside of its folder"):
        TextClassifier().__setstate__({"run_": {name: b""}})
