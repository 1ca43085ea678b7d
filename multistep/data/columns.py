"""Which columns are the text and the label: named by the user, else known by their names, else by what is in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from multistep.data.labels import as_number, brief, cell_kind
from multistep.data.read import Row
from multistep.types import Spec, UserError, nearest

TEXT_NAMES = (
    "text", "texts", "sentence", "review", "review_text", "reviewtext", "content", "document", "body", "comment",
    "comment_text", "message", "tweet", "post", "question", "query", "utterance", "input", "abstract", "description",
    "headline", "title",
)  # fmt: skip
TEXT_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text_a", "text_b"))
LABEL_NAMES = (
    "label", "labels", "target", "targets", "class", "category", "categories", "intent", "sentiment", "topic", "tags",
    "y", "rating", "score", "stars", "grade",
)  # fmt: skip
_ID_NAMES = {
    "id", "ids", "idx", "index", "uuid", "guid", "key", "url", "link", "row", "no", "date", "time", "timestamp",
}  # fmt: skip
_SAMPLE = 2000  # rows looked at to judge a column


class Columns(Spec):
    """Where text and label are; `why` is shown to the user."""

    text: tuple[str, ...]
    label: str
    why: str = ""


class Facts(NamedTuple):
    """What a sample of a column holds; shares are of the filled cells."""

    name: str
    filled: int
    words: float  # share of cells that are texts and not numbers
    numbers: float
    lists: float
    length: float  # mean characters of the texts
    distinct: int


def find_columns(rows: Sequence[Row], text: Sequence[str], label: str | None, task: str, where: str) -> Columns:
    """Columns of `rows` for training. `text`, `label`: what the user named, if anything."""
    names = names_of(rows)
    for name in (*text, *([label] if label is not None else [])):
        require(name, names, where)
    if label is not None and label in text:
        raise UserError(
            f"{where}: column {label!r} is named as text and as label. Name another with --text or --label."
        )
    facts = [facts_of(name, rows) for name in names]
    if not text and label is None:
        _check_header(names, where)
    if label is None:
        label, label_why = _find_label(facts, text, task, where)
    else:
        label_why = "as named"
    text_why = "as named"
    if not text:
        text, text_why = _find_text(facts, label, where)
    unused = [n for n in names if n not in text and n != label]
    why = f"text from {' + '.join(map(repr, text))} ({text_why}), label from {label!r} ({label_why})"
    if unused:
        why += f"; not used: {', '.join(unused[:8])}{' ...' if len(unused) > 8 else ''}"
    return Columns(text=tuple(text), label=label, why=why)


def find_text(rows: Sequence[Row], where: str) -> tuple[str, ...]:
    """Text columns alone, for files without labels."""
    return _find_text([facts_of(name, rows) for name in names_of(rows)], None, where)[0]


def names_of(rows: Sequence[Row]) -> list[str]:
    """Column names in the order they first occur (a JSON row need not have them all)."""
    names: dict[str, None] = {}
    for row in rows:
        if len(row) != len(names) or row.keys() != names.keys():
            names.update(dict.fromkeys(row))
    return list(names)


def check_columns(rows: Sequence[Row], columns: Columns, where: str, label: bool = True) -> None:
    """Another file must have the columns of the training file."""
    names = names_of(rows)
    for name in columns.text:
        require(name, names, where)
    if label:
        require(columns.label, names, where)


def text_of(row: Row, columns: Sequence[str], number: int, where: str) -> str:
    """The text of a row: its text columns, joined by line breaks. Numbers become texts; nothing there becomes ''."""
    if len(columns) == 1:
        return _as_text(row.get(columns[0]), columns[0], number, where)
    parts = [_as_text(row.get(name), name, number, where) for name in columns]
    return "\n".join(part for part in parts if part)


def _as_text(value: Any, column: str, number: int, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list | tuple | dict | bytes):
        raise UserError(
            f"{where}: row {number}: {column!r} holds {brief(value)}, not a text. Name a text column with --text."
        )
    return str(value)


def require(name: str, names: Sequence[str], where: str) -> None:
    if name not in names:
        raise UserError(f"{where}: no column {name!r}.{nearest(name, names)}")


def _check_header(names: Sequence[str], where: str) -> None:
    known = {*TEXT_NAMES, *LABEL_NAMES}
    if any(name.lower() in known for name in names):
        return
    odd = next((name for name in names if as_number(name) is not None or len(name) > 80), None)
    if odd is not None:
        raise UserError(
            f"{where}: {brief(odd)} is no column name; is there no header? Put a first line such as text,label."
        )


def facts_of(name: str, rows: Sequence[Row]) -> Facts:
    sample = rows[:: max(1, len(rows) // _SAMPLE)]  # spread over the file: files are often sorted by label
    cells = [c for row in sample if cell_kind(c := row.get(name)) != "missing"]
    texts = [c for c in cells if isinstance(c, str) and as_number(c) is None]
    numbers = sum(as_number(c) is not None for c in cells)
    lists = sum(isinstance(c, list | tuple) for c in cells)
    n = max(1, len(cells))
    length = sum(map(len, texts)) / max(1, len(texts))
    distinct = len({repr(c) if isinstance(c, list | dict) else c for c in cells})
    return Facts(name, len(cells), len(texts) / n, numbers / n, lists / n, length, distinct)


def _find_text(facts: Sequence[Facts], label: str | None, where: str) -> tuple[tuple[str, ...], str]:
    by_name = {f.name.strip().lower(): f for f in facts if f.name != label}
    for pair in TEXT_PAIRS:
        if all(name in by_name for name in pair):
            return tuple(by_name[name].name for name in pair), "a pair, by their names"
    for name in TEXT_NAMES:
        if name in by_name and by_name[name].lists == 0:
            return (by_name[name].name,), "by its name"
    texts = [f for f in by_name.values() if f.words > 0.5]
    texts = [f for f in texts if not is_id(f.name)] or texts
    if not texts:
        rest = ", ".join(f.name for f in facts if f.name != label) or "none"
        raise UserError(f"{where}: no column of texts (other columns: {rest}). Name one with --text.")
    longest = max(texts, key=lambda f: f.length)
    why = "the only texts" if len(texts) == 1 else f"the longest texts, {longest.length:.0f} characters on average"
    return (longest.name,), why


def _find_label(facts: Sequence[Facts], text: Sequence[str], task: str, where: str) -> tuple[str, str]:
    open_ = [f for f in facts if f.name not in text]
    usable = [f for f in open_ if f.filled and (task != "regress" or f.numbers > 0.5)]
    if task == "regress" and open_ and not usable:
        raise UserError(f"{where}: no column of numbers, and the task is regress. Name the target with --label.")
    by_name = {f.name.strip().lower(): f for f in usable}
    for name in LABEL_NAMES:
        if name in by_name:
            return by_name[name].name, "by its name"
    if not text:
        text = _find_text(facts, None, where)[0]
    rest = [f for f in usable if f.name not in text and not is_id(f.name)]
    if task == "multilabel" and any(f.lists for f in rest):
        rest = [f for f in rest if f.lists]
    if task == "regress":
        rest.sort(key=lambda f: -f.distinct)
    else:
        rest = [f for f in rest if f.distinct > 1] or rest  # a constant says nothing
        rest.sort(key=lambda f: f.distinct)
    if not rest:
        names = ", ".join(f.name for f in facts)
        raise UserError(f"{where}: no label column found (columns: {names}). Name it with --label.")
    if len(rest) == 1:
        return rest[0].name, "the only column left"
    return rest[0].name, f"a guess: {'most' if task == 'regress' else 'fewest'} different values, {rest[0].distinct}"


def is_id(name: str) -> bool:
    plain = name.strip().lower()
    return plain in _ID_NAMES or plain.endswith(("_id", " id", "-id")) or plain.startswith(("unnamed", "column "))
