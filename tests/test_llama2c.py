"""Tests of the reader of llama2.c: a model written by hand against llama2.c's own arithmetic, the published story, bad files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama2c_files import PIECES, tokenizer_bin

from multistep.models.llama2c import Header, convert, read_model, read_tokenizer
from multistep.types import UserError

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)


@pytest.fixture(autouse=True)
def _one_thread(torch_seeded: None) -> None: ...


def _model_bin(path: Path, tied: bool) -> tuple[Path, Header, dict[str, np.ndarray]]:
    v = 259 + len(PIECES)
    header = Header(16, 24, 2, 4, 2, v if tied else -v, 32)
    rng = np.random.default_rng(0)
    shapes = {
        "embedding": (v, 16), "norm": (2, 16), "wq": (2, 16, 16), "wk": (2, 8, 16), "wv": (2, 8, 16), "wo": (2, 16, 16),
        "mlp_norm": (2, 16), "w1": (2, 24, 16), "w2": (2, 16, 24), "w3": (2, 24, 16), "last_norm": (16,), "rotary": (2, 32, 2),
    } | ({} if tied else {"output": (v, 16)})  # fmt: skip
    weights = {name: rng.normal(0, 0.5, shape).astype("<f4") for name, shape in shapes.items()}
    path.write_bytes(struct.pack("<7i", *header) + b"".join(w.tobytes() for w in weights.values()))
    return path, header, weights


def _run_c(ids: list[int], header: Header, w: dict[str, np.ndarray]) -> np.ndarray:
    """The logits after the last token, as llama2.c's forward() adds them up: one position at a time, rotary pairs interleaved."""
    head = header.width // header.heads
    keys: list[list[np.ndarray]] = [[] for _ in range(header.layers)]
    values: list[list[np.ndarray]] = [[] for _ in range(header.layers)]
    x = np.zeros(header.width)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt(np.mean(x * x) + 1e-5)

    def rotated(x: np.ndarray, place: int) -> np.ndarray:
        out = x.copy()
        for i in range(0, len(x), 2):
            angle = place * 10000.0 ** -((i % head) / head)
            out[i] = x[i] * np.cos(angle) - x[i + 1] * np.sin(angle)
            out[i + 1] = x[i] * np.sin(angle) + x[i + 1] * np.cos(angle)
        return out

    for place, token in enumerate(ids):
        x = w["embedding"][token].astype(np.float64)
        for n in range(header.layers):
            inner = norm(x, w["norm"][n])
            query = rotated(w["wq"][n] @ inner, place)
            keys[n].append(rotated(w["wk"][n] @ inner, place))
            values[n].append(w["wv"][n] @ inner)
            mixed = np.zeros(header.width)
            for h in range(header.heads):
                at, kv = h * head, h // (header.heads // header.kv_heads) * head
                scores = np.array([query[at : at + head] @ k[kv : kv + head] for k in keys[n]]) / np.sqrt(head)
                p = np.exp(scores - scores.max())
                mixed[at : at + head] = sum(a * v[kv : kv + head] for a, v in zip(p / p.sum(), values[n], strict=True))
            x = x + w["wo"][n] @ mixed
            inner = norm(x, w["mlp_norm"][n])
            gate = w["w1"][n] @ inner
            x = x + w["w2"][n] @ (gate / (1 + np.exp(-gate)) * (w["w3"][n] @ inner))
    return w.get("output", w["embedding"]) @ norm(x, w["last_norm"])


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_computes_what_llama2c_computes(tmp_path: Path, tied: bool) -> None:
    path, header, weights = _model_bin(tmp_path / "model.bin", tied)
    model = read_model(path)
    ids = [1, 265, 30, 262, 7]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()
    np.testing.assert_allclose(logits, _run_c(ids, header, weights), rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings == tied


def test_a_folder_loads_as_any_other(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, header, weights = _model_bin(tmp_path / "model.bin", tied=True)
    convert(path, tokenizer_bin(tmp_path / "tokenizer.bin"), tmp_path / "folder")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    ids = tokenizer("hello.")["input_ids"]
    assert ids == [1, *(259 + PIECES.index(p) for p in ("▁hello", "."))]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()
    np.testing.assert_allclose(logits, _run_c(ids, header, weights), rtol=1e-4, atol=1e-4)


def test_pieces_merge_by_score_and_bytes_stand_in_for_the_rest(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tokenizer_bin(tmp_path / "tokenizer.bin"))
    assert tokenizer.encode("hello 好").tokens == ["<s>", "▁hello", "▁", "好"]
    assert tokenizer.encode("ho\n").tokens == ["<s>", "▁", "h", "o", "<0x0A>"]
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("  hello   hello ").tokens == ["<s>", "▁hello", "▁hello"]  # extra spaces go
    assert tokenizer.encode("").tokens == ["<s>"]
    for text in ("hello 好", "x é\n\t😀"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    spared = read_tokenizer(tokenizer_bin(tmp_path / "spared.bin", [*PIECES, "▁▁"]))
    assert spared.encode("h  e", add_special_tokens=False).tokens == ["▁", "h", "▁▁", "e"]


def test_the_published_story(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from multistep.generate import generate
    from multistep.predictors.decoding import Greedy

    source = shared / "models" / "stories260K"
    if not source.is_dir():
        pytest.skip("no stories260K beside the repository")
    convert(source / "stories260K.bin", source / "tok512.bin", tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    written = generate(model, [np.array([1])], Greedy(max_new_tokens=100), [2])[0]
    assert tokenizer.decode(written.ids, skip_special_tokens=True).startswith(STORY)
    # ids of sentencepiece 0.2.3 with tok512.model
    known = {
        "Hello  world": [346, 306, 414, 263, 304, 341],
        "a\n\nb\tc": [261, 13, 13, 430, 12, 429],
        "你好": [410, 231, 192, 163, 232, 168, 192],
        "\n hi": [410, 13, 270, 417],
        "   ": [],
    }
    for text, ids in known.items():
        assert tokenizer(text)["input_ids"] == [1, *ids]


def test_files_that_are_something_else_are_refused_by_name(tmp_path: Path) -> None:
    path, _, _ = _model_bin(tmp_path / "model.bin", tied=True)
    tokenizer = tokenizer_bin(tmp_path / "tokenizer.bin")
    (tmp_path / "short.bin").write_bytes(path.read_bytes()[:-4])
    (tmp_path / "other.bin").write_bytes(b"ak42" + bytes(252))
    (tmp_path / "cut.bin").write_bytes(tokenizer.read_bytes()[:-3])
    for name, words in (("short.bin", "cut off"), ("other.bin", "7 sizes"), ("absent.bin", "cannot be read")):
        with pytest.raises(UserError, match=words):
            read_model(tmp_path / name)
    for name, words in (("cut.bin", "breaks off"), ("other.bin", "breaks off|no bytes")):
        with pytest.raises(UserError, match=words):
            read_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="272 tokens"):
        convert(path, tokenizer_bin(tmp_path / "more.bin", [*PIECES, "lo"]), tmp_path / "folder")
