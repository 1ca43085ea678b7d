"""Numbers, durations and tables as plain text: the small words that explain, the card and the progress line share."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_PATH = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\,;'\"()]+[/\\])+([^\s/\\,;'\"()]+)")


def number(value: Any, digits: int = 4) -> str:
    """A number to `digits` significant digits, without trailing noise; '-' for None, NaN and infinities."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "-"
    if float(value).is_integer() and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.{digits}g}"


def plus_minus(value: Any, stderr: Any, signed: bool = False) -> str:
    """'0.9312 ± 0.0041': the value to as many decimals as two significant digits of its standard error."""
    if not _finite(value):  # the journal writes a number that is not finite as its name
        return "-"
    sign = "+" if signed else ""
    if not _finite(stderr) or stderr <= 0:
        return f"{value:{sign}.4g}"
    decimals = min(8, max(0, 1 - math.floor(math.log10(stderr))))
    return f"{value:{sign}.{decimals}f} ± {stderr:.{decimals}f}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def duration(seconds: Any) -> str:
    """'0.4 s', '38 s', '2 min 05 s', '1 h 20 min'."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count_bytes: float) -> str:
    """'23.5 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.0f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} GiB"


def clip(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def without_folders(text: str) -> str:
    """Of every path only its last part: what is shown to others does not tell a machine's folders."""
    return _PATH.sub(r"\1", text)


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table whose columns line up in a terminal too; cells that look like numbers stand to the right."""
    cells = [[_cell(c) for c in row] for row in rows]
    columns = list(zip(*cells, strict=True)) if cells else [() for _ in headers]
    widths = [max(3, _columns(h), *(_columns(c) for c in column)) for h, column in zip(headers, columns, strict=True)]
    right = [bool(column) and all(_is_number(c) for c in column) for column in columns]
    lines = [_row(headers, widths, right)]
    marks = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    lines.append("| " + " | ".join(marks) + " |")
    return "\n".join(lines + [_row(row, widths, right) for row in cells])


def _row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = []
    for cell, width, to_right in zip(cells, widths, right, strict=True):
        space = " " * (width - _columns(cell))
        padded.append(space + cell if to_right else cell + space)
    return "| " + " | ".join(padded) + " |"


def _cell(value: Any) -> str:
    text = number(value) if not isinstance(value, str) else value
    return " ".join(text.split()).replace("|", "\\|")


def _is_number(cell: str) -> bool:
    return cell == "-" or (cell[:1] in "+-0123456789" and cell[-1:].isdigit())


def _columns(text: str) -> int:
    """How many terminal columns a text fills: Chinese characters fill two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
