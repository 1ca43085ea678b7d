"""An n-gram language model over bytes: the cheap incumbent that a neural model has to beat.

    p(b | c) = (n(c b) - d(n)) / n(c) + w(c) p(b | c')      c': the context without its first byte; below it 1/256

n counts in train for the longest contexts, and for the shorter ones in how many different longer n-grams they end (modified
Kneser-Ney). The discounts d for counts of 1, 2 and 3 or more come from the counts of counts; w gives what they took to p(b | c').
Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 3.
Contexts are known by a 64-bit hash; two that collide would share their counts (about 1e-7 of a million contexts).
Shapes: N bytes, U different n-grams.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from multistep.files import reading

ORDER = 7  # bytes of context and one
SYMBOLS = 256
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class NGram:
    """Tables of one length of context each: `keys` of n-grams with counts, `contexts` with counts and different followers."""

    def __init__(self, tables: dict[str, np.ndarray]):
        self.tables = tables
        self.order = sum(name.startswith("keys.") for name in tables)

    @classmethod
    def fit(cls, texts: Sequence[str], order: int = ORDER) -> NGram:
        """Count `texts`; no n-gram reaches from one into the next."""
        tables: dict[str, np.ndarray] = {}
        stream, places_N = _stream(texts)
        longer: np.ndarray | None = None  # where each different n-gram of one byte more was first seen
        for length in range(order - 1, -1, -1):
            inside = np.flatnonzero(places_N >= length)
            # Shorter n-grams are counted once for each longer one that ends in them, and where none can: once for each time.
            seen = inside if longer is None else np.union1d(longer, inside[places_N[inside] == length])
            context = _contexts(stream, length)[seen]
            keys, first, counts = np.unique(_mix(context, stream[seen]), return_index=True, return_counts=True)
            discounts = _discounts(counts)[np.minimum(counts, 3)]
            contexts, of = np.unique(context[first], return_inverse=True)
            totals = np.bincount(of, counts)
            tables |= {f"keys.{length}": keys, f"values.{length}": (counts - discounts) / totals[of]}
            tables |= {f"contexts.{length}": contexts, f"weights.{length}": np.bincount(of, discounts) / totals}
            longer = seen[first]
        return cls(tables)

    def bits_N(self, texts: Sequence[str]) -> np.ndarray:
        """The bits that each text costs [texts]."""
        sizes = np.array([len(t.encode("utf-8", "replace")) for t in texts], dtype=np.int64)
        ends = np.cumsum(sizes)
        running = np.concatenate([[0.0], np.cumsum(self.nats_of_bytes(texts) / np.log(2))])
        return running[ends] - running[ends - sizes]

    def nats_of_bytes(self, texts: Sequence[str]) -> np.ndarray:
        """What every byte of the texts costs, one after the other [N]; no context reaches from one text into the next."""
        stream, places_N = _stream(texts)
        p_N = np.full(len(stream), 1 / SYMBOLS)
        for length in range(self.order):
            inside = np.flatnonzero(places_N >= length)
            context = _contexts(stream, length)[inside]
            direct = self._look(f"keys.{length}", f"values.{length}", _mix(context, stream[inside]), 0.0)
            p_N[inside] = direct + self._look(f"contexts.{length}", f"weights.{length}", context, 1.0) * p_N[inside]
        return -np.log(p_N)

    def next_byte(self, text: bytes) -> np.ndarray:
        """Probabilities [256] of the byte after `text`."""
        p = np.full(SYMBOLS, 1 / SYMBOLS)
        symbols = np.arange(SYMBOLS, dtype=np.uint8)
        for length in range(min(self.order, len(text) + 1)):
            tail = np.frombuffer(text[len(text) - length :], dtype=np.uint8)
            context = np.zeros(1, dtype=np.uint64)
            for byte in tail:
                context = _mix(context, np.array([byte], dtype=np.uint8))
            direct = self._look(f"keys.{length}", f"values.{length}", _mix(np.repeat(context, SYMBOLS), symbols), 0.0)
            p = direct + self._look(f"contexts.{length}", f"weights.{length}", context, 1.0) * p
        return p

    def go_on(self, text: str, count: int, temperature: float, seed: int, stop: Sequence[str] = ()) -> str:
        """At most `count` bytes after `text`, drawn one by one (temperature 0: the likeliest, the first of equals), up to the first stop
        text; bytes that make no character are left out."""
        rng, so_far = np.random.default_rng(seed), text.encode("utf-8", "replace")
        begun, ends = len(so_far), [s.encode("utf-8", "replace") for s in stop]
        for _ in range(count):
            p = self.next_byte(so_far[-self.order :])
            if temperature:
                p = (p / p.max()) ** (1 / temperature)  # at most 1, or small temperatures would leave nothing of any
                level = rng.random() * p.sum()
                byte = min(SYMBOLS - 1, int(np.searchsorted(np.cumsum(p), level, side="right")))
            else:
                byte = int(p.argmax())
            so_far += bytes([byte])
            found = [len(end) for end in ends if so_far.endswith(end, begun)]
            if found:
                return so_far[begun : len(so_far) - max(found)].decode("utf-8", "ignore")
        return so_far[begun:].decode("utf-8", "ignore")

    def _look(self, keys: str, values: str, wanted: np.ndarray, missing: float) -> np.ndarray:
        known = self.tables[keys]
        if not len(known):  # no text of train was long enough
            return np.full(len(wanted), missing)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        return np.where(known[at] == wanted, self.tables[values][at], missing)

    def save(self, folder: Path) -> None:
        save_file(self.tables, folder / "ngram.safetensors")

    @classmethod
    def load(cls, folder: Path) -> NGram:
        with reading(folder / "ngram.safetensors"):
            return cls(load_file(folder / "ngram.safetensors"))


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from counts of 0, 1, 2 and 3 or more; half of the count where the counts of counts do not say."""
    n1, n2, n3, n4 = (float(np.sum(counts == k)) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    found = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.clip(found, [0.0, 0.1, 0.1, 0.1], [0.0, 0.999, 1.999, 2.999])  # 0 would leave nothing to unseen bytes


def _stream(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """All bytes one after the other, and each byte's place in its text."""
    parts = [np.frombuffer(t.encode("utf-8", "replace"), dtype=np.uint8) for t in texts]
    stream = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)
    places = np.concatenate([np.arange(len(p)) for p in parts]) if parts else np.zeros(0, dtype=np.int64)
    return stream, places


def _contexts(stream: np.ndarray, length: int) -> np.ndarray:
    """The hash of the `length` bytes before each byte (of fewer at the beginning; those are not asked for)."""
    hashes = np.zeros(len(stream), dtype=np.uint64)
    for back in range(length, 0, -1):
        shifted = np.zeros_like(stream)
        shifted[back:] = stream[:-back] if back else stream
        hashes = _mix(hashes, shifted)
    return hashes


def _mix(context: np.ndarray, symbol: np.ndarray) -> np.ndarray:
    """The hash of a context with one more byte."""
    mixed = (context ^ (symbol.astype(np.uint64) + np.uint64(1))) * _FACTOR
    return mixed ^ (mixed >> np.uint64(29))
