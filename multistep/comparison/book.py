"""The rows of a comparison on disk: one JSON line each, synced when it is written, so that a kill loses the running one at most."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multistep.types import UserError

Row = dict[str, Any]


class Book:
    """`rows.jsonl` in a folder. The first row says the settings; a comparison with others is refused."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.path = folder / "rows.jsonl"
        self.rows = read(self.path) if self.path.exists() else []
        if not self.rows:
            folder.mkdir(parents=True, exist_ok=True)
            self.add("settings", settings=dict(settings))
            return
        then, now = self.rows[0].get("settings", {}), plain(settings)
        differing = next((k for k in {**then, **now} if then.get(k) != now.get(k)), None)
        if differing is not None:
            raise UserError(
                f"{folder}: its rows were made with {differing} {then.get(differing)!r}, not {now.get(differing)!r}. "
                "Choose another --out."
            )

    def add(self, kind: str, **fields: Any) -> Row:
        """Append a row. Raises OSError (disk full) with the file left whole up to the row before."""
        row = plain({"kind": kind, **fields})
        with open(self.path, "ab") as file:
            start = file.tell()
            try:
                file.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise
        self.rows.append(row)
        return row

    def of(self, kind: str, optimizer: str) -> list[Row]:
        return [r for r in self.rows if r["kind"] == kind and r["optimizer"] == optimizer]


def read(path: Path) -> list[Row]:
    """All whole rows; half a line at the end, of a process that was killed, is dropped from the file.

    Raises UserError when the file is something else.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    rows: list[Any] = []
    try:
        rows = [json.loads(line) for line in whole.splitlines() if line]
        sound = all(isinstance(r, dict) and "kind" in r for r in rows) and (not rows or rows[0]["kind"] == "settings")
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"{path}: not the rows of a comparison. Mend the file, or choose another --out.")
    return rows


def plain(value: Any) -> Any:
    """As JSON has it: a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
