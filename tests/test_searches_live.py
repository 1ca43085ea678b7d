"""Every controller on real runs of texts: it trains, compares, commits; killed in the middle of several outstanding trials it ends the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import committed, config, of_kind, run, same_states, tiny_encoder, write_rows

from multistep import api
from multistep.controllers import CONTROLLERS
from multistep.controllers.plan import Plan
from multistep.journal import Journal
from multistep.types import UserError

LOOSE = {"optimizer": {"kind": "adamw"}}  # the rate is what is searched


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data and an encoder, made once; stretches of ten updates say something."""
    root = tmp_path_factory.mktemp("searches")
    write_rows(root / "rows.csv")
    tiny_encoder(root / "encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "least_updates", 10.0)
        yield root


@pytest.mark.parametrize("name", CONTROLLERS)
def test_it_drives_a_run(folder: Path, tmp_path: Path, name: str) -> None:
    done = run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder", controller=name, **LOOSE))
    trained = [r["trial"] for r in of_kind(done, "Asked") if r["trial"]["action"]["kind"] == "fine_tune"]
    assert trained and sum(t["share"] for t in trained) <= 240
    assert len(of_kind(done, "TestRead")) == 1 and done.predict(["alpha up 7"])[0].value
    told = {r["trial"]: r["outcome"] for r in of_kind(done, "Told")}
    if name in ("halving", "population"):
        starts = {t["start"] for t in trained}
        thawed = [t for t in trained if t["start"] in {u["id"] for u in trained}]
        assert thawed and len(starts) > 1
        for trial in thawed:  # goes on: its optimizer has its moments
            assert told[trial["id"]]["facts"]["update"] > told[trial["start"]]["facts"]["update"]


class Killed(BaseException):
    """Stands for kill -9 inside one process: nothing may catch it."""


@pytest.mark.parametrize("at", [9, 12, 15, 20, 26])
def test_killed_with_several_outstanding_it_ends_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    more = {"controller": "halving", "budget": "120 updates", **LOOSE}
    straight = run(config(folder / "rows.csv", tmp_path / "straight", folder / "encoder", **more))
    append, left = Journal.append, [at]

    def dying(self: Journal, kind: str, **fields: object) -> dict[str, object]:
        record = append(self, kind, **fields)
        left[0] -= kind != "Measured"
        if left[0] <= 0:
            raise Killed
        return record

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", dying)
        with pytest.raises(Killed):
            run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder", **more))
    resumed = api.resume(tmp_path / "run")
    assert committed(resumed) == committed(straight)
    same_states(tmp_path / "straight", tmp_path / "run")


def test_a_target_ends_training(folder: Path, tmp_path: Path) -> None:
    more = {"until": "accuracy=0.4", "metric": "accuracy", **LOOSE}
    done = run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder", **more))
    ended = [r for r in of_kind(done, "Skipped") if r["stage"] == "training"]
    assert len(ended) == 1 and "accuracy" in ended[0]["why"] and "standard error above 0.4" in ended[0]["why"]
    assert not [r for r in of_kind(done, "Asked") if r["trial"]["stage"] == "trunk"]
    assert len(of_kind(done, "TestRead")) == 1


@pytest.mark.parametrize(
    "until, named", [("soon", "METRIC=VALUE"), ("rouge1=0.4", "rouge1"), ("log_loss=nan", "METRIC=VALUE")]
)
def test_a_target_that_is_none_is_named(folder: Path, tmp_path: Path, until: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(config(folder / "rows.csv", tmp_path / "run", folder / "encoder", until=until))
    assert not (tmp_path / "run").exists()
