"""Multiple choice from words alone, and from a frozen encoder's cosines where there is one.

    score of a choice = ridge regression of being right on the weight of the words that it shares with the question, with the passage
    and with its best sentence, its length among the others and its place; differences within a question only
Source: Richardson, Burges, Renshaw 2013 (MCTest), the lexical baseline. Differs: weights are learnt.
Shapes: C choices, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from multistep.data.cells import Record
from multistep.models.passage import Sure, Weights, stem
from multistep.models.ranking import Encode, Head, fit_ranker, read
from multistep.models.written import load_data, save_data
from multistep.types import Prediction, UserError


@dataclass
class Choose:
    """`write` gives one of the choices, letter for letter."""

    kind: ClassVar[str] = "choose"

    weights: Weights
    head: Head
    sure: Sure
    encoded: bool
    encode: Encode | None = None

    @staticmethod
    def fit(records: Sequence[Record], encode: Encode | None = None) -> tuple[Choose, dict[str, Any]]:
        used = [r for r in records if len(r.choices) > 1 and r.targets and r.targets[0] in r.choices]
        if not used:
            raise UserError("choose: no row of train has choices with the right one among them.")
        weights = Weights.of([read(" ".join((r.source, r.context, *r.choices))) for r in used])
        model = Choose(weights, Head(np.zeros(0), 0.0), Sure(Head(np.zeros(3), 0.0)), encode is not None, encode)
        inputs = model._features(used)
        right = [np.array([float(c in r.targets) for c in r.choices]) for r in used]
        ranking = fit_ranker(inputs, right)
        model.head = ranking.head
        held = [ranking.unseen(i)(x) for i, x in enumerate(inputs)]
        model.sure = Sure.fit(held, [float(y[s.argmax()]) for y, s in zip(right, held, strict=True)])
        facts = {"rows": len(used), "l2": ranking.l2, "held_out": ranking.held_out, "encoder": encode is not None}
        return model, facts

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        if self.encoded and self.encode is None:
            raise UserError("choose: it was fitted with an encoder. Load it with the same one.")
        written = []
        for record, x_CD in zip(records, self._features(records), strict=True):
            if not record.choices:
                written.append(Prediction("", 0.0))
                continue
            scores = self.head(x_CD)
            written.append(Prediction(record.choices[int(scores.argmax())], self.sure(scores)))
        return written

    def save(self, folder: Path) -> None:
        data = {
            "documents": self.weights.documents, "counts": self.weights.counts, "head": self.head.state(),
            "sure": self.sure.head.state(), "encoded": self.encoded,
        }  # fmt: skip
        save_data(folder, self.kind, data)

    @staticmethod
    def load(folder: Path, encode: Encode | None = None) -> Choose:
        d = load_data(folder)
        weights = Weights(d["documents"], d["counts"])
        return Choose(weights, Head.of(d["head"]), Sure(Head.of(d["sure"])), d["encoded"], encode)

    def _features(self, records: Sequence[Record]) -> list[np.ndarray]:
        """[C,D] of each record."""
        cosines = self._cosines(records) if self.encoded else [np.zeros((len(r.choices), 0)) for r in records]
        return [np.column_stack([self._lexical(r), c]) for r, c in zip(records, cosines, strict=True)]

    def _lexical(self, record: Record) -> np.ndarray:
        question, passage = ({stem(w) for w in read(t).low} for t in (record.source, record.context))
        text = read(record.context)
        parts = [{stem(w) for w in text.low[s.start : s.end]} for s in text.ranges()]
        words = [[stem(w) for w in read(c).low] for c in record.choices]
        lengths = np.array([len(w) for w in words], dtype=np.float64)
        shared = set.intersection(*map(set, words)) if words else set[str]()
        rows = []
        for place, own in enumerate(words):
            alone = set(own) - shared  # what all choices have says nothing
            best = max((self._weight((alone | question) & part) for part in parts), default=0.0)
            verbatim = bool(record.choices[place].strip()) and record.choices[place].lower() in record.context.lower()
            rows.append(
                [self._share(alone, question), self._share(alone, passage), self._weight(alone & question),
                 self._weight(alone & passage), best, verbatim, np.log1p(lengths[place]),
                 lengths[place] == lengths.max(), lengths[place] == lengths.min(), lengths[place] / max(lengths.mean(), 1),
                 place == 0, place == 1, place == 2, place == len(words) - 1]
            )  # fmt: skip
        return np.array(rows, dtype=np.float32).reshape(-1, 14)

    def _weight(self, stems: set[str]) -> float:
        return float(self.weights.idf(sorted(stems)).sum())

    def _share(self, own: set[str], other: set[str]) -> float:
        return self._weight(own & other) / max(self._weight(own), 1e-9)

    def _cosines(self, records: Sequence[Record]) -> list[np.ndarray]:
        """[C,3]: of a choice to the question, to question and passage, to the nearest sentence of the passage."""
        assert self.encode is not None
        sentences = [[read(r.context).text[a:b] for a, b in read(r.context).sentences] for r in records]
        texts = [
            [r.source, f"{r.source} {r.context}".strip(), *r.choices, *parts]
            for r, parts in zip(records, sentences, strict=True)
        ]
        every = np.asarray(self.encode([t for part in texts for t in part]), np.float64)
        every = every / np.maximum(np.linalg.norm(every, axis=1, keepdims=True), 1e-9)
        rows, start = [], 0
        for record, part in zip(records, texts, strict=True):
            own = every[start : start + len(part)]
            start += len(part)
            choices, places = own[2 : 2 + len(record.choices)], own[2 + len(record.choices) :]
            nearest = (choices @ places.T).max(1) if len(places) else np.zeros(len(choices))
            rows.append(np.column_stack([choices @ own[0], choices @ own[1], nearest]))
        return rows
