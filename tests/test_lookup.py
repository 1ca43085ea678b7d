"""Tests of prompt lookup: several tokens at once are what one after the other are, and what is written is greedy writing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_generate import IDS, PROMPTS, _model

from multistep.generate import generate
from multistep.lookup import Places, look_up
from multistep.models.step import CachedDecoder, CachedSeq2Seq, LlamaSteps, M2MSteps, stepper_of
from multistep.predictors.decoding import Greedy

STEPPERS = {
    "llama": ("decoder", LlamaSteps), "any decoder": ("decoder", CachedDecoder),
    "m2m100": ("seq2seq", lambda m: M2MSteps(m, 1)), "any seq2seq": ("seq2seq", lambda m: CachedSeq2Seq(m, 1)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(torch_seeded: None) -> None: ...


@pytest.mark.parametrize("name", STEPPERS)
def test_tokens_taken_at_once_and_taken_back_leave_no_trace(name: str) -> None:
    kind, make = STEPPERS[name]
    model = _model(kind)
    one, many = make(model), make(model)
    tokens = torch.tensor([7, 8, 9, 10, 11, 12])
    for stepper in (one, many):
        stepper.start([PROMPTS[1]])
        stepper.step(tokens[:1])
    expected = torch.stack([one.step(tokens[i : i + 1])[0] for i in range(1, 6)])
    many.several(torch.tensor([30, 31, 32, 33]))
    many.back(4)
    found = [many.several(tokens[1:4]), many.step(tokens[4:5]), many.several(tokens[5:6])]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_a_cache_that_is_full_grows_for_several(kind: str) -> None:
    model = _model(kind)
    one, many = stepper_of(model), stepper_of(model)
    tokens = torch.arange(5, 59).repeat(2)[:100]
    one.start([PROMPTS[0]])
    many.start([PROMPTS[0]])
    expected = torch.stack([one.step(t[None])[0] for t in tokens])
    torch.testing.assert_close(many.several(tokens), expected, rtol=1e-4, atol=1e-4)  # pyright: ignore


def test_several_are_for_one_row() -> None:
    for kind in ("decoder", "seq2seq"):
        stepper: Any = stepper_of(_model(kind))
        stepper.start(PROMPTS[:2])
        with pytest.raises(ValueError, match="one row, not for 2"):
            stepper.several(torch.tensor([5, 6]))


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
@pytest.mark.parametrize(
    "decoding",
    [
        Greedy(max_new_tokens=60),
        Greedy(max_new_tokens=1),
        Greedy(max_new_tokens=40, min_new_tokens=40, repetition_penalty=1.2),
        Greedy(max_new_tokens=40, no_repeat_ngram=3),
        Greedy(max_new_tokens=40, stop=("cd", "xyz")),
    ],
)
@pytest.mark.parametrize("guesses", [1, 5])
def test_lookup_writes_what_greedy_writes(kind: str, decoding: Greedy, guesses: int) -> None:
    model = _model(kind)

    def decode(ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)

    expected = generate(model, PROMPTS, decoding, [2], decode=decode)
    for prompt, greedy in zip(PROMPTS, expected, strict=True):
        written, _ = look_up(stepper_of(model), prompt, decoding, [2], guesses, decode)
        assert (written.ids, written.ended) == (greedy.ids, greedy.ended)
        assert written.score == pytest.approx(greedy.score, abs=1e-4)


def test_it_saves_passes_where_a_text_repeats_itself() -> None:
    model = _model("decoder")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)  # a model without a mind of its own soon says the same again
    written, passes = look_up(stepper_of(model), PROMPTS[1], Greedy(max_new_tokens=80), [IDS["eos"]], 6)
    assert len(written.ids) == 80 and passes < 50


def test_a_guess_is_what_followed_the_latest_longest_match() -> None:
    places = Places([1, 2, 3, 4, 1, 2, 5, 6, 9, 2, 3])
    assert places.guess(3) == [4, 1, 2]  # (2, 3) stood at its beginning
    places.append(4)
    assert places.guess(9) == [1, 2, 5, 6, 9, 2, 3, 4]
    places.append(7)
    assert places.guess(3) == []
    assert Places([]).guess(3) == []


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        look_up(stepper_of(_model("decoder")), np.zeros(0, dtype=np.int64), Greedy(), [2], 4)
