"""Greedy soup: never worse on validation than its best member; in both doors it is tried, judged and journaled. The mean of equal trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors.torch import load_file
from test_modules import network, run

from multistep import api
from multistep.api import Run
from multistep.controllers import module, trunk
from multistep.labels import data_of, task_for
from multistep.predictors import Single
from multistep.replay import replay
from multistep.strategy import Average, Trial
from multistep.tune.actions import run_mean
from multistep.tune.soup import greedy_soup
from multistep.tune.workbench import Workbench
from multistep.tuning.common import config_of
from multistep.tuning.labels import replayed

pytestmark = pytest.mark.usefixtures("torch_seeded")


@pytest.mark.parametrize("seed", range(5))
def test_a_soup_is_no_worse_than_its_best_member(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    goal = torch.randn(6, generator=generator)
    states = {f"{n}": {"w": goal + torch.randn(6, generator=generator), "n": torch.tensor(n)} for n in range(6)}
    asked: list[float] = []

    def score(weights: object) -> float:
        asked.append(-float((weights["w"] - goal).norm()))  # pyright: ignore
        return asked[-1]

    before = {k: v["w"].clone() for k, v in states.items()}
    soup, taken, tried = greedy_soup(list(states), states.__getitem__, score)
    assert score(soup) >= max(t["alone"] for t in tried) and tried[0]["taken"] and len(tried) == 6
    assert [t["alone"] for t in tried] == sorted((t["alone"] for t in tried), reverse=True)
    assert torch.allclose(soup["w"], torch.stack([states[m]["w"] for m in taken]).mean(0), atol=1e-6)
    assert soup["n"] == states[taken[0]]["n"] and len(taken) > 1
    assert all(torch.equal(states[k]["w"], v) for k, v in before.items())


def test_ties_are_taken_in_and_what_is_worse_is_not() -> None:
    states = {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}, "far": {"w": torch.full((1,), 9.0)}}
    soup, taken, _ = greedy_soup(list(states), states.__getitem__, lambda w: -abs(float(w["w"]) - 1.0))
    assert taken == ["a", "b"] and float(soup["w"]) == 1.0


def test_any_module_tries_it_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_UPDATES", 10)
    result = run(network(), controller="staged", budget="400 updates", soup=True, metric="loss")
    asked = {r["trial"]["stage"]: r["trial"] for r in result.records() if r["kind"] == "Asked"}
    members = asked["soup"]["action"]["members"]
    assert len(members) >= 3 and any("race" in m for m in members) and "race" not in members[-1]
    (noted,) = [r for r in result.records() if r["kind"] == "Noted" and r["facts"].get("which") == "soup"]
    assert next(t["state"] for t in noted["facts"]["tried"] if t["taken"]) in members
    assert not any(
        r["trial"]["stage"] == "soup"
        for r in run(controller="staged", budget="300 updates").records()
        if r["kind"] == "Asked"
    )


def test_one_training_makes_no_soup() -> None:
    result = run(controller="staged", budget="200 updates", soup=True, optimizer={"kind": "adamw", "lr": 0.003})
    assert any(r["stage"] == "soup" and "needs two" in r["why"] for r in result.records() if r["kind"] == "Skipped")


def test_texts_try_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "PROBE_UPDATES", 5)
    rows, encoder = runs.write_rows(tmp_path / "rows.csv", 600), runs.tiny_encoder(tmp_path / "encoder")
    done = runs.run(runs.config(rows, tmp_path / "run", encoder, budget="120 updates", soup=True, optimizer={}))
    asked = [r["trial"] for r in runs.of_kind(done, "Asked") if r["trial"]["stage"] == "soup"]
    assert len(asked) == 1 and len(asked[0]["action"]["members"]) >= 2
    told = next(r["outcome"] for r in runs.of_kind(done, "Told") if r["stage"] == "soup")
    assert told["ok"] == ("members" in told["facts"]) and (told["ok"] or "in a soup" in told["failure"])


def of_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str) -> Run:
    """A run with three trainings of its encoder and their mean."""
    monkeypatch.setattr(trunk, "trainings", lambda plan, action: (3, plan.remaining / 4))
    monkeypatch.setattr(trunk, "AGAIN_EPOCHS", 0.0)
    rows, encoder = runs.write_rows(tmp_path / "rows.csv", 900, noise=0.05), runs.tiny_encoder(tmp_path / "encoder")
    return runs.run(runs.config(rows, tmp_path / "run", encoder, budget=budget, optimizer={"lr": 5e-3}))


def kinds(outcome: dict[str, Any]) -> tuple[str, str]:
    """By which rules the mean was judged: against what stands, and against the best of its family."""
    return outcome["verdict"]["by"]["kind"], outcome["facts"]["family_verdict"]["by"]["kind"]


def test_the_mean_of_equal_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = of_three(tmp_path, monkeypatch, "900 updates")
    asked = {r["trial"]["id"]: r["trial"] for r in runs.of_kind(done, "Asked")}
    told = {r["trial"]: r["outcome"] for r in runs.of_kind(done, "Told")}
    (mean,) = [t for t in asked.values() if t["stage"] == "average"]
    members = mean["action"]["members"]
    assert [asked[m]["stage"] for m in members] == ["trunk", "again", "again"]
    assert told[mean["id"]]["facts"]["members"] == list(members)
    before = next(r for r in runs.of_kind(done, "RolledBack") if r["trial"] == members[0])
    assert before["families"]["encoder"] == members[0] and before["incumbent"]["model"] == "linear"
    assert kinds(told[mean["id"]]) == ("gain", "not_worse"), "another model stands: it has to be better than that"

    of_mean, *of_members = (
        load_file(tmp_path / "run" / "states" / state / "tensors.safetensors") for state in (mean["id"], *members)
    )
    assert of_mean and all(
        torch.allclose(value, torch.stack([m[name] for m in of_members]).mean(0), atol=1e-6)
        for name, value in of_mean.items()
    )
    assert any(not torch.equal(value, of_members[0][name]) for name, value in of_mean.items())

    records = done.records()
    place = next(n for n, r in enumerate(records) if r["kind"] == "Told" and r["trial"] == members[0])
    records[place]["outcome"]["verdict"] = told[mean["id"]]["facts"]["family_verdict"]
    assert any(f.n == place and "had to be better" in str(f) for f in replay(records).findings)


def test_more_budget_goes_on_from_a_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = of_three(tmp_path, monkeypatch, "900 updates")
    first = next(r["trial"] for r in runs.of_kind(done, "Asked") if r["trial"]["stage"] == "trunk")
    later = api.resume(done.out, "+120 updates")
    (found,) = later.replay()
    assert found.ok, found.findings
    trunks = [r["trial"] for r in runs.of_kind(later, "Asked") if r["trial"]["stage"] == "trunk"]
    assert len(trunks) == 2 and trunks[1]["start"].endswith("-average")
    assert trunks[1]["action"]["optimizer"]["lr"] == first["action"]["optimizer"]["lr"]


@pytest.mark.parametrize("stands", ["05-trunk", "04-head"])
def test_the_mean_takes_the_place_of_one_of_its_members_unless_it_harms(
    stands: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = of_three(tmp_path, monkeypatch, "240 updates")
    config, past = config_of(done.out)
    dataset = data_of(config)
    bench = replayed(Workbench(config, dataset, task_for(dataset), done.out), past)
    bench.metric, bench.incumbent, bench.families["encoder"] = "accuracy", Single(model="encoder"), stands
    asked = next(r["trial"] for r in runs.of_kind(done, "Asked") if r["trial"]["stage"] == "average")
    trial = Trial.parse(asked)
    assert isinstance(trial.action, Average)
    steps = run_mean(bench, trial, trial.action)
    with pytest.raises(StopIteration) as end:
        while True:
            next(steps)
    rule = "not_worse" if stands == "05-trunk" else "gain"
    assert kinds(end.value.value.model_dump(mode="json")) == (rule, rule)
