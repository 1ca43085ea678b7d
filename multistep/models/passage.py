"""Answers out of a passage, and choices among several, from words alone: what a model that reads has to beat.

passage: sentences are ranked by the weight (idf) of the question's words in them, spans of the best few by a ridge regression of
    what a span would score (mean of exact match and F1) on: the question's words around it and in it, place, length, edges, and the
    kind of question (who, when, how many, 谁, 哪年, 多少 ...) against the kind of span (digits, years, capitals ...).
choose: a ridge regression of being right on the words that a choice shares with question and passage, and on an encoder's cosines.
Both: a logistic head on the best score and its lead, fitted on held-out scores, says how likely the answer is right. Where train has
questions without an answer, "" is given below the confidence that held-out rows score best with.
Sources: Richardson, Burges, Renshaw 2013 (MCTest: sliding windows of words); Rajpurkar et al. 2016 (SQuAD), arXiv 1606.05250,
section 5 (a linear model of spans). Differs: few features, none from a parser; Chinese by characters.
Shapes: T words of a passage, S sentences, C spans or choices, D features.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from multistep.data.cells import Record
from multistep.metrics.words import f1, normalized, unspaced
from multistep.models.ranking import Head, Ranking, Span, Text, fit_ranker, read, solve
from multistep.models.written import load_data, save_data
from multistep.types import Prediction, UserError

_SENTENCES = 3  # of a passage that spans are looked for in, the best by the question's words
_MOST_WORDS = 25  # of an answer
_TRAIN_SPANS = 400  # of a question, and the right one; the others are left out at random
_JUDGED = 1000  # rows that confidence is learnt from
_STEM = 5  # letters: words that begin alike count as one word, as "surrender" and "surrendered"
_ALONE = 0.3  # what a character of the question counts in Chinese without either of its neighbours
_REACH = 4.0  # words: how far a question's word makes itself felt
_KINDS = (  # of questions; the first that matches
    r"how (many|much|long|old|far|often|large|big|tall|high)|percent|多少|几[^乎]|多大|多长|多高|多久|多远",
    r"\bwhen\b|(what|which) (year|date|day|month|century|decade)|何时|什么时候|哪.{0,2}[年月日天]|何年|时间",
    r"\bwho|谁|哪.{0,2}人|何人|什么人",
    r"\bwhere\b|(what|which) (city|country|state|place|river)|哪里|哪儿|何处|什么地方|哪.{0,2}[国省市县区]|位于",
    r"\bwhy\b|reason|为什么|为何|原因",
    r"\bhow\b|怎么|怎样|如何",
    r"\bwhich\b|哪",
    r"\bwhat\b|什么|何",
)
_NUMBER_WORDS = frozenset(
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "hundred", "thousand",
     "million", "billion", "half", "percent", *"一二三四五六七八九十百千万亿两")
)  # fmt: skip
_DATE_WORDS = frozenset(
    ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november", "december",
     "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "century", *"年月日")
)  # fmt: skip
_NO_EDGE = frozenset(
    ("of", "in", "by", "to", "and", "is", "was", "as", "for", "at", "on", "from", "with", "that", "were", "are", "be", "or",
     *"的是在了于和与被")
)  # fmt: skip


def stem(word: str) -> str:
    return word[:_STEM]


@dataclass(frozen=True)
class Weights:
    """How rare stems are in train."""

    documents: int
    counts: dict[str, int]

    @staticmethod
    def of(texts: Sequence[Text]) -> Weights:
        counts = Counter(s for text in texts for s in {stem(w) for w in text.low})
        return Weights(len(texts), dict(counts))

    def idf(self, words: Sequence[str]) -> np.ndarray:
        every = self.documents + 1
        return np.array([math.log1p(every / (self.counts.get(stem(w), 0) + 1)) for w in words], dtype=np.float64)


class Edge(NamedTuple):
    """The first and last word of an answer, the one before and the one after; "" where there is none."""

    first: str
    last: str
    before: str
    after: str


def edge(text: Text, span: Span) -> Edge:
    low = ["", *text.low, ""]
    return Edge(low[span.start + 1], low[span.end], low[span.start], low[span.end + 1])


@dataclass(frozen=True)
class Edges:
    """How often words stand at the edges of answers of train, and in its passages."""

    counts: dict[str, list[int]]  # first, last, before, after, anywhere

    @staticmethod
    def of(texts: Sequence[Text], edges: Sequence[Edge]) -> Edges:
        counts: dict[str, list[int]] = {}
        for kind in range(4):
            for word in (e[kind] for e in edges):
                counts.setdefault(word, [0] * 5)[kind] += 1
        for text in texts:
            for word in text.low:
                if word in counts:
                    counts[word][4] += 1
        return Edges(counts)

    def odds(self, text: Text, own: Edge | None) -> np.ndarray:
        """[T,4]: log of the share of a word's places that are such edges; without the answer `own` of train, which would betray itself."""
        rows = []
        for word in text.low:
            *sides, anywhere = self.counts.get(word, _NOWHERE)
            seen = [n - (own is not None and own[i] == word) for i, n in enumerate(sides)]
            rows.append([math.log((n + 0.1) / (anywhere + 5)) for n in seen])
        return np.array(rows, dtype=np.float64).reshape(-1, 4)


_NOWHERE = [0, 0, 0, 0, 0]


@dataclass(frozen=True)
class Sure:
    """How likely the best candidate is right, from its score, its lead over the next and their number."""

    head: Head

    @staticmethod
    def fit(scores: Sequence[np.ndarray], right: Sequence[float]) -> Sure:
        """`scores`: of candidates by a head that has not seen them; `right`: 0..1 for the best."""
        x_ND = np.array([_lead(s) for s in scores])
        if len(scores) < 2 or max(right) == min(right):
            share = (sum(right) + 1) / (len(right) + 2)
            return Sure(Head(np.zeros(x_ND.shape[1] if len(x_ND) else 3), math.log(share / (1 - share))))
        return Sure(solve(x_ND, np.array(right, dtype=np.float64), "sigmoid", 0.1 / len(scores) + 1e-4))

    def __call__(self, scores_C: np.ndarray) -> float:
        return float(1 / (1 + np.exp(-self.head(_lead(scores_C)[None])[0])))


def _lead(scores_C: np.ndarray) -> np.ndarray:
    best = np.sort(scores_C)[::-1]
    return np.array([best[0] - scores_C.mean(), best[0] - best[min(1, len(best) - 1)], math.log(len(best))])


# ---------------------------------------------------------------------------------------------- spans of a passage


@dataclass
class Passage:
    """`write` gives verbatim spans of the passages, or "" where it has learnt that some questions have no answer."""

    kind: ClassVar[str] = "passage"

    weights: Weights
    edges: Edges
    spans: Head
    sure: Sure
    longest: int  # words of an answer
    least: float  # confidence below which "" is given; 0: never

    @staticmethod
    def fit(records: Sequence[Record]) -> tuple[Passage, dict[str, Any]]:
        used = [r for r in records if r.context.strip() and r.targets]
        passages = {c: read(c) for c in dict.fromkeys(r.context for r in used)}
        gold = {i: g for i, r in enumerate(used) if (g := _golden(passages[r.context], r))}
        if not gold:
            raise UserError(
                "passage: no answer of train stands in its passage. Give rows with a context and an answer."
            )
        longest = max(1, min(_MOST_WORDS, int(np.percentile([s.end - s.start for s in gold.values()], 95))))
        texts = list(passages.values())
        edges = Edges.of(texts, [edge(passages[used[i].context], span) for i, span in gold.items()])
        zero = Head(np.zeros(0), 0.0)
        model = Passage(Weights.of(texts), edges, zero, Sure(zero), longest, 0.0)
        rng = np.random.default_rng(0)
        inputs, scores = [], []
        for i, span in gold.items():
            text, question = passages[used[i].context], read(used[i].source)
            spans = model._candidates(text, question)
            some = [spans[n] for n in rng.permutation(len(spans))[:_TRAIN_SPANS]]
            some = list(dict.fromkeys([*some, span]))
            inputs.append(model._features(text, question, some, edge(text, span)))
            scores.append(np.array([_right(text.text[_place(text, s)], used[i].targets) for s in some]))
        ranking = fit_ranker(inputs, scores)
        model.spans = ranking.head
        model._judge(used, passages, gold, ranking)
        facts = {
            "rows": len(used), "taught": len(gold), "no_answer": sum(not r.targets[0] for r in used), "longest": longest,
            "l2": ranking.l2, "held_out": ranking.held_out, "least": model.least,
        }  # fmt: skip
        return model, facts

    def _judge(
        self, records: Sequence[Record], passages: dict[str, Text], gold: dict[int, Span], ranking: Ranking
    ) -> None:
        """Fit `sure` and `least` on rows as `write` sees them, by heads that have not seen them."""
        places = {i: n for n, i in enumerate(gold)}
        step = max(1.0, len(records) / _JUDGED)
        held, gain, empty = [], [], []
        for i in (int(n * step) for n in range(min(len(records), _JUDGED))):
            text, question = passages[records[i].context], read(records[i].source)
            if spans := self._candidates(text, question):
                head = ranking.unseen(places[i]) if i in places else ranking.head
                own = edge(text, gold[i]) if i in gold else None
                held.append(head(self._features(text, question, spans, own)))
                told = text.text[_place(text, spans[int(held[-1].argmax())])]
                gain.append(_right(told, records[i].targets))
                empty.append(not records[i].targets[0])
        if held:
            self.sure = Sure.fit(held, gain)
        if any(empty):
            self.least = answer_threshold(np.array([self.sure(s) for s in held]), np.array(gain), np.array(empty))

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        passages = {c: read(c) for c in dict.fromkeys(r.context for r in records)}
        written = []
        for record in records:
            text, question = passages[record.context], read(record.source)
            spans = self._candidates(text, question)
            if not spans:
                written.append(Prediction("", 0.0))
                continue
            scores = self.spans(self._features(text, question, spans, None))
            sure = self.sure(scores)
            told = sure >= self.least
            best = text.text[_place(text, spans[int(scores.argmax())])]
            written.append(Prediction(best, sure) if told else Prediction("", 1 - sure))
        return written

    def save(self, folder: Path) -> None:
        data = {
            "documents": self.weights.documents, "counts": self.weights.counts,
            "edges": self.edges.counts, "spans": self.spans.state(),
            "sure": self.sure.head.state(), "longest": self.longest, "least": self.least,
        }  # fmt: skip
        save_data(folder, self.kind, data)

    @staticmethod
    def load(folder: Path) -> Passage:
        d = load_data(folder)
        weights = Weights(d["documents"], d["counts"])
        return Passage(
            weights, Edges(d["edges"]), Head.of(d["spans"]), Sure(Head.of(d["sure"])), d["longest"], d["least"]
        )

    def _candidates(self, text: Text, question: Text) -> list[Span]:
        """Spans of up to `longest` words in the sentences that hold most of the question."""
        ranges = text.ranges()
        match_T = self._match(text, question)
        held = [_covered(text, s, match_T) for s in ranges]
        best = sorted(np.argsort([-h for h in held], kind="stable")[:_SENTENCES].tolist())
        return [
            Span(s.sentence, a, b)
            for s in (ranges[i] for i in best)
            for a in range(s.start, s.end)
            if _opens(text, s, a)
            for b in range(a + 1, min(s.end, a + self.longest) + 1)
            if _closes(text, s, b)
        ]

    def _match(self, text: Text, question: Text) -> np.ndarray:
        """[T]: the weight of the words that the question has too."""
        asked = {stem(w) for w in question.low}
        pairs = {pair for pair in itertools.pairwise(question.low) if _unspaced(pair[0]) and _unspaced(pair[1])}
        low = text.low
        share_T = np.array([float(stem(w) in asked) for w in low])
        for t, word in enumerate(low):
            if share_T[t] and _unspaced(word):
                together = (t > 0 and (low[t - 1], word) in pairs) or (t + 1 < len(low) and (word, low[t + 1]) in pairs)
                share_T[t] = 1.0 if together else _ALONE
        return share_T * self.weights.idf(low)

    def _features(self, text: Text, question: Text, spans: Sequence[Span], own: Edge | None) -> np.ndarray:
        """[C,D]"""
        k_C, a_C, b_C = np.array(spans, dtype=np.int64).T
        n_C, n_words = b_C - a_C, len(text.low)
        match_T, idf_T = self._match(text, question), self.weights.idf(text.low)
        ranges = {s.sentence: s for s in text.ranges()}
        asked = max(float(self.weights.idf(sorted({stem(w) for w in question.low})).sum()), 1e-9)
        covered = {k: _covered(text, s, match_T) / asked for k, s in ranges.items()}
        order = sorted(covered, key=lambda k: -covered[k])
        begin_C = np.array([ranges[int(k)].start for k in k_C])
        end_C = np.array([ranges[int(k)].end for k in k_C])
        digit_T = np.array([w[0].isdigit() for w in text.low], dtype=np.float64)
        year_T = np.array([bool(re.fullmatch(r"1\d{3}|20\d\d", w)) for w in text.low], dtype=np.float64)
        number_T = np.array([w in _NUMBER_WORDS for w in text.low], dtype=np.float64)
        date_T = np.array([w in _DATE_WORDS for w in text.low], dtype=np.float64)
        capital_T = np.array([w[0].isupper() for w in text.raw], dtype=np.float64)
        break_T = np.append(text.breaks_T, True)
        near_T = np.exp(-np.arange(n_words) / _REACH)
        left_T = np.convolve(match_T, near_T)[:n_words]  # felt at a word from those up to it
        right_T = np.convolve(match_T[::-1], near_T)[:n_words][::-1]

        def total(x_T: np.ndarray) -> np.ndarray:
            sums = np.concatenate([[0.0], np.cumsum(x_T)])
            return sums[b_C] - sums[a_C]

        before_C, after_C = np.maximum(a_C - 1, 0), np.minimum(b_C, n_words - 1)
        inside_C, after_start_C = a_C > begin_C, b_C < end_C
        left_C, right_C = np.where(inside_C, left_T[before_C], 0.0), np.where(after_start_C, right_T[after_C], 0.0)
        kinds = [total(digit_T) > 0, total(year_T) > 0, total(number_T) > 0, total(date_T) > 0, total(capital_T) / n_C,
                 total(capital_T) == n_C, np.log(n_C), n_C == 1]  # fmt: skip
        columns = [
            *kinds, n_C == 2, n_C == 3, n_C, total(idf_T) / n_C, total(match_T) / np.maximum(total(idf_T), 1e-9),
            total((match_T > 0).astype(float)) / n_C,
            np.array([covered[int(k)] for k in k_C]), np.array([covered[order[0]] - covered[int(k)] for k in k_C]),
            k_C == order[0], k_C / max(1, len(text.sentences)), left_C, right_C, left_C + right_C, np.maximum(left_C, right_C),
            np.where(inside_C, match_T[before_C] > 0, 0), np.where(after_start_C, match_T[after_C] > 0, 0),
            break_T[a_C], break_T[b_C], break_T[a_C] & break_T[b_C], total(break_T[:-1].astype(float)) - break_T[a_C],
            a_C == begin_C, b_C == end_C, (a_C - begin_C) / (end_C - begin_C), digit_T[a_C], digit_T[b_C - 1],
            capital_T[a_C], capital_T[b_C - 1], np.where(inside_C, capital_T[before_C], 0), np.where(after_start_C, capital_T[after_C], 0),
            np.where(inside_C, digit_T[before_C], 0), np.where(after_start_C, digit_T[after_C], 0),
        ]  # fmt: skip
        odds_T4 = self.edges.odds(text, own)
        usual = math.log(0.02)
        columns += [odds_T4[a_C, 0], odds_T4[b_C - 1, 1], np.where(inside_C, odds_T4[before_C, 2], usual),
                    np.where(after_start_C, odds_T4[after_C, 3], usual)]  # fmt: skip
        asks = question_kind(question.text)
        for kind in range(len(_KINDS) + 1):
            columns += kinds if kind == asks else [np.zeros(len(a_C))] * len(kinds)
        return np.stack([np.asarray(c, np.float32) for c in columns], axis=1)


def question_kind(question: str) -> int:
    """Which of the kinds of questions it is; their number when it is none."""
    low = question.lower()
    return next((i for i, pattern in enumerate(_KINDS) if re.search(pattern, low)), len(_KINDS))


def _unspaced(word: str) -> bool:
    return unspaced().match(word) is not None


def _covered(text: Text, sentence: Span, match_T: np.ndarray) -> float:
    """The weight of the question's different words in a sentence."""
    return sum({stem(text.low[t]): match_T[t] for t in range(sentence.start, sentence.end)}.values())


def _opens(text: Text, sentence: Span, at: int) -> bool:
    """A span may begin with any word of Latin script but a function word inside of a sentence; in Chinese anywhere."""
    return at == sentence.start or bool(text.breaks_T[at]) or text.low[at] not in _NO_EDGE


def _closes(text: Text, sentence: Span, end: int) -> bool:
    return end == sentence.end or text.low[end - 1] not in _NO_EDGE


def _place(text: Text, span: Span) -> slice:
    """Its characters, without the marks at the edges of a sentence."""
    return slice(int(text.starts_T[span.start]), int(text.ends_T[span.end - 1]))


def _right(told: str, targets: Sequence[str]) -> float:
    return max((f1(told, t) + (normalized(told) == normalized(t))) / 2 for t in targets)


def _golden(text: Text, record: Record) -> Span | None:
    """The words of the first right answer that stands in the passage."""
    for target, start in zip(record.targets, record.starts, strict=True):
        if start >= 0 and target.strip():
            inside = np.flatnonzero((text.ends_T > start) & (text.starts_T < start + len(target)))
            if len(inside):
                return Span(int(text.sentence_T[inside[0]]), int(inside[0]), int(inside[-1]) + 1)
    return None


def answer_threshold(sure_N: np.ndarray, gain_N: np.ndarray, empty_N: np.ndarray) -> float:
    """The confidence from which answering scores best: an answer gains what it is worth, none 1 where there is none."""
    order = np.argsort(sure_N, kind="stable")
    silent = np.concatenate([[0.0], np.cumsum(empty_N[order])])  # the first i say nothing
    told = np.concatenate([np.cumsum(gain_N[order][::-1])[::-1], [0.0]])
    cut = int(np.argmax(silent + told))
    return 0.0 if cut == 0 else float(np.nextafter(sure_N[order[cut - 1]], 2.0))
