"""Tests of token sequences as training rows: what counts, what is padding, and that no position sees what it must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from multistep.models.decoder import new_decoder
from multistep.models.seq2seq import new_seq2seq
from multistep.objectives import NextToken, Seq2Seq
from multistep.objectives.shapes import IGNORED, Hidden
from multistep.sequences import BlockRows, PairRows, PromptRows, judge_tokens, windows

IDS = {"pad": 0, "bos": 1, "eos": 2}
RNG = np.random.default_rng(0)
SOURCES = [RNG.integers(5, 60, size=n) for n in (4, 7, 3, 6)]
TARGETS = [np.append(RNG.integers(5, 60, size=n), 2) for n in (5, 2, 8, 3)]


def test_a_gpu_judges_as_much_at_once_as_its_logits_leave_room_for() -> None:
    assert [judge_tokens("cpu", n) for n in (2, 150_000)] == [4096, 4096]
    assert [judge_tokens("cuda", n) for n in (2, 8192, 16_384, 150_000)] == [32_768, 32_768, 16_384, 4096]


def test_pairs_count_every_target_token_once(torch_seeded: None) -> None:
    rows = PairRows(SOURCES, TARGETS, 0, 1, "cpu")
    model = new_seq2seq(60, 32, 1, 64, IDS, 0)
    inputs, targets = rows.load(np.arange(4))
    assert targets[0].tolist() == np.concatenate(TARGETS).tolist()
    together = Seq2Seq().loss(rows.outputs(model, inputs), targets)
    one_by_one, count = 0.0, 0
    for source, target in zip(SOURCES, TARGETS, strict=True):
        decoder = torch.tensor([[1, *target[:-1]]])
        logits = model(input_ids=torch.tensor(source)[None], decoder_input_ids=decoder, use_cache=False).logits
        one_by_one += float(F.cross_entropy(logits[0].detach(), torch.tensor(target), reduction="sum"))
        count += len(target)
    torch.testing.assert_close(float(together.detach()), one_by_one / count, rtol=1e-5, atol=1e-5)
    assert Seq2Seq().count(targets) == count == sum(rows.counts(np.arange(4)))
    assert sorted(np.concatenate(rows.parts(20)).tolist()) == [0, 1, 2, 3] and len(rows.parts(20)) > len(rows.parts(99))
    assert rows.tokens(np.array([0, 2])) == (4 + 6) + (3 + 9)


def small(kind: str) -> Any:
    """A model with random weights of a class that is not trained from scratch here."""
    import transformers

    torch.manual_seed(0)
    t: Any = transformers
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    match kind:
        case "gpt2":
            return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=64, **ids))
        case "gemma2":  # caps its logits
            config = t.Gemma2Config(
                vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.0, **ids,
            )  # fmt: skip
            return t.Gemma2ForCausalLM(config)
        case "t5":  # tied: scales its last states
            config = t.T5Config(
                vocab_size=60, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
            )
            return t.T5ForConditionalGeneration(config)
        case _:  # adds a bias to its logits
            config = t.MarianConfig(
                vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_start_token_id=1,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, forced_eos_token_id=2, **ids,
            )  # fmt: skip
            model = t.MarianMTModel(config)
            model.final_logits_bias = torch.randn_like(model.final_logits_bias)
            return model


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_any_decoder_is_trained_on_its_own_logits(kind: str) -> None:
    ids = [np.concatenate([s, t]) for s, t in zip(SOURCES, TARGETS, strict=True)]
    counted = [np.arange(len(i)) >= len(s) for i, s in zip(ids, SOURCES, strict=True)]
    model, rows = small(kind).eval(), PromptRows(ids, counted, 0, "cpu")
    outputs = rows.outputs(model, rows.load(np.arange(4))[0])
    alone = [
        model(input_ids=torch.tensor(i)[None]).logits[0, len(s) - 1 : -1] for i, s in zip(ids, SOURCES, strict=True)
    ]
    torch.testing.assert_close(outputs[0], torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_any_pair_of_encoder_and_decoder_is_trained_on_its_own_logits(kind: str) -> None:
    model = small(kind).eval()
    start = model.config.decoder_start_token_id
    rows = PairRows(SOURCES, TARGETS, 0, start, "cpu")
    outputs = rows.outputs(model, rows.load(np.arange(4))[0])
    alone = [
        model(input_ids=torch.tensor(s)[None], decoder_input_ids=torch.tensor([[start, *t[:-1]]])).logits[0]
        for s, t in zip(SOURCES, TARGETS, strict=True)
    ]
    torch.testing.assert_close(outputs[0], torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_large_vocabulary_is_left_to_the_loss(torch_seeded: None) -> None:
    rows, model = PairRows(SOURCES, TARGETS, 0, 1, "cpu"), new_seq2seq(3000, 32, 1, 64, IDS, 0)
    inputs, targets = rows.load(np.arange(4))
    whole = rows.outputs(model, inputs)
    rows.whole = False
    hidden = rows.outputs(model, inputs)
    assert isinstance(whole, torch.Tensor) and isinstance(hidden, Hidden)
    torch.testing.assert_close(Seq2Seq().loss(hidden, targets), Seq2Seq().loss(whole, targets))


def test_prompts_are_read_but_not_learnt(torch_seeded: None) -> None:
    ids = [np.concatenate([s, t]) for s, t in zip(SOURCES, TARGETS, strict=True)]
    counted = [np.arange(len(i)) >= len(s) for i, s in zip(ids, SOURCES, strict=True)]
    rows = PromptRows(ids, counted, 0, "cpu")
    model = new_decoder(60, 32, 1, 64, IDS, 0)
    inputs, targets = rows.load(np.arange(4))
    assert targets[0].tolist() == np.concatenate(TARGETS).tolist()
    outputs = rows.outputs(model, inputs)
    alone = torch.cat(
        [
            model(input_ids=torch.tensor(i)[None], use_cache=False).logits[0, len(s) - 1 : -1]
            for i, s in zip(ids, SOURCES, strict=True)
        ]
    )
    torch.testing.assert_close(outputs[0], alone, rtol=1e-4, atol=1e-4)


def test_blocks_cover_the_stream_and_each_epoch_at_another_phase() -> None:
    stream = np.arange(1000)
    rows = BlockRows(stream, [0], 16, "cpu")
    order = rows.order(4, 0)
    first = np.concatenate([order.at(i) for i in range(order.per_epoch)])
    second = np.concatenate([order.at(order.per_epoch + i) for i in range(order.per_epoch)])
    assert len(set(first)) >= len(first) - 2 and len(set(first % 16)) <= 2
    assert first.max() + 17 <= 1000 and set(first % 16) != set(second % 16)
    again = rows.order(4, 0)
    assert np.array_equal(again.at(order.per_epoch + 1), order.at(order.per_epoch + 1))
    (ids, positions), targets = rows.load(np.array([5, 900]))
    assert positions is None and torch.equal(targets, ids + 1) and rows.tokens(np.array([5, 900])) == 32


def test_no_document_attends_to_another(torch_seeded: None) -> None:
    documents = [RNG.integers(5, 60, size=n) for n in (10, 7, 30)]
    stream = np.concatenate(documents)
    rows = BlockRows(stream, [0, 10, 17], 20, "cpu")
    model = new_decoder(60, 32, 2, 64, IDS, 0).eval()
    inputs, targets = rows.load(np.array([0]))
    outputs = rows.outputs(model, inputs)
    assert isinstance(outputs, torch.Tensor)
    for begin, document in ((0, documents[0]), (10, documents[1])):
        alone = model(input_ids=torch.tensor(document)[None], use_cache=False).logits
        torch.testing.assert_close(outputs[:, begin : begin + len(document)], alone, rtol=1e-4, atol=1e-4)
    crossing = torch.tensor([9, 16])
    assert targets[0, crossing].tolist() == [IGNORED, IGNORED]
    assert NextToken().count(targets) == 18


def test_sliding_windows_judge_every_token_once() -> None:
    for length, block, stride in ((50, 16, 8), (16, 16, 16), (5, 16, 4), (33, 8, 8)):
        judged = []
        for start, end, first in windows(length, block, stride):
            assert start < first <= end <= length and end - start <= block + 1
            judged += range(first, end)
        assert judged == list(range(1, length))
