"""Runs of two processes that torchrun starts: one journal, the decisions and bits of a run in one process, stops and kills."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_language import config as language_config
from test_language import pairs

from multistep import journal, team
from multistep.api import load
from multistep.launch import alone, assists
from multistep.replay import replay_run
from multistep.state import read_folder
from multistep.types import UserError

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and dist.is_available() and dist.is_gloo_available()),
    reason="not Linux, or this torch has no gloo: processes are not started",
)
TESTS = Path(__file__).parent
ALONE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def started(*arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *arguments,
    ]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        command, env={**os.environ, **ALONE, "PYTHONPATH": paths}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def everyone(named: str, number: int) -> None:
    """Send a signal to torchrun and to what it started: the processes that have this in their command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if named in path.read_bytes().decode(errors="replace").split("\0") and int(path.parent.name) != os.getpid():
                os.kill(int(path.parent.name), number)


def together(*arguments: str) -> tuple[str, str]:
    process = started(*arguments)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    return out, err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and an encoder; a run in two processes and the same in one."""
    folder = tmp_path_factory.mktemp("team")
    runs.write_rows(folder / "rows.csv")
    runs.tiny_encoder(folder / "encoder")
    out, _ = together("-m", "multistep", *fitting(folder, "two"))
    (folder / "said").write_text(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs.run(runs.config(folder / "rows.csv", folder / "one", folder / "encoder", device="cpu"))
    torch.set_num_threads(threads)
    return folder


def fitting(folder: Path, name: str) -> list[str]:
    return [
        "fit", str(folder / "rows.csv"), "batch_size=8", "optimizer.lr=2e-3", "device=cpu", "--budget", "240 updates",
        "--model", str(folder / "encoder"), "--out", str(folder / name), "--quiet",
    ]  # fmt: skip


def trained(out: Path) -> Iterator[dict[str, Any]]:
    for record in journal.read(out / "journal.jsonl"):
        if record["kind"] == "Told" and "train_loss" in record["outcome"]["facts"]:
            yield record


def test_the_run_is_that_of_one_process(made: Path) -> None:
    two, one = load(made / "two"), load(made / "one")
    kinds = [[r["kind"] for r in run.records() if r["kind"] != "Measured"] for run in (two, one)]
    assert [run.records()[0]["machine"].get("processes") for run in (two, one)] == [2, None]
    assert kinds[0] == kinds[1] and kinds[0].count("Started") == kinds[0].count("Finished") == 1
    assert all(replayed.ok for replayed in replay_run(made / "two"))
    losses = [[r["outcome"]["facts"]["train_loss"] for r in trained(out)] for out in (made / "two", made / "one")]
    assert len(losses[0]) >= 1
    np.testing.assert_allclose(*losses, rtol=1e-3)  # sums are added in another order
    for name in {r["outcome"]["state"] for r in trained(made / "one")}:
        (_, mine), (_, theirs) = (read_folder(made / which / "states" / name) for which in ("two", "one"))
        assert mine.keys() == theirs.keys()
        for key in mine:
            if key.startswith("model."):
                torch.testing.assert_close(mine[key], theirs[key], atol=2e-3, rtol=1e-2)
    texts = ["river up stone", "cloud left glass", "paper down"]
    assert [p.value for p in two.predict(texts)] == [p.value for p in one.predict(texts)] == ["north", "west", "south"]


def test_the_first_process_alone_speaks_and_writes(made: Path) -> None:
    said = (made / "said").read_text()
    assert said.count("Test, read once") == 1
    names = {p.name for p in (made / "two" / "states").iterdir()}
    assert not [n for n in names if "process" in n or ".live." in n or n.endswith(".tmp")]


@pytest.mark.parametrize("signals", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_team_that_was_stopped_goes_on(made: Path, tmp_path: Path, signals: signal.Signals) -> None:
    out = tmp_path / "run"
    arguments = [a if a != str(made / "two") else str(out) for a in fitting(made, "two")]
    process = started("-m", "multistep", *[a if a != "240 updates" else "400 updates" for a in arguments])
    until, book = time.monotonic() + 120, out / "journal.jsonl"
    while not (book.exists() and '"Measured"' in book.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[1][-2000:]
    if signals == signal.SIGTERM:
        process.terminate()  # torchrun passes it on
    else:
        everyone(str(out), signals)
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0
    assert signals == signal.SIGKILL or "saved; resume with" in err
    assert journal.read(out / "journal.jsonl")[-1]["kind"] != "Finished"
    together("-m", "multistep", "resume", str(out), "--quiet")
    records = journal.read(out / "journal.jsonl")
    assert records[-1]["kind"] == "Finished" and all(r.ok for r in replay_run(out))
    assert not list(out.glob("states/process-*"))


WRITER = """
import sys
from multistep import cli
from multistep.tune import measuring

measuring.LEAST_TARGETS = 10  # so little data would not be trained on
sys.exit(cli.run(["fit", sys.argv[1], "--quiet"]))
"""


def test_a_model_that_writes_is_trained_together(tmp_path: Path) -> None:
    cfg = language_config(pairs(tmp_path), tmp_path / "run", "translate", budget="60 updates", device="cpu")
    (tmp_path / "run.yaml").write_text(json.dumps(cfg.model_dump(mode="json", exclude_none=True)))
    (tmp_path / "script.py").write_text(WRITER)
    together(str(tmp_path / "script.py"), str(tmp_path / "run.yaml"))
    assert all(replayed.ok for replayed in replay_run(tmp_path / "run"))
    assert list(trained(tmp_path / "run"))


SCRIPT = """
import sys
import torch
from safetensors.torch import save_file
from test_modules import blobs
from test_modules import run as optimize

torch.manual_seed(int(__import__("os").environ["RANK"]))  # not even the weights are the same at first
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
first = optimize(torch.nn.Linear(8, 3), budget="20 updates", optimizer="newton_cg", schedule="constant")  # the first one's alone
found = optimize(model, test=blobs(100, 2), controller="staged", budget="120 updates", out=sys.argv[1] or None)
if sys.argv[1]:
    found = optimize(model, test=blobs(100, 2), controller="staged", budget="200 updates", out=sys.argv[1])  # on from there
rank = __import__("os").environ["RANK"]
save_file(model.state_dict(), f"{sys.argv[2]}/{rank}.safetensors")
open(f"{sys.argv[2]}/{rank}.txt", "w").write(f"{found.best.value} {found.test['accuracy'].value}")
"""


@pytest.mark.parametrize("kept", [True, False], ids=["a folder", "no folder"])
def test_a_module_is_optimized_together(tmp_path: Path, kept: bool) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    together(str(tmp_path / "script.py"), str(tmp_path / "run") if kept else "", str(tmp_path))
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and float(said[0].split()[0]) > 0.7
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    if kept:
        (replayed,) = replay_run(tmp_path / "run")
        assert replayed.ok and replayed.derived["test readings"] == 2


OTHER = """
import os, sys
from multistep import cli

sys.exit(cli.run([*sys.argv[1:], "--seed", os.environ["RANK"]]))
"""


def test_other_settings_than_the_first_ones_are_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(OTHER)
    _, err = started(str(tmp_path / "script.py"), *fitting(made, "other")).communicate(timeout=100)
    assert "this one was given other settings than the first" in err and "another one was given other settings" in err
    assert "Traceback" not in err.replace('Traceback (most recent call last):\n  File "<frozen runpy>"', "")
    assert not (made / "other").exists()


def test_what_one_process_meets_alone_ends_all(made: Path, tmp_path: Path) -> None:
    process = started("-m", "multistep", "fit", str(tmp_path / "absent.csv"), "--out", str(tmp_path / "run"))
    _, err = process.communicate(timeout=100)
    assert process.returncode != 0 and "absent.csv" in err


def test_alone_there_is_no_team(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with team.gathered():
        assert team.leads() and team.size() == 1 and team.trains_together() and team.speed() == 1
        assert team.own(tmp_path) == tmp_path and team.first({"a": 1}) == {"a": 1}
    assert not assists()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert assists() and not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & set(alone()) and "PATH" in alone()
    monkeypatch.setattr(team, "_MEETING", team.timedelta(seconds=1))
    with pytest.raises(UserError, match=r"cannot meet.*torchrun"), team.gathered():
        pass


def test_what_a_larger_team_kept_is_swept(tmp_path: Path) -> None:
    for name in ("process-1", "process-2", "01-incumbent"):
        (tmp_path / name).mkdir()
    team.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["01-incumbent"]
