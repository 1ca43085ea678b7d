"""How large a model of texts from random weights is, and what its batches hold: the rules, and what is measured for them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace as Some
from typing import Any

import pytest
import torch

from multistep.controllers.sizes import BATCH_TOKENS, RUNGS, dropout_for, weights_fit
from multistep.data.cells import Record, Turn
from multistep.strategy import Shape
from multistep.tune import measuring
from multistep.types import UserError


def test_sizes_follow_their_rule() -> None:
    assert (
        weights_fit(1_000_000, 1e6, 250_000)
        and not weights_fit(1_000_001, 1e6, 10**9)
        and not weights_fit(10**6, 1e9, 249_999)
    )
    assert [dropout_for(e) for e in (1, 5, 15)] == [0.0, 0.1, 0.2]
    assert all(a < b for a, b in pairwise(RUNGS)) and all(w % 32 == 0 for w, _ in RUNGS)
    assert torch.get_num_threads() == 1


def test_all_answers_of_a_conversation_are_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """So all of them count where it is asked whether there are enough for a model from scratch."""
    asked: list[int] = []
    monkeypatch.setattr(measuring.Profiler, "_kind", lambda self, tokens: asked.append(tokens) or ("", None, "enough"))
    said = (("system", "be kind"), ("user", "a"), ("assistant", "12345"), ("user", "b"), ("assistant", "123"))
    records = [Record("b", ("123",), turns=tuple(Turn(*s) for s in said)), Record("q", ("1234567",))]
    codec = Some(tokenizer="t", targets=lambda texts: [list(text) for text in texts])
    speakers: Any = Some(codec=codec, data=Some(train=records), characters=True, facts={})
    problem: Any = Some(unit="seconds", config=Some(max_length=None), task=Some(kind="chat"))
    facts = measuring.Profiler(speakers, problem).facts()
    assert asked == [5 + 3 + 7] and facts["target_tokens"] == 3 + 7, "what is written is one answer a row"


def weights_of(shape: Shape) -> int:
    return 12 * shape.layers * shape.width**2


def profiler_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, update: Callable[[Shape], float], peak: float
) -> measuring.Profiler:
    """One whose card multiplies at `peak` FLOP a second, and whose updates have the speed that `update` says, in tokens a second."""
    monkeypatch.setattr(measuring.Profiler, "_update", lambda self, shape, facts, optimizer, bf16: update(shape))
    monkeypatch.setattr(measuring, "matrix_peak", lambda device, bf16: peak)
    config = Some(precision="bf16", batch_tokens=None)
    problem: Any = Some(unit="seconds", budget=60.0, config=config, task=Some(kind="lm"))
    speakers: Any = Some(device="cuda", model=None)
    return measuring.Profiler(speakers, problem)


@pytest.mark.parametrize(
    ("different", "tokens_s", "peak", "chosen", "most"),
    [
        (10**9, 1e7, 1e15, (1024, 16), 1),  # it has data and time for all
        (909_582, 1e6, 1e15, (192, 4), 1),  # 256 wide has more than four weights for each token of train
        (
            10**9,
            1e6,
            1e15,
            (512, 8),
            2,
        ),  # 42 s of so many tokens are one for each of its weights, and less for the next
        (
            10**9,
            1e6,
            1e14,
            (512, 8),
            1,
        ),  # no card of this speed has so many tokens for larger ones: they are not measured
        (10**9, 1e4, 1e15, (96, 3), 8),
        (10**9, 0.0, 1e15, (64, 2), 8),
        (10, 1e7, 1e15, (64, 2), 0),
    ],
)
def test_on_a_gpu_the_size_is_looked_for_from_above(
    different: int, tokens_s: float, peak: float, chosen: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small models take as long as larger ones there; what cannot fit is not measured."""
    measured: list[Shape] = []

    def update(shape: Shape) -> float:
        measured.append(shape)
        return tokens_s or 1e-9

    profiler = profiler_of_a_gpu(monkeypatch, update, peak)
    found = profiler._from_above(RUNGS, Shape(reads="stream"), {"train_tokens": different})
    assert (found.width, found.layers) == chosen and len(measured) <= most
    assert all(weights_of(m) <= 4 * different for m in measured)
    sizes = [weights_of(m) for m in measured]
    assert sizes == sorted(sizes, reverse=True)
    guess = profiler._batch(profiler._tokens(0.0), {"reads": "stream", "row_tokens": 256})
    assert guess["batch_tokens"] == BATCH_TOKENS[1], "the first batch that is measured fills the card"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), UserError("out of memory with one example at once")]
)
def test_a_size_that_a_gpu_has_no_memory_for_does_not_fit(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(shape: Shape) -> float:
        if shape.width > 256:
            raise error
        return 1e9

    profiler = profiler_of_a_gpu(monkeypatch, update, 1e18)
    found = profiler._from_above(RUNGS, Shape(reads="stream"), {"train_tokens": 10**9})
    assert (found.width, found.layers) == (256, 6)
    error = UserError("another one")
    with pytest.raises(UserError, match="another one"):
        profiler._from_above(RUNGS, Shape(reads="stream"), {"train_tokens": 10**9})


def test_measuring_sizes_has_its_share_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it a size is taken only where a larger one that was measured is fast enough for it."""
    now, measured = [0.0], []

    def update(shape: Shape) -> float:
        now[0] += 2.0  # of 1.8 s
        measured.append(shape.width)
        return 1e5

    monkeypatch.setattr(measuring.time, "monotonic", lambda: now[0])
    profiler = profiler_of_a_gpu(monkeypatch, update, 1e18)
    found = profiler._from_above(RUNGS, Shape(reads="stream"), {"train_tokens": 10**9})
    assert measured == [1024] and (found.width, found.layers) == (192, 4)  # 4.2M tokens
