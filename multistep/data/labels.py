"""What a label cell means: its kind, the task that follows from a column of them, and the label of an `Example`."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple, Self

from multistep.types import TaskKind, UserError, nearest

TASKS: tuple[TaskKind, ...] = ("classify", "multilabel", "regress")
CellKind = Literal["missing", "text", "number", "truth", "list", "other"]
_FEW_WHOLE = 20  # so many different whole numbers are classes whatever they are
_FEW_BROKEN = 10  # so many different numbers with a fraction are classes (half stars)
_HUGE = 1e30  # squares of larger targets leave the range of float32 and soon of float64
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"[+-]?[0-9]+(?:\.0*)?")
_WORDS = {"text": "a text", "number": "a number", "truth": "true or false", "list": "a list", "other": "an object"}


def cell_kind(value: Any) -> CellKind:
    if value is None or value == "":
        return "missing"
    if isinstance(value, str):
        return "text" if value.strip() else "missing"
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int | float):
        return "number"
    return "list" if isinstance(value, list | tuple) else "other"


def as_number(value: Any) -> float | None:
    """The number in a cell (also as text, as CSV has it), or None."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


class Spelling(NamedTuple):
    """How the texts of a label column are read: train says it, and later files are read alike."""

    numbers: bool  # all labels are numbers: the text "nan" is a gap
    by_value: bool  # and none is written as codes are (007): 1 and 1.0 are one label

    @classmethod
    def of(cls, cells: Sequence[Any]) -> Self:
        filled = [c for c in cells if cell_kind(c) != "missing" and not _is_nan(c)]
        numbers = bool(filled) and all(as_number(c) is not None for c in filled)
        return cls(numbers, numbers and all(value_name(c) is not None for c in filled if isinstance(c, str)))

    @classmethod
    def of_model(cls, task: TaskKind, labels: Sequence[str]) -> Self:
        """Of the files that a model with these labels is judged on."""
        if task == "regress":
            return cls(numbers=True, by_value=False)
        numbers = bool(labels) and all(as_number(label) is not None and not _is_nan(label) for label in labels)
        return cls(numbers, numbers and all(value_name(label) == label for label in labels))

    def without_gaps(self, cells: Sequence[Any]) -> list[Any]:
        return [None if self.numbers and isinstance(c, str) and _is_nan(c) else c for c in cells]


def value_name(text: str) -> str | None:
    """The one spelling of a whole number, "1" for "1.0"; other numbers as they are, for 1.10 may be a version and 1e3 an id. None of what
    is no number, or written as a code is (007)."""
    text = text.strip()
    if not _NUMBER.fullmatch(text) or math.isinf(value := float(text)):
        return None
    if not _WHOLE.fullmatch(text):
        return text
    exact = Decimal(text)  # more digits than a float has
    return str(int(exact)) if exact == int(exact) else str(int(value))


def _is_nan(cell: Any) -> bool:
    number = as_number(cell)
    return number is not None and math.isnan(number)


def check_task(task: str) -> None:
    if task != "auto" and task not in TASKS:
        raise UserError(f"task: unknown {task!r}.{nearest(task, ['auto', *TASKS])}")


def infer_task(cells: Sequence[Any], where: str) -> tuple[TaskKind, str]:
    """The task that a label column asks for, and why in words."""
    cells = Spelling.of(cells).without_gaps(cells)
    check_one_kind(cells, where)
    filled = [c for c in cells if cell_kind(c) != "missing" and not (isinstance(c, float) and math.isnan(c))]
    if not filled:
        raise UserError(f"{where}: no label in any row. Name the label column with --label.")
    if all(isinstance(c, list | tuple) or _looks_like_list(c) for c in filled):
        return "multilabel", "labels are lists"
    numbers = [as_number(c) for c in filled]
    values = [n for n in numbers if n is not None]
    if len(values) < len(filled):
        return "classify", "labels are names"
    distinct = set(values)
    if all(v.is_integer() for v in distinct):
        # whole numbers counted off from 0 or 1, each several times, are indices of classes however many they are
        counted_off = min(distinct) in (0, 1) and max(distinct) - min(distinct) + 1 == len(distinct)
        if len(distinct) <= _FEW_WHOLE or (counted_off and len(values) >= 5 * len(distinct)):
            return "classify", f"labels are {len(distinct)} different whole numbers"
        if values == [values[0] + i for i in range(len(values))]:
            raise UserError(
                f"{where}: labels count up row by row, as row numbers do. Name another column with --label."
            )
        return "regress", f"labels are whole numbers with {len(distinct):,} different values"
    if len(distinct) <= min(_FEW_BROKEN, len(values) // 2):
        return "classify", f"labels are only {len(distinct)} different numbers"
    return "regress", f"labels are numbers with {len(distinct):,} different values"


def check_one_kind(cells: Sequence[Any], where: str) -> None:
    first: dict[str, int] = {}
    for row, cell in enumerate(cells, 1):
        kind = cell_kind(cell)
        if kind != "missing":
            first.setdefault(kind, row)
    if "other" in first:
        raise UserError(f"{where}: row {first['other']}: the label is an object. Make it a text, a number or a list.")
    if len(first) > 1:
        (a, row_a), (b, row_b) = list(first.items())[:2]
        raise UserError(
            f"{where}: labels of different kinds: {_WORDS[a]} in row {row_a} ({brief(cells[row_a - 1])}), "
            f"{_WORDS[b]} in row {row_b} ({brief(cells[row_b - 1])}). Write all of them the same way."
        )


def to_labels(cells: Sequence[Any], task: TaskKind, where: str, spelling: Spelling | None = None) -> list[Any]:
    """Cells to labels of examples: str, sorted tuple of str, or float; None where the label is missing. `spelling`: that of train."""
    spelling = Spelling.of(cells) if spelling is None else spelling
    cells = spelling.without_gaps(cells)
    check_one_kind(cells, where)
    if task == "regress":
        return _to_numbers(cells, where)
    if task == "multilabel":
        return [_to_classes(cell, row, where) for row, cell in enumerate(cells, 1)]
    return [_to_class(cell, row, where, spelling) for row, cell in enumerate(cells, 1)]


def _to_numbers(cells: Sequence[Any], where: str) -> list[float | None]:
    numbers: list[float | None] = []
    broken: list[int] = []
    for row, cell in enumerate(cells, 1):
        missing = cell_kind(cell) == "missing"
        number = None if missing else as_number(cell)
        if number is None and not missing:
            raise UserError(
                f"{where}: row {row}: label {brief(cell)} is not a number, and the task is regress. "
                "Mend the column, name another with --label, or use --task classify."
            )
        if number is not None and not abs(number) <= _HUGE:  # NaN compares false
            broken.append(row)
        numbers.append(number)
    if broken:
        rows = ", ".join(map(str, broken[:3])) + (" ..." if len(broken) > 3 else "")
        raise UserError(
            f"{where}: {len(broken)} targets are NaN, infinite or beyond {_HUGE:g} (row {rows}). Leave the cell empty or remove the rows."
        )
    return numbers


def _to_class(cell: Any, row: int, where: str, spelling: Spelling) -> str | None:
    if cell_kind(cell) == "missing" or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, list | tuple):
        if len(cell) != 1:
            raise UserError(f"{where}: row {row}: label {brief(cell)} is a list. Use --task multilabel.")
        cell = cell[0]
    name = _name(cell, row, where)
    return (value_name(name) or name) if spelling.by_value else name


def _to_classes(cell: Any, row: int, where: str) -> tuple[str, ...] | None:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, str):  # an empty text is a row with none of the labels
        cell = _list_in(cell) if _looks_like_list(cell) else [part for part in re.split(r"[|;]", cell) if part.strip()]
    parts = cell if isinstance(cell, list | tuple) else [cell]
    return tuple(sorted({_name(part, row, where) for part in parts}))


def _name(cell: Any, row: int, where: str) -> str:
    if cell_kind(cell) in ("missing", "list", "other"):
        raise UserError(f"{where}: row {row}: {brief(cell)} inside a list of labels. Labels are texts or numbers.")
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))  # 1.0 is how tables with gaps write the class 1
    return str(cell).strip()


def _looks_like_list(cell: Any) -> bool:
    return isinstance(cell, str) and cell.strip()[:1] == "[" and cell.strip()[-1:] == "]"


def _list_in(cell: str) -> list[Any]:
    """The list that is written into a text cell; else the text as one label."""
    value = structure(cell)
    return value if isinstance(value, list) else [cell]


def structure(cell: Any) -> Any:
    """A list or object written into a text cell, as JSON or as Python writes it; anything else as it is."""
    if isinstance(cell, str) and cell.strip()[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(cell.strip())
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # all that literal_eval raises
                continue
    return cell


def brief(value: Any, limit: int = 40) -> str:
    """A value for an error message: one line, short."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
