"""Whole runs on small data: every task, controller and source of a model; what is served is what was evaluated."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from transformers import AutoModel, AutoTokenizer

from multistep import api, cli, data, metrics
from multistep.report.conclusion import conclusion
from multistep.types import UserError, Verdict


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return runs.write_rows(tmp_path / "rows.csv")


def write(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.mark.parametrize("controller", ["staged", "race", "fixed"])
@pytest.mark.parametrize("budget", ["200 updates", "12000 tokens"])
def test_every_controller_ends_with_a_served_model(
    rows: Path, encoder: Path, tmp_path: Path, controller: str, budget: str
) -> None:
    cfg = runs.config(rows, tmp_path / "run", encoder, controller=controller, budget=budget, optimizer={})
    done = runs.run(cfg)
    assert runs.of_kind(done, "Finished") and len(runs.of_kind(done, "TestRead")) == 1
    assert done.summary()["metrics"]["accuracy"]["value"] > 0.5
    assert {p.value for p in done.predict(["alpha up 1", "down beta 2"])} <= set(runs.LABELS)
    assert "accuracy" in done.explain()


def test_what_is_served_is_what_was_evaluated(rows: Path, encoder: Path, tmp_path: Path) -> None:
    done = runs.run(runs.config(rows, tmp_path / "run", encoder))
    read = runs.of_kind(done, "TestRead")[0]["metrics"]["accuracy"]
    dataset = data.load(rows, seed=0)
    write(tmp_path / "test.csv", ["text", "label"], [[e.text, e.label] for e in dataset.test])
    again = api.load(tmp_path / "run").evaluate(tmp_path / "test.csv")
    assert again["metrics"]["accuracy"]["value"] == pytest.approx(read[0])
    alone = [done.predict([e.text])[0] for e in dataset.test[:5]]
    together = done.predict([e.text for e in dataset.test])[:5]
    for one, other in zip(alone, together, strict=True):
        assert one.value == other.value
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)


def test_a_linear_model_is_served_with_its_validation_rows(tmp_path: Path) -> None:
    rows = runs.write_rows(tmp_path / "rows.csv", rows=900, seed=5, noise=0.3)
    done = runs.run(runs.config(rows, tmp_path / "run", "none"))
    (trial,) = (t for t in done.summary()["trials"] if t["stage"] == "refit")
    assert trial["status"] == "committed" and trial["rule"].endswith(": not worse")
    dataset = data.load(rows, seed=0)
    solved = next(r for r in runs.of_kind(done, "Noted") if r.get("trial") == trial["id"])
    assert solved["facts"]["rows"] == len(dataset.train) + len(dataset.control) + len(dataset.calibration)
    info = json.loads((done.out / "model" / "multistep.json").read_text())
    assert info["states"] == {"linear": trial["id"]}, "it is served"
    judged = runs.of_kind(done, "Committed")[-1]["families"]["linear"]
    assert judged != trial["id"], "and what judged candidates are compared with is the one that was judged"
    read = runs.of_kind(done, "TestRead")[0]["metrics"]["accuracy"]
    write(tmp_path / "test.csv", ["text", "label"], [[e.text, e.label] for e in dataset.test])
    again = api.load(done.out).evaluate(tmp_path / "test.csv")["metrics"]["accuracy"]["value"]
    assert again == pytest.approx(read[0]), "the test is read with what is served"
    assert "refit: " in (done.out / "model" / "README.md").read_text()
    said = conclusion(done.summary())
    assert sum("learnt from the validation rows too" in s for s in said) == 1 and not any("improved" in s for s in said)


def test_a_linear_model_that_more_rows_harm_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control rows that are many and wrong."""
    rows = runs.write_rows(tmp_path / "rows.csv", rows=2400)
    dataset, wrong = data.load(rows, seed=0), {"north": "south", "south": "west", "west": "north"}
    control = [replace(e, label=wrong[e.label]) for e in dataset.control] * 10
    monkeypatch.setattr(data, "load", lambda *a, **k: replace(dataset, control=control))
    done = runs.run(runs.config(rows, tmp_path / "run", "none"))
    (trial,) = (t for t in done.summary()["trials"] if t["stage"] == "refit")
    assert trial["status"] == "rolled back" and trial["rule"].endswith(": worse")
    info = json.loads((done.out / "model" / "multistep.json").read_text())
    assert info["states"]["linear"] == runs.of_kind(done, "Committed")[-1]["families"]["linear"] != trial["id"]
    assert not (done.out / "states" / trial["id"]).exists()


def test_the_bundle_is_a_folder_others_can_load(
    rows: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "judge", lambda *a, **k: Verdict(accept=True, rule="whatever comes last"))
    done = runs.run(runs.config(rows, tmp_path / "run", encoder))
    model = done.out / "model"
    assert AutoModel.from_pretrained(model).config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(model)("alpha up")["input_ids"][0] == 2
    card = (model / "README.md").read_text()
    assert card.startswith("---") and "| accuracy" in card and "precision" in card and "north" in card
    assert "whatever comes last" in card and str(tmp_path) not in card
    info = json.loads((model / "multistep.json").read_text())
    assert str(tmp_path) not in json.dumps(info)


def test_regression(encoder: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    said = {"poor": 1.0, "fair": 2.5, "good": 4.0}
    lines: list[list[object]] = []
    for i in range(300):
        words = rng.choices(list(said), k=2)
        lines.append([f"{' and '.join(words)} {i}", round(sum(said[w] for w in words) / 2 + rng.gauss(0, 0.2), 2)])
    path = write(tmp_path / "scores.csv", ["text", "score"], lines)
    done = runs.run(runs.config(path, tmp_path / "run", encoder))
    assert done.bundle.task.kind == "regress"
    assert done.summary()["metrics"]["r2"]["value"] > 0.7
    assert done.predict(["good and good 1"])[0].value > done.predict(["poor and poor 1"])[0].value


def test_multilabel(encoder: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    lines: list[list[object]] = []
    for i in range(300):
        some = [w for w in ("fire", "water", "wind") if rng.random() < 0.4]
        lines.append([" ".join(rng.sample([*some, "stone", "cloud", str(i)], len(some) + 3)), json.dumps(some)])
    path = write(tmp_path / "tags.csv", ["text", "tags"], lines)
    done = runs.run(runs.config(path, tmp_path / "run", encoder))
    assert done.bundle.task.kind == "multilabel"
    assert done.summary()["metrics"]["f1_micro"]["value"] > 0.8
    assert done.predict(["fire water 3"])[0].value == ("fire", "water")


def test_binary_with_thresholds_for_f1(encoder: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    lines: list[list[object]] = []
    for i in range(500):
        rare = rng.random() < 0.12
        shown = rng.random() < (0.8 if rare else 0.05)
        lines.append([f"{'fire' if shown else 'stone'} {rng.choice(runs.WORDS)} {i}", "yes" if rare else "no"])
    path = write(tmp_path / "rare.csv", ["text", "label"], lines)
    done = runs.run(runs.config(path, tmp_path / "run", encoder, metric="f1_macro"))
    tried = [r["trial"]["action"] for r in runs.of_kind(done, "Asked") if r["trial"]["stage"] == "predict"]
    assert "thresholds" in {a["what"] for a in tried}
    assert done.summary()["metrics"]["f1_macro"]["value"] > 0.6


def test_without_a_pretrained_encoder(rows: Path, tmp_path: Path) -> None:
    done = runs.run(runs.config(rows, tmp_path / "none", "none"))
    assert any("--model none" in r["why"] for r in runs.of_kind(done, "Skipped"))
    assert not (done.out / "model" / "config.json").exists()


def test_a_text_that_the_encoder_cannot_read_gets_one_from_scratch(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multistep.tune import workbench

    monkeypatch.setattr(workbench, "default_encoders", lambda: iter([str(encoder)]))
    monkeypatch.setattr(workbench, "SCRATCH_WIDTH", 32)
    monkeypatch.setattr(workbench, "SCRATCH_LAYERS", 1)
    rng = random.Random(0)
    good, bad, other = "好棒喜欢推荐", "差坏失望退货", "书店房间电脑服务早餐"
    lines: list[list[object]] = []
    for _ in range(300):
        label = rng.random() < 0.5
        text = "".join(rng.choices(other, k=8)) + rng.choice(good if label else bad) + "".join(rng.choices(other, k=5))
        lines.append([text, "positive" if label else "negative"])
    path = write(tmp_path / "zh.csv", ["text", "label"], lines)
    done = runs.run(runs.config(path, tmp_path / "run", "auto", budget="150 updates"))
    profile = next(r for r in runs.of_kind(done, "Noted") if r["what"] == "profiled")
    assert profile["facts"]["encoder"] == "scratch"
    assert any(r["trial"]["stage"] == "trunk" for r in runs.of_kind(done, "Asked"))
    assert done.predict(["房间很好"])[0].value == "positive"


def test_more_budget_after_the_end(rows: Path, encoder: Path, tmp_path: Path) -> None:
    done = runs.run(runs.config(rows, tmp_path / "run", encoder, budget="100 updates"))
    before = len(done.records())
    more = api.resume(done.out, "+80 updates")
    twice = api.resume(more.out, "+80 updates")
    kinds = [r["kind"] for r in twice.records()]
    assert kinds.count("Finished") == 3 and kinds.count("Resumed") == 2 and len(kinds) > before
    assert twice.summary()["spent"]["updates"] <= 260 * 1.05
    with pytest.raises(UserError, match="cannot add"):
        api.resume(done.out, "+5m")


def test_the_same_seed_gives_the_same_run(rows: Path, encoder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        runs.run(runs.config(rows, tmp_path / name, encoder))
    runs.same_states(tmp_path / "a", tmp_path / "b")


def test_an_old_run_is_not_overwritten(rows: Path, encoder: Path, tmp_path: Path) -> None:
    runs.run(runs.config(rows, tmp_path / "run", encoder, budget="40 updates"))
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    with pytest.raises(UserError, match="there is a run already"):
        runs.run(runs.config(rows, tmp_path / "run", encoder))
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before


def test_changed_data_cannot_be_resumed(rows: Path, encoder: Path, tmp_path: Path) -> None:
    done = runs.run(runs.config(rows, tmp_path / "run", encoder, budget="40 updates"))
    runs.write_rows(rows, seed=5)
    with pytest.raises(UserError, match="data changed"):
        api.resume(done.out, "+40 updates")


def test_the_command_line_end_to_end(
    rows: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    words = ["fit", str(rows), f"model={encoder}", "budget=60 updates", "batch_size=8", "--out", out, "--json"]
    assert cli.run(words) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert 0 <= fitted["metrics"]["accuracy"]["value"] <= 1
    for verb in (
        ["explain", out],
        ["evaluate", out, str(rows)],
        ["predict", out, "alpha up"],
        ["predict", out, str(rows)],
    ):
        assert cli.run([*verb, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)


def test_text_longer_than_the_encoder_reads_is_counted(encoder: Path, tmp_path: Path) -> None:
    lines: list[list[object]] = [
        [f"{'up' if i % 2 else 'down'} " + " ".join(runs.WORDS * 3) + f" {i}", "ab"[i % 2]] for i in range(120)
    ]
    path = write(tmp_path / "long.csv", ["text", "label"], lines)
    done = runs.run(runs.config(path, tmp_path / "run", encoder, budget="40 updates", max_length=16))
    head = next(r["outcome"] for r in runs.of_kind(done, "Told") if r["stage"] == "head")
    assert head["facts"]["truncated"]["train"] > 50
    assert np.isfinite(head["metrics"]["log_loss"][0])
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize(
    "more",
    [
        {"optimizer": {"kind": "muon", "lr": 2e-3}, "schedule": {"kind": "wsd"}},
        {"optimizer": {"kind": "schedule_free", "lr": 5e-3}, "schedule": {"kind": "constant"}},
        {"optimizer": {"kind": "prodigy"}, "schedule": {"kind": "cosine"}},
        {"objective": {"kind": "r_drop"}, "dropout": 0.1},
        {"objective": {"kind": "cross_entropy", "class_weights": [1.0, 2.0, 1.0], "focal_gamma": 1.0}},
        {"objective": {"kind": "fgm", "epsilon": 0.05}, "layers": 2},
    ],
    ids=lambda more: "-".join(v["kind"] for v in more.values() if isinstance(v, dict)),
)
def test_members_are_asked_for_by_name(rows: Path, tmp_path: Path, encoder: Path, more: dict) -> None:
    done = runs.run(runs.config(rows, tmp_path / "run", encoder, **more))
    trunk = next(r["trial"]["action"] for r in runs.of_kind(done, "Asked") if r["trial"]["stage"] == "trunk")
    for part, wanted in more.items():
        if isinstance(wanted, dict):
            assert trunk[part]["kind"] == wanted["kind"]
    told = next(r["outcome"] for r in runs.of_kind(done, "Told") if r["stage"] == "trunk")
    assert told["ok"] and told["facts"]["train_loss"] > 0 and told["facts"]["progress"] > 0
    assert runs.of_kind(done, "TestRead") and done.predict(["alpha up"])[0].value in runs.LABELS


def test_an_objective_on_embeddings_trains_the_top_layers_from_token_ids(
    rows: Path, tmp_path: Path, encoder: Path
) -> None:
    objective = {"kind": "fgm", "epsilon": 0.05}
    done = runs.run(runs.config(rows, tmp_path / "run", encoder, objective=objective, layers=1, optimizer={"lr": 1e-3}))
    trunk = next(r["trial"] for r in runs.of_kind(done, "Asked") if r["trial"]["stage"] == "trunk")
    assert trunk["action"]["layers"] == 1
    told = next(r["outcome"] for r in runs.of_kind(done, "Told") if r["trial"] == trunk["id"])
    assert told["ok"] and told["facts"]["progress"] == 1.0
    said = [r["facts"]["rule"] for r in runs.of_kind(done, "Noted") if r["what"] == "input"]
    assert said and "from token ids" in said[0] and said[0] in done.explain()
    chosen = [r["facts"]["rule"] for r in runs.of_kind(done, "Noted") if r["what"] == "optimizer"]
    assert chosen == ["auto: adamw, whose lr was given"] and chosen[0] in done.explain()


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"kind": "mse"}, "does not fit the task classify"),
        ({"kind": "cross_entropy", "class_weights": [1.0, 2.0]}, "2 weights"),
    ],
)
def test_an_objective_that_does_not_fit_is_refused_before_anything_is_written(
    rows: Path, tmp_path: Path, encoder: Path, objective: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        runs.run(runs.config(rows, tmp_path / "run", encoder, objective=objective))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["encoder", "auto"])
def test_more_tokens_than_the_encoder_has_positions_are_refused(
    encoder: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it goes on; from scratch there are 512."""
    from multistep.tune import workbench

    monkeypatch.setattr(workbench, "default_encoders", lambda: iter([]))
    rows = runs.write_rows(tmp_path / "rows.csv", rows=120)
    given, name, most = (
        (str(encoder), "encoder", 64) if model == "encoder" else ("auto", "the encoder from scratch", 512)
    )
    cfg = runs.config(rows, tmp_path / "run", given, budget="40 updates", max_length=most + 1)
    line = f"max_length: {most + 1} tokens, but {name} has {most} positions"
    for attempt in (lambda: runs.run(cfg), lambda: api.resume(tmp_path / "run")):
        with pytest.raises(UserError, match=line) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert api.load(tmp_path / "run").predict(["alpha up"])[0].value, "the linear model stands"


@pytest.mark.parametrize(("model", "length"), [("none", 1024), ("lstm", 1024), ("encoder", 64), ("encoder", None)])
def test_texts_are_read_as_far_as_there_are_positions(
    encoder: Path, tmp_path: Path, model: str, length: int | None
) -> None:
    lines: list[list[object]] = [
        [f"{'up' if i % 2 else 'down'} " + " ".join(runs.WORDS * 40) + f" {i}", "ab"[i % 2]] for i in range(60)
    ]
    path = write(tmp_path / "long.csv", ["text", "label"], lines)
    given = str(encoder) if model == "encoder" else model
    more = {} if length is None else {"max_length": length}
    done = runs.run(runs.config(path, tmp_path / "run", given, budget="40 updates", **more))
    assert runs.of_kind(done, "TestRead")
    lengths = {t["trial"]["action"].get("max_length") for t in runs.of_kind(done, "Asked")} - {None}
    assert lengths == {"none": set(), "lstm": {1024}, "encoder": {64}}[model]


def test_positions_are_those_of_the_table(encoder: Path) -> None:
    from transformers import DebertaV2Config, DebertaV2Model, RobertaConfig, RobertaModel

    from multistep.models.encoder import Encoder, load_backbone
    from multistep.models.lstm import new_lstm

    size = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    roberta = RobertaModel(RobertaConfig(**size, max_position_embeddings=66, pad_token_id=1))
    relative = DebertaV2Model(
        DebertaV2Config(
            **size,
            max_position_embeddings=66,
            position_biased_input=False,
            relative_attention=True,
            pos_att_type="p2c|c2p",
        )
    )
    assert Encoder(load_backbone(str(encoder)), 2).positions == 64
    assert Encoder(roberta, 2).positions == 64, "two are those of padding"
    assert Encoder(relative, 2).positions is None and new_lstm(50, 0, 8, 2, seed=0).positions is None
    ids = torch.full((1, 64), 7)
    roberta(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 65), 7), attention_mask=torch.ones(1, 65))


def test_a_run_that_went_on_answers_with_its_new_model(rows: Path, tmp_path: Path) -> None:
    done = runs.run(runs.config(rows, tmp_path / "run", "none", budget="40 updates"))
    old = done.bundle
    assert done.bundle is old, "loaded once"
    done.resume("+20 updates")
    assert done.bundle is not old and done.predict(["alpha up"])[0].value in runs.LABELS


def test_fit_takes_the_options_of_the_command_line(rows: Path, tmp_path: Path) -> None:
    import inspect

    options = set(inspect.signature(cli.fit).parameters) - {"source", "overrides", "quiet", "as_json"}
    assert options == set(inspect.signature(api.fit).parameters) - {"source", "overrides", "quiet"}
    done = api.fit(rows, model="none", until="accuracy=0.2", budget="40 updates", out=tmp_path / "run")
    assert runs.of_kind(done, "Started")[0]["config"]["until"] == "accuracy=0.2"
    with pytest.raises(UserError, match="adapter: read by tasks that write"):
        api.fit(rows, model="none", adapter="lora", out=tmp_path / "other")
