"""Batches: every row once an epoch, the same at every position whatever was asked before; by length for encoding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multistep.data.batches import Batches, by_length

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=400).map(np.array)
quick = settings(max_examples=40, deadline=None, derandomize=True)


@quick
@given(lengths_N=LENGTHS, batch_size=st.integers(1, 70), seed=st.integers(0, 2**31 - 1))
def test_every_row_once_an_epoch(lengths_N: np.ndarray, batch_size: int, seed: int) -> None:
    batches = Batches(lengths_N, batch_size, seed)
    for epoch in range(3):
        seen = [batches.at(epoch * batches.per_epoch + i) for i in range(batches.per_epoch)]
        assert sorted(np.concatenate(seen).tolist()) == list(range(len(lengths_N)))
        sizes = [len(b) for b in seen]
        assert max(sizes) - min(sizes) <= 1, "every example weighs the same"
        assert max(sizes) <= 1.5 * batch_size + 1 and min(sizes) >= min(batch_size, len(lengths_N)) / 2


@quick
@given(lengths_N=LENGTHS, batch_size=st.integers(1, 40), positions=st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_position_is_all_there_is_to_remember(lengths_N: np.ndarray, batch_size: int, positions: list[int]) -> None:
    asked = Batches(lengths_N, batch_size, seed=5)
    for position in positions:
        fresh = Batches(lengths_N, batch_size, seed=5)
        assert np.array_equal(asked.at(position), fresh.at(position))


def test_epochs_and_seeds_differ() -> None:
    lengths_N = np.random.default_rng(0).integers(1, 100, 200)
    one, two = Batches(lengths_N, 10, seed=1), Batches(lengths_N, 10, seed=2)
    assert not np.array_equal(one.at(0), one.at(one.per_epoch))
    assert not np.array_equal(one.at(0), two.at(0))


def test_batches_hold_rows_of_like_length_in_mixed_order() -> None:
    lengths_N = np.random.default_rng(0).integers(1, 513, 2000)
    batches = Batches(lengths_N, 16, seed=0)
    epoch = [lengths_N[batches.at(i)] for i in range(batches.per_epoch)]
    padded = sum(len(b) * b.max() for b in epoch)
    assert padded < 1.1 * lengths_N.sum()
    means = np.array([b.mean() for b in epoch])
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3, "not from short to long"


def test_fewer_rows_than_a_batch_and_none() -> None:
    batches = Batches(np.array([3, 1, 2]), 32, seed=0)
    assert batches.per_epoch == 1 and sorted(batches.at(7).tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least one row"):
        Batches(np.array([], dtype=int), 4, seed=0)


@quick
@given(lengths_N=LENGTHS, batch_tokens=st.integers(1, 3000))
def test_by_length_covers_all_within_its_tokens(lengths_N: np.ndarray, batch_tokens: int) -> None:
    batches = by_length(lengths_N, batch_tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths_N)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * lengths_N[rows].max() <= batch_tokens
    order = lengths_N[np.concatenate(batches)]
    assert (np.diff(order) >= 0).all(), "shortest first"
    for rows, following in pairwise(batches):
        assert (len(rows) + 1) * lengths_N[following[0]] > batch_tokens, "no batch is smaller than it must be"


def test_by_length_of_nothing() -> None:
    assert by_length(np.array([], dtype=int), 10) == []
