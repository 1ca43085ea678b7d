"""Splits: nothing lost, duplicates on one side, every class its share, given splits untouched; and the report's counts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multistep.data import DataReport, Dataset, demo_rows, load, write_demo
from multistep.data.split import Item, divide, normalised


def write(path: Path, rows: list[tuple[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
    return path


def parts(data: Dataset) -> dict[str, list[Any]]:
    return {"train": data.train, "control": data.control, "calibration": data.calibration, "test": data.test}


def keys(examples: list[Any]) -> set[bytes]:
    return {normalised(e.text)[0] for e in examples}


@pytest.fixture
def thousand(tmp_path: Path) -> Path:
    rows = [(f"Text {i % 900} of  many", "abc"[(i % 900) % 3] if i % 900 else "rare") for i in range(1000)]
    return write(tmp_path / "x.jsonl", [(t.upper() if i >= 900 else t, y) for i, (t, y) in enumerate(rows)])


def test_made_splits(thousand: Path) -> None:
    data = load(thousand, seed=1)
    sizes = {name: len(part) for name, part in parts(data).items()}
    assert sum(sizes.values()) == 1000
    assert abs(sizes["test"] - 100) <= 2 and abs(sizes["control"] - 50) <= 2 and abs(sizes["calibration"] - 50) <= 2
    seen: set[bytes] = set()
    for part in parts(data).values():
        assert not seen & keys(part)
        seen |= keys(part)
    for part in (data.control, data.calibration, data.test):
        counts = Counter(e.label for e in part)
        assert max(counts.values()) - min(counts.values()) <= 0.1 * len(part)
    assert data.labels == ("a", "b", "c", "rare")
    assert data.report.leakage == {} and data.report.duplicates.count > 50
    assert data.splits_given == ()


def test_deterministic(thousand: Path) -> None:
    first, again, other = load(thousand), load(thousand), load(thousand, seed=1)
    assert parts(first) == parts(again) and first.fingerprint == again.fingerprint
    assert first.test != other.test and first.fingerprint != other.fingerprint


def test_small_data_says_so(tmp_path: Path) -> None:
    data = load(write(tmp_path / "x.jsonl", [(f"text {i}", "ab"[i % 2]) for i in range(12)]))
    assert {name: len(p) for name, p in parts(data).items()} == {"train": 6, "control": 2, "calibration": 1, "test": 3}
    assert any("small data" in note for note in data.report.notes)
    data = load(write(tmp_path / "y.jsonl", [(f"text {i}", "ab"[i % 2]) for i in range(120)]))
    assert (len(data.test), len(data.control) + len(data.calibration)) == (20, 20)


def test_given_splits_stay_and_leaks_decide_nothing(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [(f"train {i}", "ab"[i % 2]) for i in range(100)])
    valid = [(f"valid {i}", "ab"[i % 2]) for i in range(20)] + [("TRAIN  7", "b"), ("train 8", "b")]
    test = [(f"test {i}", "ab"[i % 2]) for i in range(20)] + [("train 9", "b"), ("valid 3", "b"), ("", "a")]
    write(tmp_path / "valid.jsonl", valid)
    write(tmp_path / "test.jsonl", test)
    data = load(tmp_path)
    assert [e.text for e in data.test] == [t for t, _ in test]
    assert len(data.train) == 100 and len(data.control) == len(data.calibration) == 10
    assert not keys(data.train) & (keys(data.control) | keys(data.calibration))
    report = data.report
    assert {pair: found.count for pair, found in report.leakage.items()} == {
        "train-validation": 2, "train-test": 1, "validation-test": 1,
    }  # fmt: skip
    assert report.leakage["train-test"].first[0].row == 21 and "row 10" in report.leakage["train-test"].first[0].note
    assert report.empty.count == 1 and report.dropped == {}
    assert any("2 validation rows occur in train" in note for note in report.notes)
    assert report.conflicts.count == 2  # "train 8" is a in train, b in validation
    assert data.splits_given == ("train", "validation", "test")


def test_missing_splits_are_made_away_from_the_given_ones(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [(f"row {i}", "ab"[i % 2]) for i in range(300)])
    test = [(f"row {i}", "ab"[i % 2]) for i in range(0, 300, 3)]
    write(tmp_path / "test.jsonl", test)
    data = load(tmp_path)
    held = keys(data.control) | keys(data.calibration)
    assert len(data.test) == 100 and len(held) == 30 and not held & keys(data.test)
    assert list(data.report.leakage) == ["train-test"]
    assert load(tmp_path).splits_given == ("train", "test")


@pytest.mark.parametrize("task", ["classify", "regress"])
def test_without_a_test_every_row_trains_or_validates(tmp_path: Path, task: str) -> None:
    labels: list[Any] = ["a", "b"] if task == "classify" else [1.5, 2.5]
    rows = [(f"row {i}", labels[i % 2]) for i in range(300)]
    data = load(write(tmp_path / "x.jsonl", rows), task=task, test=False)
    assert [len(part) for part in parts(data).values()] == [270, 15, 15, 0]
    assert any("no test split, as asked" in note for note in data.report.notes) and data.report.lines()
    folder = tmp_path / "given"
    folder.mkdir()
    write(folder / "train.jsonl", rows)
    write(folder / "test.jsonl", rows[:10])
    assert not load(folder, task=task, test=False).test and load(folder, task=task).test


def test_dropped_rows_are_counted(tmp_path: Path) -> None:
    rows: list[tuple[str, Any]] = [(f"row {i}", "ab"[i % 2]) for i in range(50)]
    rows += [("no label", None), ("  ", "a"), ("none either", ""), ("single", "once")]
    data = load(write(tmp_path / "x.jsonl", rows))
    report = data.report
    assert {reason: f.count for reason, f in report.dropped.items()} == {"without text": 1, "without label": 2}
    assert [p.row for p in report.dropped["without label"].first] == [51, 53]
    assert report.rare == ("once",) and "single" in {e.text for e in data.train}
    assert sum(map(len, parts(data).values())) == 51


def test_multilabel_and_regress(tmp_path: Path) -> None:
    rows = [(f"row {i}", "|".join(x for x, k in (("a", 2), ("b", 3), ("c", 50)) if i % k == 0)) for i in range(200)]
    data = load(write(tmp_path / "m.jsonl", rows), task="multilabel")
    assert data.labels == ("a", "b", "c") and () in {e.label for e in data.train}
    assert any("c" in e.label for e in data.train)
    data = load(write(tmp_path / "r.jsonl", [(f"row {i}", i / 7) for i in range(200)]))
    assert data.task_kind == "regress" and data.labels == () and isinstance(data.train[0].label, float)
    counting = write(tmp_path / "c.jsonl", [(f"row {i}", i) for i in range(200)])
    assert load(counting, task="regress").train[0].label == 0.0  # looks like row numbers, but was asked for
    targets = data.report.splits["test"].targets
    assert targets is not None and targets.min < 3 and targets.max > 25 and abs(targets.mean - 14.2) < 1.5


def test_numbers_as_texts_are_said(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [(i if i % 2 else f"t{i}", "ab"[i % 2]) for i in range(40)])  # type: ignore[misc]
    data = load(path)
    assert any("20 of 40 cells of text column 'text'" in note for note in data.report.notes)


def test_report_survives_json_and_reads_well(thousand: Path) -> None:
    report = load(thousand).report
    assert DataReport.parse(json.loads(report.model_dump_json())) == report
    text = "\n".join(report.lines())
    for word in ("rows", "classes", "duplicates", "leakage", "rare"):
        assert word in text
    assert all("\n" not in line for line in report.lines())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abcd")), min_size=4, max_size=80),
    st.integers(1, 20),
    st.integers(0, 3),
)
def test_divide_is_a_partition_of_groups(rows: list[tuple[int, str]], wanted: int, seed: int) -> None:
    items = [Item("all", n, str(t), y, bytes([t]), 1) for n, (t, y) in enumerate(rows, 1)]
    rest, taken = divide(items, wanted, "classify", str(seed), cover=True)
    assert sorted(rest + taken, key=lambda i: i.number) == items
    assert not {i.key for i in rest} & {i.key for i in taken}
    assert {i.label for i in rest} == {i.label for i in items}
    biggest = max(Counter(i.key for i in items).values())
    assert len(taken) <= wanted + biggest


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.perf_counter()
    rows = demo_rows()
    assert time.perf_counter() - start < 20  # about one second on a free core
    counts = Counter(row["label"] for row in rows)
    assert len(rows) > 3000 and {"asyncio", "email"} <= counts.keys() and min(counts.values()) >= 60
    assert min(len(row["text"]) for row in rows) >= 20
    monkeypatch.setattr("multistep.data.demo.demo_rows", lambda: rows)
    write_demo(tmp_path / "deep" / "demo.csv")
    data = load(tmp_path / "deep" / "demo.csv")
    assert sum(map(len, parts(data).values())) == len(rows) and set(data.labels) == counts.keys()


def test_import_is_light() -> None:
    code = (
        "import sys, multistep.data; "
        "print(sorted({'torch', 'numpy', 'pandas', 'datasets', 'pyarrow', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
