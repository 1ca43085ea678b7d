"""Replay of what went wrong in trainings, what watches saw and what was diagnosed: real runs of which each such record is changed or gone."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from test_diagnose import flip, folder, marked
from test_modules import blobs, network
from test_modules import run as optimize
from test_recovery import Hopeless, Steep, course
from test_recovery import noisy as losses
from test_replay import alter, leaves, renumbered
from test_watch import SETTLED, begun, flat, noisy

from multistep import cli, detect
from multistep.diagnosis.looks import decided
from multistep.diagnosis.training import Look
from multistep.replay import Replayed, replay
from multistep.schedules import Plateau
from multistep.tune.watch import Looks, checks

Records = list[dict[str, Any]]
MADE: dict[str, Callable[[], Any]] = {
    "diverged": lambda: optimize(
        Hopeless(), budget="600 updates", optimizer={"kind": "adamw", "lr": 1e-3}, controller="staged"
    ),
    "a bad batch": lambda: optimize(
        Steep(), train=blobs(320, 0, noise=0.5), optimizer={"kind": "adamw", "lr": 1e-2}, batch_size=32, controller="staged"
    ),
    "overfitted": lambda: optimize(
        network(hidden=1024), train=noisy(200), validation=blobs(400, 1), metric="loss", controller="staged",
        optimizer={"kind": "adamw", "lr": 0.003}, batch_size=8, budget="100 updates",
    ),
    "stopped": lambda: optimize(
        network(hidden=64), train=noisy(), validation=blobs(400, 1, noise=3.0), metric="loss", patience=3,
        optimizer={"kind": "adamw", "lr": 0.002}, schedule="constant", budget="1000 updates",
    ),
    "cut": lambda: optimize(optimizer={"kind": "sgd", "lr": 0.3}, schedule=SETTLED, budget="400 updates"),
}  # fmt: skip
# Of these records only once in a journal, or words of what was done. Of a divergence the largest of three numbers makes the margin.
_AS_WRITTEN = {
    "Event": {"event", "update", "rows", "back_to", "action", "loss_nats", "grad_norm", "updates", "stderr", "lowest_loss", "highest_loss"},
    "Diagnosed": {"action", "rows", "updates", "stderr", "lowest_loss", "highest_loss"},
    "at the end": {"text", "given", "likely", "probability"}, "Noted": set(),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Records]:
    """The journals. "paused": of labelled texts, of which a third is wrong, so that the watch over the gap stops the trunk."""
    root = tmp_path_factory.mktemp("made")
    journals = {}
    for name, make in MADE.items():
        torch.manual_seed(0)
        journals[name] = make().records()
    (train, _), (validation, _) = flip(marked(200), 0.3), flip(marked(300, 1), 0.3)
    data = folder(root / "d", train=train, validation=validation, test=marked(60, 2))
    settings = runs.config(
        data, root / "run", runs.tiny_encoder(root / "encoder"), optimizer={"lr": 5e-3}, budget="400 updates"
    )
    journals["paused"] = runs.run(settings).records()
    return journals


EVERY = pytest.mark.parametrize("name", [*MADE, "paused"])


def places(records: Records) -> list[int]:
    """The numbers of the records that this file is about."""
    return [
        n for n, r in enumerate(records)
        if r["kind"] in ("Event", "Diagnosed") or (r["kind"] == "Noted" and r["what"] == "not found")
    ]  # fmt: skip


def changed(records: Records, change: Callable[[Records], object]) -> Replayed:
    copied = copy.deepcopy(records)
    change(copied)
    return replay(copied)


def numbers(found: Replayed) -> set[int]:
    return {f.n for f in found.findings}


def of(records: Records, kind: str, **fields: Any) -> list[dict[str, Any]]:
    return [r for r in records if r["kind"] == kind and all(r.get(k) == v for k, v in fields.items())]


def test_what_was_done_is_in_them(made: dict[str, Records]) -> None:
    def said(name: str, kind: str, key: str) -> list[str]:
        return [r[key] for r in of(made[name], kind) if r.get("at") != "end"]

    assert said("diverged", "Event", "event") == ["divergence"] * detect.MAX_RESTARTS
    assert said("diverged", "Diagnosed", "name") == ["divergence"]
    assert said("a bad batch", "Event", "event") == ["exploding gradient"]
    assert said("overfitted", "Diagnosed", "name") == said("paused", "Diagnosed", "name") == ["overfitting"]
    assert said("stopped", "Event", "event") == ["no improvement"]
    assert len(said("cut", "Event", "event")) >= 2 and set(said("cut", "Event", "event")) == {"plateau"}


@EVERY
def test_it_follows_wherever_the_journal_ends(made: dict[str, Records], name: str) -> None:
    records = made[name]
    whole = replay(records)
    assert whole.ok and not whole.unchecked and whole.derived["events"] >= 1 and whole.derived["diagnoses"] >= 1, whole
    for end in range(places(records)[0], len(records)):
        assert replay(records[:end]).ok, (end, replay(records[:end]).findings)


@EVERY
def test_a_record_that_is_gone_is_missed(made: dict[str, Records], name: str) -> None:
    for n in places(made[name]):
        found = replay(renumbered(made[name][:n] + made[name][n + 1 :]))
        assert found.findings, (n, made[name][n])


@EVERY
def test_a_record_that_is_there_twice_or_elsewhere_is_seen(made: dict[str, Records], name: str) -> None:
    records = made[name]
    told = {r["trial"]: n for n, r in enumerate(records) if r["kind"] == "Told"}
    for n in places(records):
        found = replay(renumbered([*records[: n + 1], records[n], *records[n + 1 :]]))
        assert found.findings, (n, records[n])
        late = told[records[n]["trial"]]
        moved = [*records[:n], *records[n + 1 : late + 1], records[n], *records[late + 1 :]]
        assert late in numbers(changed(renumbered(moved), _same_clock)), (n, records[n])


def _same_clock(records: Records) -> None:
    """So that nothing but the place is wrong."""
    for before, after in pairwise(records):
        for unit, count in before["clock"].items():
            after["clock"][unit] = max(after["clock"][unit], count)


@EVERY
def test_any_change_of_what_was_done_or_said_is_seen(made: dict[str, Records], name: str) -> None:
    records, tried = made[name], 0
    every = []
    for n in places(records):
        sort = "at the end" if records[n].get("at") == "end" else records[n]["kind"]
        body = {k: v for k, v in records[n].items() if k not in ("n", "clock", "kind")}
        every += [(n, p) for p in leaves(body) if not set(p) & _AS_WRITTEN[sort] and not _beyond(p)]
    for n, path in random.Random(0).sample(every, min(80, len(every))):
        found = changed(records, lambda rs, n=n, path=path: alter(rs, n, path))
        assert found.findings, (n, path, records[n])
        tried += n in numbers(found)
    assert tried >= 0.8 * min(80, len(every)), "what does not follow is named by its line"


def _beyond(path: tuple[Any, ...]) -> bool:
    """Rows whose labels are likely to be wrong: the first five are in what to do."""
    return "suspects" in path and path[path.index("suspects") + 1] >= 5


# ---------------------------------------------------------------------------------------------- line by line


def test_an_edited_diagnosis_names_its_line(made: dict[str, Records]) -> None:
    for name in made:
        for record in of(made[name], "Diagnosed", at="end"):
            found = changed(made[name], lambda rs, n=record["n"]: rs[n].update(words=f"{rs[n]['words']}."))
            assert numbers(found) == {record["n"]} and "from what was told follows" in str(found.findings[0])
    records = made["a bad batch"]
    (law,) = [r for r in records if r.get("name") == "budget too small" or "budget too small" in (r.get("facts") or {})]
    path = ("facts", "budget too small", "numbers", "gain") if law["kind"] == "Noted" else ("numbers", "gain")
    found = changed(records, lambda rs: alter(rs, law["n"], path))
    assert numbers(found) == {law["n"]} and "gain" in found.findings[0].says


def test_an_edited_look_names_its_line(made: dict[str, Records]) -> None:
    for name in ("overfitted", "paused", "stopped", "cut"):
        told = next(r for r in of(made[name], "Told") if "looks" in r["outcome"]["facts"])
        last = len(told["outcome"]["facts"]["looks"]) - 1

        def lower(records: Records, n: int = told["n"], last: int = last) -> None:
            look = records[n]["outcome"]["facts"]["looks"][last]
            look["validation_loss"] *= 0.5

        found = changed(made[name], lower)
        assert found.findings and min(numbers(found)) <= told["n"], (name, found)
    told = next(r for r in of(made["paused"], "Told") if "looks" in r["outcome"]["facts"])
    found = changed(made["paused"], lambda rs: rs[told["n"]]["outcome"]["facts"]["looks"][2].update(train_loss=9.0))
    (seen,) = [r for r in of(made["paused"], "Diagnosed", name="overfitting") if r.get("at") != "end"]
    assert {seen["n"]} <= numbers(found) and any("no look of it has these numbers" in f.follows for f in found.findings)


def test_a_rise_that_nobody_saw_is_missed(made: dict[str, Records]) -> None:
    """Of a training that came to its end: a look that would have stopped it."""
    records = made["a bad batch"]
    told = next(r for r in of(records, "Told") if "looks" in r["outcome"]["facts"])

    def risen(records: Records) -> None:
        for k, look in enumerate(records[told["n"]]["outcome"]["facts"]["looks"][5:8]):
            look.update(validation_loss=3.0 + k, train_loss=0.01 - 0.001 * k, rise_stderr=0.1)

    found = changed(records, risen)
    assert any(f.n == told["n"] and "its looks give: overfitting" in f.follows for f in found.findings)


def test_a_changed_restart_names_its_line(made: dict[str, Records]) -> None:
    records = made["diverged"]
    again = of(records, "Event", event="divergence")
    for event in again:
        for change in (
            lambda r: r.update(lr_scale=r["lr_scale"] / 2),
            lambda r: r["numbers"].update(lr=2 * r["numbers"]["lr"]),
            lambda r: r["numbers"].update(recent_loss=0.1),
            lambda r: r["numbers"].update(rule="because"),
        ):
            found = changed(records, lambda rs, n=event["n"], change=change: change(rs[n]))
            assert event["n"] in numbers(found), (event, found)
    told = next(r for r in of(records, "Told") if "restarts" in r["outcome"]["facts"])
    found = changed(records, lambda rs: rs[told["n"]]["outcome"]["facts"].update(restarts=1))
    assert any(f.n == told["n"] and "its events say: 0 and 3" in f.follows for f in found.findings)
    (bad,) = of(made["a bad batch"], "Event")
    found = changed(made["a bad batch"], lambda rs: rs[bad["n"]].update(lr_scale=0.25))
    assert numbers(found) == {bad["n"]} and "follows times 0.5" in found.findings[0].follows


def test_a_probe_may_not_begin_again(made: dict[str, Records]) -> None:
    records = made["diverged"]
    trunk = next(r for r in of(records, "Asked") if r["trial"]["stage"] == "trunk")
    found = changed(records, lambda rs: rs[trunk["n"]]["trial"].update(commit=False, watch_gap=False))
    assert of(records, "Event", event="divergence")[0]["n"] in numbers(found)


def test_what_was_measured_binds_what_is_said(made: dict[str, Records]) -> None:
    records = made["paused"]
    told = next(r for r in of(records, "Told") if r["stage"] == "diagnose")
    facts = ("outcome", "facts", "known")
    for path in ((*facts, "advice", "regularized"), (*facts, "measured", "noise", "sure"), (*facts, "measured", "label"),
                 (*facts, "measured", "more_rows", "value"), (*facts, "served", 0), (*facts, "rows")):  # fmt: skip
        assert changed(records, lambda rs, path=path: alter(rs, told["n"], path)).findings, path


# ---------------------------------------------------------------------------------------------- older journals


def test_an_older_journal_is_unchecked_there_and_no_error(
    made: dict[str, Records], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def older(records: Records) -> None:
        for r in records:
            facts = r["outcome"]["facts"] if r["kind"] == "Told" else {}
            facts.pop("known", None)
            for look in [*facts.get("looks", []), *((r.get("numbers") or {}).get(k) for k in ("best", "now"))]:
                for key in ("rows", "gain", "gain_stderr", "rise_stderr") if isinstance(look, dict) else ():
                    look.pop(key, None)
            for fields in (facts.get("diagnosis"), facts.get("stopped")):
                for look in ((fields or {}).get("numbers", {}).get(k) for k in ("best", "now")):
                    for key in ("rows", "gain", "gain_stderr", "rise_stderr") if isinstance(look, dict) else ():
                        look.pop(key, None)

    for name in made:
        found = changed(made[name], older)
        assert found.ok and any("its diagnoses" in u for u in found.unchecked), (name, found.findings)
        assert ("what watches decided" in str(found)) == (name not in ("diverged", "paused")), name
    copied = copy.deepcopy(made["stopped"])
    older(copied)
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(r) + "\n" for r in copied), encoding="utf-8")
    assert cli.run(["replay", str(tmp_path)]) == 0 and "; not checked: " in capsys.readouterr().out
    assert cli.run(["replay", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["journals"][0]["unchecked"]) == 2


# ---------------------------------------------------------------------------------------------- the rules, said and derived


def test_the_words_of_a_divergence_follow_from_its_numbers() -> None:
    n, seen = np.arange(200), set()
    rising = {
        "above": np.where(n < 3, 1.3, 4.4), "lost": np.where(n < 60, 2.3 * np.exp(-n / 40), 2.3), "long": np.where(n < 8, 0.38, 0.8),
        "stuck": np.interp(n, [0, 20, 40, 60], [1.0, 4.0, 4.0, 1.2]),
    }  # fmt: skip
    for levels in rising.values():
        for seed in range(5):
            if (diverged := course(losses(levels, 0.1, seed))) is None:
                continue
            said = json.loads(json.dumps(diverged[1]))
            assert detect.follows(said), said
            assert not detect.follows({**said, "recent_loss": said["recent_loss"] - 0.3}), said
            assert not detect.follows({**said, "rule": said["rule"] + " at once"})
            seen.add(re.sub(r"[\d.]+", "", said["rule"]))
    assert len(seen) >= 3, seen
    blown = detect.Course()
    for k, loss in enumerate([1.0] * 5 + [9.0] * 3):
        blown.see(loss, 1.0, k)
    said = blown.blows_up()
    assert said is not None and detect.follows(said) and not detect.follows({**said, "recent_loss": 2.5})
    assert detect.follows({"rule": "4 bad batches with 12 good ones between them"}) and not detect.follows(
        {"rule": "?"}
    )


def test_what_a_watch_decides_is_derived_from_its_looks(tmp_path: Path) -> None:
    cut = Plateau(factor=0.3, patience=1, floor=0.05)
    ways: list[dict[str, Any]] = [
        {"overfitting": True},
        {"patience": 2},
        {"plateau": cut},
        {"patience": 3, "plateau": cut},
    ]
    seen_names = set()
    for seed in range(8):
        levels = np.cumsum(np.random.default_rng(seed).normal(0.05, 0.15, 19)) + 3.0
        for more in ways:
            names, seen = watched(tmp_path / "best", levels, more)
            rules = {"overfitting": False, "patience": 0, "plateau": None, **more}
            assert decided(seen, **rules) == names, (seed, more)
            if any(names):
                first = next(n for n, name in enumerate(names) if name)
                assert decided([k.with_(gain=None, rise_stderr=None) for k in seen], **rules)[first] is None
            seen_names |= set(names)
    assert seen_names == {"", "overfitting", "no improvement", "plateau"}


def watched(folder: Path, levels: np.ndarray, more: dict[str, Any]) -> tuple[list[str], list[Look]]:
    """What a watch finds at each look when validation has these levels, while train falls; and its looks, from JSON."""
    given = iter(flat(level, seed=k) for k, level in enumerate(levels))
    state, watch = begun(folder), Looks(folder, lambda _: next(given), checks(), **more)
    names: list[str] = []
    for update in range(5, 100, 5):
        state.segment.updates = state.counters.update = update
        found = watch.look(state, [1.0 / update])
        names.append("" if found is None else found.fields.get("name") or found.fields["event"])
        if found is not None and found.ends:
            break
    return names, [Look(**look) for look in json.loads(json.dumps(watch.looks()))]
