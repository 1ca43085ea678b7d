"""Examples for prompts: records of train with their answers, kept in the bundle, and which of them are nearest to a request.

Nearness is the cosine of tf-idf vectors of n-grams of three characters: no model is needed, and any script has them.
Shapes: E examples.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from multistep.data.cells import Record, Turn

FILE = "examples.jsonl"


class Examples:
    """`read`: a request as one text. The vectors are made when they are first asked for."""

    def __init__(self, records: Sequence[Record], read: Callable[[Record], str]):
        self.records = list(records)
        self.read = read
        self._vectors: list[dict[str, float]] | None = None
        self._idf: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.records)

    def nearest(self, record: Record, k: int) -> list[int]:
        """The places of the k nearest examples, the nearest first; of equals the first."""
        if self._vectors is None:
            grams = [trigrams(self.read(r)) for r in self.records]
            known = Counter(gram for row in grams for gram in row)
            self._idf = {g: math.log((1 + len(grams)) / (1 + n)) + 1 for g, n in known.items()}
            self._vectors = [self._vector(row) for row in grams]
        vector = self._vector(trigrams(self.read(record)))
        score_E = [sum(v * row.get(g, 0.0) for g, v in vector.items()) for row in self._vectors]
        return np.argsort(-np.round(score_E, 12), kind="stable")[:k].tolist()

    def _vector(self, grams: Counter[str]) -> dict[str, float]:
        found = {g: n * self._idf[g] for g, n in grams.items() if g in self._idf}
        length = math.sqrt(sum(v * v for v in found.values())) or 1.0
        return {g: v / length for g, v in found.items()}

    def save(self, folder: Path) -> None:
        lines = [json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in self.records]
        (folder / FILE).write_bytes("".join(lines).encode("utf-8", "replace"))

    @classmethod
    def load(cls, folder: Path, read: Callable[[Record], str]) -> Examples:
        """Those of a folder; none where it has none. Raises ValueError or KeyError where the file is damaged."""
        if not (folder / FILE).exists():
            return cls((), read)
        rows = [json.loads(line) for line in (folder / FILE).read_text(encoding="utf-8").split("\n") if line]
        return cls([_record(row) for row in rows], read)


def _record(row: dict) -> Record:  # pyright: ignore[reportMissingTypeArgument]
    lists = {k: tuple(row[k]) for k in ("targets", "starts", "choices")}
    return Record(row["source"], context=row["context"], turns=tuple(Turn(**t) for t in row["turns"]), **lists)


def trigrams(text: str) -> Counter[str]:
    """Runs of three characters, in lower case, white space as one space."""
    padded = f" {' '.join(text.lower().split())} "
    return Counter(padded[i : i + 3] for i in range(len(padded) - 2))
