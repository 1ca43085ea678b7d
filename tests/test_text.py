"""Tests of text: n-grams against a plain count, odd texts, saving; subword tokenizers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from multistep.subwords import encode_ids, load_tokenizer, train_tokenizer, unknown_rate
from multistep.text import (
    NgramFeatures,
    Vectorizer,
    characters,
    learn_block,
    text_facts,
    unspaced_share,
    words,
)
from multistep.types import UserError

TEXTS = [
    "The film was good, really good!",
    "the film was not good",
    "",
    "  ",
    "Not the best film; not bad.",
    "good film",
]
CHINESE = ["房间很好,服务也很好", "房间不好", "服务很差,再也不来了", "很好的酒店"]


def test_words_are_runs_of_letters_and_single_marks() -> None:
    stream = words(["Don't stop!", "", "don't"])
    assert np.diff(stream.starts_N1).tolist() == [5, 0, 3]
    assert stream.units_T[:3].tolist() == stream.units_T[5:].tolist()


def test_words_isolate_chinese_characters() -> None:
    assert np.diff(words(["房间ok好"]).starts_N1).tolist() == [4]


def test_order_of_letters_matters_in_the_hash() -> None:
    assert len(set(words(["ab ba aab abb a b"]).units_T.tolist())) == 6


def test_characters_join_spaces() -> None:
    stream = characters(["a  b", "", " a b "])
    assert "".join(chr(int(u)) for u in stream.units_T[: stream.starts_N1[1]]) == " a b "
    assert stream.units_T[: stream.starts_N1[1]].tolist() == stream.units_T[stream.starts_N1[2] :].tolist()
    assert stream.starts_N1[2] - stream.starts_N1[1] == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(alphabet="ab c.", max_size=12), min_size=1, max_size=8), st.integers(1, 3), st.integers(1, 3))
def test_learn_block_counts_like_a_plain_counter(texts: list[str], order: int, min_count: int) -> None:
    stream = words(texts)
    rows = [stream.units_T[a:b].tolist() for a, b in zip(stream.starts_N1, stream.starts_N1[1:], strict=False)]
    grams = [[tuple(r[i : i + n]) for n in range(1, order + 1) for i in range(len(r) - n + 1)] for r in rows]
    totals = Counter(g for r in grams for g in r)
    expected = [sorted(c for g, c in Counter(r).items() if totals[g] >= min_count) for r in grams]
    block, counts = learn_block(stream, order, min_count, 10**6)
    assert block.width == sum(c >= min_count for c in totals.values())
    for n, want in enumerate(expected):
        assert sorted(counts[[n]].data.tolist()) == want
    assert np.array_equal(block.count(stream).toarray(), counts.toarray())


def test_max_features_holds_and_keeps_the_frequent() -> None:
    texts = [" ".join(f"w{i % (j + 1)}" for i in range(50)) for j in range(30)]
    block, counts = learn_block(words(texts), 2, 1, 40)
    assert 0 < block.width <= 40
    assert np.array_equal(block.count(words(texts)).toarray(), counts.toarray())


@pytest.mark.parametrize("unit", ["auto", "word", "char", "both"])
@pytest.mark.parametrize("weight", ["tfidf", "nb", "nb_tfidf"])
@pytest.mark.parametrize("texts", [TEXTS, CHINESE])
def test_vectorizer_round_trip(tmp_path: Path, unit: str, weight: str, texts: list[str]) -> None:
    features = NgramFeatures.parse({"unit": unit, "weight": weight, "min_count": 1})
    fitted, matrix = Vectorizer.fit(texts, features)
    fitted.save(tmp_path)
    loaded = Vectorizer.load(tmp_path)
    asked = [*texts, "quite unknown 酒", "\ud800 \u0000 ok"]
    before, after = fitted.transform(asked), loaded.transform(asked)
    assert matrix.dtype == np.float32 and matrix.shape == (len(texts), fitted.width)
    assert np.array_equal(fitted.transform(texts).toarray(), matrix.toarray())
    for name in ("data", "indices", "indptr"):
        assert np.array_equal(vars(before)[name], vars(after)[name])
    assert loaded.settings == fitted.settings and np.isfinite(after.data).all()


def test_transform_of_nothing_and_of_empty_texts() -> None:
    fitted, _ = Vectorizer.fit(TEXTS, NgramFeatures(unit="both", min_count=1))
    assert fitted.transform([]).shape == (0, fitted.width)
    assert fitted.transform([""])[:, : fitted.blocks["word"].width].nnz == 0


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, whole_characters = words(TEXTS), characters(TEXTS)
    monkeypatch.setattr("multistep.text._CHUNK_CHARACTERS", 10)
    for one, other in ((whole, words(TEXTS)), (whole_characters, characters(TEXTS))):
        assert np.array_equal(one.units_T, other.units_T) and np.array_equal(one.starts_N1, other.starts_N1)


def test_texts_without_any_ngram_are_an_error() -> None:
    with pytest.raises(UserError, match="n-gram"):
        Vectorizer.fit(["", " "], NgramFeatures(unit="word"))


def test_script_is_seen() -> None:
    assert unspaced_share(TEXTS) == 0.0 and unspaced_share(CHINESE) == 1.0
    assert unspaced_share([""]) == 0.0
    facts = text_facts(TEXTS)
    assert facts.rows == 6 and facts.mean_words == pytest.approx(27 / 6, abs=1.0)


@pytest.mark.parametrize("texts", [TEXTS * 5, CHINESE * 5])
def test_trained_tokenizer(tmp_path: Path, texts: list[str]) -> None:
    train_tokenizer(texts, 200, tmp_path / "tokenizer.json")
    trained = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [trained.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    loaded = load_tokenizer(str(tmp_path))
    ids, truncated = encode_ids(loaded, texts, 6)
    same, _ = encode_ids(trained, texts, 6)
    assert all(np.array_equal(a, b) and a.dtype == np.int32 for a, b in zip(ids, same, strict=True))
    assert all(len(i) <= 6 and i[0] == 2 and i[-1] == 3 for i in ids)
    longer, none = encode_ids(loaded, texts, 500)
    assert none == 0 and truncated == sum(len(i) > 6 for i in longer)
    assert unknown_rate(loaded, texts) == 0.0 and unknown_rate(loaded, ["ψψψ"]) == 1.0
    assert unknown_rate(loaded, []) == 0.0


def test_tokenizers_of_two_processes_are_equal(tmp_path: Path) -> None:
    """The trainer's own order of characters inside words is another one in each process: seen, and kept out."""
    code = "import sys; from multistep.subwords import train_tokenizer as t; t(sys.argv[2:], 60, __import__('pathlib').Path(sys.argv[1]))"
    rng = np.random.default_rng(0)
    texts = [" ".join("".join(rng.choice(list("abcdéfgh你好"), 5)) for _ in range(20)) for _ in range(20)]
    files = [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"]
    for file in files:
        subprocess.run([sys.executable, "-c", code, str(file), *texts], check=True)
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    trained = Tokenizer.from_file(str(files[0]))
    assert trained.token_to_id("##a") is not None and trained.token_to_id("##好") is None


def test_tokenizer_encodes_surrogates(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 100, tmp_path / "tokenizer.json")
    assert len(encode_ids(load_tokenizer(str(tmp_path)), ["a \ud800 b"], 10)[0][0]) >= 2


def test_missing_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(str(tmp_path))
