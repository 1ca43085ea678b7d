"""Greedy soup: never worse on validation than its best member; in both doors it is tried, judged and journaled."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
from test_modules import network, run

from multistep.controllers import module, trunk
from multistep.tune.soup import greedy_soup

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
