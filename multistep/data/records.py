"""Language data: a source to records in four splits, with a report. Shapes are recognised in shapes.py, rows made records in cells.py,
tables and plain text read in tables.py.

Splits that came as files are kept; what is missing is made from train: rows of one source (or one passage) on one side. A language model's
text is never shuffled: validation and test are the end of it, as Karpathy's nanoGPT (2022) has them. Half of validation decides
training (control), half prediction (calibration).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from multistep.data import read, tables
from multistep.data.cells import NO_SOURCE, NO_TARGET, Record, Turn, to_record
from multistep.data.dataset import MIN_ROWS, names_a_file
from multistep.data.language import LanguageReport, make_report
from multistep.data.read import Row
from multistep.data.shapes import Layout, check_kind, check_layout, find_layout
from multistep.data.split import NO_TEST, Item, Splits, make_splits, normalised, without
from multistep.text import unspaced_share
from multistep.types import UserError

__all__ = [
    "LanguageData",
    "LanguageReport",
    "Layout",
    "Record",
    "Turn",
    "bare",
    "load_language",
    "read_records",
    "read_sources",
]

MIN_CHARACTERS = 1000  # of a text to model
_FEW_TEXTS = 100  # so few rows of text are cut into pieces, or no split could be made of them
_PASSAGES = 20  # with fewer different passages a split by passage would be lopsided
_SHARE = 0.1  # of a text's characters for validation, and for test


@dataclass(frozen=True)
class LanguageData:
    """Records in four splits. `stream`: lm's records are pieces of one running text, in order: join them before cutting windows."""

    train: list[Record]
    control: list[Record]
    calibration: list[Record]
    test: list[Record]
    kind: str  # the task
    shape: str  # what was recognised, said to the user
    layout: Layout
    report: LanguageReport
    fingerprint: str
    splits_given: tuple[str, ...]
    unspaced: float  # share of the letters of train's targets in scripts without spaces between words
    stream: bool = False


def load_language(
    source: str | Path, *, task: str, text: str | Sequence[str] = (), label: str | None = None, seed: int = 0,
    test: bool = True,
) -> LanguageData:  # fmt: skip
    """Read, understand, split and describe language data.

    source: a file, a folder of splits, a saved `datasets` folder, a hub name, plain text (.txt), or two line-aligned files
    "corpus.{en,de}" (a folder: train.en, train.de ...). text, label: columns where names do not tell (answer: question, context).
    Without `test` none is made, and the rows of one that came as a file are not used. Raises UserError.
    """
    check_kind(task)
    asked = [text] if isinstance(text, str) else list(text)
    found = tables.read_tables(source, asked)
    if found.plain and task != "lm":
        raise UserError(
            f"{source}: plain text is for --task lm. Give {task} a table, such as .jsonl, or line-aligned files."
        )
    parts, notes = _with_train({s: rows for s, rows in found.rows.items() if test or s != "test"}, task)
    if not parts:
        raise UserError(f"{source}: only a test split is there, and test=false. Give train rows too.")
    main = "train" if "train" in parts else read.WHOLE
    where = {split: str(source) if split == read.WHOLE else f"{source} ({split})" for split in parts}
    others = [row for split, rows in parts.items() if split != main for row in rows[:100]]
    layout = find_layout(parts[main], task, asked, label, where[main], others)
    for split, rows in parts.items():
        if split != main:
            check_layout(rows, layout, where[split])
    reader, stream = layout, False
    if task == "lm":
        parts, stream, said = _texts(parts, main, layout, found.plain, where)
        layout = layout.with_(why=said if found.plain else layout.why + said)
        reader = layout.with_(source=("text",)) if said else layout  # of the pieces
    pool = _Pool(reader, stream)
    items = {split: pool.add(rows, split, where[split]) for split, rows in parts.items()}
    _check(items, pool, main, task, where)
    splits = (
        _from_the_end(items, main, stream, str(source), notes, test)
        if task == "lm"
        else _split(items, main, seed, str(source), notes, test)
    )
    report = make_report(str(source), layout, splits, pool.records, pool.empty, pool.dropped, pool.remarks, notes)
    sides = [
        [pool.records[i.split, i.number] for i in side]
        for side in (splits.train, splits.control, splits.calibration, splits.test)
    ]
    return LanguageData(
        *sides, kind=task, shape=layout.why, layout=layout, report=report, fingerprint=_fingerprint(sides, task, seed),
        splits_given=tuple(s for s in ("train", "validation", "test") if s in parts and s in found.rows),
        unspaced=unspaced_share([t for record in sides[0][:500] for t in record.targets[:1]]), stream=stream,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- later files


def read_records(source: str | Path, layout: Layout) -> list[Record]:
    """Every row of a file (or of the test split of a folder), for evaluation: none is left out, so all need an answer."""
    found = tables.read_tables(source, layout.source, only="test").rows
    rows = found.get("test", found.get(read.WHOLE))
    if rows is None:
        raise UserError(f"{source}: no test split there. Name a file.")
    check_layout(rows, layout, str(source))
    records = [to_record(row, layout, number, str(source)) for number, row in enumerate(rows, 1)]
    missing = [n for n, f in enumerate(records, 1) if f.record is None or f.reason or not f.record.targets]
    if missing:
        first = ", ".join(map(str, missing[:3])) + (" ..." if len(missing) > 3 else "")
        raise UserError(f"{source}: {len(missing):,} rows have no usable answer (row {first}). Fill or remove them.")
    return [f.record for f in records if f.record]


def read_sources(source: str | Path, layout: Layout) -> list[Record]:
    """What to answer, in order: `source` is "-" (standard input, a text a line), a file, or a text itself. Answers may be there or not."""
    if isinstance(source, str) and not source.strip():
        raise UserError("text: no text in it. Give at least one text.")
    path = Path(source)
    if str(source) == "-":
        records, where = bare(read.read_stdin(), layout, "standard input"), "standard input"
    elif read.exists(path):
        records, where = _of_file(path, layout), str(source)
    elif isinstance(source, Path) or names_a_file(source):
        raise read.missing_file(path)
    else:
        records, where = bare([source], layout, "the text"), "the text"
    if layout.task == "lm":  # a text to go on with
        records = [Record("".join(r.targets), ()) for r in records]
    if not any(r.source.strip() for r in records):
        raise UserError(f"{where}: no text in it. Give at least one text.")
    return records


def _of_file(path: Path, layout: Layout) -> list[Record]:
    if path.is_dir():
        raise UserError(f"{path}: a folder. Name one file of texts.")
    if read.file_format(path) is None:
        return bare(read.read_lines(path), layout, str(path))
    rows = tables.read_one(path)
    check_layout(rows, layout, str(path), target=False)
    found = [to_record(row, layout, number, str(path), asking=True) for number, row in enumerate(rows, 1)]
    odd = next((n for n, f in enumerate(found, 1) if f.record is None), None)
    if odd is not None:
        raise UserError(f"{path}: row {odd}: {found[odd - 1].reason}. Mend or remove the row.")
    return [f.record for f in found if f.record]


def bare(texts: Sequence[str], layout: Layout, where: str) -> list[Record]:
    """Texts alone as what is to be answered. Raises UserError where more columns are needed."""
    if layout.context or layout.choices:
        columns = ", ".join(layout.needed(target=False))
        raise UserError(f"{where}: a question alone is not enough here. Give a file with the columns {columns}.")
    if layout.task == "chat":
        return [Record(text, (), turns=(Turn("user", text),)) for text in texts]
    return [Record("", (text,)) if layout.task == "lm" else Record(text, ()) for text in texts]


# ---------------------------------------------------------------------------------------------- rows to items


class _Pool:
    """Records by (split, row), and what was found on the way."""

    def __init__(self, layout: Layout, stream: bool):
        self.layout = layout
        self.stream = stream
        self.records: dict[tuple[str, int], Record] = {}
        self.empty: list[Item] = []
        self.dropped: dict[str, list[Item]] = {}
        self.remarks: dict[str, list[Item]] = {}

    def add(self, rows: Sequence[Row], split: str, where: str) -> list[Item]:
        """The rows that can be used. A given test keeps rows without a source: these have an answer too."""
        kept = []
        for number, row in enumerate(rows, 1):
            record, reason, remarks = to_record(row, self.layout, number, where)
            item = self._item(record or Record("", ()), split, number)
            if not item.words and not self.stream:
                self.empty.append(item)
            if record is None or reason or not record.targets:
                reason = reason or (NO_SOURCE if self.layout.task == "lm" else NO_TARGET)
            elif not item.words and not self.stream and (split != "test" or self.layout.task == "lm"):
                reason = NO_SOURCE
            if reason:
                self.dropped.setdefault(reason, []).append(item)
                continue
            for remark in remarks:
                self.remarks.setdefault(remark, []).append(item)
            if record:
                self.records[split, number] = record
            kept.append(item)
        return kept

    def _item(self, record: Record, split: str, number: int) -> Item:
        text = "".join(record.targets[:1]) if self.layout.task == "lm" else record.source
        if self.layout.task == "chat":  # all that was said before the answer
            whole = "\n".join(turn.text for turn in record.asked)
        else:
            whole = "\n".join(part for part in (text, record.context, *record.choices) if part) or text
        key, words = normalised(whole)
        if self.layout.task == "answer":
            words = len(text.split())
        answer = () if self.layout.task == "lm" else record.targets[:1]
        return Item(split, number, text, answer, key, words, normalised(record.context)[0] if record.context else b"")


def _with_train(parts: dict[str, list[Row]], task: str) -> tuple[dict[str, list[Row]], list[str]]:
    """Where no train split came, validation is divided, or else test; said in a note."""
    if "train" in parts or read.WHOLE in parts or not parts:
        return parts, []
    split = "validation" if "validation" in parts else "test"
    rest = {name: rows for name, rows in parts.items() if name != split}
    what = "train and validation are" if rest else "train, validation and test are"
    note = f"no train split came: {what} made from the {len(parts[split]):,} rows of {split}"
    return {"train": parts[split], **rest}, [note]


def _texts(
    parts: dict[str, list[Row]], main: str, layout: Layout, plain: str, where: dict[str, str]
) -> tuple[dict[str, list[Row]], bool, str]:
    """lm: whether the rows are a running text, and few long rows cut into pieces."""
    texts = {
        split: [
            r.targets[0]
            for n, row in enumerate(rows, 1)
            if (r := to_record(row, layout, n, where[split]).record) and r.targets
        ]
        for split, rows in parts.items()
    }
    size = sum(map(len, texts[main]))
    if size < MIN_CHARACTERS:
        raise UserError(
            f"{where[main]}: {size:,} characters of text. At least {MIN_CHARACTERS:,} are needed, better a million."
        )
    if plain:
        return parts, True, f"plain text: {plain}"
    if len(texts[main]) < _FEW_TEXTS:
        pieces = {split: [piece for text in part for piece in tables.cut(text)[0]] for split, part in texts.items()}
        rows: dict[str, list[Row]] = {split: [{"text": piece} for piece in part] for split, part in pieces.items()}
        return rows, True, f"; {len(texts[main])} texts cut in {len(rows[main]):,} pieces"
    running = sum(text.endswith("\n") for text in texts[main]) > 0.9 * len(texts[main])
    return parts, running, ""


def _check(items: dict[str, list[Item]], pool: _Pool, main: str, task: str, where: dict[str, str]) -> None:
    reasons = Counter({reason: len(found) for reason, found in pool.dropped.items()})
    for split in (main, *(s for s in items if s != main)):
        if not items[split]:
            raise UserError(
                f"{where[split]}: no row is of use ({_counted(reasons)}). Mend it, or name columns with --text and --label."
            )
    if len(items[main]) < MIN_ROWS:
        left_out = f" ({_counted(reasons)})" if reasons else ""
        raise UserError(
            f"{where[main]}: {len(items[main])} usable rows{left_out}. At least {MIN_ROWS} are needed, better some thousands."
        )


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{n:,} rows: {reason}" for reason, n in reasons.most_common(2)) or "none was read"


# ---------------------------------------------------------------------------------------------- splits


def _split(items: dict[str, list[Item]], main: str, seed: int, where: str, notes: list[str], test: bool) -> Splits:
    passages = {item.group for item in items[main] if item.group}
    shared = {item.group for split, part in items.items() if split != main for item in part} & passages
    if len(passages) < _PASSAGES or 2 * len(shared) > len(passages):  # no way, or no use, to keep them apart
        items = {split: [item._replace(group=b"") for item in part] for split, part in items.items()}
    elif len(items) < 3:
        notes.append(f"questions on one passage stay together ({len(passages):,} passages)")
    # Targets are texts here: "regress" would spread the rows over their order, which means nothing, so all are alike.
    answers = {(i.split, i.number): i.label for part in items.values() for i in part}
    alike = {split: [item._replace(label=0.0) for item in part] for split, part in items.items()}
    splits = make_splits(alike, "regress", seed, where, test)
    sides = [[i._replace(label=answers[i.split, i.number]) for i in side] for side in splits[:5]]
    return Splits(*sides, notes=[*notes, *splits.notes])


def _from_the_end(
    items: dict[str, list[Item]], main: str, stream: bool, where: str, notes: list[str], test: bool
) -> Splits:
    """Validation and test, where they did not come, are the end of the text, each a tenth of its characters. Of texts that are whole
    by themselves those of validation that occur in train decide nothing; a running text stays whole."""
    parts, train = dict(items), items[main]
    size = sum(len(i.text) for i in train)
    if not test:
        parts["test"] = []
        notes.append(NO_TEST)
    for split in ("test", "validation"):
        if split not in parts:
            n = len(train)
            train, parts[split] = _cut_end(train, int(_SHARE * size), least=1 if split == "test" else 2)
            notes.append(
                f"{split} made from the end of train: {len(parts[split]):,} of {n:,} {'pieces' if stream else 'rows'}"
            )
    deciding = parts["validation"] if stream else without(train, parts["validation"], where, notes)
    control, calibration = _cut_end(deciding, sum(len(i.text) for i in deciding) // 2, least=1)
    if not control or not calibration:
        raise UserError(
            f"{where}: validation is a single piece of text and cannot be halved. Give a longer one, or none and it is made from train."
        )
    return Splits(train, parts["validation"], control, calibration, parts["test"], notes)


def _cut_end(items: list[Item], characters: int, least: int) -> tuple[list[Item], list[Item]]:
    taken = size = 0
    while taken < len(items) - 1 and (taken < least or size + len(items[-taken - 1].text) <= characters):
        taken += 1
        size += len(items[-taken].text)
    return items[: len(items) - taken], items[len(items) - taken :]


def _fingerprint(sides: Sequence[Sequence[Record]], task: str, seed: int) -> str:
    digest = hashlib.sha256(f"{task} {seed}".encode())
    for side in sides:
        digest.update(f"\n{len(side)}\n".encode())
        for record in side:
            digest.update(f"{record!r}\n".encode())
    return digest.hexdigest()
