"""Behaviour of `compare`: equal tuning, equal runs, rows that are gone on with, what is said of them; the statistics against scipy."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import write_rows
from scipy import stats
from torch import Tensor, nn

import multistep
from multistep import cli
from multistep.comparison.entrants import chosen, entrants, next_value
from multistep.comparison.plot import ticks
from multistep.comparison.statistics import against_best, holm, mean_of, paired_p, reaches
from multistep.optimizers import AdamW
from multistep.types import UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(3, 8, generator=torch.Generator().manual_seed(99))
    y = torch.randint(0, 3, (n,), generator=generator)
    return centres[y] + 2 * torch.randn(n, 8, generator=generator), y


def network(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def run(optimizers: Any = ("adamw", "sgd"), **more: Any) -> Any:
    given: dict[str, Any] = {
        "objective": "cross_entropy", "train": blobs(200, 0), "validation": blobs(200, 1), "metric": "loss",
        "budget": "40 updates", "seeds": 2, "points": 4,
    }  # fmt: skip
    return multistep.compare(optimizers, network, **{**given, **more})


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock says."""
    skipped = ("seconds", "wall_s", "judge_s", "when", "load_before", "curve")
    kept = [{k: v for k, v in r.items() if k not in skipped} for r in rows]
    return [
        {**r, "curve": [[p[0], p[2], p[3]] for p in full.get("curve", [])]} for r, full in zip(kept, rows, strict=True)
    ]


# ---------------------------------------------------------------------------------------------- the comparison


def test_probes_alike_then_runs_in_turns_and_the_same_twice(tmp_path: Path) -> None:
    found = run(out=tmp_path / "a")
    rows = found.rows[1:]
    said = [(r["kind"], r["optimizer"], r.get("index", r.get("seed"))) for r in rows]
    assert said == [
        *(("probe", name, n) for n in range(3) for name in ("adamw", "sgd")),
        *(("run", name, seed) for seed in range(2) for name in ("adamw", "sgd")),
    ]
    assert {r["updates"] for r in rows if r["kind"] == "probe"} == {10} and {r["updates"] for r in rows[6:]} == {40}
    assert [r["value"] for r in rows if r["kind"] == "probe" and r["index"] == 0] == [
        pytest.approx(AdamW.rates["scratch"].prior), 0.1,
    ]  # fmt: skip
    curve = rows[-1]["curve"]
    assert [p[2] for p in curve] == [10, 20, 30, 40] and curve[-1][3] == pytest.approx(rows[-1]["score"])
    assert rows[6]["value"] == chosen_value(rows, "adamw")
    assert timeless(run(out=tmp_path / "b").rows) == timeless(found.rows)


def chosen_value(rows: list[dict[str, Any]], name: str) -> float:
    probes = [r for r in rows if r["kind"] == "probe" and r["optimizer"] == name]
    return min(probes, key=lambda r: r["score"])["value"]


def test_every_optimizer_sees_the_same_seeds_and_each_seed_its_own_start() -> None:
    starts: dict[int, list[Tensor]] = {}

    def make(seed: int) -> nn.Module:
        module = network(seed)
        starts.setdefault(seed, []).append(next(module.parameters()).detach().clone())
        return module

    multistep.compare(
        ["adamw", "sgd"], make, objective="cross_entropy", train=blobs(100, 0), budget="20 updates", seeds=2, points=1
    )
    assert torch.equal(starts[0][0], starts[0][1]) and not torch.equal(starts[0][0], starts[1][0])


def test_looking_at_validation_changes_nothing(tmp_path: Path) -> None:
    few, many = run(("adamw", "schedule_free"), points=1), run(("adamw", "schedule_free"), points=20)
    assert [r["score"] for r in few.rows[1:]] == [r["score"] for r in many.rows[1:]]


def test_the_clock_stops_while_judging(monkeypatch: pytest.MonkeyPatch) -> None:
    from multistep.comparison import arena as arenas

    now = [0.0]
    monkeypatch.setattr("multistep.processes.now_s", lambda: now.__setitem__(0, now[0] + 0.01) or now[0])
    judge = arenas.ModuleArena.judge

    def slow(self: Any, module: nn.Module, split: str) -> dict[str, float]:
        now[0] += 100.0
        return judge(self, module, split)

    monkeypatch.setattr(arenas.ModuleArena, "judge", slow)
    rows = [r for r in run(budget="1s", probe_share=0.5).rows if r["kind"] == "run"]
    assert all(r["seconds"] == pytest.approx(1.0, abs=0.1) and len(r["curve"]) == 4 for r in rows)


def test_a_kill_loses_the_running_row_and_no_other(tmp_path: Path) -> None:
    whole = run(out=tmp_path / "whole")
    path = tmp_path / "cut" / "rows.jsonl"
    path.parent.mkdir()
    for kept in (1, 4, 8):
        lines = whole.out.joinpath("rows.jsonl").read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:30])  # half a row, as a killed process leaves it
        assert timeless(run(out=path.parent).rows) == timeless(whole.rows)


def test_nothing_is_run_again_and_more_may_be_asked_for(tmp_path: Path) -> None:
    first = run(out=tmp_path).rows
    assert run(out=tmp_path).rows == first
    more = run(("adamw", "sgd", "lion"), out=tmp_path, more=1, closest=2).rows
    assert more[: len(first)] == first
    added = [(r["kind"], r["optimizer"], r.get("seed")) for r in more[len(first) :]]
    assert added[:5] == [*[("probe", "lion", None)] * 3, ("run", "lion", 0), ("run", "lion", 1)]
    assert len(added) == 7 and {r[2] for r in added[5:]} == {2}
    best = [s["optimizer"] for s in multistep.Compared(tmp_path).summary()["standings"]]
    assert {r[1] for r in added[5:]} <= set(best)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"budget": "50 updates"}, "budget"),
        ({"batch_size": 16}, "adamw"),
        ({"clip": 2.0}, "clip"),
        ({"points": 5}, "points"),
    ],
)
def test_rows_of_other_settings_are_refused_by_name(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    run(out=tmp_path)
    with pytest.raises(UserError, match=named):
        run(out=tmp_path, **change)


def test_a_run_that_diverges_is_a_row_and_comes_last() -> None:
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    found = multistep.compare(
        [{"kind": "sgd", "lr": 1000.0, "name": "wild"}, "adamw", "sgd"], lambda seed: nn.Linear(8, 1), objective="mse",
        train=(x, 3 * x[:, :1]), validation=(x, 3 * x[:, :1]), metric="loss", budget="60 updates", seeds=2, clip=0.0,
    )  # fmt: skip
    wild = [r for r in found.rows if r.get("optimizer") == "wild"]
    assert len(wild) == 2 and all(r["diverged"] and r["score"] is None for r in wild)  # given a rate, so no probes
    last = found.summary()["standings"][-1]
    assert last["optimizer"] == "wild" and last["score"] is None and last["diverged"] == 2
    assert "diverged (2 of 2)" in found.table() and "2 of 2 runs diverged" in found.table()
    ET.fromstring(found.plot())


def test_table_json_and_picture(tmp_path: Path) -> None:
    found = run(("adamw", "sgd", "lbfgs@all", "prodigy"), metric="accuracy", budget="12 updates", seeds=3, out=tmp_path)
    summary = found.summary()
    scores = [s["score"]["value"] for s in summary["standings"]]
    assert summary["better"] == "higher" and scores == sorted(scores, reverse=True)
    assert summary["best"] == summary["standings"][0]["optimizer"]
    assert {s["batch_size"] for s in summary["standings"] if s["optimizer"] == "lbfgs@all"} == {200}
    json.dumps(summary)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text.count("\n| ") == 5 and "best mean" in text and "Holm" in text
    picture = ET.fromstring((tmp_path / "curves.svg").read_text(encoding="utf-8"))
    assert picture.tag.endswith("svg") and "seconds of training" in (tmp_path / "curves.svg").read_text(
        encoding="utf-8"
    )


def test_texts_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows(tmp_path / "rows.csv", rows=150)
    command = [
        "compare",
        "adamw,sgd",
        str(source),
        "model=lstm",
        "--budget",
        "12 updates",
        "--seeds",
        "2",
        "--probes",
        "1",
    ]
    command += ["--out", str(tmp_path / "out"), "--json", "--quiet"]
    assert cli.run(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["metric"] == "accuracy" and {s["optimizer"] for s in said["standings"]} == {"adamw", "sgd"}
    assert cli.run(command) == 0 and json.loads(capsys.readouterr().out) == said  # nothing was left to do
    assert (tmp_path / "out" / "curves.svg").exists()


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "words, said",
    [
        (["adamw,muom"], "Did you mean 'muon'"),
        (["adamw"], "two or more"),
        (["adamw,adamw"], "twice"),
        (["adamw,sgd@many"], "'many' is no batch size"),
        (["adamw,sgd", "--seeds", "1"], "seeds: 1 is too few"),
        (["adamw,sgd", "--budget", "soon"], "budget"),
        (["adamw,sgd", "--budget", "8 updates"], "a probe of 2 updates"),
        (["adamw,sgd", "--metric", "mse"], "metric"),
        (["adamw,sgd", "schedule.kind=constant"], "does not decay to zero"),
        (["adamw,sgd", "model=none"], "model: none"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    source = write_rows(tmp_path / "rows.csv", rows=60)
    more = ["model=lstm"] if "model=none" not in words else []
    code = cli.run(["compare", words[0], str(source), *more, *words[1:], "--out", str(tmp_path / "out"), "--quiet"])
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1, error


def test_bad_settings_of_python() -> None:
    with pytest.raises(UserError, match="learning"):
        run([{"kind": "adamw", "learning": 1}, "sgd"])
    with pytest.raises(UserError, match="objective= and train="):
        multistep.compare(["adamw", "sgd"], network)
    with pytest.raises(UserError, match="max_parameters"):
        run(["adamw", {"kind": "newton", "max_parameters": 10}])


# ---------------------------------------------------------------------------------------------- the search for a knob


def one(given: str | dict[str, Any]) -> Any:
    return entrants([given, "nadam"], 32, 1000, "scratch", {})[0]


def search(entrant: Any, score: Any, probes: int) -> list[float]:
    tried: list[tuple[float, float]] = []
    for _ in range(probes):
        value = next_value(entrant, tried)
        tried.append((value, score(value)))
    return [v for v, _ in tried]


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd", "prodigy", "newton_cg", "lbfgs"])
@pytest.mark.parametrize("best", [1e-6, 1.0, 1e6])
def test_probes_move_toward_what_is_better_within_the_range(kind: str, best: float) -> None:
    entrant = one(kind)
    values = search(entrant, lambda v: -abs(np.log(v / (best * entrant.prior))), 6)
    assert values[0] == entrant.prior and len(set(values)) == 6
    assert all(entrant.low * 0.999 <= v <= entrant.high * 1.001 for v in values)
    value, word = chosen(entrant, [(v, -abs(np.log(v / (best * entrant.prior)))) for v in values])
    assert (word == "") == (best == 1.0) and (best == 1.0) == (value == entrant.prior)


def test_after_divergence_the_search_goes_where_it_is_safer() -> None:
    worst = float("-inf")
    rates = search(one("adamw"), lambda v: worst, 3)
    assert rates == sorted(rates, reverse=True)
    dampings = search(one("newton_cg"), lambda v: worst, 3)
    assert dampings == sorted(dampings) and chosen(one("adamw"), [(1e-3, worst)])[1] == "every probe diverged"


def test_what_was_given_is_not_tuned() -> None:
    given = one({"kind": "newton_cg", "damping": 0.5})
    assert given.knob == "" and given.at(given.prior).damping == 0.5 and given.at(given.prior).lr == 1.0
    assert one({"kind": "adamw", "lr": 0.01}).at(0.01).lr == 0.01 and one({"kind": "adamw", "lr": 0.01}).knob == ""
    assert one("newton_cg").at(0.3).damping == 0.3


# ---------------------------------------------------------------------------------------------- statistics


def test_means_and_paired_tests_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 9):
        a, b = rng.normal(size=n), rng.normal(0.3, 1.0, size=n)
        found = mean_of(a.tolist())
        low, high = stats.t.interval(0.95, n - 1, a.mean(), stats.sem(a))
        assert (found.stderr, found.low, found.high) == pytest.approx((stats.sem(a), low, high))
        assert paired_p((a - b).tolist()) == pytest.approx(stats.ttest_rel(a, b).pvalue)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_against_the_best_pairs_by_seed() -> None:
    scores = {
        "best": {0: 0.9, 1: 0.8, 2: 0.85, 3: 0.88}, "near": {0: 0.89, 1: 0.81, 2: 0.84},
        "far": {0: 0.70, 1: 0.61, 2: 0.65, 3: 0.68}, "same": {0: 0.9, 1: 0.8},
    }  # fmt: skip
    found = against_best(scores, "best", 1.0)
    assert found["far"].apart and found["far"].gain == pytest.approx(-0.1975) and found["far"].n == 4
    assert not found["near"].apart and found["near"].n == 3
    assert not found["same"].apart and found["same"].p == 1.0
    raw = stats.ttest_rel([0.70, 0.61, 0.65, 0.68], [0.9, 0.8, 0.85, 0.88]).pvalue
    assert found["far"].p == pytest.approx(3 * raw)
    assert against_best({k: {s: -v for s, v in x.items()} for k, x in scores.items()}, "best", -1.0) == found


def test_when_a_curve_reaches_a_level() -> None:
    curve = [(0.25, 1.0, 10.0, 0.8), (0.5, 2.0, 20.0, 0.4), (1.0, 4.0, 40.0, 0.2)]
    assert reaches(curve, 0.6, -1.0) == pytest.approx((1.5, 15.0))
    assert reaches(curve, 0.9, -1.0) == (1.0, 10.0) and reaches(curve, 0.1, -1.0) is None


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 60.0) == [0, 10, 20, 30, 40, 50, 60]
    for low, high in ((1.43, 1.97), (-3e-5, 2e-4), (0.0, 1e6), (0.5, 0.5)):
        found = ticks(low, high)
        assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in found) and len(found) <= 9
