"""Stretches of a text, and a linear head that ranks them: what summaries and answers are extracted with.

A text is a row of words (in scripts without spaces: of characters) that know their place, their sentence and whether a mark stands
before them; a span is a range of words, and its text a verbatim slice. The head is a ridge regression of what a span would score,
on features and scores less their mean over the spans of the same text: only what tells spans of one text apart is learnt.
Sources: Conroy and O'Leary 2001, "Text summarization via hidden Markov models" (sentence features, learnt); Joachims 2002, "Optimizing
search engines using clickthrough data" (only differences within a group count; here squared, not hinge).
Shapes: T words of a text, C spans of a text, D features, N rows in all.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from multistep.metrics.words import unspaced
from multistep.models.head import principal_axes
from multistep.objectives.convex import ConvexProblem, Dense, Loss
from multistep.optimizers.newton_cg import NewtonCG

Encode = Callable[[Sequence[str]], np.ndarray]  # texts -> [N,D]
L2S = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)  # per standardised feature
FOLDS = 5

_SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’）]*|\n+|$)", re.DOTALL)
_INSIDE = " -'’_/&."  # between words without breaking a phrase


def sentences(text: str) -> list[str]:
    """The sentences of a text; their ends are full stops before a space, those of Chinese and Japanese, and line breaks."""
    return [text[start:end] for start, end in sentence_places(text)]


def sentence_places(text: str) -> list[tuple[int, int]]:
    """Where its sentences begin and end, in characters, without the space around them."""
    places = []
    for match in _SENTENCE.finditer(text):
        found = match.group()
        if stripped := found.strip():
            start = match.start() + found.index(stripped)
            places.append((start, start + len(stripped)))
    return places


@lru_cache
def _words() -> re.Pattern[str]:
    single = unspaced().pattern
    return re.compile(rf"(?=\w){single}|(?:(?!{single})[^\W_])+")


class Span(NamedTuple):
    """Words `start` to before `end`, all of one sentence."""

    sentence: int
    start: int
    end: int


@dataclass(frozen=True)
class Text:
    """A text as words. `low`: in lower case; `starts_T`, `ends_T`: characters; `breaks_T`: a mark or a line break stands before."""

    text: str
    sentences: list[tuple[int, int]]
    raw: list[str]
    low: list[str]
    starts_T: np.ndarray
    ends_T: np.ndarray
    sentence_T: np.ndarray
    breaks_T: np.ndarray

    def slice(self, span: Span) -> str:
        """The span as it stands in the text; at the edges of a sentence with the marks there."""
        start, end = int(self.starts_T[span.start]), int(self.ends_T[span.end - 1])
        sentence_start, sentence_end = self.sentences[span.sentence]
        if span.start == 0 or self.sentence_T[span.start - 1] != span.sentence:
            start = sentence_start
        if span.end == len(self.low) or self.sentence_T[span.end] != span.sentence:
            end = sentence_end
        return self.text[start:end]

    def ranges(self) -> list[Span]:
        """The sentences that have a word, as spans."""
        edges = np.flatnonzero(np.diff(self.sentence_T, prepend=-1, append=len(self.sentences)))
        return [Span(int(self.sentence_T[a]), int(a), int(b)) for a, b in itertools.pairwise(edges)]


def read(text: str) -> Text:
    places = sentence_places(text)
    found = list(_words().finditer(text))
    starts_T, ends_T = (np.array([edge(m) for m in found], dtype=np.int64) for edge in (re.Match.start, re.Match.end))
    begins = np.array([start for start, _ in places], dtype=np.int64)
    sentence_T = np.searchsorted(begins, starts_T, side="right") - 1
    breaks_T = np.ones(len(found), dtype=bool)
    for i in range(1, len(found)):
        gap = text[ends_T[i - 1] : starts_T[i]]
        breaks_T[i] = sentence_T[i] != sentence_T[i - 1] or bool(gap.strip(_INSIDE)) or "\n" in gap
    raw = [m.group() for m in found]
    return Text(text, places, raw, [w.lower() for w in raw], starts_T, ends_T, sentence_T, breaks_T)


# ---------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class Head:
    """score = features @ weights + bias"""

    weights_D: np.ndarray
    bias: float

    def __call__(self, features_ND: np.ndarray) -> np.ndarray:
        return features_ND @ self.weights_D + self.bias

    def state(self) -> list[float]:
        return [*self.weights_D.tolist(), self.bias]

    @staticmethod
    def of(state: Sequence[float]) -> Head:
        return Head(np.array(state[:-1], dtype=np.float64), float(state[-1]))


def solve(
    features_ND: np.ndarray, targets_N: np.ndarray, loss: Loss, l2: float, weight_N: np.ndarray | None = None
) -> Head:
    """A ridge or logistic regression (targets 0 and 1), on standardised features turned to their principal axes."""
    x = torch.as_tensor(np.asarray(features_ND, np.float32))
    axes = principal_axes(x)
    problem = ConvexProblem(Dense(axes.apply(x)), np.asarray(targets_N, np.float64), loss, 1, l2, weight_N)
    w_DK, b_K = axes.fold(NewtonCG(tolerance=1e-4).minimize(problem).weights)
    return Head(w_DK.numpy()[:, 0].astype(np.float64), float(b_K[0]))


class Ranking(NamedTuple):
    """`held_out`: the mean score of the first choices of heads that have not seen them; `folds`: those heads."""

    head: Head
    l2: float
    held_out: float
    folds: list[Head]

    def unseen(self, text: int) -> Head:
        """The head that was fitted without this text."""
        return self.folds[text % len(self.folds)]


def fit_ranker(features: Sequence[np.ndarray], targets: Sequence[np.ndarray], l2s: Sequence[float] = L2S) -> Ranking:
    """Features [C,D] and scores [C] of the spans of each text; every text weighs the same.

    The strength is the one whose first choices score best on held-out texts. Every text is held out once; all are used in the end.
    """
    n_folds = min(FOLDS, len(features))
    folds = [range(fold, len(features), n_folds) for fold in range(n_folds)]
    moments = [_Moments.of([features[i] for i in fold], [targets[i] for i in fold]) for fold in folds]
    whole = moments[0]
    for part in moments[1:]:
        whole = whole.plus(part, 1.0)
    if n_folds < 2:  # nothing is held out: the strongest, and no opinion on what it has not seen
        head = whole.heads([max(l2s)])[0]
        return Ranking(head, max(l2s), 0.0, [Head(np.zeros_like(head.weights_D), 0.0)])
    heads = [whole.plus(part, -1.0).heads(l2s) for part in moments]
    gains_L = np.zeros(len(l2s))
    for fold, own in zip(folds, heads, strict=True):
        weights_DL = np.stack([head.weights_D for head in own], axis=1)
        for i in fold:
            gains_L += targets[i][(features[i] @ weights_DL).argmax(0)]
    best = int(np.argmax(gains_L))
    return Ranking(
        whole.heads([l2s[best]])[0], l2s[best], float(gains_L[best]) / len(features), [own[best] for own in heads]
    )


class _Moments(NamedTuple):
    """What a ridge regression needs of its rows: their number of texts, x^T x and x^T y of differences within texts. They add up, so
    folds and strengths cost nothing."""

    texts: float
    xx_DD: np.ndarray
    xy_D: np.ndarray

    @staticmethod
    def of(features: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> _Moments:
        width = features[0].shape[1]
        xx_DD, xy_D = np.zeros((width, width)), np.zeros(width)
        for start in range(0, len(features), 256):
            xs, ys = [], []
            for f, t in zip(features[start : start + 256], targets[start : start + 256], strict=True):
                weight = len(t) ** -0.5
                xs.append((f - f.mean(0, keepdims=True, dtype=np.float64)) * weight)
                ys.append((t - t.mean()) * weight)
            x_ND, y_N = np.concatenate(xs), np.concatenate(ys)
            xx_DD += x_ND.T @ x_ND
            xy_D += x_ND.T @ y_N
        return _Moments(float(len(features)), xx_DD, xy_D)

    def plus(self, other: _Moments, sign: float) -> _Moments:
        return _Moments(self.texts + sign * other.texts, self.xx_DD + sign * other.xx_DD, self.xy_D + sign * other.xy_D)

    def heads(self, l2s: Sequence[float]) -> list[Head]:
        """One for each strength: the minimum of mean squared error / 2 + l2 / 2 |w|^2 for standardised features."""
        scale_D = np.sqrt(np.maximum(np.diagonal(self.xx_DD), 0.0) / max(self.texts, 1.0))
        scale_D = np.where(scale_D > 1e-6, scale_D, np.inf)  # what never differs within a text says nothing
        values_D, turn_DD = np.linalg.eigh(self.xx_DD / max(self.texts, 1.0) / np.outer(scale_D, scale_D))
        aim_D = turn_DD.T @ (self.xy_D / max(self.texts, 1.0) / scale_D)
        return [Head(turn_DD @ (aim_D / (np.maximum(values_D, 0.0) + l2)) / scale_D, 0.0) for l2 in l2s]
