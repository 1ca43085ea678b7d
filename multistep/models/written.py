"""What all cheap writers share: the protocol, and their file. Weights are numbers in JSON: they come back to the last bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from multistep.data.cells import Record
from multistep.files import reading
from multistep.types import Prediction

FILE = "writer.json"


class Writer(Protocol):
    """Records in, answers out; each has a text as its value, and a confidence where one is known."""

    kind: ClassVar[str]

    def write(self, records: Sequence[Record]) -> list[Prediction]: ...

    def save(self, folder: Path) -> None: ...


def save_data(folder: Path, kind: str, data: dict[str, Any]) -> None:
    text = json.dumps({"kind": kind, **data}, ensure_ascii=False)
    (folder / FILE).write_text(text, encoding="utf-8", errors="replace")


def load_data(folder: Path) -> dict[str, Any]:
    with reading(folder / FILE):
        return json.loads((folder / FILE).read_text(encoding="utf-8"))
