"""scikit-learn's tf-idf + linear model with a grid search, as a competent user writes it, in the same wall-clock time.

Words and pairs of words (Chinese: one to three characters), sublinear tf-idf; LinearSVC and LogisticRegression over C,
two points at a time on two cores; the best on the validation split (or in 3-fold cross-validation of both) is fitted
again on train + validation. The grid is walked most promising first and stops in time for that refit. Kind to the
peer: its imports and its test are outside its time.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from _common import (
    CELLS,
    EXTRA_TESTS,
    Results,
    Row,
    load,
    load_average,
    markdown,
    mean_sd,
    parser,
    seconds,
    select,
    values,
)
from _peers import Fitted, Given, best_of

BENCH = "peer_sklearn"
CHINESE = {"chnsenticorp"}
# (model, C), most promising first. "grid" walks both families in turn; "logreg" is the second one alone.
SVC = tuple(("svc", c) for c in (1.0, 0.3, 3.0, 0.1, 10.0, 0.03, 30.0))
LOGREG = tuple(("logreg", c) for c in (10.0, 30.0, 3.0, 100.0, 1.0, 300.0, 0.3))
GRIDS: dict[str, tuple[tuple[str, float], ...]] = {
    "grid": tuple(point for pair in zip(SVC, LOGREG, strict=True) for point in pair),
    "logreg": LOGREG,
}
Choose = Literal["validation", "cv"]


@dataclass(frozen=True, slots=True)
class Fold:
    """One way to judge a point of the grid: fit on one part, score on the other."""

    x_fit_ND: csr_matrix
    y_fit_N: np.ndarray
    x_score_MD: csr_matrix
    y_score_M: np.ndarray


_folds: list[Fold] = []  # what the worker processes inherit by fork, instead of copies through pipes


def vectorizer(dataset: str) -> TfidfVectorizer:
    if dataset in CHINESE:
        return TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True)
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)


def model(kind: str, c: float, seed: int) -> Any:
    if kind == "svc":
        return LinearSVC(C=c, random_state=seed)
    return LogisticRegression(C=c, max_iter=1000, random_state=seed)


def _score(job: tuple[int, str, float, int]) -> tuple[int, float, float]:
    """Number of the point, mean accuracy over the folds, seconds of one fit."""
    number, kind, c, seed = job
    start = time.monotonic()
    with threadpool_limits(1):
        fitted = [(fold, model(kind, c, seed).fit(fold.x_fit_ND, fold.y_fit_N)) for fold in _folds]
        scores = [float((m.predict(fold.x_score_MD) == fold.y_score_M).mean()) for fold, m in fitted]
    return number, float(np.mean(scores)), (time.monotonic() - start) / len(_folds)


def folds(dataset: str, choose: Choose, seed: int) -> Iterator[Fold]:
    texts, labels = load(dataset, "train")
    texts_v, labels_v = load(dataset, "validation")
    if choose == "validation":
        make = vectorizer(dataset)
        x_ND = csr_matrix(make.fit_transform(texts))
        yield Fold(x_ND, np.array(labels), csr_matrix(make.transform(texts_v)), np.array(labels_v))
        return
    # As GridSearchCV does over features made once: the fold's own idf would cost a pass over the texts for each fold.
    x_ND = csr_matrix(vectorizer(dataset).fit_transform(texts + texts_v))
    y_N = np.array(labels + labels_v)
    for fit, score in StratifiedKFold(3, shuffle=True, random_state=seed).split(y_N, y_N):
        yield Fold(x_ND[fit], y_N[fit], x_ND[score], y_N[score])


def search(dataset: str, budget: str, system: str, seed: int, choose: Choose) -> Row:
    """Walk the grid within the budget, refit the best, read the test."""
    start = time.monotonic()
    final, make, facts = walk(dataset, seconds(budget), system, seed, choose)
    row: Row = {"ok": True}
    for test in ("test", *EXTRA_TESTS.get(dataset, ())):
        texts_t, labels_t = load(dataset, test)
        right_N = final.predict(make.transform(texts_t)) == np.array(labels_t)
        row["accuracy" if test == "test" else f"accuracy_{test}"] = float(right_N.mean())
    return row | facts | {"wall_s": round(time.monotonic() - start, 2)}


def walk(dataset: str, limit_s: float, system: str, seed: int, choose: Choose) -> tuple[Any, TfidfVectorizer, Row]:
    """The best point of the grid that was reached in time, fitted on train + validation; its vectorizer; facts."""
    grid = GRIDS[system]
    start = time.monotonic()
    _folds[:] = folds(dataset, choose, seed)
    featurize_s = time.monotonic() - start

    scores: dict[int, float] = {}
    fit_s: dict[int, float] = {}
    with multiprocessing.get_context("fork").Pool(2) as pool:
        jobs = [(number, kind, c, seed) for number, (kind, c) in enumerate(grid)]
        finished = pool.imap_unordered(_score, jobs)
        for _ in jobs:
            # The refit: all texts once more through the vectorizer, and the best point on a few more rows.
            refit_s = 1.3 * (featurize_s + fit_s[best_of(scores)]) if scores else 0.0
            left_s = limit_s - (time.monotonic() - start) - refit_s
            try:
                # Something must come of it, however small the budget: for the first point we wait.
                number, score, fit_s_one = finished.next(timeout=max(0.0, left_s) if scores else None)
            except multiprocessing.TimeoutError:
                break
            scores[number], fit_s[number] = score, fit_s_one
        pool.terminate()
    search_s = time.monotonic() - start

    best = best_of(scores)
    kind, c = grid[best]
    texts, labels = (a + b for a, b in zip(load(dataset, "train"), load(dataset, "validation"), strict=True))
    make = vectorizer(dataset)
    with threadpool_limits(1):  # as it was timed in the search
        final = model(kind, c, seed).fit(make.fit_transform(texts), labels)
    train_s = time.monotonic() - start
    facts: Row = {"best": f"{kind} C={c:g}", "score_chosen_by": round(scores[best], 5), "choose": choose}
    facts |= {"tried": len(scores), "points": len(grid), "features": len(make.vocabulary_)}
    facts |= {"featurize_s": round(featurize_s, 2), "search_s": round(search_s, 2), "train_s": round(train_s, 2)}
    return final, make, facts


def fit(given: Given) -> Fitted:
    """The grid of both families as a peer of course.py."""
    final, make, facts = walk(given.dataset, given.clock.left_s, "grid", given.seed, "validation")
    return Fitted(lambda texts: [str(label) for label in final.predict(make.transform(texts))], facts)


def table(rows: list[Row]) -> str:
    head = ["dataset", "budget", "system", "seeds", "test accuracy", "test_dedup", "chosen", "tried", "train s"]
    head += ["with test s"]
    body = []
    for dataset, budget, system in dict.fromkeys((row["dataset"], row["budget"], row["system"]) for row in rows):
        mine = select(rows, dataset=dataset, budget=budget, system=system)
        chosen = ", ".join(sorted({row["best"] for row in mine}))
        tried = ", ".join(sorted({f"{row['tried']}/{row['points']}" for row in mine}))
        accuracies = [mean_sd(values(mine, name)) for name in ("accuracy", "accuracy_test_dedup")]
        times = [mean_sd(values(mine, name), 1) for name in ("train_s", "wall_s")]
        body.append([dataset, budget, system, len(mine), *accuracies, chosen, tried, *times])
    return markdown(head, body)


def main() -> None:
    # Logistic regression has no randomness here, LinearSVC only the order of its coordinates: one seed says it.
    options = parser(__doc__, seeds=(0,))
    options.add_argument("--datasets", nargs="+", choices=sorted({c.dataset for c in CELLS}), help="None: all")
    options.add_argument("--budgets", nargs="+", help="such as 60s. None: the datasets' own")
    options.add_argument("--systems", nargs="+", choices=sorted(GRIDS), default=sorted(GRIDS), help="the grids to walk")
    options.add_argument("--choose", choices=("validation", "cv"), default="validation", help="what picks the best")
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    cells = [c for c in CELLS if not given.datasets or c.dataset in given.datasets]
    todo = list(dict.fromkeys((c.dataset, b) for c in cells for b in (given.budgets or [c.budget])))
    for dataset, budget in todo:
        for system in given.systems:
            for seed in given.seeds:
                name = system if given.choose == "validation" else f"{system}-cv"
                if not results.has(dataset, budget, name, seed):
                    before = load_average()
                    measured = search(dataset, budget, system, seed, given.choose)
                    results.add(dataset, budget, name, seed, measured, before)


if __name__ == "__main__":
    main()
