"""Tests of summaries by extraction: spans and places, heads that find what made the data, verbatim slices, the way to disk and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from multistep.data.cells import Record
from multistep.metrics.texts import statistics
from multistep.models.baselines import Lead, load_writer
from multistep.models.extract import Extract
from multistep.models.ranking import Encode, Span, fit_ranker, read, sentence_places
from multistep.types import UserError

FILLER = ["river", "stone", "cloud", "paper", "garden", "window", "silver", "copper", "candle", "meadow", "harbour", "bridge", "lantern",
        "marble", "thunder"]  # fmt: skip
TOPICS = ["market", "contract", "pipeline", "election", "merger", "tariff", "reactor", "vaccine"]  # fmt: skip


def documents(n: int, seed: int = 0) -> list[Record]:
    """The summary is the sentence that begins with "Result", whatever its place."""
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(n):
        parts = [" ".join(rng.choice(FILLER, 7)).capitalize() + "." for _ in range(4)]
        topic = f"Result the {rng.choice(TOPICS)} {rng.choice(TOPICS)} was signed in {rng.choice(FILLER)}."
        parts.insert(int(rng.integers(1, 5)), topic)
        records.append(Record(" ".join(parts), (topic.rstrip("."),)))
    return records


def first_letters(texts: Sequence[str]) -> np.ndarray:
    """An encoder that sees how a sentence begins."""
    return np.array([[float(t[:1] == c) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"] + [len(t) / 100] for t in texts])


def score(outputs: list[str], records: list[Record]) -> float:
    return float(statistics("rougeL", outputs, [r.targets for r in records])[:, 0].mean())


def test_words_know_their_place() -> None:
    text = read("Dr. Who—yes, he! 你好，世界。\nEnd")
    assert [text.text[a:b] for a, b in text.sentences] == ["Dr.", "Who—yes, he!", "你好，世界。", "End"]
    assert text.low == ["dr", "who", "yes", "he", "你", "好", "世", "界", "end"]
    assert all(text.text[a:b] == w for a, b, w in zip(text.starts_T, text.ends_T, text.raw, strict=True))
    assert text.breaks_T.tolist() == [True, True, True, True, True, False, True, False, True]
    assert [text.slice(s) for s in text.ranges()] == ["Dr.", "Who—yes, he!", "你好，世界。", "End"]
    assert text.slice(Span(2, 6, 8)) == "世界。" and text.slice(Span(2, 4, 6)) == "你好"


@pytest.mark.parametrize("text", ["", "   ", "...", "—", "!?", "\n\n", "no end", "A. B.\n\n C?  "])
def test_sentences_cover_all_that_is_not_space(text: str) -> None:
    inside = [text[a:b] for a, b in sentence_places(text)]
    assert "".join("".join(inside).split()) == "".join(text.split())
    assert [read(text).slice(s) for s in read(text).ranges()] == [p for p in inside if any(c.isalnum() for c in p)]


def test_the_ranker_learns_differences_within_a_text_alone() -> None:
    rng = np.random.default_rng(0)
    weights_D = np.array([1.0, -2.0, 0.0])
    features = [rng.normal(size=(rng.integers(2, 9), 3)) for _ in range(60)]
    levels = rng.normal(size=60) * 100  # of a whole text: no one's business
    targets = [f @ weights_D + level for f, level in zip(features, levels, strict=True)]
    found = fit_ranker(features, targets, [1e-6])
    np.testing.assert_allclose(found.head.weights_D, weights_D, atol=1e-3)
    x = np.concatenate([(f - f.mean(0)) / len(f) ** 0.5 for f in features])
    y = np.concatenate([(t - t.mean()) / len(t) ** 0.5 for t in targets])
    scale_D = np.sqrt((x**2).sum(0) / 60)
    by_hand = np.linalg.solve(x.T @ x / 60 + np.diag(0.1 * scale_D**2), x.T @ y / 60)
    np.testing.assert_allclose(fit_ranker(features, targets, [0.1]).head.weights_D, by_hand, rtol=1e-8)
    assert len(found.folds) == 5 and not np.allclose(found.unseen(0).weights_D, found.head.weights_D, atol=1e-9)


@pytest.mark.parametrize("encode", [None, first_letters], ids=["words", "encoder"])
def test_extract_finds_the_sentence_that_the_summary_is(encode: Encode | None, tmp_path: Path) -> None:
    model, facts = Extract.fit(documents(60), encode)
    held = documents(40, seed=1)
    told = [p.value for p in model.write(held)]
    assert all(t in r.source for t, r in zip(told, held, strict=True)) and facts["count"] == 1
    assert score(told, held) > 0.9 > 0.3 > score([p.value for p in Lead(1).write(held)], held)
    model.save(tmp_path)
    odd = [*held, Record("", ()), Record("—", ()), Record("One sentence only.", ()), Record("孤\ud800 ok", ())]
    assert load_writer(tmp_path, encode).write(odd) == model.write(odd)
    told = [p.value for p in model.write(odd)][40:43]
    assert told[:2] == ["", "—"] and told[2] and told[2] in "One sentence only."
    if encode is not None:
        with pytest.raises(UserError, match="fitted with an encoder"):
            load_writer(tmp_path).write(held)


def test_short_summaries_are_phrases() -> None:
    records = [
        Record(f"Hello all, please read {r.targets[0].split()[2]} update before noon. Thanks and bye.", (f"{r.targets[0].split()[2]} update",))
        for r in documents(80)
    ]  # fmt: skip
    model, facts = Extract.fit(records[:60])
    told = [p.value for p in model.write(records[60:])]
    assert facts["phrase_words"] == 2 and told == [r.targets[0] for r in records[60:]]


def test_several_sentences_where_summaries_are_long() -> None:
    records = []
    for r in documents(60):
        parts = [r.source[a:b] for a, b in sentence_places(r.source)]
        records.append(Record(r.source, (" ".join((*parts[:2], r.targets[0])),)))
    model, facts = Extract.fit(records[:50])
    assert facts["count"] > 1
    for record, prediction in zip(records[50:], model.write(records[50:]), strict=True):
        places = [record.source.find(record.source[a:b]) for a, b in sentence_places(prediction.value)]
        assert places and len(sentence_places(prediction.value)) >= 2


def test_chinese_documents() -> None:
    rng = np.random.default_rng(0)
    letters = "山水云石林花草木风雨雪月"

    def one() -> Record:
        parts = ["".join(rng.choice(list(letters), 8)) + "。" for _ in range(3)]
        right = "结果表明" + "".join(rng.choice(list(letters), 6)) + "。"
        parts.insert(int(rng.integers(1, 4)), right)
        return Record("".join(parts), (right,))

    records = [one() for _ in range(60)]
    told = [p.value for p in Extract.fit(records[:40])[0].write(records[40:])]
    assert all(t in r.source for t, r in zip(told, records[40:], strict=True)) and score(told, records[40:]) > 0.9


@pytest.mark.parametrize("n", [1, 2, 10])
def test_few_rows_are_enough(n: int) -> None:
    records = documents(n)
    told = [p.value for p in Extract.fit([*records, Record("", ("x",)), Record("no summary", ())])[0].write(records)]
    assert all(t and t in r.source for t, r in zip(told, records, strict=True))
    with pytest.raises(UserError, match="no document"):
        Extract.fit([Record("", ("x",)), Record("a", ("—",))])


def test_every_sentence_is_embedded_once() -> None:
    seen: list[str] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        seen.extend(texts)
        return first_letters(texts)

    records = documents(20)
    Extract.fit(records, encode)
    assert len(seen) == sum(len(sentence_places(r.source)) for r in records)
