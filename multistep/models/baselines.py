"""Cheap writers: what a model that writes has to beat before it stands.

copy: the source as it is. lead: its first sentences. nearest: the answer of the most similar source of train. dictionary: the
likeliest translation of every word, in the source's order (IBM model 1).
Sources: lead-k: Nallapati et al. 2017, arXiv 1611.04230; IBM model 1: Brown et al. 1993, "The mathematics of statistical machine
translation". Shapes: N rows, P pairs of words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from scipy import sparse

from multistep.text import NgramFeatures, Vectorizer

_SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’）]*|\n+|$)", re.DOTALL)
_WORD = re.compile(r"\w+|[^\w\s]")
_ROUNDS = 5  # of expectation and maximization
_MOST_PAIRS = 20_000_000  # of words that occur together; rows beyond are not read


class Writer(Protocol):
    """Texts in, texts out."""

    kind: ClassVar[str]

    def write(self, sources: Sequence[str]) -> list[str]: ...

    def save(self, folder: Path) -> None: ...


def sentences(text: str) -> list[str]:
    """The sentences of a text; their ends are full stops before a space, those of Chinese and Japanese, and line breaks."""
    return [s for part in _SENTENCE.findall(text) if (s := part.strip())]


class Copy:
    kind: ClassVar[str] = "copy"

    def write(self, sources: Sequence[str]) -> list[str]:
        return list(sources)

    def save(self, folder: Path) -> None:
        _save(folder, self.kind, {})


class Lead:
    """The first `count` sentences."""

    kind: ClassVar[str] = "lead"

    def __init__(self, count: int):
        self.count = count

    def write(self, sources: Sequence[str]) -> list[str]:
        return [" ".join(sentences(s)[: self.count]) for s in sources]

    def save(self, folder: Path) -> None:
        _save(folder, self.kind, {"count": self.count})


class Nearest:
    """The target of the most similar source, by the cosine of tf-idf over words and character n-grams."""

    kind: ClassVar[str] = "nearest"

    def __init__(self, sources: Sequence[str], targets: Sequence[str]):
        self.sources, self.targets = list(sources), list(targets)
        features = NgramFeatures(unit="both", order=2, char_order=4, min_count=1, max_features=200_000)
        self._vectorizer, counts_ND = Vectorizer.fit(self.sources, features)
        self._known_ND = _unit(counts_ND)

    def write(self, sources: Sequence[str]) -> list[str]:
        found = []
        for start in range(0, len(sources), 256):
            asked = _unit(self._vectorizer.transform(list(sources[start : start + 256])))
            alike = np.asarray((asked @ self._known_ND.T).todense())
            found += [self.targets[i] for i in alike.argmax(1).tolist()]
        return found

    def save(self, folder: Path) -> None:
        _save(folder, self.kind, {"sources": self.sources, "targets": self.targets})


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

    def write(self, sources: Sequence[str]) -> list[str]:
        return [
            re.sub(
                r"\s+([.,!?;:])", r"\1", " ".join(self.words.get(w.lower()) or w for w in map(str, _WORD.findall(s)))
            )
            for s in sources
        ]

    def save(self, folder: Path) -> None:
        _save(folder, self.kind, {"words": self.words})


def load_writer(folder: Path) -> Writer:
    """What `save` wrote."""
    data = json.loads((folder / "writer.json").read_text(encoding="utf-8"))
    match data.pop("kind"):
        case "copy":
            return Copy()
        case "lead":
            return Lead(**data)
        case "nearest":
            return Nearest(**data)
        case "dictionary":
            return Dictionary(**data)
        case kind:
            raise ValueError(f"{folder}: there is no writer {kind!r}")


def _save(folder: Path, kind: str, data: dict[str, Any]) -> None:
    text = json.dumps({"kind": kind, **data}, ensure_ascii=False)
    (folder / "writer.json").write_text(text, encoding="utf-8", errors="replace")


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
