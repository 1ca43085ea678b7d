"""Replay: every journal of a run that lived replays, wherever it ends; one in which anything was changed does not, and it says where."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from papers import live, problem

from multistep import cli, journal
from multistep.budget import Budget, parse_budget
from multistep.controllers import CONTROLLERS
from multistep.controllers.script import Target
from multistep.replay import Replayed, replay, replay_run
from multistep.replay.found import Finding
from multistep.types import UserError

Records = list[dict[str, Any]]
DECISIONS = ("Asked", "Skipped", "Reserved", "Told", "Committed", "RolledBack")  # all else: test_replay_training.py
LIVED = [
    ("300s", "some/encoder", "staged"), ("5000 updates", "some/encoder", "staged"), ("300s", "none", "staged"),
    ("120s", "lstm", "race"), ("60s", "some/encoder", "fixed"), ("40 updates", "scratch", "staged"), ("2e6 tokens", "lstm", "race"),
]  # fmt: skip


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Records:
    total = parse_budget("300s")
    return live(tmp_path_factory.mktemp("lived") / "journal.jsonl", problem(total), total)


def numbers(found: Replayed) -> set[int]:
    return {f.n for f in found.findings}


def tampered(records: Records, change: Callable[[Records], object]) -> Replayed:
    copied = copy.deepcopy(records)
    change(copied)
    return replay(copied)


def renumbered(records: Records) -> Records:
    return [{**r, "n": n} for n, r in enumerate(records)]


def of(records: Records, kind: str, stage: str = "") -> dict[str, Any]:
    return next(r for r in records if r["kind"] == kind and stage in ("", r.get("stage")))


# ---------------------------------------------------------------------------------------------- what lived


@pytest.mark.parametrize(("budget", "encoder", "controller"), LIVED)
@pytest.mark.parametrize("seed", range(3))
def test_what_lived_replays_wherever_it_ends(
    budget: str, encoder: str, controller: str, seed: int, tmp_path: Path
) -> None:
    total = parse_budget(budget)
    records = live(tmp_path / "journal.jsonl", problem(total, controller), total, encoder=encoder, seed=seed)
    whole = replay(records)
    asks = sum(r["kind"] in ("Asked", "Skipped", "Reserved") for r in records)
    assert (
        whole.ok and whole.derived["asks"] == asks and whole.derived["verdicts"] and whole.derived["test readings"] == 1
    )
    for end in range(len(records)):
        assert replay(records[:end]).ok, (end, replay(records[:end]).findings)


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("budget", ["300s", "3000 updates"])
def test_every_controller_replays(controller: str, budget: str, tmp_path: Path) -> None:
    total = parse_budget(budget)
    records = live(tmp_path / "journal.jsonl", problem(total, controller), total)
    assert replay(records).ok, replay(records).findings
    asked = [n for n, r in enumerate(records) if r["kind"] == "Asked"]
    for n in asked[:: max(1, len(asked) // 5)]:
        found = tampered(records, lambda rs, n=n: rs[n]["trial"].update(why="because"))
        assert n in numbers(found) and replay(records[:n]).ok


def test_what_was_interrupted_and_gone_on_with_replays(tmp_path: Path) -> None:
    total, path = Budget(amount=300.0), tmp_path / "journal.jsonl"
    straight = live(tmp_path / "straight.jsonl", problem(total), total)
    for stop in (7, 20, 33):
        past = journal.read(path) if path.exists() else []
        records = live(path, problem(total), total, stop_at=stop, past=past)
        assert records[-1]["kind"] == "Interrupted" and replay(records).ok
    records = live(path, problem(total), total, past=records)
    assert replay(records).ok and [r["kind"] for r in records].count("Resumed") == 3
    settled = [
        [(r["kind"], r["trial"]) for r in rs if r["kind"] in ("Committed", "RolledBack")] for rs in (records, straight)
    ]
    assert settled[0] == settled[1]


def test_a_finished_run_that_was_given_more_replays(tmp_path: Path) -> None:
    path, first, more = tmp_path / "journal.jsonl", parse_budget("120s"), parse_budget("300s")
    records = live(path, problem(first), first)
    records = live(path, problem(first), more, past=records)
    assert replay(records).ok and replay(records).derived["test readings"] == 2
    assert any(r["kind"] == "Asked" and r["trial"]["id"].startswith("2-") for r in records)
    late = next(n for n, r in enumerate(records) if r["kind"] == "Resumed")
    without = renumbered(records[:late] + records[late + 1 :])
    assert any("was read before" in f.follows for f in replay(without).findings)


def test_more_of_a_run_with_a_target_goes_in_legs(tmp_path: Path) -> None:
    path, first, more = tmp_path / "journal.jsonl", parse_budget("120s"), parse_budget("420s")
    given = problem(first).with_(target=Target(metric="accuracy", value=0.99, higher_is_better=True))
    records = live(path, given, more, past=live(path, given, first))
    asked = [r["trial"] for r in records if r["kind"] == "Asked" and r["trial"]["id"].startswith("2-")]
    trunks = [trial["why"] for trial in asked if trial["stage"] == "trunk"]
    assert len(trunks) > 1 and all("of the time for it" in why for why in trunks) and replay(records).ok


# ---------------------------------------------------------------------------------------------- what was changed


def test_every_verdict_that_is_flipped_is_seen(lived: Records) -> None:
    flipped = 0
    for n, record in enumerate(lived):
        if record["kind"] != "Told":
            continue
        facts = record["outcome"]["facts"]
        if record["outcome"]["verdict"] is not None:
            found = tampered(
                lived,
                lambda rs, n=n: rs[n]["outcome"]["verdict"].update(accept=not rs[n]["outcome"]["verdict"]["accept"]),
            )
            assert n in numbers(found)
            flipped += 1
        for key in (k for k in facts if k.endswith("_verdict")):
            found = tampered(lived, lambda rs, n=n, key=key: _flip(rs[n]["outcome"]["facts"][key]))
            assert n in numbers(found)
            flipped += 1
    assert flipped == replay(lived).derived["verdicts"] > 10


def _flip(verdict: dict[str, Any]) -> None:
    verdict["accept"] = not verdict["accept"]


def test_a_rival_that_is_gone_is_missed(lived: Records) -> None:
    for key in ("against", "family"):
        places = [n for n, r in enumerate(lived) if r["kind"] == "Told" and f"{key}_rival" in r["outcome"]["facts"]]
        assert places
        for n in places:
            for gone in ([f"{key}_rival"], [f"{key}_verdict"], [f"{key}_rival", f"{key}_verdict"]):
                found = tampered(lived, lambda rs, n=n, gone=gone: [rs[n]["outcome"]["facts"].pop(k) for k in gone])
                assert any(f.n == n and f"nothing of {key}_" in f.says for f in found.findings), (n, gone)


def test_evidence_of_before_a_comparison_had_both_tails_replays(lived: Records) -> None:
    def older(records: Records) -> None:
        for record in records:
            for compared in record.get("evidence") or []:
                del compared["p_worse"]
            if record["kind"] == "Told":
                verdicts = [record["outcome"]["verdict"] or {}]
                verdicts += [v for k, v in record["outcome"]["facts"].items() if k.endswith("_verdict")]
                for compared in (c for v in verdicts for c in v.get("evidence", ())):
                    del compared["p_worse"]

    found = tampered(lived, older)
    assert found.ok, found.findings


def test_every_decision_that_is_turned_round_is_seen(lived: Records) -> None:
    turned = {"Committed": "RolledBack", "RolledBack": "Committed"}
    for n, record in enumerate(lived):
        if record["kind"] in turned:
            found = tampered(lived, lambda rs, n=n: rs[n].update(kind=turned[rs[n]["kind"]]))
            assert n in numbers(found) and "it follows: " in str(found.findings[0])


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(tree, dict):
        return [p for k, v in tree.items() for p in leaves(v, (*path, k))]
    if isinstance(tree, list):
        return [p for i, v in enumerate(tree) for p in leaves(v, (*path, i))]
    return [path]


def alter(records: Records, n: int, path: tuple[Any, ...]) -> None:
    at: Any = records[n]
    for key in path[:-1]:
        at = at[key]
    old = at[path[-1]]
    if isinstance(old, bool):
        at[path[-1]] = not old
    elif isinstance(old, int | float):
        at[path[-1]] = old + 1 if isinstance(old, int) else 1.37 * old + 0.21
    else:
        at[path[-1]] = f"{old}x" if isinstance(old, str) else "x"


# What a journal has only once, or has no use for: what was measured, and what it cost.
_TAKEN_AS_WRITTEN = ("metrics", "cost", "stage", "rows", "n_layers", "encoder", "ok", "failure", "predictor")


def test_any_change_of_a_decision_is_seen(lived: Records) -> None:
    places = []
    for n, record in enumerate(lived):
        if record["kind"] in DECISIONS:
            body = {k: v for k, v in record.items() if k not in ("n", "clock")}
            places += [(n, p) for p in leaves(body) if record["kind"] != "Told" or not set(p) & set(_TAKEN_AS_WRITTEN)]
    profile = {n for n, r in enumerate(lived) if r["kind"] == "Told" and r["stage"] == "profile"}
    places = [(n, p) for n, p in places if n not in profile]  # taken as it was measured
    assert len(places) > 500
    missed = []
    for n, path in random.Random(0).sample(places, 250):
        found = tampered(lived, lambda rs, n=n, path=path: alter(rs, n, path))
        if found.ok:
            missed.append((lived[n]["kind"], path))
    told = [
        path for kind, path in missed if kind == "Told" and path[-1] in ("state", "incumbent", "alpha")
    ]  # of what was not kept
    assert len(told) == len(missed) < 10, missed


@pytest.mark.parametrize("keep_numbers", [True, False])
def test_a_line_that_is_gone_is_missed(lived: Records, keep_numbers: bool) -> None:
    last = max(n for n, r in enumerate(lived) if r["kind"] == "Asked")
    for n, record in enumerate(lived[:last]):
        if record["kind"] not in DECISIONS and not keep_numbers:
            continue
        rest = lived[:n] + lived[n + 1 :]
        found = replay(rest if keep_numbers else renumbered(rest))
        assert found.findings or found.unknown, (n, record["kind"])


def test_lines_that_change_places_are_seen(lived: Records) -> None:
    places = [n for n, r in enumerate(lived) if r["kind"] in DECISIONS]
    for a, b in pairwise(places):
        swapped = list(lived)
        swapped[a], swapped[b] = lived[b], lived[a]
        assert replay(swapped).findings, (a, b)
        clocks = [{**r, "clock": lived[n]["clock"]} for n, r in enumerate(renumbered(swapped))]
        assert replay(clocks).findings, (lived[a]["kind"], lived[b]["kind"], a, b)


def test_updates_are_taken_back_where_memory_ran_out_and_nowhere_else(lived: Records) -> None:
    trunk = next(r["trial"]["id"] for r in lived if r["kind"] == "Asked" and r["trial"]["stage"] == "trunk")
    at = max(n for n, r in enumerate(lived) if r["kind"] == "Measured" and r["trial"] == trunk)
    before, counts = lived[at]["clock"], {"updates": lived[at]["clock"]["updates"] + 40}
    fields = {"trial": trunk, "update": 1, "action": "", "clock": before}

    def with_event(event: str) -> Records:
        records = copy.deepcopy(lived)
        records[at]["clock"].update(counts)
        records.insert(at + 1, {"n": 0, "kind": "Event", "event": event, **fields})
        return renumbered(records)

    assert replay(with_event("out of memory")).ok
    assert [f.n for f in replay(with_event("spike")).findings] == [at + 1]


def test_the_clock_and_what_was_left(lived: Records) -> None:
    def back(records: Records) -> None:
        records[20]["clock"]["wall_s"] = 0.5

    found = tampered(lived, back)
    assert 20 in numbers(found) and "it went back" in str(found.findings[0])
    told = of(lived, "Told", "head")
    found = tampered(lived, lambda rs: rs[told["n"]]["outcome"].update(remaining=told["outcome"]["remaining"] + 0.1))
    assert any(f.n == told["n"] and "reserved leave" in f.follows for f in found.findings)
    reserved = of(lived, "Reserved")
    found = tampered(lived, lambda rs: rs[reserved["n"]].update(amount=0.5))
    assert {f.kind for f in found.findings} >= {"Reserved", "Told"}
    trunk = next(r for r in lived if r["kind"] == "Asked" and r["trial"]["stage"] == "trunk")
    before = max((r for r in lived[: trunk["n"]] if r["kind"] == "Told"), key=lambda r: r["n"])
    found = tampered(lived, lambda rs: rs[before["n"]]["outcome"].update(remaining=0.0))
    assert any(f.n == trunk["n"] and "nothing of the budget was left" in f.follows for f in found.findings)


def test_the_test_is_read_once_and_last(lived: Records) -> None:
    read = of(lived, "TestRead")
    twice = renumbered([*lived[: read["n"] + 1], read, *lived[read["n"] + 1 :]])
    assert any("it was read before" in f.follows for f in replay(twice).findings)
    first = next(r["n"] for r in lived if r["kind"] == "Asked" and r["trial"]["stage"] == "race")
    early = renumbered([*lived[:first], {**read, "clock": lived[first]["clock"]}, *lived[first:]])
    assert any("the test was read before" in f.follows for f in replay(early).findings)
    found = tampered(lived, lambda rs: rs[read["n"]]["metrics"].update(accuracy=[0.99, 0.01]))
    assert any("read others on the test" in f.follows for f in found.findings)


def test_what_a_controller_was_given_counts(lived: Records) -> None:
    start = next(r for r in lived if r.get("what") == "problem")
    found = tampered(lived, lambda rs: rs[start["n"]]["facts"]["problem"].update(budget=200.0))
    assert any(f.kind == "Asked" and "the controller asks" in f.follows for f in found.findings)
    found = tampered(lived, lambda rs: rs[start["n"]]["facts"].update(controller="hopeful"))
    assert found.findings[0].n == start["n"] and "'hopeful' is not known" in found.findings[0].follows
    found = tampered(lived, lambda rs: rs[start["n"]]["facts"].update(problem={"task": "classify"}))
    assert found.findings[0].n == start["n"]


def test_a_journal_of_another_version_cannot_be_replayed(lived: Records) -> None:
    old = renumbered([r for r in lived if r.get("what") != "problem"])
    assert replay(old).unknown and not replay(old).findings and "cannot be replayed" in str(replay(old))

    for r in old:
        if r["kind"] == "Asked":
            r["trial"] = {**r["trial"], "later": True}
    assert replay(old).unknown and not replay(old).findings

    def words_alone(records: Records) -> None:
        for r in records:
            if r["kind"] == "Told" and r["outcome"]["verdict"]:
                r["outcome"]["verdict"]["by"] = None

    found = tampered(lived, words_alone)
    assert found.unknown and not found.findings


def test_lines_that_are_no_decisions(lived: Records) -> None:
    for change, words in (
        (lambda rs: rs[9].update(kind="Thought"), "'Thought'"), (lambda rs: rs[9].pop("clock"), "its clock is None"),
        (lambda rs: rs[9].update(n="x"), "number 'x'"),
    ):  # fmt: skip
        found = tampered(lived, change)
        assert 9 in numbers(found) and any(words in f.says for f in found.findings)
    told = of(lived, "Told", "head")["n"]
    for gone in ("outcome", "trial"):
        assert told in numbers(tampered(lived, lambda rs, gone=gone: rs[told].pop(gone)))
    found = tampered(lived, lambda rs: rs[told]["outcome"].update(verdict={"accept": 1, "rule": []}))
    assert told in numbers(found)


# ---------------------------------------------------------------------------------------------- the command


def written(folder: Path, records: Records) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "journal.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def test_the_command(lived: Records, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(tmp_path / "run", lived)
    assert cli.run(["replay", str(run)]) == 0 and "all follows from its evidence" in capsys.readouterr().out
    told = of(lived, "Told", "head")["n"]
    bad = copy.deepcopy(lived)
    _flip(bad[told]["outcome"]["verdict"])
    written(run, bad)
    assert cli.run(["replay", str(run)]) == 1
    out = capsys.readouterr().out
    assert f"record {told} (Told): the journal says 04-head: " in out and "do not follow" in out.splitlines()[-1]
    assert cli.run(["replay", str(run), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False and said["journals"][0]["findings"][0]["n"] == told
    written(run, renumbered([r for r in lived if r.get("what") != "problem"]))
    assert cli.run(["replay", str(run)]) == 2
    assert "written by an older version" in (err := capsys.readouterr().err) and "again" in err
    assert cli.run(["replay", str(tmp_path / "nowhere")]) == 2


def test_it_needs_no_torch(lived: Records, tmp_path: Path) -> None:
    run = written(tmp_path / "run", lived)
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from multistep import cli\n"
        f"sys.exit(cli.run(['replay', {str(run)!r}]) or cli.run(['explain', {str(run)!r}, '--page', {str(run / 'p.html')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (run / "p.html").exists()


def test_findings_are_one_line_and_in_order(lived: Records) -> None:
    def spoil(records: Records) -> None:
        for r in records:
            if r["kind"] in ("Committed", "RolledBack"):
                r["rule"] = "because\nI say so"

    found = tampered(lived, spoil).findings
    assert [f.n for f in found] == sorted(f.n for f in found) and len(found) > 3
    assert all("\n" not in str(f) and isinstance(f, Finding) for f in found)


def test_a_folder_without_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run"):
        replay_run(tmp_path)
