"""`load`: a labelled source to the four splits and the report; `read_texts` and `read_labelled` for what comes later.

Also here: what is left out before splitting (rows without text or label), each reason counted in the report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multistep.data import columns as columns_
from multistep.data import read
from multistep.data.columns import Columns
from multistep.data.labels import Spelling, brief, cell_kind, check_task, infer_task, to_labels
from multistep.data.report import DataReport, make_report
from multistep.data.split import Item, make_splits, normalised
from multistep.types import Example, TaskKind, UserError

MIN_ROWS = 10  # fewer make no splits worth the name
NO_TEXT = "without text"
NO_LABEL = "without label"


@dataclass(frozen=True)
class Dataset:
    """Examples in four splits. `labels`: those seen in train, sorted; () for regress. `splits_given`: came as files."""

    train: list[Example]
    control: list[Example]
    calibration: list[Example]
    test: list[Example]
    task_kind: TaskKind
    labels: tuple[str, ...]
    columns: Columns
    report: DataReport
    fingerprint: str
    splits_given: tuple[str, ...]
    train_rows: tuple[int, ...] = ()  # of train in its file, from 1


def load(
    source: str | Path, *, task: str = "auto", text: str | Sequence[str] = (), label: str | None = None, seed: int = 0,
    test: bool = True,
) -> Dataset:  # fmt: skip
    """Read, understand, split and describe a dataset: a file, a folder of splits, a saved `datasets` folder, a hub name.

    Without `test` none is made, and the rows of one that came as a file are not used.
    """
    check_task(task)
    tables = read.read_rows(source)
    if not test:
        tables.pop("test", None)
    main = "train" if "train" in tables else read.WHOLE
    where = {split: str(source) if split == read.WHOLE else f"{source} ({split})" for split in tables}
    columns = columns_.find_columns(tables[main], [text] if isinstance(text, str) else text, label, task, where[main])
    for split, rows in tables.items():
        if split != main:
            columns_.check_columns(rows, columns, where[split])
    cells = {split: [row.get(columns.label) for row in rows] for split, rows in tables.items()}
    kind, task_why = infer_task(cells[main], where[main]) if task == "auto" else (_as_kind(task), "as asked")
    spelling = Spelling.of(cells[main])

    items: dict[str, list[Item]] = {}
    empty: list[Item] = []
    dropped: dict[str, list[Item]] = {NO_TEXT: [], NO_LABEL: []}
    for split, rows in tables.items():
        items[split] = []
        found = to_labels(cells[split], kind, where[split], spelling)
        for item in _items(rows, found, columns, split, where[split]):
            if not item.words:
                empty.append(item)
            if item.label is None:
                dropped[NO_LABEL].append(item)
            elif not item.words and split != "test":  # a given test stays whole: an empty text has an answer too
                dropped[NO_TEXT].append(item)
            else:
                items[split].append(item)
    _check_rows(items[main], dropped, where[main])
    for split, part in items.items():
        if not part:
            raise UserError(
                f"{where[split]}: no row has a label. Fill them in, or remove the file and a split is made."
            )
    labels = _find_labels(items[main], kind, columns.label, where[main])
    if kind != "regress":
        for split, part in items.items():
            _check_seen(part, labels, where[split])
    splits = make_splits(items, kind, seed, str(source), test)
    notes = _numbers_as_texts(tables, columns)
    report = make_report(str(source), kind, columns.why, task_why, splits, empty, dropped, notes)
    train, control, calibration, held = map(_examples, (splits.train, splits.control, splits.calibration, splits.test))
    fingerprint = _fingerprint((train, control, calibration, held), kind, seed)
    given = tuple(split for split in ("train", "validation", "test") if split in tables)
    rows = tuple(item.number for item in splits.train)
    return Dataset(train, control, calibration, held, kind, labels, columns, report, fingerprint, given, rows)


def read_labelled(
    source: str | Path, columns: Columns, task_kind: TaskKind, labels: Sequence[str] = ()
) -> list[Example]:
    """Every row of a file (or of the test split of a folder), for evaluation: none is left out, so all need a label. `labels`: those
    that the model knows."""
    tables = read.read_rows(source, only="test")
    split = "test" if "test" in tables else read.WHOLE
    if split not in tables:
        raise UserError(f"{source}: no test split there. Name a file.")
    rows, where = tables[split], str(source) if split == read.WHOLE else f"{source} (test)"
    columns_.check_columns(rows, columns, where)
    spelling = Spelling.of_model(task_kind, labels)
    found = to_labels([row.get(columns.label) for row in rows], task_kind, where, spelling)
    missing = [number for number, label in enumerate(found, 1) if label is None]
    if missing:
        first = ", ".join(map(str, missing[:3])) + (" ..." if len(missing) > 3 else "")
        raise UserError(f"{where}: {len(missing)} rows have no {columns.label!r} (row {first}). Fill or remove them.")
    return _examples(_items(rows, found, columns, "test", where))


def read_texts(source: str | Path, columns: Columns | None = None) -> list[str]:
    """Texts to answer, in order: `source` is "-" (standard input, a text a line), a file, or a text itself."""
    if isinstance(source, str) and not source.strip():
        raise UserError("text: no text in it. Give at least one text.")
    if str(source) == "-":
        texts, where = read.read_stdin(), "standard input"
    elif (path := Path(source)) and read.exists(path):
        texts, where = _texts_of_file(path, columns), str(source)
    elif isinstance(source, Path) or names_a_file(source):
        raise read.missing_file(path)
    else:
        texts, where = [source], "the text"
    if not any(text.strip() for text in texts):
        raise UserError(f"{where}: no text in it. Give at least one text.")
    return texts


def _texts_of_file(path: Path, columns: Columns | None) -> list[str]:
    if path.is_dir():
        raise UserError(f"{path}: a folder. Name one file of texts.")
    if path.name.lower().removesuffix(".gz").endswith(".txt"):
        return read.read_lines(path)
    rows = read.read_file(path)
    if columns is not None:
        columns_.check_columns(rows, columns, str(path), label=False)
    names = columns.text if columns is not None else columns_.find_text(rows, str(path))
    return [columns_.text_of(row, names, number, str(path)) for number, row in enumerate(rows, 1)]


def names_a_file(source: str) -> bool:
    """A single word that ends as a data file does was meant as one."""
    suffixes = (*read.FORMATS, ".txt")
    return not any(c.isspace() for c in source) and source.lower().removesuffix(".gz").endswith(suffixes)


# ---------------------------------------------------------------------------------------------- rows to items


def _as_kind(task: str) -> TaskKind:
    return "classify" if task == "classify" else "multilabel" if task == "multilabel" else "regress"


def _items(rows: list[read.Row], labels: list[Any], columns: Columns, split: str, where: str) -> list[Item]:
    items = []
    for number, (row, label) in enumerate(zip(rows, labels, strict=True), 1):
        text = columns_.text_of(row, columns.text, number, where)
        key, words = normalised(text)
        items.append(Item(split, number, text, label, key, words))
    return items


def _examples(items: list[Item]) -> list[Example]:
    return [Example(item.text, item.label) for item in items]


def _numbers_as_texts(tables: dict[str, list[read.Row]], columns: Columns) -> list[str]:
    notes = []
    for name in columns.text:
        cells = [row.get(name) for rows in tables.values() for row in rows]
        count = sum(not isinstance(cell, str) and cell_kind(cell) != "missing" for cell in cells)
        if count:
            notes.append(f"{count:,} of {len(cells):,} cells of text column {name!r} are not texts: turned into text")
    return notes


def _check_rows(rows: list[Item], dropped: dict[str, list[Item]], where: str) -> None:
    if not rows and any(item.split in ("train", read.WHOLE) for item in dropped[NO_TEXT]):
        raise UserError(f"{where}: every text is empty. Name the text column with --text.")
    if not rows:
        raise UserError(f"{where}: no label in any row. Name the label column with --label.")
    if len(rows) < MIN_ROWS:
        raise UserError(f"{where}: {len(rows)} usable rows. At least {MIN_ROWS} are needed, better some hundreds.")


def _find_labels(rows: list[Item], kind: TaskKind, column: str, where: str) -> tuple[str, ...]:
    """The labels of train. Raises when they cannot be learned from. (Made splits leave every label in train.)"""
    if kind == "regress":
        if len({item.label for item in rows}) == 1:
            raise UserError(f"{where}: all targets in {column!r} are {rows[0].label:g}. There is nothing to learn.")
        return ()
    labels = sorted({label for item in rows for label in _as_tuple(item.label)})
    if len(labels) < 2:
        only = f"only the label {brief(labels[0])}" if labels else "no label"
        raise UserError(f"{where}: {only} in {column!r}. At least two different labels are needed.")
    if kind == "classify" and 1.2 * len(labels) > len(rows):
        raise UserError(
            f"{where}: {len(labels):,} different labels in {len(rows):,} rows: {column!r} looks like an id. "
            "Name the label column with --label, or use --task regress for numbers."
        )
    return tuple(labels)


def _check_seen(rows: list[Item], labels: tuple[str, ...], where: str) -> None:
    known = set(labels)
    for item in rows:
        unseen = next((label for label in _as_tuple(item.label) if label not in known), None)
        if unseen is not None:
            raise UserError(
                f"{where}: row {item.number}: label {brief(unseen)} does not occur in train. "
                "Mend the label, remove the row, or add rows of it to train."
            )


def _as_tuple(label: Any) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (label,)


def _fingerprint(parts: Sequence[Sequence[Example]], kind: TaskKind, seed: int) -> str:
    digest = hashlib.sha256(f"{kind} {seed}".encode())
    for part in parts:
        digest.update(f"\n{len(part)}\n".encode())
        for example in part:
            digest.update(f"{len(example.text)} {example.text} {example.label!r}\n".encode())
    return digest.hexdigest()
