"""Cheap writers: what a model that writes has to beat before it stands.

copy: the source as it is. lead: its first sentences. nearest: the answer of the most similar source of train. dictionary: the
likeliest translation of every word, in the source's order (IBM model 1). Those that extract are in extract.py and passage.py;
`load_writer` loads all.
Sources: lead-k: Nallapati et al. 2017, arXiv 1611.04230; IBM model 1: Brown et al. 1993, "The mathematics of statistical machine
translation". Shapes: N rows, P pairs of words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from scipy import sparse

from multistep.data.cells import Record
from multistep.models.choose import Choose
from multistep.models.extract import Extract
from multistep.models.passage import Passage
from multistep.models.ranking import Encode, sentences
from multistep.models.written import Writer, load_data, save_data
from multistep.text import NgramFeatures, Vectorizer
from multistep.types import Prediction

__all__ = ["Copy", "Dictionary", "Lead", "Nearest", "Writer", "load_writer", "sentences"]

_WORD = re.compile(r"\w+|[^\w\s]")
_ROUNDS = 5  # of expectation and maximization
_MOST_PAIRS = 20_000_000  # of words that occur together; rows beyond are not read


def asked(record: Record) -> str:
    """What is given, as one text: of a chat all turns before the answer."""
    return "\n".join(turn.text for turn in record.asked) if record.turns else record.source


class Copy:
    kind: ClassVar[str] = "copy"

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        return [Prediction(r.source) for r in records]

    def save(self, folder: Path) -> None:
        save_data(folder, self.kind, {})


class Lead:
    """The first `count` sentences."""

    kind: ClassVar[str] = "lead"

    def __init__(self, count: int):
        self.count = count

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        return [Prediction(" ".join(sentences(r.source)[: self.count])) for r in records]

    def save(self, folder: Path) -> None:
        save_data(folder, self.kind, {"count": self.count})


class Nearest:
    """The target of the most similar source, by the cosine of tf-idf over words and character n-grams."""

    kind: ClassVar[str] = "nearest"

    def __init__(self, sources: Sequence[str], targets: Sequence[str]):
        self.sources, self.targets = list(sources), list(targets)
        features = NgramFeatures(unit="both", order=2, char_order=4, min_count=1, max_features=200_000)
        self._vectorizer, counts_ND = Vectorizer.fit(self.sources, features)
        self._known_ND = _unit(counts_ND)

    @classmethod
    def fit(cls, records: Sequence[Record]) -> Self:
        known = [r for r in records if r.targets]
        return cls([asked(r) for r in known], [r.targets[0] for r in known])

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        """The confidence is the cosine."""
        found = []
        for start in range(0, len(records), 256):
            asked_BD = _unit(self._vectorizer.transform([asked(r) for r in records[start : start + 256]]))
            alike_BN = np.asarray((asked_BD @ self._known_ND.T).todense())
            best_B = alike_BN.argmax(1)
            sure_B = np.clip(alike_BN.max(1), 0.0, 1.0)
            found += [Prediction(self.targets[i], c) for i, c in zip(best_B.tolist(), sure_B.tolist(), strict=True)]
        return found

    def save(self, folder: Path) -> None:
        save_data(folder, self.kind, {"sources": self.sources, "targets": self.targets})


class Dictionary:
    """Word by word. A word that train does not have stays as it is."""

    kind: ClassVar[str] = "dictionary"

    def __init__(self, words: dict[str, str]):
        self.words = words

    @classmethod
    def fit(cls, sources: Sequence[str], targets: Sequence[str]) -> Self:
        """Expectation and maximization over the pairs of words that occur together in a row."""
        source_rows, source_words = _indexed(sources)
        target_rows, target_words = _indexed(targets)
        lefts, rights, rows, total = [], [], [], 0
        for row, (s, t) in enumerate(zip(source_rows, target_rows, strict=True)):
            total += len(s) * len(t)
            if total > _MOST_PAIRS:
                break
            lefts.append(np.tile(s, len(t)))
            rights.append(np.repeat(t, len(s)))
            rows.append(np.full(len(s) * len(t), row))
        if not lefts:
            return cls({})
        left_P, right_P, row_P = (np.concatenate(p) for p in (lefts, rights, rows))
        pair, pair_P = np.unique(left_P.astype(np.int64) * len(target_words) + right_P, return_inverse=True)
        left_U = pair // len(target_words)
        _, place_P = np.unique(row_P.astype(np.int64) * len(target_words) + right_P, return_inverse=True)
        chance_U = np.ones(len(pair))
        for _ in range(_ROUNDS):
            weight_P = chance_U[pair_P]
            weight_P = weight_P / np.bincount(place_P, weight_P)[place_P]
            counts_U = np.bincount(pair_P, weight_P)
            chance_U = counts_U / np.bincount(left_U, counts_U)[left_U]
        order = np.lexsort((pair % len(target_words), -chance_U, left_U))
        first = order[np.unique(left_U[order], return_index=True)[1]]
        return cls({source_words[left_U[u]]: target_words[pair[u] % len(target_words)] for u in first.tolist()})

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        told = (
            " ".join(self.words.get(w.lower()) or w for w in map(str, _WORD.findall(record.source)))
            for record in records
        )
        return [Prediction(re.sub(r"\s+([.,!?;:])", r"\1", text)) for text in told]

    def save(self, folder: Path) -> None:
        save_data(folder, self.kind, {"words": self.words})


def load_writer(folder: Path, encode: Encode | None = None) -> Writer:
    """What `save` wrote. `encode`: the encoder that it was fitted with, where it was fitted with one."""
    data = load_data(folder)
    match data["kind"]:
        case "copy":
            return Copy()
        case "lead":
            return Lead(data["count"])
        case "nearest":
            return Nearest(data["sources"], data["targets"])
        case "dictionary":
            return Dictionary(data["words"])
        case "extract":
            return Extract.load(folder, encode)
        case "passage":
            return Passage.load(folder)
        case "choose":
            return Choose.load(folder, encode)
        case kind:
            raise ValueError(f"{folder}: there is no writer {kind!r}")


def _indexed(texts: Sequence[str]) -> tuple[list[np.ndarray], list[str]]:
    """The different lower-case words of every text, as numbers, and all the words."""
    places: dict[str, int] = {}
    rows = []
    for text in texts:
        seen = dict.fromkeys(w.lower() for w in _WORD.findall(text))
        rows.append(np.array([places.setdefault(w, len(places)) for w in seen], dtype=np.int64))
    return rows, list(places)


def _unit(x_ND: sparse.csr_matrix) -> sparse.csr_matrix:
    lengths_N = np.sqrt(np.asarray(x_ND.multiply(x_ND).sum(1)).ravel())
    return sparse.csr_matrix(sparse.diags(1 / np.maximum(lengths_N, 1e-12)) @ x_ND)
