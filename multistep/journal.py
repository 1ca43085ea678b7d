"""The journal of a run: JSON lines, append only. Every decision is in it with its evidence; it can be replayed.

A record is `{"n": 12, "kind": "Told", "clock": {...}, ...}`. Decisions are synced to disk before the run goes on; measurements
are only flushed, so a power cut may lose the last of them but never a decision. A process killed while writing leaves half
a line; `open` drops it.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from multistep.types import UserError

# What a record may be; `explain` has words for each of them.
KINDS = (
    "Started", "Resumed", "Data", "Asked", "Measured", "Noted", "Event", "Told", "Committed", "RolledBack", "Skipped",
    "Reserved", "Diagnosed", "Interrupted", "TestRead", "Finished",
)  # fmt: skip
_NOT_SYNCED = {"Measured"}


class Journal:
    """Appends to `path`. One process writes; any number may read."""

    def __init__(self, path: Path):
        self.path = path
        self._file = None
        records = _read_and_mend(path) if path.exists() else []
        self._n = records[-1]["n"] + 1 if records else 0

    def append(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Write one record and return it as `read` will. Raises OSError (disk full) with the file left whole up to the last record."""
        assert kind in KINDS and "n" not in fields, (kind, fields.get("n"))
        record: dict[str, Any] = finite({"n": self._n, "kind": kind, **fields})
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the journal
        start = self._file.seek(0, os.SEEK_END)
        try:
            data = line.encode(errors="backslashreplace")  # half of a surrogate pair: written as JSON's escape
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "no room for a whole journal record")
            if kind not in _NOT_SYNCED:
                os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)
            raise
        self._n += 1
        return record

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Unwritten(Journal):
    """Of a process that assists in a run: what is appended is numbered, and kept nowhere."""

    def __init__(self) -> None:
        self._n = 0

    def append(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._n += 1
        return finite({"n": self._n - 1, "kind": kind, **fields})

    def close(self) -> None:
        pass


def read(path: Path) -> list[dict[str, Any]]:
    """All whole records, oldest first. Raises UserError when the file is missing or is not a journal."""
    if not path.exists():
        raise UserError(f"{path.parent}: no journal.jsonl there, so it is not a run. Give the folder named by --out.")
    return list(_records(path))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")[:-1]  # what has no newline after it: the process died while writing
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not (isinstance(record, dict) and "n" in record and "kind" in record):
            raise UserError(
                f"{path}: line {number} is not a journal record; the file was edited or damaged. "
                "Mend that line, or start the run again."
            )
        yield record


def _read_and_mend(path: Path) -> list[dict[str, Any]]:
    records = list(_records(path))
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
    return records


def finite(value: Any) -> Any:
    """JSON for pydantic models, numpy scalars and paths; a number that is not finite becomes its name ("nan", "inf")."""
    if isinstance(value, BaseModel):
        return finite(value.model_dump(mode="python"))
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, np.generic):
        return finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
