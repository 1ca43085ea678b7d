"""Tests of the byte n-gram model: it is a distribution, equals a plain count, and survives the disk."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multistep.models.ngram import NGram, _discounts

TEXTS = ["the cat sat on the mat. " * 3, "the dog sat on the log.", "你好 the cat"]


@given(st.binary(max_size=12))
@settings(max_examples=30, deadline=None)
def test_next_bytes_are_a_distribution(context: bytes) -> None:
    p = NGram.fit(TEXTS, 4).next_byte(context)
    assert p.min() > 0 and p.sum() == pytest.approx(1.0)


def test_a_text_costs_what_its_bytes_cost_one_after_the_other() -> None:
    model = NGram.fit(TEXTS, 4)
    for text in ("the cat sat", "x", "", "你好 dog"):
        data = text.encode()
        slow = -sum(np.log2(model.next_byte(data[:i])[data[i]]) for i in range(len(data)))
        assert model.bits_N([text])[0] == pytest.approx(slow)
    assert model.bits_N(["the cat sat", "x"]) == pytest.approx([model.bits_N([t])[0] for t in ("the cat sat", "x")])


def test_bigrams_equal_a_plain_computation() -> None:
    text = "abracadabra abracadabra banana bandana cabana"
    pairs = Counter(itertools.pairwise(text))
    ends = Counter(b for _, b in pairs)
    ends[text[0]] += 1  # the first byte has nothing before it
    low, high = _discounts(np.array(list(ends.values()))), _discounts(np.array(list(pairs.values())))
    total = sum(ends.values())
    taken = sum(low[min(n, 3)] for n in ends.values()) / total
    for a, b in [("a", "b"), ("a", "n"), ("b", "z"), ("n", "a")]:
        shorter = (ends[b] - low[min(ends[b], 3)]) / total + taken / 256
        followers = {d: n for (c, d), n in pairs.items() if c == a}
        here = sum(followers.values())
        back = sum(high[min(n, 3)] for n in followers.values()) / here
        n = followers.get(b, 0)
        expected = (n - high[min(n, 3)]) / here + back * shorter
        assert NGram.fit([text], 2).next_byte(a.encode())[ord(b)] == pytest.approx(expected)


def test_more_context_helps_on_text_like_train() -> None:
    costs = [NGram.fit(TEXTS, order).bits_N(["the cat sat on the log."])[0] for order in (1, 3, 5)]
    assert costs[0] > costs[1] > costs[2]


def test_it_survives_the_disk(tmp_path: Path) -> None:
    model = NGram.fit(TEXTS, 4)
    model.save(tmp_path)
    assert np.array_equal(NGram.load(tmp_path).next_byte(b"the "), model.next_byte(b"the "))


def test_the_likeliest_bytes_are_written_at_no_and_at_a_small_temperature() -> None:
    model = NGram.fit([*(f"q{c}" for c in "bcdef"), "qz", "qz"])
    assert model.next_byte(b"q").max() < 0.475  # to the power of 1,000 nothing is left of it
    assert [model.go_on("q", 1, warm, seed) for warm in (0.0, 1e-3, 1e-9) for seed in (0, 1)] == ["z"] * 6
    assert {model.go_on("q", 1, 1.0, seed) for seed in range(200)} >= set("bcdefz")


def test_texts_shorter_than_the_longest_context_are_enough() -> None:
    model = NGram.fit(["yes", "no"])
    assert model.go_on("y", 2, 0.0, 0) == "es" and model.go_on("a longer text", 1, 0.0, 0)
    assert model.bits_N(["yes", "a longer text"])[0] < 8 * 3
