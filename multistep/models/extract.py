"""Summaries by extraction: the stretch of the document that a linear head expects the best ROUGE of.

Candidates are sentences and their clauses (between marks, and before words such as "that"); where summaries are short, also phrases
inside them. Three convex heads, one on top of the other, all fitted on train alone:
    words      logistic: the chance that the summary takes a word up (lexicon.py)
    sentences  ridge on a frozen encoder's embeddings (where there is one): the best ROUGE that a sentence holds; held-out scores train
               the head above
    spans      ridge on place, length, expected overlap, centrality, edges, the sentence's score -> ROUGE (mean of 1 and L)
How many spans are taken (1 to 3, best first, none overlapping, in the document's order) is what held-out documents of train score best.
Sources: Kupiec, Pedersen, Chen 1995, "A trainable document summarizer"; Cachola et al. 2020 (SciTLDR), arXiv 2004.15011, and Zhang and
Tetreault 2019 (AESLC), arXiv 1906.03497, for the tasks. Differs: linear, spans below the sentence, ROUGE is regressed on.
Shapes: T words of a document, C spans of it, S sentences, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from multistep.data.cells import Record
from multistep.metrics.words import rouge, rouge_words, unspaced
from multistep.models.lexicon import Lexicon
from multistep.models.ranking import FOLDS, Encode, Head, Ranking, Span, Text, fit_ranker, read
from multistep.models.written import load_data, save_data
from multistep.types import Prediction, UserError

_TRAIN_DOCUMENTS = 4000  # more are counted into the lexicon, but not ranked
_TRAIN_SPANS = 120  # of a document; the others are left out at random
_READ_WORDS = 600  # candidates begin before this word of a document
_SHORT = 12  # words: where 95 % of the summaries have no more, phrases are candidates too
_LEAST_CLAUSE = 5  # words
_MOST_PIECES = 10  # of a sentence; one with more is cut at its marks only, then not at all
_SENTENCE_L2S = (3.0, 1.0, 0.3, 0.1, 0.03)
_CONNECTIVES = frozenset(("that", "which", "where", "while", "by", "when", "and", "we", "but"))  # fmt: skip
_COUNTS = (1, 2, 3)


@dataclass
class Extract:
    """`write` gives verbatim stretches of the documents."""

    kind: ClassVar[str] = "extract"

    lexicon: Lexicon
    spans: Head
    sentences: Head | None
    phrase_words: int  # of the longest phrase; 0: none
    usual_words: float  # of a summary of train
    count: int
    encode: Encode | None = None

    def __post_init__(self) -> None:
        self._stop = self.lexicon.stop_words()

    @staticmethod
    def fit(records: Sequence[Record], encode: Encode | None = None) -> tuple[Extract, dict[str, Any]]:
        """The writer, and facts about it. Records without a summary, or a document without a word, are left out."""
        texts = [read(r.source) for r in records]
        used = [i for i, r in enumerate(records) if texts[i].low and any(rouge_words(t) for t in r.targets)]
        if not used:
            raise UserError("extract: no document with words has a summary. Give at least one row with both.")
        texts = [texts[i] for i in used]
        summaries = [[w for t in records[i].targets if (w := rouge_words(t))] for i in used]
        lengths = [len(s) for row in summaries for s in row]
        longest = int(np.percentile(lengths, 95))
        model = Extract(
            Lexicon.fit(texts, summaries), Head(np.zeros(0), 0.0), None,
            phrase_words=max(1, longest) if longest <= _SHORT else 0, usual_words=float(np.mean(lengths)), count=1,
            encode=encode,
        )  # fmt: skip
        step = max(1.0, len(texts) / _TRAIN_DOCUMENTS)
        some = [int(i * step) for i in range(min(len(texts), _TRAIN_DOCUMENTS))]
        ranking, chosen = model._fit_heads([texts[i] for i in some], [summaries[i] for i in some])
        model.spans = ranking.head
        held = []
        for count in _COUNTS if len(some) >= FOLDS else (1,):
            told = [_told(texts[i], _pick(spans, count)) for i, spans in zip(some, chosen, strict=True)]
            held.append(float(np.mean([_score(rouge_words(t), summaries[i]) for i, t in zip(some, told, strict=True)])))
        model.count = _COUNTS[int(np.argmax(held))]
        facts = {
            "count": model.count, "phrase_words": model.phrase_words, "l2": ranking.l2, "held_out": held,
            "documents": len(texts), "ranked": len(some), "left_out": len(records) - len(texts),
            "encoder": encode is not None,
        }  # fmt: skip
        return model, facts

    def _fit_heads(
        self, texts: Sequence[Text], summaries: Sequence[Sequence[list[str]]]
    ) -> tuple[Ranking, list[list[Span]]]:
        """The ranking of spans; and some spans of every text, best first, by the head that has not seen it."""
        rng = np.random.default_rng(0)
        known: list[tuple[list[Span], np.ndarray]] = []
        for text, row in zip(texts, summaries, strict=True):
            spans = self._candidates(text)
            if len(spans) > _TRAIN_SPANS:
                spans = [spans[i] for i in np.sort(rng.choice(len(spans), _TRAIN_SPANS, replace=False))]
            known.append((spans, np.array([_score(text.low[s.start : s.end], row) for s in spans])))
        own = [{w for s in row for w in s} for row in summaries]
        inputs = [self._features(t, c, words) for t, (c, _), words in zip(texts, known, own, strict=True)]
        if self.encode is not None:
            embedded = self._embed(texts)
            best = []
            for text, (spans, scores) in zip(texts, known, strict=True):
                places = np.array([s.sentence for s in spans])
                best.append(np.array([scores[places == k].max(initial=0.0) for k in range(len(text.sentences))]))
            ranked = fit_ranker(embedded, best, _SENTENCE_L2S)
            self.sentences = ranked.head
            for i, (spans, _) in enumerate(known):
                inputs[i] = _with(inputs[i], spans, ranked.unseen(i)(embedded[i]))
        ranking = fit_ranker(inputs, [scores for _, scores in known])
        chosen = [_ordered(spans, ranking.unseen(i)(inputs[i])) for i, (spans, _) in enumerate(known)]
        return ranking, chosen

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        if self.sentences is not None and self.encode is None:
            raise UserError("extract: it was fitted with an encoder. Load it with the same one.")
        texts = [read(r.source) for r in records]
        embedded = self._embed(texts) if self.sentences is not None else [None] * len(texts)
        written = []
        for record, text, embedded_SD in zip(records, texts, embedded, strict=True):
            spans = self._candidates(text)
            if not spans:
                written.append(Prediction(record.source.strip()))
                continue
            inputs = self._features(text, spans, None)
            if self.sentences is not None and embedded_SD is not None:
                inputs = _with(inputs, spans, self.sentences(embedded_SD))
            written.append(Prediction(_told(text, _pick(_ordered(spans, self.spans(inputs)), self.count))))
        return written

    def save(self, folder: Path) -> None:
        data = {
            "lexicon": self.lexicon.state(), "spans": self.spans.state(),
            "sentences": self.sentences.state() if self.sentences else None, "phrase_words": self.phrase_words,
            "usual_words": self.usual_words, "count": self.count,
        }  # fmt: skip
        save_data(folder, self.kind, data)

    @staticmethod
    def load(folder: Path, encode: Encode | None = None) -> Extract:
        data = load_data(folder)
        sentence_head = Head.of(data["sentences"]) if data["sentences"] else None
        return Extract(
            Lexicon.of(data["lexicon"]), Head.of(data["spans"]), sentence_head, data["phrase_words"],
            data["usual_words"], data["count"], encode,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------ candidates

    def _candidates(self, text: Text) -> list[Span]:
        """Sentences first, each once; then clauses and phrases."""
        every = text.ranges()
        found = dict.fromkeys(s for s in every if s.start < _READ_WORDS)
        for sentence in list(found):
            cuts = self._cuts(text, sentence)
            for i, start in enumerate(cuts):
                for end in cuts[i + 1 :]:
                    if end - start >= _LEAST_CLAUSE:
                        found[Span(sentence.sentence, start, end)] = None
            if self.phrase_words:
                found.update(dict.fromkeys(self._phrases(text, sentence)))
        return list(found)

    @staticmethod
    def _cuts(text: Text, sentence: Span) -> list[int]:
        inside = range(sentence.start + 1, sentence.end)
        marks = [i for i in inside if text.breaks_T[i]]
        cuts = [i for i in inside if text.breaks_T[i] or text.low[i] in _CONNECTIVES]
        chosen = cuts if len(cuts) < _MOST_PIECES else marks if len(marks) < _MOST_PIECES else []
        return [sentence.start, *chosen, sentence.end]

    def _phrases(self, text: Text, sentence: Span) -> list[Span]:
        """Ranges of words that neither begin nor end with a very frequent word and cross no mark after their fourth word."""
        found = []
        for start in range(sentence.start, min(sentence.end, _READ_WORDS)):
            if text.low[start] in self._stop and start > sentence.start and not text.breaks_T[start]:
                continue
            for end in range(start + 1, min(sentence.end, start + self.phrase_words) + 1):
                if end - 1 > start and text.breaks_T[end - 1] and end - start > 4:
                    break
                if text.low[end - 1] not in self._stop:
                    found.append(Span(sentence.sentence, start, end))
        return found

    # ------------------------------------------------------------------------------------------ features

    def _embed(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """[S,D] of each text; every sentence once, with its cosine to the mean of its document and to the first sentence."""
        assert self.encode is not None
        flat = [t.text[a:b] for t in texts for a, b in t.sentences]
        every = np.asarray(self.encode(flat), np.float32) if flat else np.zeros((0, 1), np.float32)
        rows, start = [], 0
        for text in texts:
            own_SD = every[start : start + len(text.sentences)]
            start += len(text.sentences)
            unit_SD = own_SD / np.maximum(np.linalg.norm(own_SD, axis=1, keepdims=True), 1e-9)
            mean_D = unit_SD.mean(0) if len(unit_SD) else np.zeros(every.shape[1])
            middle = unit_SD @ mean_D / max(float(np.linalg.norm(mean_D)), 1e-9)
            first = unit_SD @ unit_SD[0] if len(unit_SD) else np.zeros(0)
            rows.append(np.column_stack([own_SD, middle, first]))
        return rows

    def _features(self, text: Text, spans: Sequence[Span], own: set[str] | None) -> np.ndarray:
        """[C,D]"""
        k_C, a_C, b_C = np.array(spans, dtype=np.int64).T
        n_C, n_words, last = b_C - a_C, len(text.low), b_C - 1
        chance_T, idf_T, edge_T2 = self.lexicon.chances(text, own), self.lexicon.idf(text), self.lexicon.edges(text)
        capital_T = np.array([w[0].isupper() for w in text.raw], dtype=np.float64)
        digit_T = np.array([any(c.isdigit() for c in w) for w in text.low], dtype=np.float64)
        stop_T = np.array([w in self._stop for w in text.low], dtype=np.float64)
        times, first = Counter(text.low), dict(zip(reversed(text.low), range(len(text.low) - 1, -1, -1), strict=True))
        again_T = np.array([float(first[w] < i) for i, w in enumerate(text.low)])
        weight_T = np.array([times[w] for w in text.low]) * idf_T**2
        break_T = np.append(text.breaks_T, True)
        ranges = {s.sentence: s for s in text.ranges()}
        begin_C = np.array([ranges[int(k)].start for k in k_C])
        end_C = np.array([ranges[int(k)].end for k in k_C])
        asks_S = np.array([any(mark in text.text[a:b] for mark in "?？") for a, b in text.sentences])
        n_sentences = len(text.sentences)

        def total(x_T: np.ndarray) -> np.ndarray:
            sums = np.concatenate([[0.0], np.cumsum(x_T)])
            return sums[b_C] - sums[a_C]

        def before(x_T: np.ndarray, outside: float) -> np.ndarray:
            return np.where(a_C > begin_C, x_T[np.maximum(a_C - 1, 0)], outside)

        def after(x_T: np.ndarray, outside: float) -> np.ndarray:
            return np.where(b_C < end_C, x_T[np.minimum(b_C, n_words - 1)], outside)

        hits_C = total(chance_T)
        centre_C = total(weight_T) / np.sqrt(np.maximum(total(idf_T**2), 1e-9) * max(float(weight_T.sum()), 1e-9))
        columns = [
            k_C == 0, k_C == 1, k_C == 2, k_C == n_sentences - 1, k_C == n_sentences - 2, k_C / max(1, n_sentences - 1),
            np.log1p(k_C), a_C / n_words, np.log1p(a_C),
            n_C, np.log(n_C), n_C == 1, n_C == 2, n_C == 3, n_C < 6, np.maximum(0, n_C - self.usual_words),
            hits_C, hits_C / n_C, *(2 * hits_C / (n_C + m) for m in (self.usual_words, self.usual_words / 2, self.usual_words * 2)),
            centre_C, total(idf_T), total(idf_T) / n_C, idf_T[a_C], idf_T[last], total(again_T) / n_C,
            total(capital_T) / n_C, total(capital_T) == n_C, total(digit_T) > 0, asks_S[k_C],
            total(break_T[:-1].astype(float)) - break_T[a_C], break_T[a_C], break_T[b_C], break_T[a_C] & break_T[b_C],
            a_C == begin_C, b_C == end_C, (a_C == begin_C) & (b_C == end_C), np.log1p(a_C - begin_C), n_C / (end_C - begin_C),
            edge_T2[a_C, 0], edge_T2[last, 1], chance_T[a_C], chance_T[last], before(chance_T, 0.0), after(chance_T, 0.0),
            stop_T[a_C], before(stop_T, 1.0), after(stop_T, 1.0),
            capital_T[a_C], capital_T[last], before(capital_T, 0.0), after(capital_T, 0.0),
        ]  # fmt: skip
        return np.stack([np.asarray(c, np.float32) for c in columns], axis=1)


def _with(features_CD: np.ndarray, spans: Sequence[Span], scores_S: np.ndarray) -> np.ndarray:
    return np.column_stack([features_CD, scores_S[[s.sentence for s in spans]].astype(np.float32)])


def _score(written: Sequence[str], summaries: Sequence[Sequence[str]]) -> float:
    """The mean of ROUGE-1 and ROUGE-L with the best summary."""
    said = list(written)
    return max((rouge(1, said, list(s)) + rouge(0, said, list(s))) / 2 for s in summaries)


def _ordered(spans: Sequence[Span], scores_C: np.ndarray) -> list[Span]:
    """Best first."""
    return [spans[i] for i in np.argsort(-scores_C, kind="stable").tolist()]


def _pick(ordered: Sequence[Span], count: int) -> list[Span]:
    """The first `count` that do not overlap, in the document's order."""
    chosen: list[Span] = []
    for span in ordered:
        if all(span.end <= s.start or span.start >= s.end for s in chosen):
            chosen.append(span)
            if len(chosen) == count:
                break
    return sorted(chosen, key=lambda s: s.start)


def _told(text: Text, spans: Sequence[Span]) -> str:
    """Slices one after the other; no space between where the script has none."""
    told = ""
    for part in (text.slice(s) for s in spans):
        glue = "" if not told or unspaced().match(part[0]) else " "
        told += glue + part
    return told
