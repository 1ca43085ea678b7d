"""Laws of adapters: begins as the identity, trains alone, folds in without a change, survives its files."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multistep.generate import generate
from multistep.models.adapter import (
    Lora,
    Targets,
    adapter_weights,
    add_adapter,
    is_adapted,
    load_adapter,
    merged,
    save_adapter,
    target_layers,
)
from multistep.models.decoder import new_decoder
from multistep.models.seq2seq import new_seq2seq
from multistep.models.step import CachedDecoder, CachedSeq2Seq, LlamaSteps, M2MSteps, stepper_of
from multistep.predictors.decoding import Greedy
from multistep.types import UserError

pytest.importorskip("peft")
IDS = {"pad": 0, "bos": 1, "eos": 2}
PROMPTS = [np.random.default_rng(n).integers(5, 60, size=n) for n in (4, 7, 2)]
KINDS = ("decoder", "seq2seq", "gpt2")


@pytest.fixture(autouse=True)
def _one_thread(torch_seeded: None) -> None: ...


def _base(kind: str) -> Any:
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    return (new_decoder if kind == "decoder" else new_seq2seq)(60, 32, 2, 64, IDS, 0).eval()


def _logits(model: Any) -> torch.Tensor:
    ids = torch.from_numpy(PROMPTS[1])[None]
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def _train(model: Any, updates: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.from_numpy(PROMPTS[1])[None]
    model.train()
    for _ in range(updates):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_an_adapter_begins_as_the_identity_and_trains_alone(kind: str, targets: Targets) -> None:
    model = _base(kind)
    before, weights = _logits(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    add_adapter(model, Lora(rank=4, targets=targets))
    assert torch.equal(_logits(model), before) and is_adapted(model)
    ours = dict(adapter_weights(model))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(ours)
    first = {n: p.detach().clone() for n, p in ours.items()}
    _train(model)
    assert not torch.equal(_logits(model), before)
    assert all(not torch.equal(p, first[n]) for n, p in ours.items())
    now = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if n not in ours}
    assert now.keys() == weights.keys() and all(torch.equal(p, weights[n]) for n, p in now.items())


@pytest.mark.parametrize("kind", KINDS)
def test_folded_in_it_is_the_same_model_of_plain_modules(kind: str) -> None:
    model = _base(kind)
    names = [n for n, _ in model.named_parameters()]
    add_adapter(model, Lora(rank=4, dropout=0.1))
    _train(model)
    whole = merged(model)
    torch.testing.assert_close(_logits(whole), _logits(model), rtol=1e-5, atol=1e-5)
    assert [n for n, _ in whole.named_parameters()] == names and not is_adapted(whole) and is_adapted(model)
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert tied and all(p.requires_grad for p in whole.parameters())
    found = [[w.ids for w in generate(m, PROMPTS, Greedy(max_new_tokens=12), [2])] for m in (model, whole)]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_its_files_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    import peft

    model, base = _base(kind), _base(kind)
    add_adapter(model, Lora(rank=3, alpha=6))
    _train(model)
    save_adapter(model, tmp_path / "ours", base="./base")
    theirs = peft.PeftModel.from_pretrained(_base(kind), str(tmp_path / "ours"))
    assert theirs.peft_config["default"].base_model_name_or_path == "./base"
    torch.testing.assert_close(_logits(theirs), _logits(model), rtol=0, atol=0)
    load_adapter(base, tmp_path / "ours")
    torch.testing.assert_close(_logits(base), _logits(model), rtol=0, atol=0)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {n for n, _ in adapter_weights(base)}
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = _base(kind)
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(_logits(again), _logits(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "plain", "adapted"), [("decoder", LlamaSteps, CachedDecoder), ("seq2seq", M2MSteps, CachedSeq2Seq)]
)
def test_writing_goes_through_the_adapter(kind: str, plain: type, adapted: type) -> None:
    model = _base(kind)
    assert type(stepper_of(model)) is plain
    add_adapter(model, Lora(rank=4))
    assert type(stepper_of(model)) is adapted
    _train(model, 20)
    assert type(stepper_of(merged(model))) is plain
    for prompt, written in zip(PROMPTS, generate(model, PROMPTS, Greedy(max_new_tokens=12), [2]), strict=True):
        ids = torch.from_numpy(prompt)[None]
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)[
            0
        ].tolist()
        assert written.ids == [t for t in theirs[1 if kind == "seq2seq" else len(prompt) :] if t not in (0, 2)]


def test_targets_are_found_in_any_architecture() -> None:
    llama = _base("decoder")
    assert target_layers(llama, "attention") == (["k_proj", "o_proj", "q_proj", "v_proj"], False)
    assert "lm_head" not in target_layers(llama, "all")[0] and len(target_layers(llama, "all")[0]) == 7
    assert target_layers(_base("gpt2"), "all") == (["c_attn", "c_fc", "c_proj"], True)
    # c_proj ends the attention and the inner layers alike: full names
    assert target_layers(_base("gpt2"), "attention")[0] == [
        f"transformer.h.{n}.attn.{m}" for n in range(2) for m in ("c_attn", "c_proj")
    ]


def test_the_same_seed_gives_the_same_adapter() -> None:
    models = [_base("decoder") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(1)  # where the generator stands does not matter, and it stays there
        state = torch.get_rng_state()
        add_adapter(model, Lora(rank=2), seed)
        assert torch.equal(torch.get_rng_state(), state)
    a, b, c = ([p.detach() for n, p in adapter_weights(m) if "lora_A" in n] for m in models)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_a_fork_has_an_adapter_of_its_own() -> None:
    model = _base("decoder")
    add_adapter(model, Lora(rank=2))
    twin, before = copy.deepcopy(model), _logits(model)
    _train(twin)
    assert torch.equal(_logits(model), before)


def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _base("decoder")
    add_adapter(model, Lora(rank=2))
    with pytest.raises(UserError, match="already"):
        add_adapter(model, Lora())
    save_adapter(model, tmp_path)
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(new_decoder(60, 64, 2, 64, IDS, 0), tmp_path)
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(new_decoder(60, 32, 3, 64, IDS, 0), tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_adapter(_base("decoder"), tmp_path / "absent")
    with pytest.raises(ValueError, match="no adapter"):
        save_adapter(_base("decoder"), tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'multistep\[lora\]'"):
        add_adapter(_base("decoder"), Lora())
