"""Obeys the ways to write that wrap others (predictors/ways.py): which of several candidates is given back, and what is asked again.

A way is obeyed for each request alone: its candidates, its votes and its examples depend on nothing else in the batch.
Shapes: D different texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from multistep.data.cells import Record, Turn
from multistep.examples import Examples
from multistep.generate import Written
from multistep.metrics.utility import alike
from multistep.metrics.words import last_number, normalized, rouge_words
from multistep.predictors.best_of import BestOf
from multistep.predictors.decoding import Beam, Decoding, Greedy, Sample
from multistep.predictors.draft_revise import DraftRevise
from multistep.predictors.few_shot import FewShot
from multistep.predictors.mbr import Mbr
from multistep.predictors.vote import Vote
from multistep.predictors.ways import Way
from multistep.tasks.writing import Writing
from multistep.types import Prediction, UserError


class Writes(Protocol):
    """A model that writes plainly."""

    task: Writing

    @property
    def examples(self) -> Examples: ...

    def candidates(self, records: Sequence[Record], decoding: Decoding, n: int) -> list[list[Written]]:
        """So many texts for each record (of a beam: at most so many), the k-th drawn with seed + k."""
        ...

    def said(self, written: Written) -> Prediction: ...

    def asked(self, record: Record) -> tuple[Turn, ...]:
        """The request as turns. Raises UserError where the model does not read prompts."""
        ...

    def shortened(self, text: str, tokens: int) -> str: ...


def answers(model: Writes, records: Sequence[Record], way: Way) -> list[Prediction]:
    """An answer for every record, in order."""
    match way:
        case Greedy() | Beam() | Sample():
            return [model.said(found[0]) for found in model.candidates(records, way, 1)]
        case Mbr() | BestOf() | Vote():
            found = model.candidates(records, way.inner, way.n)
            return [_chosen(model, record, row, way) for record, row in zip(records, found, strict=True)]
        case DraftRevise():
            return _revised(model, records, way)
        case FewShot():
            return answers(model, shown(model, records, way), way.inner)


# ---------------------------------------------------------------------------------------------- one of several


def _chosen(model: Writes, record: Record, found: Sequence[Written], way: Mbr | BestOf | Vote) -> Prediction:
    said = [model.said(written) for written in found]
    texts = [str(s.value) for s in said]
    match way:
        case Mbr():
            return said[least_risk(texts, way.utility)]
        case BestOf(scorer="likelihood"):
            return said[int(np.argmax([_likelihood(w, way.length_penalty) for w in found]))]
        case BestOf():
            share = [grounded(text, model.task.reads(record)) for text in texts]
            return said[max(range(len(texts)), key=lambda i: (share[i], found[i].score))]
        case Vote():
            chosen, share = majority(texts, [w.score for w in found], way.reads)
            return said[chosen] if len(texts) == 1 else replace(said[chosen], confidence=share)


def least_risk(texts: Sequence[str], utility: str) -> int:
    """The place of the text with the highest mean utility against the others, the first of equals."""
    if len(set(texts)) == 1:
        return 0
    different = list(dict.fromkeys(texts))
    count_D = np.array([texts.count(text) for text in different], np.float64)
    alike_DD = alike(utility, different)
    expected_D = (alike_DD @ count_D - alike_DD.diagonal()) / (len(texts) - 1)
    return texts.index(different[int(np.argmax(np.round(expected_D, 9)))])


def _likelihood(written: Written, length_penalty: float) -> float:
    """A mean over tokens made a sum, divided by length^length_penalty."""
    tokens = max(1, len(written.ids) + written.ended)
    return written.score * tokens ** (1.0 - length_penalty)


def grounded(text: str, source: str) -> float:
    """The share of the words of a text that stand in the source; 0 of an empty text."""
    words, there = rouge_words(text), set(rouge_words(source))
    return sum(word in there for word in words) / len(words) if words else 0.0


def majority(texts: Sequence[str], scores: Sequence[float], reads: str) -> tuple[int, float]:
    """The place of the likeliest text that holds the answer of most texts, and the share of those that hold it."""
    keys: list[object] = [last_number(text) if reads == "number" else normalized(text) for text in texts]
    if all(key is None for key in keys):
        keys = [normalized(text) for text in texts]
    voters = [i for i, key in enumerate(keys) if key is not None]
    likeliest = max(voters, key=lambda i: (sum(keys[j] == keys[i] for j in voters), scores[i], -i))
    return likeliest, sum(keys[j] == keys[likeliest] for j in voters) / len(texts)


# ---------------------------------------------------------------------------------------------- asked again


def _revised(model: Writes, records: Sequence[Record], way: DraftRevise) -> list[Prediction]:
    found, asked = answers(model, records, way.inner), list(records)
    for _ in range(way.rounds):
        asked = [
            replace(r, targets=(), turns=(*model.asked(r), Turn("assistant", str(said.value)), Turn("user", way.again)))
            for r, said in zip(asked, found, strict=True)
        ]
        found = answers(model, asked, way.inner)
    return found


# ---------------------------------------------------------------------------------------------- examples


def shown(model: Writes, records: Sequence[Record], way: FewShot) -> list[Record]:
    """The records with examples before them. Raises UserError where there are too few."""
    if not way.k and not way.keep:
        return list(records)
    if len(model.examples) < way.k:
        raise UserError(f"few_shot: {way.k} examples are asked for, the bundle holds {len(model.examples)}. Lower k.")
    read = [_cut(model, record, way.keep) for record in model.examples.records] if way.k else []
    chosen = _selection(model, records, way)
    return [
        _with(model, _cut(model, r, way.keep), [read[i] for i in row], way)
        for r, row in zip(records, chosen, strict=True)
    ]


def _with(model: Writes, record: Record, examples: Sequence[Record], way: FewShot) -> Record:
    asked = model.asked(record)
    first = [
        turn for turn in asked if turn.role == "system"
    ]  # an example's system turns would be another's instructions
    rest = [turn for turn in asked if turn.role != "system"]
    if way.template == "turns":
        before = [t for e in examples for t in (*_spoken(model, e), Turn("assistant", e.targets[0]))]
        return replace(record, targets=(), turns=(*first, *before, *rest))
    told = "".join("\n".join([*(t.text for t in _spoken(model, e)), e.targets[0]]) + "\n\n" for e in examples)
    last = rest[-1]
    return replace(record, targets=(), turns=(*first, *rest[:-1], Turn(last.role, told + last.text)))


def _spoken(model: Writes, record: Record) -> list[Turn]:
    return [turn for turn in model.asked(record) if turn.role != "system"]


def _cut(model: Writes, record: Record, keep: int) -> Record:
    """The request's last turn shortened to so many tokens."""
    if not keep:
        return record
    *before, last = model.asked(record)
    turns = (*before, Turn(last.role, model.shortened(last.text, keep)))
    answered = (Turn("assistant", record.targets[0]),) if record.targets else ()
    return replace(record, turns=(*turns, *answered))


def _selection(model: Writes, records: Sequence[Record], way: FewShot) -> list[list[int]]:
    """The places of the examples of each record, the one that stands next to the request last."""
    count = len(model.examples)
    if way.choose == "seed" or not way.k:
        same = np.random.default_rng(way.seed).permutation(count)[: way.k].tolist()
        return [same] * len(records)
    return [model.examples.nearest(record, way.k)[::-1] for record in records]
