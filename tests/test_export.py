"""Tests of exports: what other programs compute of them is what the model gives, by the very lines of their README."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import LABELS
from test_engines import TEXTS, encoder_text, needs, writer

from multistep import cli, dialogue
from multistep.api import load
from multistep.bundle import Bundle, load_bundle, write_bundle
from multistep.data.shapes import Layout
from multistep.export import checked, export
from multistep.export.checked import check_logits, check_texts
from multistep.generate import generate
from multistep.language_bundle import write_language_bundle
from multistep.models.linear import Linear
from multistep.predictors import Affine, Blend, Single, Temperature, Thresholds
from multistep.predictors.decoding import Beam, Greedy
from multistep.subwords import load_tokenizer
from multistep.tasks import Classify, Multilabel, Regress, Task
from multistep.tasks.writing import Writing
from multistep.text import NgramFeatures, Vectorizer
from multistep.types import UserError
from multistep.writing import Neural

TASK = Classify(labels=LABELS)
ENCODER = Single(model="encoder")
LONG = [*TEXTS[:5], " ".join(TEXTS), "strange ψ 好 letters"]


@pytest.fixture(autouse=True)
def _one_thread(torch_seeded: None) -> None: ...


def label_bundle(tmp_path: Path, kind: str = "bert", task: Task = TASK, predictor: Any = ENCODER) -> Path:
    model = encoder_text(tmp_path / "encoder", kind)
    if task.kind != "regress":
        model.scale, model.mean = 1.0, 0.0
    linear = Linear(np.zeros((0, 3), np.float32), np.zeros(3, np.float32), Vectorizer.fit(TEXTS, NgramFeatures())[0])
    tokenizer, folder = load_tokenizer(str(tmp_path / "encoder")), tmp_path / "run" / "model"
    folder.parent.mkdir()
    models: Any = {"encoder": model}
    if "linear" in predictor.models():
        linear.weights_DK = np.zeros((linear.vectorizer.width, 3), np.float32)
        models["linear"] = linear
    write_bundle(folder, task, predictor, models, tokenizer, 32, {})
    return folder


def logits_of(folder: Path, texts: list[str]) -> np.ndarray:
    bundle = load_bundle(folder)
    assert isinstance(bundle, Bundle)
    return bundle.scored(texts)[0]


def readme_lines(out: Path, texts: list[str]) -> dict[str, Any]:
    """What the lines of the README leave behind, run on other texts."""
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace('["a text", "another one"]', repr(texts)).replace(
        'folder, text = ".", "a text"', 'folder, text = ".", TEXT'
    )
    code = code.replace('"."', repr(str(out)))
    found: dict[str, Any] = {"TEXT": texts[0]}
    exec(compile(code, "README.md", "exec"), found)
    return found


@pytest.mark.parametrize("kind", ["bert", "distilbert", "lstm"])
def test_a_folder_s_lines_give_the_logits(tmp_path: Path, kind: str) -> None:
    predictor = Temperature(inner=ENCODER, temperature=1.7)
    folder, out = label_bundle(tmp_path, kind, predictor=predictor), tmp_path / "out"
    found = export(folder.parent, "folder", out)
    assert found.to == "folder" and "apart by" in found.agreement
    assert {"README.md", "head.safetensors", "model.safetensors", "config.json", "labels.json"} <= set(found.files)
    lines = readme_lines(out, LONG)
    np.testing.assert_allclose(lines["logits"].numpy(), logits_of(folder, LONG), atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "lstm"])
def test_an_onnx_graph_gives_the_logits(tmp_path: Path, kind: str) -> None:
    needs("onnxruntime")
    predictor = Thresholds(inner=Temperature(inner=ENCODER, temperature=0.6), offsets=(0.1, 0.0, -0.2))
    folder, out = label_bundle(tmp_path, kind, predictor=predictor), tmp_path / "out"
    export(folder, "onnx", out)
    lines = readme_lines(out, LONG)
    expected = logits_of(folder, LONG)
    np.testing.assert_allclose(lines["logits"], expected, atol=1e-4)
    facts = json.loads((out / "labels.json").read_text())
    assert facts["labels"] == list(LABELS) and facts["max_length"] == 32
    logp = lines["logits"] - np.log(np.exp(lines["logits"]).sum(1, keepdims=True))
    bundle = load_bundle(folder)
    said = [facts["labels"][i] for i in (logp + facts["offsets"]).argmax(1)]
    assert said == [p.value for p in bundle.predict(LONG)]  # the README's words, done


@pytest.mark.parametrize("kind", ["bert", "lstm"])
def test_a_keras_model_gives_the_logits(tmp_path: Path, kind: str) -> None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    needs("keras")
    folder, out = label_bundle(tmp_path, kind), tmp_path / "out"
    found = export(folder, "keras", out)
    assert "model.keras" in found.files
    lines = readme_lines(out, LONG)
    np.testing.assert_allclose(np.asarray(lines["logits"]), logits_of(folder, LONG), atol=1e-4)


def test_keras_has_no_twin_of_every_encoder(tmp_path: Path) -> None:
    needs("keras")
    with pytest.raises(UserError, match=r"no twin of a distilbert\. Use --to onnx"):
        export(label_bundle(tmp_path, "distilbert"), "keras", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*tmp"))


def test_values_of_a_regression_are_in_their_units(tmp_path: Path) -> None:
    predictor = Affine(inner=ENCODER, slope=0.9, intercept=-3.0)
    folder = label_bundle(tmp_path, task=Regress(mean=0.5, scale=2.0), predictor=predictor)
    export(folder, "folder", tmp_path / "out")
    lines = readme_lines(tmp_path / "out", LONG)
    np.testing.assert_allclose(lines["logits"].numpy(), logits_of(folder, LONG), atol=1e-4)


def test_a_multilabel_readme_says_how_labels_are_said(tmp_path: Path) -> None:
    predictor = Thresholds(inner=ENCODER, offsets=(0.3, 0.5, 0.7))
    folder = label_bundle(tmp_path, task=Multilabel(labels=LABELS), predictor=predictor)
    export(folder, "folder", tmp_path / "out")
    assert "above the label's number in `offsets`" in (tmp_path / "out" / "README.md").read_text()
    p = 1 / (1 + np.exp(-readme_lines(tmp_path / "out", LONG)["logits"].numpy()))
    offsets = json.loads((tmp_path / "out" / "labels.json").read_text())["offsets"]
    said = [tuple(np.array(LABELS)[row]) for row in p > np.array(offsets)]
    assert said == [tuple(p.value) for p in load_bundle(folder).predict(LONG)]


def test_what_cannot_be_exported_says_what_can(tmp_path: Path) -> None:
    linear = Single(model="linear")
    blend = Blend(members=(ENCODER, linear), weights=(0.5, 0.5))
    inside = Temperature(inner=Thresholds(inner=ENCODER, offsets=(0.0, 0.1, 0.2)), temperature=2.0)
    for number, (predictor, why) in enumerate(
        (
            (linear, "single of linear, and the n-grams"),
            (blend, "blend of encoder and linear"),
            (inside, "only temperature"),
        )
    ):
        (tmp_path / str(number)).mkdir()
        folder = label_bundle(tmp_path / str(number), predictor=predictor)
        for to in ("onnx", "folder", "keras"):
            with pytest.raises(UserError, match=f"{why}.*multistep.load"):
                export(folder, to, tmp_path / "out")
    (tmp_path / "labels").mkdir()
    with pytest.raises(UserError, match="for models that write"):
        export(label_bundle(tmp_path / "labels"), "ctranslate2", tmp_path / "out")
    with pytest.raises(UserError, match=r"'onxn' is not known. Did you mean 'onnx'\?"):
        export(tmp_path / "labels" / "run", "onxn", tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    folder = label_bundle(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="something already"):
        export(folder, "folder", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_export_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "CLOSE", -1.0)
    with pytest.raises(UserError, match="too far; nothing was written"):
        export(label_bundle(tmp_path), "folder", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_differences_that_are_refused() -> None:
    ones = np.ones((2, 3))
    assert "apart by" in check_logits(ones + 1e-5, ones, "it")
    for wrong in (ones + 0.1, ones * np.nan):
        with pytest.raises(UserError, match="too far"):
            check_logits(wrong, ones, "it")
    assert check_texts([[1], [2], [3], [9]], [[1], [2], [3], [4]], "it").startswith("3 of 4")
    with pytest.raises(UserError, match="only 1 of 4"):
        check_texts([[1], [0], [0], [0]], [[1], [2], [3], [4]], "it")


# ---------------------------------------------------------------------------------------------- models that write


def language_bundle(tmp_path: Path, kind: str, decoding: Any) -> tuple[Path, Neural]:
    neural = writer(tmp_path, kind, decoding)
    form: Any = {"task": "lm", "form": "text", "source": ("text",)}
    if kind == "seq2seq":
        form = {"task": "translate", "form": "pair", "source": ("source",), "target": "target"}
    standing = {"kind": kind, "decoding": decoding.model_dump(mode="json")}
    write_language_bundle(tmp_path / "model", neural.task, Layout(**form), neural, standing, {"metric": "bleu"})
    return tmp_path / "model", neural


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
@pytest.mark.parametrize("to", ["folder", "ctranslate2"])
def test_the_lines_of_a_model_that_writes_write_what_it_writes(tmp_path: Path, kind: str, to: str) -> None:
    needs("ctranslate2")
    decoding = (
        Greedy(max_new_tokens=9, repetition_penalty=1.1) if kind == "decoder" else Beam(max_new_tokens=9, beams=2)
    )
    folder, neural = language_bundle(tmp_path, kind, decoding)
    found = export(folder, to, tmp_path / "out")
    assert "8 of 8 texts the same" in found.agreement or "7 of 8" in found.agreement
    text = TEXTS[5]
    lines = readme_lines(tmp_path / "out", [text])
    if to == "ctranslate2":
        got = lines["found"] if kind == "decoder" else lines["tokenizer"].convert_tokens_to_ids(lines["found"])
        ids = np.append([1], neural.codec.pieces([text])[0]) if kind == "decoder" else neural.codec.whole([text])[0]
    else:
        ids = lines["batch"]["input_ids"][0].numpy()
        got = lines["ids"].tolist()[1 if kind == "seq2seq" else len(ids) :]
    expected = generate(neural.model, [ids], decoding, [2])[0].ids
    assert [t for t in got if t not in (0, 2)] == [t for t in expected if t not in (0, 2)]


@pytest.mark.parametrize("to", ["folder", "ctranslate2"])
def test_every_token_that_ends_a_turn_is_told(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("ctranslate2")
    decoding, text = Greedy(max_new_tokens=9), TEXTS[5]
    neural = replace(writer(tmp_path, "decoder", decoding), reads="prompts", task=Writing(kind="chat"))
    tokenizer = neural.codec.tokenizer
    dialogue.ensure_template(tokenizer)
    ids = np.append([1] if to == "ctranslate2" else [], neural.codec.pieces([text])[0]).astype(np.int64)
    free = generate(neural.model, [ids], decoding, [2])[0].ids
    end = free[4]  # what the model writes ends a turn, beside the end token
    monkeypatch.setattr(dialogue, "endings", lambda tokenizer: dialogue.Endings((2, end), ()))
    layout = Layout(task="chat", form="messages", source=("text",))
    standing = {"kind": "model", "decoding": decoding.model_dump(mode="json")}
    write_language_bundle(tmp_path / "model", neural.task, layout, neural, standing, {"metric": "bits_per_byte"})
    told = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert told["eos_token_id"] == [2, end]
    found = export(tmp_path / "model", to, tmp_path / "out")
    assert "8 of 8 texts the same" in found.agreement or "7 of 8" in found.agreement
    lines = readme_lines(tmp_path / "out", [text])
    got = lines["found"] if to == "ctranslate2" else lines["ids"].tolist()[len(ids) :]
    assert got == free[: free.index(end) + (to == "folder")]  # transformers keeps the token that ended it


def test_a_model_that_writes_has_no_graph_and_no_twin(tmp_path: Path) -> None:
    folder, _ = language_bundle(tmp_path, "seq2seq", Greedy())
    for to, why in (("onnx", "--to ctranslate2"), ("keras", "not for a model that writes")):
        with pytest.raises(UserError, match=why):
            export(folder, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- front doors


def test_the_verb_and_the_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = label_bundle(tmp_path)
    assert cli.run(["export", str(folder), "--to", "folder", "--out", str(tmp_path / "a"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["to"] == "folder" and "head.safetensors" in said["files"] and "apart by" in said["agreement"]
    assert cli.run(["export", str(folder), "--to", "folder", "--out", str(tmp_path / "a")]) == 2
    assert "something already" in capsys.readouterr().err
    assert cli.run(["export", str(folder), "--to", "folder", "--out", str(tmp_path / "b")]) == 0
    assert "README.md says how to use it" in capsys.readouterr().out
    assert load(folder).export("folder", tmp_path / "c").files == tuple(said["files"])
    assert torch.get_num_threads() == 1
