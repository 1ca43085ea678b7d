"""Multiple choice: the choices of a row, and which of them its answer names.

An answer is the text of a choice, its letter (its label where the choices have labels), or its place, counted from 0. "1" may be a text in
one row and a place in all: so what the answers of a column are is decided once, by what all of them can be. Where they can be several
things, numbers are labels before places and places before texts; texts are texts before letters and letters before places.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any, Literal

from multistep.data.columns import text_of
from multistep.data.labels import as_number, brief, cell_kind, structure
from multistep.data.read import Row
from multistep.types import UserError

Named = Literal["text", "letter", "place"]
_TEXTS: tuple[Named, ...] = ("text", "letter", "place")
_NUMBERS: tuple[Named, ...] = ("letter", "place", "text")  # numbers are no letters, but may be labels


def choices_of(row: Row, columns: Sequence[str], number: int, where: str) -> tuple[list[str | None], list[str]]:
    """The texts of the choices, a gap as None, which moves no letter and no place; and their letters. Raises UserError."""
    cell = structure(row.get(columns[0])) if len(columns) == 1 else [row.get(n) for n in columns]
    letters: Sequence[Any] = string.ascii_uppercase
    if isinstance(cell, dict):
        cell, letters = cell.get("text", []), cell.get("label", letters)
    if not isinstance(cell, list):
        raise UserError(f"{where}: row {number}: {columns[0]!r} holds {brief(cell)}, not a list of choices.")
    gaps = [cell_kind(c) == "missing" for c in cell]
    texts = [
        None if gap else text_of({"choices": c}, ["choices"], number, where) for c, gap in zip(cell, gaps, strict=True)
    ]
    return texts, [str(x).strip().upper() for x in letters]


def chosen(answer: Any, texts: Sequence[str | None], letters: Sequence[str], first: Named | None) -> str | None:
    """The choice that an answer names; None where it names none. `first`: what the answers of its column are, where they are one thing."""
    found = _readings(answer, texts, letters)
    order = _NUMBERS if cell_kind(answer) == "number" else _TEXTS
    return next((found[how] for how in (first, *order) if how in found), None)


def named_by(rows: Sequence[Row], columns: Sequence[str], target: str) -> Named | None:
    """What all answers of a column are; None where no one thing is what all of them can be."""
    shared, order = set(_TEXTS), _NUMBERS
    for row in rows:
        answer = row.get(target)
        if cell_kind(answer) == "missing":
            continue
        try:
            texts, letters = choices_of(row, columns, 0, "")
        except UserError:  # told where the row is read
            continue
        shared &= _readings(answer, texts, letters).keys()
        if cell_kind(answer) != "number":
            order = _TEXTS
    return next((how for how in order if how in shared), None)


def _readings(answer: Any, texts: Sequence[str | None], letters: Sequence[str]) -> dict[Named, str]:
    said, number = str(answer).strip(), as_number(answer)
    places: dict[Named, int] = {}
    if said in texts:
        places["text"] = texts.index(said)
    if said.upper() in letters:
        places["letter"] = letters.index(said.upper())
    if number is not None and number.is_integer():
        places["place"] = int(number)
    found: dict[Named, str] = {}
    for how, place in places.items():
        if 0 <= place < len(texts) and (text := texts[place]) is not None:
            found[how] = text
    return found
