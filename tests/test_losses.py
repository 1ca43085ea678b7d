"""What losses are charged for: every byte that the assistant says, whatever the window, for counts and networks alike."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multistep import dialogue
from multistep.codec import Codec
from multistep.data.cells import Record, Turn
from multistep.metrics.texts import measure_rows
from multistep.models.decoder import new_decoder
from multistep.models.ngram import NGram
from multistep.models.seq2seq import new_seq2seq
from multistep.other_writers import Counted
from multistep.predictors.decoding import Greedy, Sample
from multistep.subwords import train_bytes
from multistep.tasks.writing import Writing
from multistep.tune.speakers import _tokenizer_config
from multistep.writing import Neural, sizes

pytestmark = pytest.mark.usefixtures("torch_seeded")


def talk(*said: str) -> Record:
    """The user and the assistant in turns."""
    turns = tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(said))
    return Record(said[-2], (said[-1],), turns=turns)


SHORT = talk("hi", "good day", "so", "bye 好")
MANY = talk(*(f"{word} number {i}" for i in range(12) for word in ("ask", "answer")))
LONG = talk("a question " * 20, "an answer " * 20)


@pytest.fixture
def codec(tmp_path: Path) -> Codec:
    """A token a byte."""
    train_bytes(["a b"], 259, tmp_path / "tokenizer.json")
    _tokenizer_config(tmp_path)
    found = Codec.load(tmp_path)
    dialogue.ensure_template(found.tokenizer)
    return found


def model_of(codec: Codec, reads: Any, context: int) -> Neural:
    make, kind = (new_seq2seq, "translate") if reads == "pairs" else (new_decoder, "chat")
    model = make(len(codec.tokenizer), 32, 1, context, {"pad": codec.pad, "bos": codec.bos, "eos": codec.eos}, 0)
    return Neural(model, codec, Writing(kind=kind), reads, context)  # pyright: ignore[reportArgumentType]


def test_counts_charge_every_turn_of_the_assistant(codec: Codec) -> None:
    counted = Counted(NGram.fit(["good day", "bye 好"]), codec)
    found = counted.losses([SHORT, Record("x", ("good",))], False)
    apart = counted.losses([Record("", ("good day",)), Record("", ("bye 好",)), Record("", ("good",))], False)
    np.testing.assert_allclose(found, [apart[0] + apart[1], apart[2]])
    assert found[:, 2].tolist() == sizes([SHORT, Record("x", ("good",))]).tolist() == [15, 4]


def test_a_conversation_costs_what_its_answers_cost_in_one_window(codec: Codec) -> None:
    neural = model_of(codec, "prompts", 256)
    shown = dialogue.render(codec.tokenizer, SHORT.turns)
    ids = torch.from_numpy(shown.ids.astype(np.int64))
    with torch.no_grad():
        logp = neural.model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
    nats = -logp.gather(1, ids[1:, None])[:, 0].numpy()[shown.counted[1:]]
    assert neural.losses([SHORT], False)[0].tolist() == pytest.approx([nats.sum(), len(nats), 15], rel=1e-5)


def test_a_smaller_window_leaves_nothing_out(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [SHORT, MANY, LONG]
    turns = [len(r.counted) for r in records]
    shortest = model_of(codec, "prompts", 32).losses(records, False)
    assert shortest[:, 2].tolist() == sizes(records).tolist()
    assert shortest[:, 1].tolist() == (sizes(records) + 2 * np.array(turns)).tolist()  # a space and the end of each

    def by_place(self: Neural, rows: Any, inputs: Any, targets: torch.Tensor) -> np.ndarray:
        """The more stands before a token, the cheaper it is."""
        return (1 / (1 + inputs[1].nonzero()[:, 1].double())).numpy()[None]

    monkeypatch.setattr(Neural, "_nats", by_place)
    by_window = [model_of(codec, "prompts", context).losses(records, False) for context in (32, 64, 1024)]
    for small, large in pairwise(by_window):
        assert small[:, 1:].tolist() == large[:, 1:].tolist()
        assert (small[1:, 0] > large[1:, 0]).all()
        assert measure_rows("bits_per_byte", small).value > measure_rows("bits_per_byte", large).value
        assert measure_rows("perplexity", small).value > measure_rows("perplexity", large).value


def test_the_end_of_a_target_that_has_no_positions_costs_eight_bits_a_byte(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_nat(self: Neural, rows: Any, inputs: Any, targets: torch.Tensor) -> np.ndarray:
        return np.ones(targets.shape)

    monkeypatch.setattr(Neural, "_nats", one_nat)
    records = [Record("a", ("x" * 40,)), Record("b", ("short",))]
    large, small = (model_of(codec, "pairs", context).losses(records, False) for context in (64, 16))
    assert large.tolist() == [[41, 41, 40], [6, 6, 5]]
    assert small[1].tolist() == large[1].tolist() and small[0, 1:].tolist() == large[0, 1:].tolist()
    assert small[0, 0] == pytest.approx(16 + 25 * 8 * math.log(2) * 40 / 41)


def test_counts_write_the_likeliest_byte_though_it_is_unlikely(codec: Codec) -> None:
    ngram = NGram.fit([*(f"q{c}" for c in "bcdef"), "qz", "qz", "z好"])
    assert ngram.next_byte(b"q").max() < 0.475
    for decoding in (Greedy(max_new_tokens=4), Greedy(max_new_tokens=4, repetition_penalty=1.1)):
        found = Counted(ngram, codec, decoding).write([Record("q", ()), Record("q", ())])
        assert [p.value for p in found] == ["z好", "z好"]


@pytest.mark.parametrize(
    ("stop", "written"),
    [
        ((), "bcdef"),
        (("d",), "bc"),
        (("ef", "cd"), "b"),
        (("cd", "bcd"), ""),  # of two that end together the one that begins first
        (("ab", "ax"), "bcdef"),  # what begins in the prompt is none
        (("好",), "bcdef"),
    ],
)
def test_counts_end_at_a_stop_text(codec: Codec, stop: tuple[str, ...], written: str) -> None:
    ngram = NGram.fit(["abcdef"] * 3)
    for decoding in (Greedy(max_new_tokens=5, stop=stop), Sample(max_new_tokens=5, temperature=1e-3, stop=stop)):
        assert [p.value for p in Counted(ngram, codec, decoding).write([Record("a", ())])] == [written]
