"""Forced events: data with a known defect goes through a whole run, which has to say so, with numbers and what to do next."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from multistep import api, report
from multistep.api import Run
from multistep.controllers import diagnosing
from multistep.metrics.power import FEWEST_ROWS
from multistep.tune import evidence


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny_encoder(tmp_path_factory.mktemp("encoder") / "encoder")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def found(run: Run) -> dict[str, dict[str, Any]]:
    """What was named at the end, by name; every one has words and something to do."""
    at_end = [r for r in runs.of_kind(run, "Diagnosed") if r.get("at") == "end"]
    assert all(r["words"] and r["action"] and r["numbers"] for r in at_end)
    return {r["name"]: r for r in at_end}


def not_found(run: Run) -> dict[str, dict[str, Any]]:
    return run.summary()["not_found"]


def write(path: Path, rows: list[list[Any]], header: tuple[str, str] = ("text", "label")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def marked(n: int, seed: int = 0, words: int = 6) -> list[list[Any]]:
    """Texts whose class shows in one word: [text, label]."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        k = rng.randrange(3)
        some = rng.choices(runs.WORDS, k=words)
        some.insert(rng.randrange(words), ("up", "down", "left")[k])
        rows.append([f"{' '.join(some)} {seed}x{i}", runs.LABELS[k]])
    return rows


def flip(rows: list[list[Any]], share: float) -> tuple[list[list[Any]], set[int]]:
    """The same rows with so many wrong labels, and the numbers of these rows in their file."""
    rng = random.Random(9)
    bad = set(rng.sample(range(len(rows)), round(share * len(rows))))
    others = {label: [x for x in runs.LABELS if x != label] for label in runs.LABELS}
    return [[t, rng.choice(others[y]) if i in bad else y] for i, (t, y) in enumerate(rows)], {i + 1 for i in bad}


def folder(root: Path, **splits: list[list[Any]]) -> Path:
    root.mkdir()
    for name, rows in splits.items():
        write(root / f"{name}.csv", rows)
    return root


# ---------------------------------------------------------------------------------------------- labels


def test_flipped_labels_are_named_row_by_row(tmp_path: Path) -> None:
    rows, bad = flip(marked(900), 0.1)
    run = runs.run(runs.config(write(tmp_path / "x.csv", rows), tmp_path / "run", "none"))
    said = found(run)["noisy labels"]
    suspects = said["numbers"]["suspects"]
    assert len(suspects) == 50
    right = [s for s in suspects if s["row"] in bad]
    assert len(right) / len(suspects) >= 0.9
    assert all(
        rows[s["row"] - 1][0].startswith(s["text"][:20]) and rows[s["row"] - 1][1] == s["given"] for s in suspects
    )
    truth = dict(marked(900))
    assert sum(truth[rows[s["row"] - 1][0]] == s["likely"] for s in right) / len(right) >= 0.9
    assert abs(said["numbers"]["share"] - 0.1) < 3 * said["numbers"]["share_stderr"] + 0.01
    assert f"row {suspects[0]['row']}: {suspects[0]['given']}" in run.explain()


def test_clean_labels_raise_no_alarm_and_a_learning_curve_is_fitted(tmp_path: Path) -> None:
    run = runs.run(runs.config(write(tmp_path / "x.csv", marked(900)), tmp_path / "run", "none"))
    assert "noisy labels" not in found(run) and "cannot be learnt" not in found(run)
    clear = not_found(run)
    assert clear["noisy labels"]["numbers"]["share"] < 0.02
    assert "twice the rows" in clear["too little data"]["words"]
    assert "Looked for and not found" in run.explain()


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_head_on_the_encoder_says_it_too(
    tmp_path: Path, encoder: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights tell little apart, so the words here are few; where they are blind is seen on control."""
    monkeypatch.setattr(diagnosing, "measured_by", lambda plan: "head")
    train, bad = flip(marked(900, words=2), share)
    data = folder(tmp_path / "d", train=train, validation=marked(800, 1, words=2), test=marked(60, 2, words=2))
    run = runs.run(runs.config(data, tmp_path / "run", encoder, budget="60 updates"))
    (asked,) = [r["trial"] for r in runs.of_kind(run, "Asked") if r["trial"]["stage"] == "diagnose"]
    assert asked["action"]["by"] == "head"
    if not share:
        assert "noisy labels" not in found(run) and "ridge" in not_found(run)["noisy labels"]["words"]
        return
    suspects = found(run)["noisy labels"]["numbers"]["suspects"]
    assert sum(s["row"] in bad for s in suspects) / len(suspects) >= 0.8


def test_a_part_of_train_says_nothing_of_more_rows(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosing, "measured_by", lambda plan: "head")
    data = folder(tmp_path / "d", train=marked(400, words=2), validation=marked(200, 1, words=2), test=marked(60, 2))
    for most, whole in ((400, True), (300, False)):
        monkeypatch.setattr(evidence, "MOST_ROWS", most)
        run = runs.run(runs.config(data, tmp_path / f"run{most}", encoder, budget="40 updates"))
        assert ("too little data" in {**found(run), **not_found(run)}) == whole
        told = next(r["outcome"]["facts"] for r in runs.of_kind(run, "Told") if r["stage"] == "diagnose")
        assert whole or "saw 300 of the 400 rows" in told["not_measured"]
        assert "noisy labels" in {**found(run), **not_found(run)}, "labels are asked about all the same"


def test_shuffled_labels_cannot_be_learnt_and_what_stood_first_stays(tmp_path: Path, encoder: Path) -> None:
    data = runs.write_rows(tmp_path / "x.csv", 900, shuffled=True)
    run = runs.run(runs.config(data, tmp_path / "run", encoder))
    said = found(run)
    assert (
        "not better than guessing" in said["cannot be learnt"]["words"]
        and "'label'" in said["cannot be learnt"]["action"]
    )
    assert set(said) <= {"cannot be learnt", "validation too small"}, "nothing is said of how it was learnt"
    committed = runs.of_kind(run, "Committed")
    assert [c["trial"] for c in committed if c["stage"] != "refit"] == ["01-incumbent"]
    assert {c["families"]["linear"] for c in committed} == {"01-incumbent"}, "what is judged is what stood first"
    assert all(c["incumbent"] == {"kind": "single", "model": "linear"} for c in committed)
    assert run.predict(["alpha up"])[0].value in runs.LABELS


# ---------------------------------------------------------------------------------------------- splits


def test_twenty_validation_rows_do_not_decide(tmp_path: Path, encoder: Path) -> None:
    train, _ = flip(marked(300), 0.1)
    data = folder(tmp_path / "d", train=train, validation=marked(20, 1), test=marked(60, 2))
    run = runs.run(runs.config(data, tmp_path / "run", encoder, optimizer={}))
    said = found(run)["validation too small"]
    assert said["numbers"]["rows"] == 10 and "only gains of 0.25" in said["words"] and said["numbers"]["needed"] >= 80
    why = {r["stage"]: r["why"] for r in runs.of_kind(run, "Skipped")}
    assert f"< {FEWEST_ROWS}" in why["race"] and f"< {FEWEST_ROWS}" in why["predict"]
    assert [c["trial"] for c in runs.of_kind(run, "Committed")] == ["01-incumbent"]
    assert all("on 10 rows" in r["rule"] for r in runs.of_kind(run, "RolledBack"))
    solved = [r["facts"]["path"] for r in runs.of_kind(run, "Noted") if r["what"] == "solved"]
    assert solved and all(len(path) == 1 for path in solved), "train chose the strength, not ten rows"
    told = next(r["outcome"] for r in runs.of_kind(run, "Told") if r["stage"] == "trunk")
    assert "looks" not in told["facts"], "a rise on ten rows means nothing"


@pytest.mark.parametrize(
    "more, words",
    [
        ({"patience": 3, "schedule": {"kind": "constant"}}, "patience=3 stops nothing"),
        ({"schedule": {"kind": "plateau", "patience": 1}}, "the plateau cuts no rate"),
    ],
)
def test_ten_validation_rows_stop_no_training_and_cut_no_rate(
    tmp_path: Path, encoder: Path, more: dict[str, Any], words: str
) -> None:
    data = folder(tmp_path / "d", train=marked(300), validation=marked(20, 1), test=marked(60, 2))
    run = runs.run(runs.config(data, tmp_path / "run", encoder, **more))
    assert not [r for r in runs.of_kind(run, "Event") if r["event"] in ("no improvement", "plateau")]
    rules = {r["facts"]["rule"] for r in runs.of_kind(run, "Noted") if r["what"] == "looks"}
    assert len(rules) == 1 and words in min(rules) and min(rules) in run.explain()
    told = next(r["outcome"] for r in runs.of_kind(run, "Told") if r["stage"] == "trunk")
    assert told["facts"]["progress"] == 1.0 and not {"stopped", "looks"} & set(told["facts"])


def test_leaking_splits_are_named_with_what_was_done(tmp_path: Path) -> None:
    train = marked(200)
    copied = [list(row) for row in train[:4]]
    turned = [[" ".join(reversed(t.split())), y] for t, y in train[4:14]]
    data = folder(
        tmp_path / "d", train=train, validation=[*marked(60, 1), *train[20:22]], test=[*marked(60, 2), *copied, *turned]
    )
    run = runs.run(runs.config(data, tmp_path / "run", "none"))
    said = found(run)["leaking splits"]
    assert said["numbers"]["exact"] == {"train-validation": 2, "train-test": 4}
    assert said["numbers"]["near"] == {"train-test": 10}
    assert "decided nothing" in said["words"] and "too good" in said["words"] and "test" in said["action"]
    clean = folder(tmp_path / "c", train=train, validation=marked(60, 1), test=marked(60, 2))
    assert "leaking splits" not in found(runs.run(runs.config(clean, tmp_path / "run2", "none")))


# ---------------------------------------------------------------------------------------------- training


def test_more_budget_says_again_what_is_the_matter_now(tmp_path: Path, encoder: Path) -> None:
    data = runs.write_rows(tmp_path / "x.csv", 500)
    first = runs.run(runs.config(data, tmp_path / "run", encoder, budget="20 updates"))
    little = found(first)["budget too small"]
    assert "no training" in little["words"] and f"resume {tmp_path / 'run'} --budget +'20 updates'" in little["action"]
    more = api.resume(first.out, "+300 updates")
    trials = [r["trial"]["id"] for r in runs.of_kind(more, "Asked") if r["trial"]["stage"] == "diagnose"]
    assert len(trials) == 2 and trials[1].startswith("2-")
    named = [d["name"] for d in report.summary(more.records())["diagnosed"] if d.get("at") == "end"]
    assert len(named) == len(set(named)) and "no training" not in json.dumps(
        report.summary(more.records())["diagnosed"]
    )


# ---------------------------------------------------------------------------------------------- other tasks


def test_a_regression_names_numbers_that_are_far_off(tmp_path: Path) -> None:
    rng = random.Random(0)
    said = {"poor": 1.0, "fair": 2.5, "good": 4.0}
    rows: list[list[Any]] = []
    for i in range(400):
        words = rng.choices(list(said), k=2)
        rows.append([f"{' and '.join(words)} {i}", round(sum(said[w] for w in words) / 2 + rng.gauss(0, 0.1), 2)])
    bad = set(rng.sample(range(1, 401), 40))
    spoilt = [[t, 9.0 - y if i + 1 in bad else y] for i, (t, y) in enumerate(rows)]
    run = runs.run(runs.config(write(tmp_path / "x.csv", spoilt, ("text", "score")), tmp_path / "run", "none"))
    suspects = found(run)["noisy labels"]["numbers"]["suspects"]
    assert len(suspects) > 20 and sum(s["row"] in bad for s in suspects) / len(suspects) >= 0.9
    clean = runs.run(runs.config(write(tmp_path / "y.csv", rows, ("text", "score")), tmp_path / "run2", "none"))
    assert "noisy labels" not in found(clean) and "better than a guess" in not_found(clean)["cannot be learnt"]["words"]


def test_labels_by_themselves(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows: list[list[Any]] = []
    for i in range(500):
        some = [w for w in ("fire", "water", "wind") if rng.random() < 0.4]
        rows.append([" ".join(rng.sample([*some, "stone", "cloud", str(i)], len(some) + 3)), some])
    bad = set(rng.sample(range(1, 501), 60))
    spoilt = [[t, json.dumps(sorted(set(y) ^ {"wind"}) if i + 1 in bad else y)] for i, (t, y) in enumerate(rows)]
    run = runs.run(runs.config(write(tmp_path / "x.csv", spoilt, ("text", "tags")), tmp_path / "run", "none"))
    suspects = found(run)["noisy labels"]["numbers"]["suspects"]
    assert sum(s["row"] in bad and "wind" in s["likely"] for s in suspects) / len(suspects) >= 0.9


def test_modules_and_writers_are_told_what_the_journal_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import test_language
    import test_modules

    from multistep.tune import measuring

    result = test_modules.run(controller="staged", budget="600 updates", metric="loss")
    names = [r["name"] for r in result.records() if r["kind"] == "Diagnosed" and r.get("at") == "end"]
    (clear,) = [r["facts"] for r in result.records() if r["kind"] == "Noted" and r["what"] == "not found"]
    assert names == ["budget too small"] and set(clear) == {"validation too small"}
    few = test_modules.run(validation=test_modules.blobs(15, 1), budget="12 updates")
    (small,) = [r for r in few.records() if r["kind"] == "Diagnosed" and r["name"] == "validation too small"]
    assert small["action"].startswith(f"give {small['numbers']['needed']:,} validation rows or more:"), (
        "all of them decide"
    )
    monkeypatch.setattr(measuring, "LEAST_TARGETS", 10)
    written = runs.run(
        test_language.config(test_language.corpus(tmp_path), tmp_path / "run", "lm", budget="120 updates")
    )
    stages = [r["trial"]["stage"] for r in runs.of_kind(written, "Asked")]
    assert stages[-2:] == ["diagnose", "test"]
    assert set(found(written)) == {"underfitting", "budget too small", "validation too small"} and not not_found(
        written
    )
