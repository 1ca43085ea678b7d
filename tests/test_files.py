"""Folders and files: one writer in a run's folder, nothing of others in a new run's way, damage in a line, UTF-8 everywhere."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

import multistep
from multistep import api, cli, files
from multistep.bundle import load_bundle
from multistep.codec import Codec
from multistep.data.shapes import Layout
from multistep.files import working_in
from multistep.language_bundle import write_language_bundle
from multistep.models.ngram import NGram
from multistep.other_writers import Counted
from multistep.subwords import train_bytes
from multistep.tasks.writing import Writing
from multistep.tuning import tune_run
from multistep.types import UserError

SOURCES = Path(multistep.__file__).parent
HOLDER = """
import sys
from pathlib import Path
from multistep.files import working_in
with working_in(Path(sys.argv[1]), make=True):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the linear model alone, one label of which is not ASCII. Copy it before you change it."""
    place = tmp_path_factory.mktemp("run")
    rows = runs.write_rows(place / "rows.csv")
    rows.write_text(rows.read_text(encoding="utf-8").replace("south", "süden"), encoding="utf-8")
    return runs.run(runs.config(rows, place / "run", "none", budget="40 updates")).out


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ---------------------------------------------------------------------------------------------- one writer


@pytest.fixture
def hold() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Another process that works in a folder until it is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], **pipes)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_writer_is_refused_until_the_first_is_gone(
    finished: Path, tmp_path: Path, hold: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = tmp_path / "out", finished.parent / "rows.csv"
    holder = hold(out)
    cfg = runs.config(rows, out, "none", budget="40 updates")
    for _ in range(2):  # a refusal leaves the lock as it is
        with pytest.raises(UserError, match="another process works in that folder"):
            runs.run(cfg)
    x, y = torch.zeros(40, 2), torch.arange(40) % 2
    with pytest.raises(UserError, match="another process works"):
        multistep.optimize(torch.nn.Linear(2, 2), objective="cross_entropy", train=(x, y), budget="2 updates", out=out)
    assert cli.run(["fit", str(rows), "--out", str(out), "--model", "none"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and [p.name for p in out.iterdir()] == [".lock"]
    holder.kill()
    holder.wait()
    assert (out / ".lock").exists(), "what a killed process leaves does not matter"
    assert runs.run(cfg).predict(["alpha up"])[0].value and not (out / ".lock").exists()


def test_what_goes_on_is_refused_while_another_works(run_dir: Path, hold: Callable[..., Any]) -> None:
    """`resume` and `tune` while `fit` runs; what had half been written is the other's, and stays."""
    half = run_dir / "states" / ".09-trunk.1.tmp"
    half.mkdir()
    holder = hold(run_dir)
    before = (run_dir / "journal.jsonl").read_bytes()
    for attempt in (lambda: api.resume(run_dir, "+20 updates"), lambda: tune_run(run_dir, budget="5s")):
        with pytest.raises(UserError, match="another process works in that folder"):
            attempt()
    assert half.exists() and (run_dir / "journal.jsonl").read_bytes() == before
    assert api.load(run_dir).predict(["alpha up"]), "reading is no work"
    holder.kill()
    holder.wait()
    api.resume(run_dir, "+20 updates")
    assert not half.exists()


def test_one_process_works_again_and_again_but_not_twice_at_once(tmp_path: Path) -> None:
    for _ in range(2):
        with working_in(tmp_path / "a" / "b", make=True):
            with pytest.raises(UserError, match="another process works"), working_in(tmp_path / "a" / "b"):
                pass
            (tmp_path / "a" / "b" / "kept").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_a_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), working_in(tmp_path / "a" / "b", make=True):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    with working_in(tmp_path / "none"):
        assert not (tmp_path / "none").exists(), "only what is asked for is made"


def test_a_lock_that_was_taken_away_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for the file that another lets go of would hold a file that nobody else will open."""
    still, asked = files._is_still, []

    def gone_once(path: Path, file: int) -> bool:
        asked.append(path)
        if len(asked) == 1:
            path.unlink()
        return still(path, file)

    monkeypatch.setattr(files, "_is_still", gone_once)
    with working_in(tmp_path):
        assert len(asked) == 2 and (tmp_path / ".lock").exists()


def test_without_locks_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_lock", lambda file: None)
    with working_in(tmp_path), working_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- a new run


@pytest.mark.parametrize(
    "name", ["model/config.json", "states/01/state.json", "config.yaml", "tokenizer.json", "tokenizer/a"]
)
def test_a_new_run_replaces_nothing(
    finished: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", encoding="utf-8")
    rows = str(finished.parent / "rows.csv")
    assert cli.run(["fit", rows, "--model", "none", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert name.split("/")[0] in said and "no journal.jsonl" in said and said.count("\n") == 1
    module, x = torch.nn.Linear(2, 2), torch.zeros(40, 2)
    with pytest.raises(UserError, match="no journal"):
        multistep.optimize(
            module, objective="cross_entropy", train=(x, torch.arange(40) % 2), budget="2 updates", out=tmp_path / "out"
        )
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [mine] and mine.read_text(
        encoding="utf-8"
    ) == "mine"


def test_states_of_a_run_whose_journal_is_gone_are_not_read(run_dir: Path, finished: Path) -> None:
    (run_dir / "journal.jsonl").unlink()
    with pytest.raises(UserError, match="model is there but no journal"):
        runs.run(runs.config(finished.parent / "rows.csv", run_dir, "none", budget="40 updates"))


def test_files_of_others_stay_beside_a_run(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine", encoding="utf-8")
    done = runs.run(runs.config(finished.parent / "rows.csv", tmp_path, "none", budget="40 updates"))
    assert done.predict(["alpha up"]) and (tmp_path / "notes.md").read_text(encoding="utf-8") == "mine"


def test_a_run_whose_configuration_was_not_written_yet_gets_it(run_dir: Path, finished: Path) -> None:
    (run_dir / "config.yaml").unlink()
    api.resume(run_dir, "+20 updates")
    again = (run_dir / "config.yaml").read_text(encoding="utf-8").replace(str(run_dir), str(finished))
    assert again == (finished / "config.yaml").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------- damage


def encoder_bundle(place: Path) -> Path:
    from multistep.bundle import write_bundle
    from multistep.evaluate import EncoderText
    from multistep.models.encoder import Encoder, load_backbone
    from multistep.predictors import Single
    from multistep.subwords import load_tokenizer
    from multistep.tasks import Classify

    made = str(runs.tiny_encoder(place / "encoder"))
    model = EncoderText(Encoder(load_backbone(made), 3), lambda texts: [], 0, False, 1.0, 0.0)
    task, predictor = Classify(labels=runs.LABELS), Single(model="encoder")
    write_bundle(place / "model", task, predictor, {"encoder": model}, load_tokenizer(made), 32, {})
    return place / "model"


def counted_bundle(place: Path) -> Path:
    (place / "tokenizer").mkdir()
    train_bytes(["a b"], 259, place / "tokenizer" / "tokenizer.json")
    names = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}'
    (place / "tokenizer" / "tokenizer_config.json").write_text(names, encoding="utf-8")
    speaker = Counted(NGram.fit(["a text", "another text"]), Codec.load(place / "tokenizer"))
    layout = Layout(task="lm", form="text", source=("text",))
    write_language_bundle(
        place / "model", Writing(kind="lm"), layout, speaker, {"kind": "ngram"}, {"metric": "bits_per_byte"}
    )
    return place / "model"


DAMAGED = [
    ("linear", "linear/linear.safetensors"), ("linear", "linear/ngrams.safetensors"), ("linear", "linear/ngrams.json"),
    ("linear", "multistep.json"), ("encoder", "head.safetensors"), ("encoder", "tokenizer.json"), ("encoder", "config.json"),
    ("counted", "ngram.safetensors"), ("counted", "tokenizer.json"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), DAMAGED)
@pytest.mark.parametrize("way", ["cut", "not what it was"])
def test_a_damaged_bundle_is_a_line_that_names_the_file(
    kind: str, name: str, way: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    match kind:
        case "linear":
            folder = Path(shutil.copytree(finished / "model", tmp_path / "model"))
        case "encoder":
            folder = encoder_bundle(tmp_path)
        case _:
            folder = counted_bundle(tmp_path)
    load_bundle(folder)
    capsys.readouterr()
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if way == "cut" else b"[3]")
    assert cli.run(["predict", str(folder), "a text"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and str(tmp_path) in said
    assert Path(name).name in said


@pytest.mark.parametrize(
    "content", ['{"format": "1"}', '{"format": 1, "task": [], "models": 3}', '{"format": 1, "language": true}']
)
def test_another_shape_of_multistep_json_is_a_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "multistep.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="the bundle is damaged") as caught:
        load_bundle(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_bundle_does_not_keep_a_run_from_being_explained(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "model" / "multistep.json").write_text("[]", encoding="utf-8")
    assert cli.run(["explain", str(run_dir), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["policy"] is None and told["best"] and told["trials"]


# ---------------------------------------------------------------------------------------------- UTF-8


def test_every_text_is_read_and_written_as_utf_8() -> None:
    """What is said nowhere is what the locale says."""
    unsaid = []
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[1:])
            opens = called == "open" and isinstance(node.func, ast.Name) and not binary
            if called in ("read_text", "write_text") or opens:
                unsaid.append(f"{path.name}:{node.lineno}")
    assert not unsaid


def test_a_bundle_serves_in_a_locale_that_is_not_utf_8(finished: Path, tmp_path: Path) -> None:
    code = "import sys, multistep; run = multistep.load(sys.argv[1]); print(ascii(run.labels.task.labels)); run.predict(['down'])"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(finished)],
        capture_output=True,
        text=True,
        env={**os.environ, **plain},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert r"s\xfcden" in done.stdout
