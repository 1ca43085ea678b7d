"""Which words of a document its summary takes up: counts on train, and a logistic head on what is known of a word.

    word:  log odds of being taken up, log idf, log count, place, sentence, spelling -> chance that the summary has it
    odds   are counted without the document itself while training, or every rare word would betray its own summary
Source: Hong and Nenkova 2014, "Improving the estimation of word importance for news multi-document summarization" (the logistic
regression; the features here are few and need no corpus besides train).
Shapes: T words of a document, U different ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from multistep.models.ranking import Head, Text, solve

_PRIOR = 3.0  # documents' worth of belief that a word is like all words
_WORD_L2 = 1e-4
_STOP_WORDS = 60  # the most frequent words of train, where phrases do not begin or end


@dataclass
class Lexicon:
    """Of each word: how many documents have it, how many of their summaries too; how often summaries begin and end with it."""

    documents: int
    summaries: int
    words: int  # running words
    counts: dict[str, tuple[int, int, int, int, int]]  # documents, taken up, begins, ends, running words
    head: Head

    def __post_init__(self) -> None:
        there = sum(n for n, *_ in self.counts.values())
        self.usual = sum(n[1] for n in self.counts.values()) / max(1, there)

    @staticmethod
    def fit(texts: Sequence[Text], summaries: Sequence[Sequence[Sequence[str]]]) -> Lexicon:
        """`summaries`: of each document, as words."""
        there, taken, begins, ends, running = (Counter[str]() for _ in range(5))
        wanted = [{w for summary in row for w in summary} for row in summaries]
        for text, row, words in zip(texts, summaries, wanted, strict=True):
            running.update(text.low)
            there.update(set(text.low))
            taken.update(set(text.low) & words)
            begins.update(s[0] for s in row if s)
            ends.update(s[-1] for s in row if s)
        counts = {w: (n, taken[w], begins[w], ends[w], running[w]) for w, n in there.items()}
        found = Lexicon(len(texts), begins.total(), running.total(), counts, Head(np.zeros(_WIDTH), 0.0))
        rows, right = [], []
        for text, words in zip(texts, wanted, strict=True):
            different, features_UD = found._features(text, words)
            rows.append(features_UD)
            right += [w in words for w in different]
        if 0 < sum(right) < len(right):
            found.head = solve(np.concatenate(rows), np.array(right, dtype=np.float64), "sigmoid", _WORD_L2)
        return found

    def chances(self, text: Text, own: set[str] | None = None) -> np.ndarray:
        """Chance [T] of each word to be taken up. `own`: the words of its summary, where the document is one of train."""
        different, features_UD = self._features(text, own)
        chance = dict(zip(different, (1 / (1 + np.exp(-self.head(features_UD)))).tolist(), strict=True))
        return np.array([chance[w] for w in text.low])

    def idf(self, text: Text) -> np.ndarray:
        """[T]"""
        return np.array([math.log((self.documents + 1) / (self.counts.get(w, _UNSEEN)[0] + 1)) for w in text.low])

    def edges(self, text: Text) -> np.ndarray:
        """[T,2]: log of how much likelier a summary begins, or ends, with the word than running text has it."""
        rows = []
        for word in text.low:
            _, _, begins, ends, running = self.counts.get(word, _UNSEEN)
            usual = math.log((running + 5) / max(self.words, 1))
            rows.append([math.log((n + 0.5) / (self.summaries + 0.5)) - usual for n in (begins, ends)])
        return np.array(rows, dtype=np.float64).reshape(-1, 2)

    def stop_words(self) -> set[str]:
        """Of the most frequent words those that are rarer at the edges of summaries than in running text."""
        frequent = sorted(self.counts.items(), key=lambda item: (-item[1][4], item[0]))[:_STOP_WORDS]
        return {w for w, n in frequent if (n[2] + n[3]) * self.words < 2 * self.summaries * n[4]}

    def _features(self, text: Text, own: set[str] | None) -> tuple[list[str], np.ndarray]:
        """The different words, and [U,D]."""
        count = Counter(text.low)
        first: dict[str, int] = {}
        for i, word in enumerate(text.low):
            first.setdefault(word, i)
        rows, usual = [], self.usual
        for word, times in count.items():
            there, taken = self.counts.get(word, _UNSEEN)[:2]
            if own is not None:
                there, taken = there - 1, taken - (word in own)
            odds = (taken + _PRIOR * usual + 1e-6) / (there - taken + _PRIOR * (1 - usual) + 1e-6)
            i, raw = first[word], text.raw[first[word]]
            sentence = text.sentence_T[i]
            rows.append(
                [math.log(odds), math.log((self.documents + 1) / (there + 1)), there <= 0, math.log(times),
                 i / len(text.low), math.log1p(i), sentence == 0, sentence == text.sentence_T[-1],
                 raw[0].isupper(), len(raw) > 1 and raw.isupper(), raw[0].isdigit(), min(len(raw), 12)]
            )  # fmt: skip
        return list(count), np.array(rows, dtype=np.float64).reshape(-1, _WIDTH)

    def state(self) -> dict[str, Any]:
        counts = {w: list(n) for w, n in self.counts.items()}
        return {
            "documents": self.documents, "summaries": self.summaries, "words": self.words,
            "counts": counts, "head": self.head.state(),
        }  # fmt: skip

    @staticmethod
    def of(state: dict[str, Any]) -> Lexicon:
        a = {w: tuple(n) for w, n in state["counts"].items()}
        return Lexicon(state["documents"], state["summaries"], state["words"], a, Head.of(state["head"]))


_WIDTH = 12
_UNSEEN = (0, 0, 0, 0, 0)
