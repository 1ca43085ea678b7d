"""The command line with a fake Python front door: what is passed on, what is printed where, and every exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from multistep import cli, report
from multistep.types import Interrupted, MetricValue, Prediction, UserError

STARTED = {
    "n": 0, "kind": "Started", "config": {"metric": "accuracy"}, "budget": {"amount": 60, "unit": "seconds"},
    "clock": {"wall_s": 0.0},
}  # fmt: skip


class FakeRun:
    def __init__(self, out: Path):
        self.out = out

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        print("a library talks")  # must not reach standard output
        return [Prediction("pos", 0.9, {"pos": 0.9, "neg": 0.1}) for _ in texts]

    def evaluate(self, source: str) -> dict[str, Any]:
        if source == "missing.csv":
            raise UserError("missing.csv: no such file.")
        return {"metrics": {"accuracy": MetricValue(0.93, 0.004), "auroc": MetricValue(float("nan"), 0.0)}, "n": 1000}

    def summary(self) -> dict[str, Any]:
        return report.summary([STARTED])


class Fake(NamedTuple):
    api: Any
    calls: list[Any]


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    calls: list[Any] = []
    api: Any = ModuleType("multistep.api")

    def fit_config(config: Any, progress: report.Progress, started: float) -> FakeRun:
        print("a library talks")
        progress.stage("incumbent", "first")
        calls.append(config)
        return FakeRun(Path("runs/x"))

    def resume(run_dir: Path, budget: str | None, progress: report.Progress) -> FakeRun:
        calls.append((run_dir, budget))
        return FakeRun(run_dir)

    api.fit_config, api.resume, api.load = fit_config, resume, FakeRun
    monkeypatch.setitem(sys.modules, "multistep.api", api)
    return Fake(api, calls)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*words: str) -> Said:
        code = cli.run(words)
        out, err = capsys.readouterr()
        return Said(code, str(out), str(err))

    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "multistep.json").write_text("{}")
    (tmp_path / "journal.jsonl").write_text(json.dumps(STARTED) + "\n")
    return tmp_path


# ---------------------------------------------------------------------------------------------- verbs


def test_fit_passes_on_options_and_overrides(fake: Fake, say: Callable[..., Said]) -> None:
    said = say(
        "fit", "r.csv", "optimizer.lr=1e-4", "--task", "classify", "--metric", "f1_macro", "--budget", "1m",
        "--seed", "3", "--out", "runs/r", "--text", "a", "--text", "b", "--label", "y", "--model", "none",
        "--controller", "race", "clip=2",
    )  # fmt: skip
    assert said.code == 0, said.err
    (config,) = fake.calls
    assert (config.data, config.task, config.metric, config.budget, config.seed) == (
        "r.csv",
        "classify",
        "f1_macro",
        "60s",
        3,
    )
    assert (config.out, config.text, config.label, config.model) == ("runs/r", ("a", "b"), "y", "none")
    assert (config.controller, config.optimizer.lr, config.clip) == ("race", 1e-4, 2)
    assert "incumbent: first" in said.err and "a library talks" in said.err
    assert "multistep predict runs/x" in said.out and "library" not in said.out


def test_options_not_given_leave_the_file_its_own(fake: Fake, say: Callable[..., Said], tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("data: r.csv\nbudget: 2h\nseed: 7\ntext: [a]\n")
    assert say("fit", str(file), "--seed", "8").code == 0
    (config,) = fake.calls
    assert (config.budget, config.seed, config.text) == ("7200s", 8, ("a",))


def test_fit_json_is_one_object_and_quiet_is_quiet(fake: Fake, say: Callable[..., Said]) -> None:
    said = say("fit", "r.csv", "--json")
    assert json.loads(said.out)["out"] == "runs/x" and json.loads(said.out)["status"] == "unfinished"
    assert said.out.count("\n") == 1 and "incumbent" in said.err
    assert "incumbent" not in say("fit", "r.csv", "--quiet").err


def test_resume(fake: Fake, say: Callable[..., Said], run_dir: Path) -> None:
    assert say("resume", str(run_dir)).code == 0
    assert json.loads(say("resume", str(run_dir), "--budget", "+5m", "--json").out)["out"] == str(run_dir)
    assert fake.calls == [(run_dir, None), (run_dir, "+5m")]


def test_explain(say: Callable[..., Said], run_dir: Path) -> None:
    assert say("explain", str(run_dir)).out.startswith("# Run\n")
    assert json.loads(say("explain", str(run_dir), "--json").out)["status"] == "unfinished"


def test_evaluate(fake: Fake, say: Callable[..., Said], run_dir: Path) -> None:
    said = say("evaluate", str(run_dir), "t.csv", "--json")
    assert json.loads(said.out) == {
        "metrics": {"accuracy": {"value": 0.93, "stderr": 0.004}, "auroc": {"value": None, "stderr": 0.0}}, "n": 1000,
    }  # fmt: skip
    assert "| accuracy | 0.9300 ± 0.0040 |" in say("evaluate", str(run_dir), "t.csv").out


def test_predict_a_text(fake: Fake, say: Callable[..., Said], run_dir: Path) -> None:
    assert say("predict", str(run_dir), "great\tfilm\n很好") == (
        0,
        "pos\t0.9000\tgreat film 很好\n",
        "a library talks\n",
    )
    said = say("predict", str(run_dir / "model"), "great film", "--json")
    row = {"text": "great film", "value": "pos", "confidence": 0.9, "scores": {"pos": 0.9, "neg": 0.1}}
    assert json.loads(said.out) == {"predictions": [row]}


def test_predict_a_file_line_by_line(fake: Fake, say: Callable[..., Said], run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffone\r\n\r\nthree\n".encode())
    assert say("predict", str(run_dir), str(file)).out == "pos\t0.9000\tone\npos\t0.9000\t\npos\t0.9000\tthree\n"


def test_predict_a_table_by_the_columns_of_training(fake: Fake, say: Callable[..., Said], run_dir: Path) -> None:
    columns = {"text": ["body"], "label": "y", "why": "asked for"}
    (run_dir / "model" / "multistep.json").write_text(json.dumps({"columns": columns}))
    (run_dir / "new.csv").write_text("id,body\n1,great\n2,awful\n")
    assert say("predict", str(run_dir), str(run_dir / "new.csv")).out == "pos\t0.9000\tgreat\npos\t0.9000\tawful\n"


def test_predict_standard_input(
    fake: Fake, say: Callable[..., Said], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a\n电影".encode())))
    assert say("predict", str(run_dir), "-").out == "pos\t0.9000\ta\npos\t0.9000\t电影\n"


@pytest.mark.parametrize(("value", "shown"), [(("a", "b"), "a,b\t"), (2.5, "2.5\t"), ((), "\t")])
def test_predict_other_tasks(
    value: Any, shown: str, fake: Fake, say: Callable[..., Said], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRun, "predict", lambda self, texts: [Prediction(value)])
    assert say("predict", str(run_dir), "x").out == f"{shown}\tx\n"


def test_serve(say: Callable[..., Said], run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def serve(path: Path, host: str, port: int, announce: Callable[..., None], settings: Any, token: str) -> bool:
        announce(f"http://{host}:{port}", {"model": "m"})
        given[:] = [settings, token]
        return settings.queue > 1

    monkeypatch.setattr("multistep.serve.serve", serve)
    assert "http://127.0.0.1:8000" in say("serve", str(run_dir)).out
    said = say("serve", str(run_dir), "--port", "9", "--json")
    assert json.loads(said.out) == {"address": "http://127.0.0.1:9", "info": {"model": "m"}}
    assert given[1] == ""
    monkeypatch.setenv("MULTISTEP_TOKEN", "of the environment".replace(" ", "-"))
    settings = ["--queue", "7", "--time-out", "2.5", "--max-tokens", "9"]
    said = say("serve", str(run_dir), *settings)
    assert (given[0].queue, given[0].time_out, given[0].max_tokens, given[1]) == (7, 2.5, 9, "of-the-environment")
    assert "of-the-environment" not in said.out
    (run_dir / "token").write_text("of a file\n".replace(" ", "-"))
    say("serve", str(run_dir), "--token-file", str(run_dir / "token"))
    assert given[1] == "of-a-file"
    (run_dir / "token").write_text("short")
    for words, code, line in (
        (["--token-file", str(run_dir / "token")], 2, "at least 8"),
        (["--token-file", str(run_dir / "none")], 2, "cannot be read"),
        (["--queue", "1"], 1, "before everything was answered"),
    ):
        said = say("serve", str(run_dir), *words)
        assert said.code == code and line in said.err


def test_doctor(say: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "usable" in say("doctor").out
    assert json.loads(say("doctor", "--json").out)["hub"]["why"] == "HF_HUB_OFFLINE is set"


# ---------------------------------------------------------------------------------------------- what goes wrong


BAD: dict[str, tuple[list[str], str]] = {
    "no such verb": (["train"], "train"),
    "no source": (["fit"], "SOURCE"),
    "unknown option": (["fit", "r.csv", "--epochs", "3"], "--epochs"),
    "seed is not a number": (["fit", "r.csv", "--seed", "x"], "'--seed'"),
    "option without value": (["fit", "r.csv", "--task"], "--task"),
    "override without =": (["fit", "r.csv", "s.csv"], "key=value"),
    "unknown key": (["fit", "r.csv", "optimzer.lr=1"], "'optimizer'"),
    "budget": (["fit", "r.csv", "--budget", "soon"], "'soon' is not a budget"),
    "no such folder": (["explain", "nowhere"], "nowhere: no such folder"),
    "a file": (["explain", "{run}/journal.jsonl"], "not a folder"),
    "not a run": (["explain", "{run}/model"], "not a run"),
    "resume what is no run": (["resume", "{run}/model"], "not a run"),
    "no model yet": (["predict", "{bare}", "x"], "no model yet"),
    "evaluate without model": (["evaluate", "{bare}", "t.csv"], "no model yet"),
    "serve without model": (["serve", "{bare}"], "no model yet"),
    "port": (["serve", "{run}", "--port", "70000"], "65535"),
    "no such data": (["evaluate", "{run}", "missing.csv"], "missing.csv: no such file"),
    "no such texts": (["predict", "{run}", "missing.txt"], "missing.txt: no such file"),
    "a table without texts": (["predict", "{run}", "{bare}/t.csv"], "t.csv"),
    "a folder of texts": (["predict", "{run}", "{bare}"], "a folder"),
    "empty text": (["predict", "{run}", ""], "no text"),
    "empty file": (["predict", "{run}", "{bare}/empty.txt"], "no text"),
    "not UTF-8": (["predict", "{run}", "{bare}/latin.txt"], "latin.txt"),
    "text not UTF-8": (["predict", "{run}", "\udce9"], "not UTF-8"),
}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_2(
    name: str, as_json: bool, fake: Fake, say: Callable[..., Said], run_dir: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file, content in {
        "journal.jsonl": b"",
        "t.csv": b"text\n",
        "empty.txt": b"\n",
        "latin.txt": b"c\xe9",
    }.items():
        (bare / file).write_bytes(content)
    words, reason = BAD[name]
    arguments = [w.format(run=run_dir, bare=bare) for w in words]
    said = say(arguments[0], "--json", *arguments[1:]) if as_json else say(*arguments)
    assert said.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and reason in said.err
    assert (json.loads(said.out)["error"] in said.err) if as_json else said.out == ""


@pytest.mark.parametrize(("error", "words"), [
    (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: no space left on device. Free some"),
    (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), "/etc/x: permission denied."),
    (OSError("40 requested and 8 written"), "no space left on device. Free some"),
    (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left on device."),
    (UserError("several\nlines"), "several lines"),
])  # fmt: skip
def test_errors_a_user_can_mend(error: Exception, words: str, fake: Fake, say: Callable[..., Said]) -> None:
    def fail(*_: Any) -> None:
        raise error

    fake.api.fit_config = fail
    said = say("fit", "r.csv")
    assert said.code == 2 and said.err.startswith(f"error: {words}") and said.err.count("\n") == 1


def test_our_own_errors_keep_their_traceback(fake: Fake, say: Callable[..., Said]) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("a bug")

    fake.api.fit_config = fail
    with pytest.raises(RuntimeError, match="a bug"):
        say("fit", "r.csv")


@pytest.mark.parametrize(("number", "name", "code"), [(2, "SIGINT", 130), (15, "SIGTERM", 143)])
def test_a_signal_says_how_to_go_on(
    number: int, name: str, code: int, fake: Fake, say: Callable[..., Said], run_dir: Path
) -> None:
    def stop(*_: Any) -> None:
        raise Interrupted(number)

    fake.api.fit_config = fake.api.resume = stop
    said = say("fit", "r.csv", "--out", "runs/r", "--json")
    assert said.code == code and said.err == "saved; resume with `multistep resume runs/r`\n"
    assert json.loads(said.out) == {"interrupted": name, "out": "runs/r"}
    said = say("resume", str(run_dir))
    assert said.code == code and said.err == f"saved; resume with `multistep resume {run_dir}`\n" and said.out == ""


def test_control_c_anywhere_else_is_130(fake: Fake, say: Callable[..., Said]) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    fake.api.fit_config = stop
    said = say("fit", "r.csv")
    assert said.code == 130 and "Traceback" not in said.err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from multistep import cli; code = cli.run([]); "
        "heavy = {'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules); "
        "sys.exit(f'{heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in ("fit", "resume", "explain", "evaluate", "predict", "serve", "doctor"))


def test_a_terminal_without_unicode_is_no_reason_to_fail(run_dir: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-m", "multistep", "explain", str(run_dir)]
    done = subprocess.run(words, capture_output=True, env=environment, check=False)
    assert done.returncode == 0 and done.stdout.startswith(b"# Run")
