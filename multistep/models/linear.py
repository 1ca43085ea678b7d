"""A linear model on n-gram counts, naive-Bayes weighted or tf-idf: the incumbent, solved in seconds.

    logits = x W + b,   x presence of n-grams, W = r * V per output,   r = log of the ratio of how often an n-gram occurs
    inside the class to outside it (each smoothed by alpha);   l2 falls on V, so n-grams that say little must pay more

Source: Wang and Manning 2012, "Baselines and Bigrams" (their MNB-weighted SVM).
Differs from the source: logistic loss, one ratio an output (one against the rest), no interpolation with plain naive Bayes;
l2 is counted in the mean squared length of the weighted rows, so one path serves every kind of features.
Shapes: N texts, D n-grams, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy import sparse
from torch import Tensor

from multistep.files import reading
from multistep.models.head import mean_loss, pose, unpose
from multistep.objectives.convex import ConvexProblem, Sparse
from multistep.optimizers.newton_cg import NewtonCG
from multistep.optimizers.path import ConvexSolver, solve_path
from multistep.text import NgramFeatures, TextFacts, Vectorizer
from multistep.types import TaskKind

PATH = (3.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # times the rows' mean squared length, divided by N


class Linear:
    """Weights [D, K], bias [K], both float32, and the vectorizer they belong to."""

    def __init__(self, weights_DK: np.ndarray, bias_K: np.ndarray, vectorizer: Vectorizer) -> None:
        self.weights_DK, self.bias_K, self.vectorizer = weights_DK, bias_K, vectorizer

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Logits float64 [N, K]."""
        return np.asarray(self.vectorizer.transform(texts) @ self.weights_DK, np.float64) + self.bias_K

    def save(self, folder: Path) -> None:
        """linear.safetensors beside the vectorizer's files."""
        self.vectorizer.save(folder)
        arrays = {"weights": np.ascontiguousarray(self.weights_DK), "bias": np.ascontiguousarray(self.bias_K)}
        save_file(arrays, folder / "linear.safetensors")

    @staticmethod
    def load(folder: Path) -> Linear:
        """What `save` wrote."""
        with reading(folder / "linear.safetensors"):
            arrays = load_file(folder / "linear.safetensors")
            weights_DK, bias_K = arrays["weights"], arrays["bias"]
        return Linear(weights_DK, bias_K, Vectorizer.load(folder))


def candidates(task_kind: TaskKind, n_outputs: int, facts: TextFacts) -> list[NgramFeatures]:
    """Features worth trying, the calibrated default first (validation sets of imdb, sst2, chnsenticorp, banking77).

    The rule: text without spaces takes characters, other text words; two classes take naive-Bayes weights, more outputs
    tf-idf (a ratio of one against many says little); short texts gain from characters inside words, long ones from runs of words.
    """
    two = task_kind == "classify" and n_outputs == 2
    if facts.unspaced_share > 0.3:
        chars = NgramFeatures(unit="char", char_order=3, weight="nb_tfidf" if two else "tfidf")
        return [chars, chars.with_(weight="nb" if two else "nb_tfidf"), chars.with_(weight="tfidf", char_order=4)]
    if facts.mean_words > 60:
        fours = NgramFeatures(unit="word", order=4, min_count=3, max_features=1_000_000, weight="nb_tfidf")
        pairs = NgramFeatures(unit="word", order=2, weight="tfidf")
        if two:
            return [fours, fours.with_(weight="nb"), pairs]
        return [pairs.with_(order=3, min_count=3), pairs.with_(weight="nb_tfidf"), pairs]
    both = NgramFeatures(unit="both", weight="nb_tfidf" if two else "tfidf")
    pairs = both.with_(unit="word")
    return [both, both.with_(weight="nb"), pairs] if two else [pairs, both]


def relative_path(n_rows: int) -> tuple[float, ...]:
    """The calibrated strengths for so many rows: what helps falls as 1/N."""
    return tuple(strength / n_rows for strength in PATH)


def path_to(l2: float, n_rows: int) -> tuple[float, ...]:
    """The strengths on the way to one: solved along them it is reached sooner than from nothing."""
    return (*(stronger for stronger in relative_path(n_rows) if stronger > 1.5 * l2), l2)


def log_count_ratio(x_ND: sparse.csr_matrix, y_NK: np.ndarray, alpha: float) -> np.ndarray:
    """log of (share of n-gram d in the texts of class k) / (its share in the others) by presence, float32 [D, K]."""
    seen = sparse.csr_matrix((np.ones_like(x_ND.data), x_ND.indices, x_ND.indptr), shape=x_ND.shape)
    inside = np.asarray(seen.T @ y_NK.astype(np.float32), np.float64)
    every = np.asarray(seen.sum(0), np.float64).reshape(-1, 1)
    inside, outside = inside + alpha, every - inside + alpha
    return np.log((inside / inside.sum(0)) / (outside / outside.sum(0))).astype(np.float32)


def fit_linear(
    texts: Sequence[str],
    targets: np.ndarray,
    task_kind: TaskKind,
    n_outputs: int,
    features: NgramFeatures,
    valid: tuple[Sequence[str], np.ndarray] | None,
    l2s: Sequence[float] | None = None,
    solver: ConvexSolver | None = None,
    deadline: Callable[[], bool] | None = None,
) -> tuple[Linear, dict[str, Any]]:
    """The model with the lowest validation loss on the path, and facts (chosen l2, score, path, features). Without `valid` the path leads
    to its weakest strength, and that is the model: from one strength to the next is faster than straight to the last.

    `l2s` are in units of the weighted rows' mean squared length; None: `relative_path`.
    Past `deadline()` the best so far is returned; reading the texts is never cut short.
    """
    vectorizer, x_ND = Vectorizer.fit(texts, features)
    valid_ND = None if valid is None else vectorizer.transform(valid[0])
    question = pose(task_kind, n_outputs, targets)
    scale_DK = None
    if features.weight != "tfidf" and task_kind != "regress":
        labels = np.asarray(question.targets)
        y_NK = np.eye(n_outputs)[labels] if question.loss == "softmax" else labels.reshape(len(texts), -1)
        scale_DK = log_count_ratio(x_ND, y_NK, features.nb_alpha)
    problem = ConvexProblem(Sparse(x_ND), question.targets, question.loss, question.columns, 1.0, scale_DK=scale_DK)
    squared_D1 = np.asarray(x_ND.multiply(x_ND).mean(0), np.float64).reshape(-1, 1)
    length = float(squared_D1.sum() if scale_DK is None else (squared_D1 * scale_DK**2).sum() / question.columns)

    def plain(w: Tensor) -> tuple[np.ndarray, np.ndarray]:
        w_DK, b_K = problem.effective(w)
        return unpose(question, task_kind, w_DK.numpy(), b_K.numpy())

    def score(w: Tensor) -> float:
        if valid is None:
            return -float(next(place))
        w_DK, b_K = plain(w)
        return mean_loss(task_kind, valid_ND @ w_DK + b_K, valid[1])

    place = count()  # on the path
    relative = relative_path(len(texts)) if l2s is None else l2s
    steps = [l2 * max(length, 1e-12) for l2 in relative]
    best, facts = solve_path(problem, steps, solver or NewtonCG(tolerance=3e-3), score, deadline)
    weights_DK, bias_K = plain(best)
    model = Linear(weights_DK.astype(np.float32), bias_K.astype(np.float32), vectorizer)
    strength = relative[steps.index(facts["l2"])] * len(texts)  # as in `PATH`
    return model, facts | {
        "features": vectorizer.settings.model_dump(), "n_features": vectorizer.width, "strength": strength,
    }  # fmt: skip
