"""The encoder: cut forward = whole forward, padding changes nothing, saved = loaded, cached = computed; what is no encoder is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from multistep.evaluate import EncoderText, Engine, Rows, encode, head_logits, keep_hidden
from multistep.models.encoder import load_backbone, load_encoder, new_backbone, pad, pool, save_encoder, set_dropout
from multistep.strategy import FineTune
from multistep.tune.fine_tune import training_rows
from multistep.types import UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")
LAYERS = 3


@pytest.fixture
def model(make_encoder: Callable) -> torch.nn.Module:
    return make_encoder(layers=LAYERS).eval()


# ---------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("cut", range(1, LAYERS + 1))
@torch.no_grad()
def test_the_forward_pass_can_be_cut_anywhere(model, make_rows: Callable, cut: int) -> None:
    ids_BT, mask_BT = make_rows(9).inputs(np.arange(9))
    hidden_BTD = model.lower(ids_BT, mask_BT, cut)
    assert torch.equal(model.upper(hidden_BTD, mask_BT, cut), model.features(ids_BT, mask_BT))
    assert torch.equal(model(hidden_BTD, mask_BT, cut), model(ids_BT, mask_BT))


@torch.no_grad()
def test_the_layers_one_by_one_are_the_backbone(model, make_rows: Callable) -> None:
    ids_BT, mask_BT = make_rows(9).inputs(np.arange(9))
    whole = model.backbone(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state
    assert torch.allclose(model.features(ids_BT, mask_BT), pool(whole, mask_BT), atol=1e-5)


@torch.no_grad()
def test_states_that_are_kept_go_on_to_a_higher_layer(model, make_rows: Callable) -> None:
    whole, by_steps = make_rows(9), make_rows(9)
    keep_hidden(model, whole, 2)
    keep_hidden(model, by_steps, 1)
    first = by_steps.hidden_SD
    keep_hidden(model, by_steps, 2)
    assert by_steps.cut == whole.cut == 2 and first is not None and by_steps.hidden_SD is not None
    assert not torch.allclose(first, by_steps.hidden_SD)
    assert torch.allclose(whole.hidden_SD, by_steps.hidden_SD, atol=1e-5)


@torch.no_grad()
def test_the_first_rows_keep_what_is_kept(model, make_rows: Callable) -> None:
    rows = make_rows(9)
    whole = encode(model, rows, cut=2)
    few = rows.beginning(4)
    assert few.cut == 2 and few.hidden_SD is not None and len(few.hidden_SD) == int(rows.lengths_N[:4].sum())
    np.testing.assert_allclose(encode(model, few), whole[:4], atol=1e-5)
    assert rows.targets is not None and few.targets is not None and torch.equal(few.targets, rows.targets[:4])


class Work:
    """Rows of two splits, and encoders by the states they come from."""

    watch = None

    def __init__(self, rows: Callable, states: dict[str | None, torch.nn.Module]):
        self.splits, self.states = {"train": rows(9), "control": rows(6)}, states

    def rows(self, split: str, max_length: int) -> Rows:
        return self.splits[split]

    def base(self) -> torch.nn.Module:
        return self.states[None]

    def fits_hidden(self, rows: Rows) -> bool:
        return True


def test_states_below_what_is_trained_are_those_of_the_state_it_starts_from(
    make_encoder: Callable, make_rows: Callable
) -> None:
    first, trained = make_encoder(layers=LAYERS).eval(), make_encoder(layers=LAYERS).eval()
    with torch.no_grad():
        trained.layers()[0].output.dense.weight.mul_(1.5)
    top = make_encoder(layers=LAYERS).eval()
    with torch.no_grad():
        top.layers()[2].output.dense.weight.mul_(1.5)
    states = {None: first, "head": first, "whole": trained, "top": top}
    bench = SimpleNamespace(work=Work(make_rows, states))

    def hidden(layers: int, start: str | None) -> torch.Tensor:
        rows = training_rows(bench, FineTune(layers=layers, max_length=64), states[start], start)
        assert isinstance(rows, Rows) and rows.cut == LAYERS - layers
        return rows.hidden_SD if rows.hidden_SD is not None else torch.zeros(0)

    def expected(model: torch.nn.Module, cut: int) -> torch.Tensor:
        rows = make_rows(9)
        keep_hidden(model, rows, cut)
        return rows.hidden_SD

    once = hidden(2, "head")
    assert torch.equal(once, expected(first, 1)) and hidden(2, "top") is once, "kept, where nothing below has changed"
    assert torch.allclose(hidden(1, "head"), expected(first, 2), atol=1e-5)
    assert torch.equal(hidden(1, "whole"), expected(trained, 2))
    assert torch.equal(hidden(2, "head"), expected(first, 1))
    assert hidden(LAYERS, "whole").numel() == 0, "all layers read token ids"


def test_frozen_features_are_never_made_of_another_states_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a run that was given more time: the hidden states that are kept are those of the state that training starts from."""
    import shutil

    import runs

    from multistep import data
    from multistep.labels import task_for
    from multistep.tune.workbench import Workbench

    monkeypatch.setenv("MULTISTEP_CACHE", str(tmp_path / "cache"))
    config = runs.config(
        runs.write_rows(tmp_path / "rows.csv", 90), tmp_path / "run", runs.tiny_encoder(tmp_path / "encoder")
    )
    dataset = data.load(config.data, task=config.task, text=config.text, label=config.label, seed=config.seed)
    work = Workbench(config, dataset, task_for(dataset), tmp_path / "run")
    assert work.find_encoder() == ""
    wanted_ND, _ = work.features("train", 32, bf16=False)
    rows, other = work.rows("train", 32), work.encoder()
    with torch.no_grad():
        other.layers()[0].output.dense.weight.mul_(1.5)
    keep_hidden(other, rows, 1)
    rows.below = "05-trunk"
    for cut in (0, 1):
        for cached in (True, False):
            if not cached:
                shutil.rmtree(tmp_path / "cache")
            kept, hidden_SD = rows.cut, rows.hidden_SD
            found_ND, from_cache = work.features("train", 32, bf16=False, cut=cut)
            assert from_cache == cached
            np.testing.assert_allclose(found_ND, wanted_ND, atol=1e-5)
            assert (rows.cut, rows.below) == (kept, "05-trunk") and rows.hidden_SD is hidden_SD
    rows.hidden_SD, rows.cut = None, 0  # what is kept from here on is that state's as well
    np.testing.assert_allclose(work.features("train", 32, bf16=False, cut=1)[0], wanted_ND, atol=1e-5)
    assert rows.cut == 0


@torch.no_grad()
def test_an_encoder_that_cannot_be_cut(model, make_rows: Callable) -> None:
    rows = make_rows(9)
    features_ND = encode(model, rows)
    model.config.model_type = "other"
    assert model.n_layers == 0 and list(model.layers()) == []
    np.testing.assert_allclose(encode(model, rows), features_ND, atol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(model, make_rows: Callable) -> None:
    rows = make_rows(6)
    alone = torch.cat([model.features(*rows.inputs(np.array([i]))) for i in range(6)])
    ids_BT, mask_BT = pad(rows.ids, 0)
    together = model.features(ids_BT, mask_BT)
    wide_ids = torch.nn.functional.pad(ids_BT, (0, 20), value=57)  # whatever stands there
    wide_mask = torch.nn.functional.pad(mask_BT, (0, 20), value=False)
    assert float((together - alone).abs().max()) < 1e-5
    assert float((model.features(wide_ids, wide_mask) - alone).abs().max()) < 1e-5


def test_pool_is_the_mean_of_real_tokens_with_a_mean_square_of_one() -> None:
    hidden_BTD = torch.randn(2, 4, 8)
    mask_BT = torch.tensor([[True, True, False, False], [False] * 4])
    pooled_BD = pool(hidden_BTD, mask_BT)
    mean_D = hidden_BTD[0, :2].mean(0)
    assert torch.allclose(pooled_BD[0], mean_D / mean_D.square().mean().sqrt(), atol=1e-5)
    assert bool((pooled_BD[1] == 0).all()), "a text of no tokens has no features"


def test_pad() -> None:
    ids_BT, mask_BT = pad([np.array([5, 6, 7], np.int32), np.array([8], np.int32), np.array([], np.int32)], 1)
    assert ids_BT.tolist() == [[5, 6, 7], [8, 1, 1], [1, 1, 1]] and ids_BT.dtype == torch.int64
    assert mask_BT.tolist() == [[True] * 3, [True, False, False], [False] * 3]


def test_the_head_starts_at_zero_and_dropout_is_live(model) -> None:
    from multistep.models.encoder import Encoder

    fresh = Encoder(new_backbone(50, 0, 32, 1, 16, seed=0), 4)
    assert not any(bool(p.any()) for p in fresh.head.parameters())
    probabilities = {m.p for m in fresh.modules() if isinstance(m, torch.nn.Dropout)}
    set_dropout(fresh, 0.25)
    assert probabilities == {0.0} and {m.p for m in fresh.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_new_weights_come_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = (new_backbone(50, 0, 32, 1, 16, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert not torch.equal(one["embeddings.word_embeddings.weight"], other["embeddings.word_embeddings.weight"])


# ---------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("cut", [1, 2])
def test_cached_hidden_states_give_the_same_logits(model, make_rows: Callable, cut: int) -> None:
    plain, cached = make_rows(40), make_rows(40)
    features_ND = encode(model, cached, cut=cut)
    assert (
        cached.cut == cut
        and cached.hidden_SD is not None
        and cached.hidden_SD.shape == (int(cached.lengths_N.sum()), 32)
    )
    np.testing.assert_array_equal(features_ND, encode(model, plain))
    np.testing.assert_allclose(encode(model, cached), features_ND, atol=1e-5)
    rows = np.array([3, 17, 0, 39])
    with torch.no_grad():
        a = model(*plain.inputs(rows))
        b = model(*cached.inputs(rows), cached.cut)
    assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(plain.load(rows)[1], cached.load(rows)[1])


def test_features_come_in_the_order_of_the_rows(model, make_rows: Callable) -> None:
    rows = make_rows(30)
    features_ND = encode(model, rows)
    for i in (0, 13, 29):
        np.testing.assert_allclose(encode(model, rows.subset(np.array([i])))[0], features_ND[i], atol=1e-5)
    assert not model.training


def test_subset_keeps_ids_and_targets(make_rows: Callable) -> None:
    rows = make_rows(10)
    part = rows.subset(np.array([7, 2]))
    assert np.array_equal(part.ids[0], rows.ids[7]) and torch.equal(part.targets, rows.targets[[7, 2]])
    assert int(part.lengths_N.sum()) == len(rows.ids[7]) + len(rows.ids[2])


def test_head_logits_are_those_of_the_model(model, make_rows: Callable) -> None:
    rows = make_rows(8)
    logits_NK = head_logits(model, encode(model, rows))
    with torch.no_grad():
        whole = model(*rows.inputs(np.arange(8))).numpy()
    assert logits_NK.dtype == np.float64
    np.testing.assert_allclose(logits_NK, whole, atol=1e-5)


def test_an_encoder_as_a_text_model(model) -> None:
    def tokenize(texts):
        return [np.array([1, *(ord(c) % 90 + 5 for c in t), 2], np.int32) for t in texts]

    engine = Engine({"encoder": EncoderText(model, tokenize, 0)})
    scaled = EncoderText(model, tokenize, 0, scale=2.0, mean=-1.0)
    texts = ["one", "", "a longer text than the others"]
    logits_NK = engine.logits("encoder", texts)
    assert logits_NK.shape == (3, 3)
    np.testing.assert_allclose(scaled.logits(texts), logits_NK * 2 - 1)
    np.testing.assert_allclose(engine.logits("encoder", texts[2:]), logits_NK[2:], atol=1e-5)
    assert engine.logits("encoder", []).shape == (0, 3)


# ---------------------------------------------------------------------------------------------- on disk


def test_saved_is_loaded_bitwise(model, make_rows: Callable, tmp_path: Path) -> None:
    from transformers import AutoModel

    save_encoder(model, tmp_path)
    again = load_encoder(tmp_path)
    rows = make_rows(12)
    assert not again.training and again.head.out_features == 3
    np.testing.assert_array_equal(encode(again, rows), encode(model, rows))
    np.testing.assert_array_equal(head_logits(again, encode(again, rows)), head_logits(model, encode(model, rows)))
    found = again.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in model.state_dict().items())
    backbone = AutoModel.from_pretrained(str(tmp_path)).eval()
    ids_BT, mask_BT = rows.inputs(np.arange(12))
    with torch.no_grad():
        hidden = backbone(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state
    np.testing.assert_allclose(pool(hidden, mask_BT).numpy(), encode(model, rows), atol=1e-5)


def test_saved_again_is_the_same_file(model, tmp_path: Path) -> None:
    for name, found in (("a", model), ("b", None), ("c", None)):
        save_encoder(found or load_encoder(tmp_path / chr(ord(name) - 1)), tmp_path / name)
    b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("b", "c"))
    assert b == c and b == (tmp_path / "a" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_a_decoder_is_no_encoder(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=rf"model: .* is not an encoder but '{kind}'\. Give an encoder") as caught:
        load_backbone(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_bert_that_was_made_a_decoder_is_no_encoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "is_decoder": True}))
    with pytest.raises(UserError, match="is not an encoder"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("config", [None, "{", '{"model_type": "no-such-type"}', '{"model_type": "bert"}', "{}"])
def test_what_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str | None) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(
        UserError, match=r"model: .* cannot be loaded \(.*\)\. Give a folder with config\.json"
    ) as caught:
        load_backbone(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model: '.*nowhere' cannot be loaded"):
        load_backbone(str(tmp_path / "nowhere"))


def test_pickled_weights_are_not_loaded(model, tmp_path: Path) -> None:
    model.backbone.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.backbone.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(tmp_path))


def test_truncated_weights_are_named(model, tmp_path: Path) -> None:
    save_encoder(model, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(tmp_path))


def test_rows_without_targets_are_for_prediction(model) -> None:
    rows = Rows([np.array([1, 2], np.int32)], 0, "cpu")
    assert rows.inputs(np.array([0]))[0].shape == (1, 2)
    with pytest.raises(AssertionError):
        rows.load(np.array([0]))
