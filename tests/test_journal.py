"""The journal: appended to and read back; a half line is dropped, a damaged one is an error, a full disk leaves whole records."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multistep.journal import KINDS, Journal, read
from multistep.types import Cost, MetricValue, Outcome, UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


def filled(path: Path, n: int = 3) -> Journal:
    journal = Journal(path)
    for i in range(n):
        journal.append("Event", event=f"number {i}")
    return journal


def test_append_and_read(path: Path) -> None:
    journal = Journal(path)
    assert not path.exists(), "nothing is written before the first record"
    first = journal.append("Started", config={"data": "ü.csv"}, folder=Path("runs/x"))
    journal.append("Measured", loss_nats=np.float32(0.5), rows=(1, 2), n_rows=np.int64(3))
    outcome = Outcome(metrics={"accuracy": MetricValue(0.9, 0.01)}, cost=Cost(updates=2))
    journal.append("Told", trial="01", outcome=outcome)
    assert first["n"] == 0
    records = read(path)
    assert [(r["n"], r["kind"]) for r in records] == [(0, "Started"), (1, "Measured"), (2, "Told")]
    assert records[0]["config"] == {"data": "ü.csv"} and records[0]["folder"] == "runs/x"
    assert records[1] == {"n": 1, "kind": "Measured", "loss_nats": 0.5, "rows": [1, 2], "n_rows": 3}
    assert Outcome(**records[2]["outcome"]) == outcome
    assert "ü" in path.read_text(encoding="utf-8")


def test_a_second_process_goes_on_counting(path: Path) -> None:
    filled(path).close()
    again = Journal(path)
    assert again.append("Resumed")["n"] == 3
    again.close()
    again.close()
    assert [r["n"] for r in read(path)] == [0, 1, 2, 3]


def test_every_kind_can_be_written_and_no_other(path: Path) -> None:
    journal = Journal(path)
    for kind in KINDS:
        journal.append(kind)
    assert [r["kind"] for r in read(path)] == list(KINDS)
    with pytest.raises(AssertionError):
        journal.append("Thought")


def test_what_is_not_finite_is_text(path: Path) -> None:
    Journal(path).append(
        "Measured", values=[float("nan"), float("inf"), -np.inf, np.float64("nan"), 1.5], deep={"x": (float("nan"),)}
    )
    (record,) = read(path)
    assert record["values"] == ["nan", "inf", "-inf", "nan", 1.5] and record["deep"] == {"x": ["nan"]}
    assert np.isnan(float(record["values"][0]))
    json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON


def test_line_breaks_and_odd_characters_stay_inside_their_line(path: Path) -> None:
    text = 'a\nb\r\u2028\x00\t"\\'
    journal = Journal(path)
    journal.append("Event", event=text)
    journal.append("Event", event="half a pair: \ud83d")
    assert [r["event"] for r in read(path)] == [text, "half a pair: \ud83d"]
    assert path.read_bytes().count(b"\n") == 2


# ---------------------------------------------------------------------------------------------- killed, damaged


@pytest.mark.parametrize("half", ['{"n": 3, "kind": "Ev', '{"n": 3, "kind": "Event"}', "{", "\x00\x00"])
def test_half_a_line_is_dropped(path: Path, half: str) -> None:
    filled(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole + half.encode())
    assert [r["n"] for r in read(path)] == [0, 1, 2], "a reader sees what a writer would keep"
    journal = Journal(path)
    assert path.read_bytes() == whole
    assert journal.append("Resumed")["n"] == 3
    assert [r["n"] for r in read(path)] == [0, 1, 2, 3]


def test_killed_inside_the_first_record(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b'{"n": 0, "ki')
    assert read(path) == []
    assert Journal(path).append("Started")["n"] == 0 and len(read(path)) == 1


@pytest.mark.parametrize("damage", [b'{"n": 1, "kind": "Ev', b"12", b"null", b"[]", b'{"kind": "Event"}', b"\xff\xfe"])
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(path: Path, damage: bytes) -> None:
    filled(path).close()
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    for opening in (read, Journal):
        with pytest.raises(UserError, match=r"journal\.jsonl: line 2 is not a journal record"):
            opening(path)
    assert path.read_bytes() == b"\n".join(lines), "it is not touched"


def test_a_missing_journal_is_an_error_that_names_the_folder(path: Path) -> None:
    with pytest.raises(UserError, match=r"run: no journal\.jsonl there"):
        read(path)


# ---------------------------------------------------------------------------------------------- full disk


class Full:
    """A file on a disk that has room for `room` more bytes."""

    def __init__(self, file: Any, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        return self.file.write(data[: self.room])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_short_write_leaves_the_file_whole(path: Path) -> None:
    journal = filled(path)
    whole, file = path.read_bytes(), journal._file
    journal._file = Full(file, room=10)  # type: ignore[assignment]
    with pytest.raises(OSError) as caught:
        journal.append("Told", trial="01")
    assert caught.value.errno == errno.ENOSPC and path.read_bytes() == whole
    journal._file = file
    assert journal.append("Told", trial="01")["n"] == 3, "once there is room, it goes on"
    assert [r["n"] for r in read(path)] == [0, 1, 2, 3]


def test_a_failed_sync_takes_the_record_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = filled(path)
    whole = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="I/O error"):
        journal.append("Committed", state="01")
    assert path.read_bytes() == whole
    assert journal.append("Measured")["n"] == 3, "measurements are not synced"


def test_a_file_size_limit_is_met_with_whole_records(path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from multistep.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
journal = Journal(Path(sys.argv[1]))
try:
    for i in range(1000):
        journal.append("Event", event="x" * 50)
except OSError as error:
    print(error.errno, i)
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    number, written = map(int, done.stdout.split())
    assert number in (errno.EFBIG, errno.ENOSPC) and written > 3
    assert len(read(path)) == written and path.read_bytes().endswith(b"}\n")


def test_a_reader_may_read_while_the_writer_writes(path: Path) -> None:
    journal = Journal(path)
    for i in range(20):
        journal.append("Measured", update=i)
        assert len(read(path)) == i + 1
