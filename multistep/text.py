"""N-gram features of texts, for linear models. (Subwords, for encoders, are in subwords.py.)

N-grams are counted with numpy over the code points of many texts at once, with no Python object a word: a table gives every
character its class (letter, single, space), a word is a run of letters and its identity a 64-bit polynomial hash, an n-gram of
order n is the pair (n-gram of order n-1, word), found in sorted arrays. 20,000 long reviews with bigrams take a few seconds.
A count of an n-gram never exceeds that of its beginning, so raising `min_count` until `max_features` holds drops whole branches.
Shapes: N texts, T tokens, D features, B code points.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field
from safetensors.numpy import load_file, save_file
from scipy import sparse

from multistep.files import reading
from multistep.types import Spec, UserError

_CHUNK_CHARACTERS = 4_000_000  # what is held as code points at once
_SPACE, _LETTER, _SINGLE = 0, 1, 2
_HASH = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication is a bijection
# Scripts written without spaces between words: Thai to Khmer, kana, CJK and its extensions.
UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF),
             (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))  # fmt: skip


class NgramFeatures(Spec):
    """What a linear model sees of a text. `order` counts words, `char_order` characters; "both" takes the union."""

    kind: Literal["ngrams"] = "ngrams"
    unit: Literal["auto", "word", "char", "both"] = "auto"
    order: Annotated[int, Field(ge=1, le=5)] = 2
    char_order: Annotated[int, Field(ge=1, le=8)] = 5
    min_count: Annotated[int, Field(ge=1)] = 2
    max_features: Annotated[int, Field(ge=1)] = 600_000
    weight: Literal["tfidf", "nb", "nb_tfidf"] = "tfidf"  # nb: presence times naive-Bayes log-count ratio
    nb_alpha: Annotated[float, Field(gt=0)] = 1.0


class Stream(NamedTuple):
    """Units of many texts in a row: `units_T` their identities, `starts_N1` where each text begins (and the end)."""

    units_T: np.ndarray
    starts_N1: np.ndarray


# ---------------------------------------------------------------------------------------------- characters and words


def unspaced_share(texts: Sequence[str], sample: int = 500) -> float:
    """The share of letters that belong to scripts written without spaces, over the first texts."""
    codes = _code_points("".join(texts[:sample]))
    letters = codes[_classes(codes) == _LETTER].size
    unspaced = np.count_nonzero(_is_unspaced(codes))
    return float(unspaced / max(letters + unspaced, 1))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _is_unspaced(codes: np.ndarray) -> np.ndarray:
    inside = np.zeros(codes.shape, bool)
    if codes.size and codes.max() >= UNSPACED[0][0]:
        for low, high in UNSPACED:
            inside |= (codes >= low) & (codes <= high)
    return inside


def _classes(codes_B: np.ndarray) -> np.ndarray:
    """Space, letter (part of a word) or single (a token of its own: punctuation, symbols, CJK) for every code point."""
    used = np.flatnonzero(np.bincount(codes_B)) if codes_B.size else np.zeros(0, np.int64)
    table = np.zeros(int(used[-1]) + 1 if used.size else 1, np.uint8)
    for code, unspaced in zip(used.tolist(), _is_unspaced(used).tolist(), strict=True):
        category = unicodedata.category(chr(code))
        if category[0] in "ZC":
            table[code] = _SPACE
        else:
            table[code] = _LETTER if category[0] in "LNM" and not unspaced else _SINGLE
    return table[codes_B]


def _chunks(texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lower-case code points of many texts, each text followed by a space, and where each text begins (and the end)."""
    begin = 0
    while begin < len(texts):
        end, size = begin, 0
        while end < len(texts) and (end == begin or size < _CHUNK_CHARACTERS):
            size += len(texts[end]) + 1
            end += 1
        pieces = [t.lower() + " " for t in texts[begin:end]]
        starts = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum([len(p) for p in pieces], out=starts[1:])
        yield _code_points("".join(pieces)), starts
        begin = end


def words(texts: Sequence[str]) -> Stream:
    """Words (runs of letters, digits, marks) and single characters, each as the 64-bit hash of its lower-case letters."""
    units, starts, total = [], [np.zeros(1, np.int64)], 0
    for codes, begins in _chunks(texts):
        kind = _classes(codes)
        first = np.empty(codes.size, bool)
        first[0] = kind[0] != _SPACE
        first[1:] = (kind[1:] == _SINGLE) | ((kind[1:] == _LETTER) & (kind[:-1] != _LETTER))
        at = np.flatnonzero(first)
        if at.size:
            inside = np.flatnonzero(kind != _SPACE)
            place = inside - np.repeat(at, np.diff(np.append(np.searchsorted(inside, at), inside.size)))
            powers = np.cumprod(np.full(int(place.max()) + 1, _HASH))
            mixed = (codes[inside].astype(np.uint64) + np.uint64(1)) * powers[place]
            units.append(np.add.reduceat(mixed, np.searchsorted(inside, at)))
        starts.append(np.searchsorted(at, begins[1:]) + total)
        total += at.size
    joined = np.concatenate(units) if units else np.zeros(0, np.uint64)
    return Stream(joined, np.concatenate(starts))


def characters(texts: Sequence[str]) -> Stream:
    """Lower-case characters, runs of space as one space; every text begins and ends with one."""
    units, starts, total = [], [np.zeros(1, np.int64)], 0
    for codes, begins in _chunks([" " + t for t in texts]):
        space = _classes(codes) == _SPACE
        keep = np.empty(codes.size, bool)
        keep[0] = True
        keep[1:] = ~(space[1:] & space[:-1])
        keep[begins[:-1]] = True
        kept = np.where(space, np.uint32(32), codes)[keep].astype(np.uint64)
        units.append(kept)
        starts.append(np.cumsum(keep)[begins[1:] - 1] + total)
        total += kept.size
    joined = np.concatenate(units) if units else np.zeros(0, np.uint64)
    return Stream(joined, np.concatenate(starts))


# ---------------------------------------------------------------------------------------------- n-grams

_NONE = np.uint64(np.iinfo(np.uint64).max)  # the key of "no n-gram ends here"


class Block(NamedTuple):
    """The n-grams of one unit: for every order the sorted keys of those kept. Columns follow the orders, then the keys."""

    keys: tuple[np.ndarray, ...]

    @property
    def width(self) -> int:
        return sum(k.size for k in self.keys)

    def count(self, stream: Stream) -> sparse.csr_matrix:
        """Counts [N, width] of the known n-grams."""
        ids: list[np.ndarray] = []
        for known in self.keys:
            ids.append(_find(known, _keys(stream, ids, self.keys[0].size)))
        return _matrix(stream, ids, [k.size for k in self.keys])


def learn_block(stream: Stream, order: int, min_count: int, max_features: int) -> tuple[Block, sparse.csr_matrix]:
    """The n-grams seen `min_count` times (or more often, so that at most `max_features` stay) and their counts [N, D]."""
    keys: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for _ in range(order):
        known, id_T, count = _often(_keys(stream, ids, keys[0].size if keys else 0), min_count)
        keys.append(known)
        ids.append(id_T)
        counts.append(count)
    if sum(k.size for k in keys) > max_features:
        every = np.sort(np.concatenate(counts))
        least = int(every[every.size - max_features - 1]) + 1  # ties go, so that never too many stay
        return learn_block(stream, order, least, max_features)
    return Block(tuple(keys)), _matrix(stream, ids, [k.size for k in keys])


def _keys(stream: Stream, ids: list[np.ndarray], n_units: int) -> np.ndarray:
    """Keys of the n-grams that end at every token, given the ids of all shorter ones."""
    if not ids:
        return stream.units_T
    keys = np.full(stream.units_T.size, _NONE)
    before, unit = ids[-1][:-1], ids[0][1:]
    good = (before >= 0) & (unit >= 0)
    keys[1:][good] = before[good].astype(np.uint64) * np.uint64(n_units) + unit[good].astype(np.uint64)
    starts = stream.starts_N1[:-1]
    keys[starts[starts < keys.size]] = _NONE  # no n-gram crosses into the next text
    return keys


def _often(keys_T: np.ndarray, min_count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted keys seen at least `min_count` times, for every token the place of its key (or -1), and the counts."""
    id_T = np.full(keys_T.size, -1, np.int32)
    at = np.flatnonzero(keys_T != _NONE)
    if not at.size:
        return np.zeros(0, np.uint64), id_T, np.zeros(0, np.int64)
    keys = keys_T[at]
    place_bits = np.uint64(int(at.size).bit_length())
    if int(keys.max()) < 1 << (64 - int(place_bits)):
        # Key and place in one integer: one sort gives both, ten times faster than an argsort.
        packed = np.sort((keys << place_bits) | np.arange(at.size, dtype=np.uint64))
        ordered = packed >> place_bits
        places = (packed & ((np.uint64(1) << place_bits) - np.uint64(1))).astype(np.int64)
    else:
        places = np.argsort(keys)
        ordered = keys[places]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    count = np.diff(np.append(first, ordered.size))
    kept = count >= min_count
    rank = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
    id_T[at[places]] = np.repeat(rank, count)
    return ordered[first[kept]], id_T, count[kept]


def _find(known: np.ndarray, keys_T: np.ndarray) -> np.ndarray:
    """The place of every key in the sorted `known`, or -1."""
    id_T = np.full(keys_T.size, -1, np.int32)
    if known.size:
        at = np.flatnonzero(keys_T != _NONE)
        place = np.minimum(np.searchsorted(known, keys_T[at]), known.size - 1)
        id_T[at] = np.where(known[place] == keys_T[at], place, -1)
    return id_T


def _matrix(stream: Stream, ids: list[np.ndarray], widths: list[int]) -> sparse.csr_matrix:
    n_texts = stream.starts_N1.size - 1
    parts = []
    for id_T, width in zip(ids, widths, strict=True):
        good = id_T >= 0
        indptr = np.concatenate([[0], np.cumsum(good)])[stream.starts_N1]
        indices = id_T[good]
        part = sparse.csr_matrix((np.ones(indices.size, np.float32), indices, indptr), shape=(n_texts, width))
        part.sum_duplicates()
        parts.append(part)
    return sparse.csr_matrix(sparse.hstack(parts, format="csr", dtype=np.float32))


class Vectorizer:
    """Texts to a csr matrix float32 [N, D], the same for ever once fitted. Naive-Bayes ratios are the linear model's."""

    def __init__(self, settings: NgramFeatures, blocks: dict[str, Block], idf: dict[str, np.ndarray]) -> None:
        self.settings, self.blocks, self.idf = settings, blocks, idf
        self.width = sum(b.width for b in blocks.values())

    @staticmethod
    def fit(texts: Sequence[str], settings: NgramFeatures) -> tuple[Vectorizer, sparse.csr_matrix]:
        """Learns the n-grams of `texts`; also gives their matrix, which is at hand then."""
        unit = settings.unit
        if unit == "auto":
            unit = "char" if unspaced_share(texts) > 0.3 else "word"
        settings = settings.with_(unit=unit)
        blocks, idf, parts = {}, {}, []
        for name in ("word", "char") if unit == "both" else (unit,):
            order = settings.order if name == "word" else settings.char_order
            block, counts = learn_block(_stream(name, texts), order, settings.min_count, settings.max_features)
            seen_D = np.bincount(counts.indices, minlength=block.width)
            blocks[name] = block
            idf[name] = (np.log((1 + len(texts)) / (1 + seen_D)) + 1).astype(np.float32)
            parts.append(_weigh(counts, settings, idf[name]))
        fitted = Vectorizer(settings, blocks, idf)
        if not fitted.width:
            raise UserError(f"text: no n-gram is seen {settings.min_count} times. Give more or longer texts.")
        return fitted, _beside(parts)

    def transform(self, texts: Sequence[str]) -> sparse.csr_matrix:
        """Features [N, D] of any texts; n-grams never seen in `fit` count for nothing."""
        parts = [_weigh(b.count(_stream(n, texts)), self.settings, self.idf[n]) for n, b in self.blocks.items()]
        return _beside(parts)

    def save(self, folder: Path) -> None:
        """ngrams.json and ngrams.safetensors in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {f"idf.{n}": a for n, a in self.idf.items()}
        for name, block in self.blocks.items():
            arrays |= {f"keys.{name}.{n}": k for n, k in enumerate(block.keys, 1)}
        save_file(arrays, folder / "ngrams.safetensors")
        shape = {"settings": self.settings.model_dump(), "orders": {n: len(b.keys) for n, b in self.blocks.items()}}
        (folder / "ngrams.json").write_text(json.dumps(shape, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Vectorizer:
        """What `save` wrote."""
        with reading(folder / "ngrams.json"):
            shape = json.loads((folder / "ngrams.json").read_text(encoding="utf-8"))
            settings, orders = NgramFeatures.parse(shape["settings"]), dict(shape["orders"])
        with reading(folder / "ngrams.safetensors"):
            arrays = load_file(folder / "ngrams.safetensors")
            blocks = {n: Block(tuple(arrays[f"keys.{n}.{i}"] for i in range(1, k + 1))) for n, k in orders.items()}
            idf = {n: arrays[f"idf.{n}"] for n in orders}
        return Vectorizer(settings, blocks, idf)


def _stream(unit: str, texts: Sequence[str]) -> Stream:
    return words(texts) if unit == "word" else characters(texts)


def _weigh(counts: sparse.csr_matrix, settings: NgramFeatures, idf_D: np.ndarray) -> sparse.csr_matrix:
    """Presence for naive Bayes; else (1 + log count) * idf, every row of length one."""
    if settings.weight == "nb":
        counts.data = np.ones_like(counts.data)
        return counts
    counts.data = (1 + np.log(counts.data)) * idf_D[counts.indices]
    lengths = np.diff(counts.indptr)
    rows = np.repeat(np.arange(lengths.size), lengths)
    norm_N = np.sqrt(np.bincount(rows, counts.data.astype(np.float64) ** 2, minlength=lengths.size))
    counts.data = (counts.data / norm_N[rows]).astype(np.float32)
    return counts


def _beside(parts: list[sparse.csr_matrix]) -> sparse.csr_matrix:
    return parts[0] if len(parts) == 1 else sparse.csr_matrix(sparse.hstack(parts, format="csr", dtype=np.float32))


class TextFacts(NamedTuple):
    """What the choice of features depends on."""

    rows: int
    mean_words: float
    unspaced_share: float


def text_facts(texts: Sequence[str], sample: int = 500) -> TextFacts:
    """Measured on texts spread evenly over the data."""
    some = texts[:: max(1, len(texts) // sample)]
    return TextFacts(len(texts), words(some).units_T.size / max(len(some), 1), unspaced_share(some, len(some)))
