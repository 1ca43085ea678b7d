"""Replay of real runs: of texts with labels, of any module, of models that write, and of tuning; killed, resumed, given more."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import runs
from test_language import config as language_config
from test_language import corpus, pairs
from test_modules import blobs, network

import multistep
from multistep import api, journal
from multistep.controllers import answering as answering_script
from multistep.controllers import decoding as decoding_script
from multistep.journal import Journal
from multistep.replay import replay, replay_run
from multistep.tuning import labels, tune_run

pytestmark = pytest.mark.usefixtures("torch_seeded")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replayed")
    runs.write_rows(folder / "rows.csv")
    runs.tiny_encoder(folder / "encoder")
    return folder


class Killed(BaseException):
    """Stands for kill -9 inside one process."""


def flips(records: list[dict[str, Any]]) -> int:
    """Every verdict in turn is flipped, and seen; how many there were."""
    count = 0
    for n, record in enumerate(records):
        if record["kind"] == "Told" and record["outcome"]["verdict"] is not None:
            changed = copy.deepcopy(records)
            changed[n]["outcome"]["verdict"]["accept"] = not record["outcome"]["verdict"]["accept"]
            assert n in {f.n for f in replay(changed).findings}
            count += 1
    return count


def test_labels_killed_resumed_and_given_more(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, left = Journal.append, [16]

    def dying(self: Journal, kind: str, **fields: object) -> dict[str, object]:
        record = append(self, kind, **fields)
        left[0] -= kind != "Measured"
        if left[0] == 0:
            raise Killed
        return record

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", dying)
        with pytest.raises(Killed):
            runs.run(runs.config(place / "rows.csv", tmp_path / "run", place / "encoder", budget="120 updates"))
    assert replay_run(tmp_path / "run")[0].ok
    done = api.resume(tmp_path / "run")
    (found,) = done.replay()
    assert found.ok and found.derived["verdicts"] >= 6 and found.derived["decisions"] >= 5, str(found)
    assert flips(done.records()) >= 4
    (found,) = api.resume(tmp_path / "run", "+60 updates").replay()
    assert found.ok and found.derived["test readings"] == 2, found.findings


def test_any_module(tmp_path: Path) -> None:
    result = multistep.optimize(
        network(), objective="cross_entropy", train=blobs(300, 0), validation=blobs(200, 1), metric="accuracy",
        test=blobs(100, 2), budget="1500 updates", controller="staged", soup=True, out=tmp_path / "run",
    )  # fmt: skip
    records = result.records()
    found = replay(records)
    assert found.ok and found.derived["asks"] >= 8, found.findings
    assert flips(records) >= 3
    soups = [n for n, r in enumerate(records) if r.get("what") == "averaged" and r["facts"]["which"] == "soup"]
    for place in range(len(records[soups[0]]["facts"]["tried"])):
        changed = copy.deepcopy(records)
        member = changed[soups[0]]["facts"]["tried"][place]
        member["taken"] = not member["taken"]
        assert soups[0] in {f.n for f in replay(changed).findings}
    (problem,) = [r for r in records if r.get("what") == "problem"]
    assert problem["facts"]["of"] == "module" and records[1]["kind"] == "Data" and problem["n"] == 2


def test_looks_of_a_training_that_stands_still(tmp_path: Path) -> None:
    result = multistep.optimize(
        network(), objective="cross_entropy", train=blobs(300, 0), validation=blobs(200, 1), metric="loss", budget="600 updates",
        optimizer={"kind": "adamw", "lr": 0.02}, schedule={"kind": "plateau", "patience": 2}, out=tmp_path / "run",
    )  # fmt: skip
    records = result.records()
    cuts = [n for n, r in enumerate(records) if r["kind"] == "Event" and r["event"] == "plateau"]
    assert cuts and replay(records).ok
    changed = copy.deepcopy(records)
    changed[cuts[0]]["evidence"][0]["p"] /= 50
    assert cuts[0] in {f.n for f in replay(changed).findings}


@pytest.mark.parametrize("task", ["lm", "translate"])
def test_models_that_write(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from multistep.tune import measuring

    monkeypatch.setattr(measuring, "LEAST_TARGETS", 10)
    data = corpus(tmp_path) if task == "lm" else pairs(tmp_path)
    done = runs.run(language_config(data, tmp_path / "run", task))
    (found,) = done.replay()
    assert found.ok and found.derived["verdicts"] >= 3, str(found)
    assert flips(done.records()) >= 2
    (found,) = api.resume(tmp_path / "run", "+40 updates").replay()
    assert found.ok, found.findings


def test_tuning_of_answers(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels.RunModels, "runtimes", lambda self: [])
    monkeypatch.setattr(answering_script, "WORTH", 0.0)
    rows = runs.write_rows(tmp_path / "rows.csv", rows=900)
    done = runs.run(runs.config(rows, tmp_path / "run", place / "encoder", budget="120 updates"))
    judged = runs.write_rows(tmp_path / "judged.csv", rows=300, seed=5, noise=0.2)
    policy = tune_run(done.out, budget="10s", data=str(judged), latency="p95=1s", coverage=0.9)
    first, second = done.replay()
    assert first.ok and second.ok and second.journal == "tuning.jsonl" and second.derived["verdicts"] >= 4, (
        second.findings
    )
    records = journal.read(done.out / "tuning.jsonl")
    assert flips(records) >= 4 and records[-1]["pick"] == policy.pick
    changed = copy.deepcopy(records)
    changed[-1]["pick"] = "as it stands"
    assert any("stands" in f.follows for f in replay(changed).findings)
    for record in changed:
        if record["kind"] == "Asked":
            record["trial"]["alpha"] = 0.5
    assert any("the trial allows 0.5" in f.follows for f in replay(changed).findings)


def test_tuning_of_ways_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from multistep.tune import measuring

    monkeypatch.setattr(measuring, "LEAST_TARGETS", 10)
    for name, value in (("SEARCHED", 2), ("WIDTHS", (2, 4)), ("DRAWS", 4)):
        monkeypatch.setattr(decoding_script, name, value)
    settings = {"budget": "250 updates", "batch_tokens": 512, "width": 64, "metric": "chrf", "device": "cpu"}
    done = runs.run(language_config(pairs(tmp_path, 420), tmp_path / "run", "translate", **settings))
    tune_run(done.out, budget="20s", latency="p95=1s")
    found = done.replay()[1]
    assert found.ok and found.derived["asks"] >= 5, found.findings
    assert flips(journal.read(done.out / "tuning.jsonl")) >= 3
