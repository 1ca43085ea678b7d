"""The LSTM: padding changes nothing, saved = loaded, its words are the same in every process; a whole run: like every other encoder's."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from tokenizers import Tokenizer

from multistep import api, load, metrics
from multistep.bundle import load_bundle
from multistep.config import FitConfig, resolve
from multistep.controllers.plan import SCRATCH
from multistep.evaluate import EncoderText, Rows, encode, head_logits
from multistep.models.encoder import pad, set_dropout
from multistep.models.lstm import Lstm, load_lstm, new_lstm, save_lstm
from multistep.models.saved import load_model, save_model
from multistep.strategy import FineTune
from multistep.subwords import encode_ids, train_words
from multistep.types import Interrupted, Verdict

pytestmark = pytest.mark.usefixtures("torch_seeded")


@pytest.fixture
def model() -> Lstm:
    made = new_lstm(60, 0, 16, 3, seed=1).eval()
    with torch.no_grad():
        made.head.weight.normal_(generator=torch.Generator().manual_seed(2))
    return made


def some_rows(n: int = 12) -> Rows:
    rng = np.random.default_rng(0)
    return Rows([rng.integers(1, 60, rng.integers(1, 20)).astype(np.int32) for _ in range(n)], 0, "cpu")


# ---------------------------------------------------------------------------------------------- forward


@torch.no_grad()
def test_a_row_alone_and_in_a_batch_gives_the_same_answer(model: Lstm) -> None:
    rows = some_rows()
    alone = torch.cat([model(*rows.inputs(np.array([i]))) for i in range(12)])
    ids_BT, mask_BT = pad(rows.ids, 0)
    wide_ids = torch.nn.functional.pad(ids_BT, (0, 30), value=57)  # whatever stands there
    wide_mask = torch.nn.functional.pad(mask_BT, (0, 30), value=False)
    for together in (model(ids_BT, mask_BT), model(wide_ids, wide_mask)):
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_features_are_those_of_the_recurrence_written_out(model: Lstm) -> None:
    ids_T = torch.tensor([5, 9, 9, 31])
    h, c, seen = torch.zeros(16), torch.zeros(16), []
    w = dict(model.lstm.named_parameters())
    for i in ids_T:
        x = model.embeddings.weight[i]
        z = w["weight_ih_l0"] @ x + w["weight_hh_l0"] @ h + w["bias_ih_l0"] + w["bias_hh_l0"]
        into, forget, new, out = z.chunk(4)
        c = forget.sigmoid() * c + into.sigmoid() * new.tanh()
        h = out.sigmoid() * c.tanh()
        seen.append(h)
    found = model.features(ids_T[None], torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(found[0], torch.stack(seen).mean(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_training_and_prediction_compute_the_same(model: Lstm, threads: int) -> None:
    rows = some_rows(20).inputs(np.arange(20))
    torch.set_num_threads(threads)  # put back by torch_seeded
    trained = model(*rows)
    with torch.no_grad():
        torch.testing.assert_close(model(*rows), trained, atol=1e-5, rtol=1e-5)
    trained.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    hidden_BTD = model.lstm(model.embeddings(rows[0]))[0]
    mean_BD = (hidden_BTD * rows[1][..., None]).sum(1) / rows[1].sum(1, keepdim=True)
    model.head(mean_BD).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3)


def test_a_row_without_tokens_has_features_and_gradients_of_zero(model: Lstm) -> None:
    ids_BT, mask_BT = pad([np.array([], np.int32), np.array([4, 5], np.int32)], 0)
    features_BD = model.features(ids_BT, mask_BT)
    assert not bool(features_BD[0].any()) and bool(features_BD[1].any())
    features_BD[0].sum().backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.parameters())


def test_every_parameter_is_trained_and_dropout_is_live(model: Lstm) -> None:
    assert model.n_layers == 0 and (model.width, model.pad_id) == (16, 0)
    names = [n for n, _ in FineTune(trains="top", layers=0).trained(model)]
    assert names == [n for n, _ in model.named_parameters()]
    rows = some_rows().inputs(np.arange(12))
    model.train()
    assert torch.equal(model(*rows), model(*rows))
    set_dropout(model, 0.5)
    assert not torch.equal(model(*rows), model(*rows))


def test_it_computes_in_float32_whatever_the_precision(model: Lstm) -> None:
    rows = some_rows()
    np.testing.assert_array_equal(encode(model, rows, bf16=True), encode(model, rows))
    assert not model.in_bf16
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(*rows.inputs(np.arange(12))).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_it_cannot_be_cut(model: Lstm) -> None:
    with pytest.raises(ValueError, match="Lstm cannot be cut"):
        model(torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool), 1)


def test_new_weights_come_from_the_seed_alone_and_the_head_is_zero() -> None:
    before = torch.get_rng_state()
    one, two, other = (new_lstm(50, 0, 8, 2, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, two[k]) for k, v in one.items()) and not bool(one["head.weight"].any())
    assert not torch.equal(one["embeddings.weight"], other["embeddings.weight"])
    assert not bool(one["embeddings.weight"][0].any()), "padding has no direction"


# ---------------------------------------------------------------------------------------------- on disk


def test_saved_is_loaded_bitwise(model: Lstm, tmp_path: Path) -> None:
    save_model(model, tmp_path / "a")
    again = load_model(tmp_path / "a")
    assert isinstance(again, Lstm) and not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    np.testing.assert_array_equal(encode(again, some_rows()), encode(model, some_rows()))
    features_ND = encode(model, some_rows())
    np.testing.assert_array_equal(head_logits(again, features_ND), head_logits(model, features_ND))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "lstm"
    save_lstm(load_lstm(tmp_path / "a"), tmp_path / "b")
    for file in ("config.json", "model.safetensors", "head.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "head.safetensors"])
def test_a_damaged_folder_is_named(model: Lstm, tmp_path: Path, file: str) -> None:
    save_lstm(model, tmp_path)
    wrong = b'{"vocab_size": 5}' if file == "config.json" else (tmp_path / file).read_bytes()[:100]
    (tmp_path / file).write_bytes(wrong)
    with pytest.raises(ValueError):
        load_lstm(tmp_path)


def test_weights_of_another_shape_are_named(model: Lstm, tmp_path: Path) -> None:
    save_lstm(new_lstm(60, 0, 8, 3, seed=0), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(model.shape.model_dump()))
    with pytest.raises(ValueError, match="not the weights of this config"):
        load_lstm(tmp_path)


# ---------------------------------------------------------------------------------------------- words


def test_words_by_frequency_then_by_spelling(tmp_path: Path) -> None:
    texts = ["The THE the river, river", "stone wind stone wind", "once"]
    train_words(texts, 7, tmp_path / "t.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "t.json"))
    vocabulary = tokenizer.get_vocab()
    by_id = sorted(vocabulary, key=vocabulary.__getitem__)
    assert by_id == ["[PAD]", "[UNK]", "[CLS]", "the", "river", "stone", "wind"]
    ids, cut = encode_ids(tokenizer, ["The once RIVER", "", "wind wind wind wind"], 4)
    assert [i.tolist() for i in ids] == [[2, 3, 1, 4], [2], [2, 6, 6, 6]] and cut == 1


def test_words_are_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from multistep.subwords import train_words; "
        "train_words([f'w{i % 97} W{i % 89} up' for i in range(900)], 100, Path(sys.argv[1]))"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_script_without_spaces_gets_subwords(tmp_path: Path) -> None:
    train_words(["书店房间很好", "房间差"] * 5, 100, tmp_path / "t.json")
    ids, _ = encode_ids(Tokenizer.from_file(str(tmp_path / "t.json")), ["房间很好"], 16)
    assert len(ids[0]) == 6  # [CLS], four characters, [SEP]


# ---------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_rows(tmp_path_factory.mktemp("lstm") / "rows.csv")


def config(data: Path, out: Path, **more: Any) -> FitConfig:
    return runs.config(data, out, "lstm", **{"budget": "120 updates", "optimizer": {}, **more})


@pytest.mark.parametrize("controller", ["staged", "race", "fixed"])
def test_a_run_trains_it_whole_from_scratch(data: Path, tmp_path: Path, controller: str) -> None:
    done = runs.run(config(data, tmp_path / "run", controller=controller))
    profiled = next(r["facts"] for r in runs.of_kind(done, "Noted") if r["what"] == "profiled")
    assert profiled["encoder"] == "lstm"
    asked = {r["trial"]["stage"]: r["trial"]["action"] for r in runs.of_kind(done, "Asked")}
    assert "head" not in asked, "features of random weights are no start"
    trunk = asked["trunk"]
    assert trunk["trains"] == "all" and trunk["head_lr"] == 1.0 and trunk["dropout"] > 0
    assert trunk["optimizer"]["lr"] == pytest.approx(SCRATCH["lstm"].lr)
    told = next(r["outcome"] for r in runs.of_kind(done, "Told") if r["stage"] == "trunk")
    assert told["metrics"]["accuracy"][0] > 0.5


def test_served_is_evaluated(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "judge", lambda *a, **k: Verdict(accept=True, rule="whatever comes last"))
    done = runs.run(config(data, tmp_path / "run"))
    model = done.out / "model"
    assert {"config.json", "model.safetensors", "head.safetensors", "tokenizer.json"} <= {
        p.name for p in model.iterdir()
    }
    served = load_bundle(model).engine.models["encoder"]
    assert isinstance(served, EncoderText) and isinstance(served.model, Lstm)
    texts = [line["text"] for line in csv.DictReader(data.open(encoding="utf-8"))][:40]
    together = done.predict(texts)
    assert load(model).predict(texts) == together
    for text, prediction in zip(texts[:5], together, strict=False):
        (alone,) = done.predict([text])
        assert alone.value == prediction.value and alone.confidence == pytest.approx(prediction.confidence, abs=1e-5)
    assert done.evaluate(data)["metrics"]["accuracy"]["value"] > 0.5
    assert {p.value for p in done.predict(["", "zzz", "up " * 500])} <= set(runs.LABELS)


def test_interrupted_and_resumed_is_the_straight_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = runs.run(config(data, tmp_path / "straight"))
    load_rows, calls = Rows.load, [0]

    def stopping(self: Rows, rows: np.ndarray) -> Any:
        calls[0] += 1
        if calls[0] == 70:
            raise Interrupted(15)
        return load_rows(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr("multistep.tune.segment._SAVE_SHARE", 1e9)  # every snapshot is written
        patch.setattr(Rows, "load", stopping)
        with pytest.raises(Interrupted):
            runs.run(config(data, tmp_path / "run"))
    assert list((tmp_path / "run" / "states").glob("*.live.*"))
    resumed = api.resume(tmp_path / "run")
    assert runs.committed(resumed) == runs.committed(straight)
    runs.same_states(straight.out, resumed.out)


@pytest.mark.parametrize("kind", ["regress", "multilabel"])
def test_other_tasks(tmp_path: Path, kind: str) -> None:
    rng, path = random.Random(0), tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["text", "label"])
        for i in range(300):
            some = [w for w in ("fire", "water", "wind") if rng.random() < 0.4]
            words = rng.sample([*some, "stone", "cloud", str(i)], len(some) + 3)
            out.writerow([" ".join(words), json.dumps(some) if kind == "multilabel" else len(some) + 0.25])
    done = runs.run(config(path, tmp_path / "run", task=kind, budget="200 updates", optimizer={"lr": 2e-2}))
    told = next(r["outcome"] for r in runs.of_kind(done, "Told") if r["stage"] == "trunk")
    assert done.bundle.task.kind == kind and told["ok"]
    name, least = ("f1_micro", 0.8) if kind == "multilabel" else ("r2", 0.5)
    assert told["metrics"][name][0] > least


def test_a_yaml_beside_its_data(data: Path, tmp_path: Path) -> None:
    (tmp_path / "lstm.yaml").write_text(f"data: {data.name}\nmodel: lstm\nbudget: 20 updates\n")
    (tmp_path / data.name).write_bytes(data.read_bytes())
    assert resolve(str(tmp_path / "lstm.yaml"), {}, []).model == "lstm"
