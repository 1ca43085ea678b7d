"""Events that a run must survive, each made to happen: the journal shows it, the result is at least the incumbent, and
resume equals the straight run bit for bit."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import committed, config, of_kind, run, same_states, tiny_encoder, write_rows

from multistep import api, journal
from multistep.data.dataset import load
from multistep.evaluate import Rows
from multistep.journal import Journal
from multistep.state import read_folder
from multistep.tune import fine_tune, segment, training
from multistep.types import Interrupted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, an encoder and a straight run of it, made once."""
    root = tmp_path_factory.mktemp("forced")
    write_rows(root / "rows.csv")
    tiny_encoder(root / "encoder")
    run(config(root / "rows.csv", root / "straight", root / "encoder"))
    yield root


class Killed(BaseException):
    """Stands for kill -9 inside one process: nothing may catch it."""


def test_killed_at_each_journal_line_in_turn_and_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on disk when a line of the journal has been written is what a kill there leaves behind: it is kept, and resumed from."""
    append, killed = Journal.append, []

    def keeping(self: Journal, kind: str, **fields: object) -> dict[str, object]:
        record = append(self, kind, **fields)
        if kind != "Measured":  # which come by the clock
            killed.append(tmp_path / f"{len(killed):03d}-{kind}")
            shutil.copytree(tmp_path / "straight", killed[-1])
        return record

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", keeping)
        straight = run(config(folder / "rows.csv", tmp_path / "straight", folder / "encoder", budget="60 updates"))
    kinds = {path.name[4:] for path in killed}
    assert kinds >= {"Started", "Data", "Asked", "Noted", "Told", "Committed", "RolledBack", "TestRead", "Finished"}
    for path in killed:
        resumed = api.resume(path)
        assert committed(resumed) == committed(straight), path.name
        same_states(tmp_path / "straight", path)
        shutil.rmtree(path)


def test_killed_in_the_middle_of_training(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between snapshots; the run goes on from the last one and ends with the same bits."""
    monkeypatch.setattr(segment, "_SAVE_SHARE", 1e9)  # every snapshot is written
    load, calls = Rows.load, [0]

    def dying(self: Rows, rows: np.ndarray) -> tuple[Any, torch.Tensor]:
        calls[0] += 1
        if calls[0] == 90:
            raise Killed
        return load(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "load", dying)
        with pytest.raises(Killed):
            run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder"))
    assert list((tmp_path / "run" / "states").glob("*.live.*"))
    resumed = api.resume(tmp_path / "run")
    assert [r for r in of_kind(resumed, "Event") if r["event"] == "resumed"]
    same_states(folder / "straight", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_rest_is_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    load, calls = Rows.load, [0]

    def signalled(self: Rows, rows: np.ndarray) -> tuple[Any, torch.Tensor]:
        calls[0] += 1
        if calls[0] == 60:
            os.kill(os.getpid(), number)
        return load(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "load", signalled)
        with pytest.raises(Interrupted) as stopped:
            run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder"))
    assert stopped.value.signal == number
    assert journal.read(tmp_path / "run" / "journal.jsonl")[-1]["kind"] == "Interrupted"
    assert api.load(tmp_path / "run").predict(["alpha up"])[0].value
    api.resume(tmp_path / "run")
    same_states(folder / "straight", tmp_path / "run")


def test_a_signal_while_texts_go_through_the_encoder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multistep.models.encoder import Encoder

    features, calls = Encoder.features, [0]

    def signalled(self: Encoder, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 6:  # after the profile
            os.kill(os.getpid(), signal.SIGTERM)
        return features(self, ids_BT, mask_BT)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "features", signalled)
        with pytest.raises(Interrupted):
            run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder"))
    last = journal.read(tmp_path / "run" / "journal.jsonl")[-1]
    assert last["kind"] == "Interrupted" and last["trial"]
    api.resume(tmp_path / "run")
    same_states(folder / "straight", tmp_path / "run")


def _spoil(monkeypatch: pytest.MonkeyPatch, at: set[int], factor: float) -> None:
    """Batches with these numbers have their loss times `factor` (NaN or huge), counted over the whole process."""
    from multistep.objectives import CrossEntropy

    loss, calls = CrossEntropy.loss, [0]

    def spoiled(self: CrossEntropy, logits_BK: torch.Tensor, targets_B: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        value = loss(self, logits_BK, targets_B)
        return value * factor if calls[0] in at else value

    monkeypatch.setattr(CrossEntropy, "loss", spoiled)


@pytest.mark.parametrize(
    ("factor", "name"), [(float("nan"), "nonfinite"), (float("inf"), "nonfinite"), (100.0, "spike")]
)
def test_a_bad_batch_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, name: str
) -> None:
    _spoil(monkeypatch, {120}, factor)
    done = run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder"))
    events = [r for r in of_kind(done, "Event") if r["event"] == name]
    assert len(events) == 1
    assert events[0]["rows"] and events[0]["lr_scale"] == 0.5 and "rolled back" in events[0]["action"]
    assert of_kind(done, "TestRead")[0]["metrics"]["accuracy"][0] > 0.5


def test_batches_that_are_all_bad_are_a_divergence_at_any_rate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, set(range(40, 10_000)), float("nan"))
    done = run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder"))
    seen = [r["event"] for r in of_kind(done, "Event")]
    once = ["nonfinite"] * (segment.MAX_ROLLBACKS + 1)
    assert seen == [*once, "divergence"] * segment.MAX_RESTARTS + once
    (diagnosed,) = [d for d in of_kind(done, "Diagnosed") if d.get("at") != "end"]
    assert diagnosed["name"] == "divergence" and "bad batches" in diagnosed["numbers"]["rule"]
    assert of_kind(done, "Finished") and done.predict(["alpha up"])[0].value


def test_bad_batches_far_apart_stop_a_training(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "CLOSE_UPDATES", 20)
    _spoil(monkeypatch, {40, 70, 100, 130}, float("nan"))
    done = run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder"))
    events = of_kind(done, "Event")
    assert [e["event"] for e in events] == ["nonfinite"] * (segment.MAX_ROLLBACKS + 1)
    assert "stopped" in events[-1]["action"] and events[-1]["lr_scale"] == 0.5**4
    in_file = set(load(folder / "rows.csv").train_rows)
    assert in_file and all(e["rows"] and set(e["rows"]) <= in_file for e in events), "by their numbers in the file"
    (trunk,) = [r for r in of_kind(done, "Told") if r["stage"] == "trunk"]
    facts = trunk["outcome"]["facts"]
    assert facts["stopped"] == {"event": "bad batches", "rollbacks": segment.MAX_ROLLBACKS + 1}
    (cooled,) = [r["trial"] for r in of_kind(done, "Asked") if r["trial"]["stage"] == "cool-down"]
    assert cooled["start"] == trunk["trial"]
    assert cooled["action"]["optimizer"]["lr"] == pytest.approx(facts["best_lr"]) and 0 < facts["best_lr"] < 2e-3
    assert facts["lr_scale"] == 0.5**4, "the state carries it on"
    segment_then = read_folder(done.out / "states" / cooled["id"])[0]["segment"]
    assert segment_then["total"]["amount"] == pytest.approx(cooled["share"]), (
        "from its beginning, not in the trunk's middle"
    )
    assert of_kind(done, "Finished") and done.predict(["alpha up"])[0].value


def test_what_is_stopped_while_its_end_is_judged_is_not_trained_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise Interrupted(15)

    def counted(trial: Any, *rest: Any) -> Any:
        trained.append(trial.id)
        return train(trial, *rest)

    train, trained = training.run_segment, []
    with monkeypatch.context() as patch:
        patch.setattr(fine_tune, "_keep_control_logits", stopped)
        with pytest.raises(Interrupted):
            run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder"))
    monkeypatch.setattr(training, "run_segment", counted)
    resumed = api.resume(tmp_path / "run")
    assert not trained and any(r["trial"]["stage"] == "trunk" for r in of_kind(resumed, "Asked"))
    assert committed(resumed) == committed(api.load(folder / "straight")) and all(r.ok for r in resumed.replay())
    same_states(folder / "straight", tmp_path / "run")


def test_a_bad_batch_and_a_kill_after_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bad batch is part of the data here (a row whose hidden states are NaN), so the resumed run meets it again."""
    monkeypatch.setattr(segment, "_SAVE_SHARE", 1e9)
    load = Rows.load
    calls = [0, 10**9]

    def spoiled(self: Rows, rows: np.ndarray) -> tuple[Any, torch.Tensor]:
        calls[0] += 1
        if calls[0] == calls[1]:
            raise Killed
        (x, mask), targets = load(self, rows)
        return (x * float("nan") if x.is_floating_point() and 7 in rows else x, mask), targets

    monkeypatch.setattr(Rows, "load", spoiled)
    settings = {"layers": 1}  # the last layer only: inputs are hidden states
    straight = run(config(folder / "rows.csv", tmp_path / "straight", folder / "encoder", **settings))
    assert [r for r in of_kind(straight, "Event") if r["event"] == "nonfinite"]
    calls[:] = [0, 90]
    with pytest.raises(Killed):
        run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder", **settings))
    calls[:] = [0, 10**9]
    resumed = api.resume(tmp_path / "run")
    assert committed(resumed) == committed(straight)
    same_states(tmp_path / "straight", tmp_path / "run")


def test_a_full_disk_is_one_line_and_the_incumbent_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multistep import state

    def full(tensors: object, path: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder"))
    assert api.load(tmp_path / "run").predict(["alpha up"])[0].value
    assert not list((tmp_path / "run" / "states").glob(".*tmp"))
    api.resume(tmp_path / "run")
    same_states(folder / "straight", tmp_path / "run")


def test_a_worse_average_is_rolled_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from multistep.state import TrainState

    average = TrainState.average

    def spoiled(self: TrainState) -> None:
        average(self)
        for value in (*self.ema, *self.tail):
            value.zero_()

    monkeypatch.setattr(TrainState, "average", spoiled)
    done = run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder"))
    averages = [r for r in done.records() if r.get("stage") == "average" and r["kind"] in ("Committed", "RolledBack")]
    assert [r["kind"] for r in averages] == ["RolledBack", "RolledBack"]
    assert all(r["evidence"] for r in averages)


def test_a_useless_fine_tune_is_rolled_back(folder: Path, tmp_path: Path) -> None:
    settings = {"optimizer": {"lr": 1.0}, "clip": 0.0}
    done = run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder", **settings))
    stages = ("trunk", "regularize", "go on")
    told = [r for r in done.records() if r.get("stage") in stages and r["kind"] in ("Committed", "RolledBack")]
    assert told and {r["kind"] for r in told} == {"RolledBack"}
    assert of_kind(done, "TestRead")[0]["metrics"]["accuracy"][0] > 0.5


def test_a_leaking_duplicate_is_reported_and_kept_from_decisions(folder: Path, tmp_path: Path) -> None:
    from multistep import data

    for name, seed in (("train", 1), ("validation", 2), ("test", 3)):
        write_rows(tmp_path / f"{name}.csv", rows=120, seed=seed)
    train = (tmp_path / "train.csv").read_text().splitlines()
    for name in ("validation", "test"):
        with open(tmp_path / f"{name}.csv", "a") as file:
            file.write(train[5] + "\n")
    loaded = data.load(tmp_path)
    leaked = train[5].rsplit(",", 1)[0]
    assert leaked not in [e.text for e in (*loaded.control, *loaded.calibration)]
    assert any("leakage" in line for line in loaded.report.lines())


def test_labels_that_cannot_be_learnt_leave_the_incumbent(folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", shuffled=True)
    done = run(config(tmp_path / "rows.csv", tmp_path / "run", folder / "encoder"))
    assert done.predict(["alpha up"])[0].value
    assert abs(of_kind(done, "TestRead")[0]["metrics"]["accuracy"][0] - 1 / 3) < 0.3


def test_what_a_killed_process_had_half_written_goes(tmp_path: Path) -> None:
    from multistep.state import sweep, write_folder

    write_folder(tmp_path / "01-linear", {}, {})
    (tmp_path / ".02-trunk.123.tmp").mkdir()
    (tmp_path / ".02-trunk.123.tmp" / "state.json").write_text("{")
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["01-linear"]


def test_kill_9_at_random_moments(folder: Path, tmp_path: Path) -> None:
    """A real process, killed twice at moments that only the seed knows (benchmarks/kills.py does it 20 times)."""
    rng = random.Random(0)
    straight = folder / "straight"
    settings = ["model=" + str(folder / "encoder"), "budget=240 updates", "batch_size=8", "optimizer.lr=2e-3"]
    out = tmp_path / "run"
    fit = ["fit", str(folder / "rows.csv"), *settings, "--out", str(out), "--quiet"]
    for _ in range(2):
        command = ["resume", str(out), "--quiet"] if (out / "journal.jsonl").exists() else fit
        process = subprocess.Popen([sys.executable, "-m", "multistep", *command], stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(4.0, 7.0))
        process.kill()
        process.wait()
    command = ["resume", str(out), "--quiet"] if (out / "journal.jsonl").exists() else fit
    subprocess.run([sys.executable, "-m", "multistep", *command], check=True, stdout=subprocess.DEVNULL)
    assert committed(api.Run(out)) == committed(api.Run(straight))
    same_states(straight, out)
