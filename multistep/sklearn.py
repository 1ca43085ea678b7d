"""The scikit-learn front door: `TextClassifier` and `TextRegressor`, estimators whose X is texts and not numbers.

    TextClassifier(budget="60s").fit(texts, labels).predict(["great film"])

`fit` writes texts and labels as one file and makes a run of it (multistep.fit): validation is split off inside, so a score on rows
the estimator was given is no test. No test is: whoever scores holds rows back. With out=None the run lies in a temporary folder
that goes with the estimator.
A pickle or a copy carries the files of the served model and the journal as bytes, and unpacks them into a folder of its own.
Shapes: N texts, K classes in the order of `classes_`, J of them known to the model.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import check_array, check_random_state, column_or_1d
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from multistep import api
from multistep.api import Run
from multistep.metrics import log_softmax
from multistep.predictors import Predictor
from multistep.sklearn_data import (
    check_enough,
    check_labels_given,
    class_names_of,
    labels_of,
    texts_of,
    usable_rows,
)
from multistep.types import Interrupted, TaskKind, UserError

__all__ = ["EXPECTED_FAILED_CHECKS", "TextClassifier", "TextRegressor"]

# For check_estimator. Its tags make scikit-learn skip every check that fits a matrix; these cannot pass even when the matrices
# are written as texts, which is how tests/test_sklearn.py runs the others.
EXPECTED_FAILED_CHECKS: Mapping[str, str] = {
    "check_n_features_in": "a text has no number of features: there is no n_features_in_",
    "check_n_features_in_after_fitting": "a text has no number of features: none can be wrong in predict",
    "check_estimators_empty_data_messages": "wants a word about 0 features; texts without a word are refused in other words",
    "check_estimators_nan_inf": "NaN and infinity are numbers; what is missing among texts is refused by its row",
    "check_fit2d_predict1d": "one dimension is the right shape of texts, so there is no advice to reshape",
}

_TEXTS = "texts.jsonl"
_KEPT = ("model", "journal.jsonl", "config.yaml")  # of a temporary run: what answers and explains
_NEVER = -36.0  # log-odds of a class the model does not know: log of float64's epsilon, and finite for metrics
# keys of a configuration that parameters or fit set
_GIVEN = ("data", "task", "text", "label", "metric", "budget", "seed", "out", "model", "controller")
_UNITS = ("update", "updates", "token", "tokens")


class _TextEstimator(BaseEstimator):
    """What both share: parameters, the run, its folder, pickling."""

    def __init__(
        self,
        *,
        budget: str | float = "60s",
        metric: str | None = None,
        model: str = "auto",
        controller: str = "staged",
        random_state: int | np.random.RandomState | None = 0,
        out: str | Path | None = None,
        overrides: Sequence[str] = (),
        quiet: bool = True,
    ) -> None:
        """Parameters, none checked before `fit`.

        `budget`: of one fit; "200 updates" and "2e6 tokens" repeat exactly, seconds depend on the machine. `metric`: what the run
        decides by; None: accuracy, f1_micro (several labels) or mse. `model`: "auto", "none" (n-grams only), a folder, a hub name.
        `random_state`: a seed, a RandomState, or None for a new seed every fit. `out`: the run's folder, for one fit; None: a
        temporary one. `overrides`: other keys of the configuration, each "key=value".
        """
        self.budget = budget
        self.metric = metric
        self.model = model
        self.controller = controller
        self.random_state = random_state
        self.out = out
        self.overrides = overrides
        self.quiet = quiet

    run_: Run

    def explain(self) -> str:
        """What the fit tried, what it decided and why."""
        check_is_fitted(self, "run_")
        return self.run_.explain()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.one_d_array, tags.input_tags.two_d_array = True, True, False
        tags.non_deterministic = self.random_state is None or not str(self.budget).strip().lower().endswith(_UNITS)
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        return {key: _packed(value.out) if key == "run_" else value for key, value in state.items()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__({key: _unpacked(value) if key == "run_" else value for key, value in state.items()})

    # ------------------------------------------------------------------ for the two below

    def _learn(self, task: TaskKind, texts: Sequence[str], labels: Sequence[Any]) -> Run:
        """A run on these rows. Raises UserError on bad input, and what Ctrl-C would raise when a signal stopped it."""
        name = type(self).__name__
        for override in self.overrides:
            if override.partition("=")[0] in _GIVEN:
                raise UserError(f"{name}: {override!r} in overrides is a parameter or set by fit. Leave it out.")
        out = Path(tempfile.mkdtemp(prefix="multistep-") if self.out is None else self.out)
        if (out / "journal.jsonl").exists():
            raise UserError(f"{name}: {out} holds a run. Name another `out`; in a search leave it None.")
        try:
            source = _write(out / _TEXTS, texts, labels)
            run = api.fit(
                source, task=task, metric=self.metric, budget=self.budget, seed=self._seed(), out=out, text="text",
                label="label", model=self.model, controller=self.controller, overrides=("test=false", *self.overrides),
                quiet=self.quiet,
            )  # fmt: skip
        except BaseException as error:
            if self.out is None:
                shutil.rmtree(out, ignore_errors=True)
            if isinstance(error, Interrupted):  # an Exception, which a search would take for one bad candidate
                raise (KeyboardInterrupt if error.signal == signal.SIGINT else SystemExit)(128 + error.signal) from None
            if isinstance(error, UserError):
                raise UserError(str(error).replace(str(out / _TEXTS), name)) from None
            raise
        if self.out is not None:
            return run
        for path in out.iterdir():
            if path.name not in _KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        weakref.finalize(run, _remove, out, os.getpid())
        return run

    def _seed(self) -> int:
        if isinstance(self.random_state, Integral):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _scored(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """Logits [N,J] of the model and its decisions, as they were evaluated."""
        check_is_fitted(self, "run_")
        return self.run_.labels.scored(texts_of(X, type(self).__name__))


class TextClassifier(ClassifierMixin, _TextEstimator):
    """One class of several, or several labels at once, for each text.

    `fit` takes labels of any type scikit-learn knows and gives them back in `classes_` and `predict`. Several labels: an
    indicator matrix (predict gives one) or a list with a tuple of labels a row (predict gives an array of tuples).
    `predict` decides as the run found best for the metric; it is where `decision_function` is largest (above 0 for two classes
    and for several labels), which need not be where `predict_proba` is.
    """

    classes_: np.ndarray

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from texts X and labels y within the budget. There are no sample weights."""
        name = type(self).__name__
        texts = texts_of(X, name)
        labels = labels_of(y, name)
        check_consistent_length(texts, labels.codes)
        check_enough(texts, labels, name)
        names = class_names_of(labels.classes)
        cells = [[names[k] for k in code] if labels.form != "one" else names[code[0]] for code in labels.codes]
        self.run_ = self._learn("classify" if labels.form == "one" else "multilabel", texts, cells)
        self.classes_, self._names, self._form = labels.classes, names, labels.form
        return self

    def predict(self, X: Any) -> np.ndarray:
        """[N] of `classes_`; several labels: as in fit, an indicator [N,K] or an array [N] of tuples."""
        _, decisions = self._scored(X)
        if self._form == "one":
            return self.classes_[self._columns()[decisions]]
        said_NK = self._placed(decisions, 0)
        if self._form == "indicator":
            return said_NK.astype(np.int64)
        rows = np.empty(len(said_NK), dtype=object)
        rows[:] = [tuple(self.classes_[said_K > 0].tolist()) for said_K in said_NK]
        return rows

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [N,K]; rows sum to 1 unless a text may have several labels."""
        logits_NJ, _ = self._scored(X)
        return self._placed(self.run_.labels.task.probabilities(logits_NJ), 0.0)

    def decision_function(self, X: Any) -> np.ndarray:
        """Two classes: log-odds [N] of `classes_[1]`. More: log-probabilities [N,K]. Several labels: log-odds [N,K].
        Decision thresholds that the run found are added, so that `predict` follows from it."""
        logits_NJ, _ = self._scored(X)
        task, predictor = self.run_.labels.task, self.run_.labels.predictor
        base_NJ = log_softmax(logits_NJ) if task.kind == "classify" else logits_NJ
        scores_NK = self._placed(base_NJ + _shift(task.kind, predictor), _NEVER)
        if self._form == "one" and len(self.classes_) == 2:
            return scores_NK[:, 1] - scores_NK[:, 0]
        return scores_NK

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy; of several labels, the share of rows with all of them right."""
        said = self.predict(X)
        if self._form == "tuples":
            right = [set(one) == set(other) for one, other in zip(y, said, strict=True)]
            return float(np.average(right, weights=sample_weight))
        return float(accuracy_score(y, said, sample_weight=sample_weight))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def _columns(self) -> np.ndarray:
        """[J]: the place in `classes_` of each output of the model."""
        place = {name: k for k, name in enumerate(self._names)}
        return np.array([place[label] for label in self.run_.labels.task.labels], dtype=np.int64)

    def _placed(self, values_NJ: np.ndarray, unknown: float) -> np.ndarray:
        """[N,K]: the model's outputs in the order of `classes_`; `unknown` for a class of which no row could be used."""
        values_NK = np.full((len(values_NJ), len(self.classes_)), unknown, dtype=np.float64)
        values_NK[:, self._columns()] = values_NJ
        return values_NK


class TextRegressor(RegressorMixin, _TextEstimator):
    """A number for each text."""

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from texts X and numbers y within the budget. There are no sample weights."""
        name = type(self).__name__
        texts = texts_of(X, name)
        check_labels_given(y, name)
        targets = column_or_1d(check_array(y, dtype="float64", ensure_2d=False, input_name="y"), warn=True)
        check_consistent_length(texts, targets)
        usable = usable_rows(texts, name)
        if len(set(targets[usable].tolist())) == 1:
            raise UserError(f"{name}: every y is {targets[usable[0]]:g}. There is nothing to learn.")
        self.run_ = self._learn("regress", texts, targets.tolist())
        return self

    def predict(self, X: Any) -> np.ndarray:
        """float64 [N], in the units of y."""
        return np.asarray(self._scored(X)[1], dtype=np.float64)


def _shift(task: TaskKind, predictor: Predictor) -> np.ndarray | float:
    """What decision thresholds amount to on log-probabilities (classify) or logits (multilabel): [J], or 0 without any."""
    match predictor.kind:
        case "thresholds":
            offset_J = np.array(predictor.offsets)
            return offset_J if task == "classify" else np.log1p(-offset_J) - np.log(offset_J)
        case "temperature":
            return _shift(task, predictor.inner) / predictor.temperature
        case _:
            return 0.0


# ---------------------------------------------------------------------------------------------- folders and files


def _write(path: Path, texts: Sequence[str], labels: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"text": text, "label": label} for text, label in zip(texts, labels, strict=True))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _remove(folder: Path, owner: int) -> None:
    """For weakref.finalize: the folder goes when its run does, or with the process; a forked child leaves it alone."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _packed(folder: Path) -> dict[str, bytes]:
    """File name inside the run's folder -> its bytes."""
    files = [p for name in _KEPT for p in (folder / name, *(folder / name).rglob("*")) if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def _unpacked(files: Mapping[str, bytes]) -> Run:
    if strange := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UserError(
            f"the estimator that is loaded has a file {strange[0]!r} outside of its folder: it is not one of ours."
        )
    folder = Path(tempfile.mkdtemp(prefix="multistep-"))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    run = Run(folder)
    weakref.finalize(run, _remove, folder, os.getpid())
    return run
