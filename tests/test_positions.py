"""Models with a table of positions write to its end and not past it, alone and behind the server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import chat_bundle, serve_folder, served
from test_generate import _model
from test_sequences import small

from multistep.bundle import load_bundle
from multistep.codec import Codec
from multistep.data.cells import Record, Turn
from multistep.models.step import positions_of
from multistep.predictors.decoding import Beam, Greedy
from multistep.tasks.writing import Writing
from multistep.writing import Neural

IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONG: dict[str, Any] = {"max_new_tokens": 100, "min_new_tokens": 100}


@pytest.fixture(autouse=True)
def _one_thread(torch_seeded: None) -> None: ...


def bounded(kind: str) -> Any:
    """A model of a token a byte with 64 positions."""
    import transformers

    t: Any = transformers
    layers: dict[str, Any] = {
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }  # fmt: skip
    match kind:
        case "gpt2":
            found = t.GPT2LMHeadModel(
                t.GPT2Config(vocab_size=259, n_positions=64, n_embd=32, n_layer=1, n_head=2, **IDS)
            )
        case "opt":
            found = t.OPTForCausalLM(t.OPTConfig(
                vocab_size=259, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32,
                max_position_embeddings=64, **IDS,
            ))  # fmt: skip
        case _:
            found = t.BartForConditionalGeneration(t.BartConfig(
                vocab_size=259, d_model=32, max_position_embeddings=64, decoder_start_token_id=2, **layers, **IDS,
            ))  # fmt: skip
    return found.eval()


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bart", "marian"])
def test_a_table_of_positions_is_counted(kind: str) -> None:
    model = small("marian").eval() if kind == "marian" else bounded(kind)
    assert positions_of(model) == 64

    def forward(n: int) -> None:
        ids = torch.full((1, n), 5)
        with torch.no_grad():
            model(
                **(
                    {"input_ids": ids[:, :3], "decoder_input_ids": ids}
                    if model.config.is_encoder_decoder
                    else {"input_ids": ids}
                )
            )

    forward(64)
    with pytest.raises(IndexError):
        forward(65)


@pytest.mark.parametrize("model", ["decoder", "seq2seq", "gemma2", "t5"])
def test_what_turns_compares_or_computes_positions_has_none(model: str) -> None:
    assert positions_of(_model(model) if model in ("decoder", "seq2seq") else small(model)) is None


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_long_text_leaves_room_for_what_is_written(kind: str, tmp_path: Path) -> None:
    folder = chat_bundle(tmp_path, "lm", 64, model=bounded(kind), max_new_tokens=16, min_new_tokens=16)
    neural: Any = load_bundle(folder).speaker  # pyright: ignore[reportAttributeAccessIssue]
    records = [Record("x" * 200 + "the end", ()), Record("short", ())]
    long, short = neural.prompts(records)
    assert len(long) == 48 and neural.codec.text(long).endswith("the end") and len(short) == 6
    assert [len(row[0].ids) for row in neural.candidates(records, neural.decoding, 1)] == [16, 16]
    neural.decoding = Greedy(**LONG)  # more than there is: a prompt of one token, and the rest
    assert [len(p) for p in neural.prompts(records)] == [1, 1]
    for decoding in (neural.decoding, Beam(beams=2, **LONG)):
        assert [len(row[0].ids) for row in neural.candidates(records, decoding, 1)] == [63, 63]


def test_turns_and_answers_of_pairs_end_there_too(tmp_path: Path) -> None:
    folder = chat_bundle(tmp_path, "chat", 64, model=bounded("gpt2"), **LONG)
    neural: Any = load_bundle(folder).speaker  # pyright: ignore[reportAttributeAccessIssue]
    assert len(neural.candidates([Record("Say one", ())], neural.decoding, 1)[0][0].ids) == 63
    list(neural.converse([Turn("user", "Say one")], neural.decoding))  # to its end
    pairs = Neural(
        bounded("bart"), Codec.load(tmp_path / "tokenizer"), Writing(kind="translate"), "pairs", 64, Greedy(**LONG)
    )
    assert len(pairs.candidates([Record("one", ())], Greedy(**LONG), 1)[0][0].ids) == 64
    free = replace(pairs, model=_model("seq2seq"))
    assert free.endings()[1] == Greedy(**LONG) and pairs.endings()[1] == Greedy(max_new_tokens=64, min_new_tokens=64)


def test_the_server_refuses_what_has_no_positions(tmp_path: Path) -> None:
    folder = chat_bundle(tmp_path, "lm", 64, model=bounded("gpt2"), max_new_tokens=16)
    prompt = "x" * 30  # 31 tokens with the first
    expected: Any = load_bundle(folder)
    with served(serve_folder(folder)) as address:
        refused = httpx.post(f"{address}/v1/completions", json={"prompt": prompt, "max_tokens": 34})
        error = refused.json()["error"]
        assert refused.status_code == 422 and (error["param"], error["code"]) == (
            "max_tokens",
            "context_length_exceeded",
        )
        assert error["message"] == "an answer of 34 tokens after a prompt of 31; the model has positions for 64."
        fits = httpx.post(f"{address}/v1/completions", json={"prompt": prompt, "max_tokens": 33})
        assert fits.status_code == 200 and fits.json()["usage"]["prompt_tokens"] == 31
        texts = ["y" * 300, "one"]
        found = httpx.post(f"{address}/predict", json={"text": texts}).json()["predictions"]
        assert [p["value"] for p in found] == [p.value for p in expected.predict(texts)]
