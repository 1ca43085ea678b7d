"""The data report: what is in the data, said before training, with counts and the first few rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from multistep.data.split import Item, Splits
from multistep.types import Spec, TaskKind

_SHOWN = 3  # rows named for a finding
_WIDTH = 80  # characters shown of a text
NAMED = 11  # characters of a line before what it says


class Lengths(Spec):
    median: int
    p95: int
    max: int


class Targets(Spec):
    """Of a regression."""

    min: float
    mean: float
    max: float
    std: float


class Place(Spec):
    """A row, found in `split` as read (row numbers count data rows from 1), its text shortened, and what is the matter."""

    split: str
    row: int
    text: str
    note: str = ""


class Finding(Spec):
    """How many rows, and the first few of them."""

    count: int = 0
    first: tuple[Place, ...] = ()


class SplitReport(Spec):
    rows: int
    characters: Lengths
    words: Lengths
    classes: dict[str, int]  # rows by label, most first; empty for regress
    targets: Targets | None = None


class DataReport(Spec):
    """JSON-able; `lines()` says it in words. Findings count rows."""

    source: str
    task: TaskKind
    columns: str  # which and why
    task_why: str
    splits: dict[str, SplitReport]  # train, control, calibration, test
    imbalance: float | None  # largest class of train / smallest
    rare: tuple[str, ...]  # labels with a single row in train
    duplicates: Finding  # rows of train that repeat an earlier text of train
    leakage: dict[str, Finding]  # "train-test": rows of test whose text is in train; only pairs that leak
    conflicts: Finding  # rows whose text has another label elsewhere
    empty: Finding  # rows without text
    dropped: dict[str, Finding]  # reason -> rows
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        rows = " · ".join(f"{name} {part.rows:,}" for name, part in self.splits.items())
        train = self.splits["train"]
        lines = [
            entry("data", f"{self.source}: {self.columns}"),
            entry("task", f"{self.task} ({self.task_why})"),
            entry("rows", rows),
            *(entry("", note) for note in self.notes),
            entry("lengths", f"{in_words(train.characters)} characters; {in_words(train.words)} words (train)"),
        ]
        if train.targets:
            t = train.targets
            lines.append(entry("targets", f"{t.min:g} to {t.max:g}, mean {t.mean:.4g}, std {t.std:.4g} (train)"))
        else:
            lines.append(entry("classes", self._classes(train.classes)))
        lines += entries("duplicates", self.duplicates, "rows of train repeat a text of train")
        lines += [x for pair, found in self.leakage.items() for x in entries("leakage", found, leak(pair))]
        if not self.leakage:
            lines.append(entry("leakage", "none between the splits"))
        lines += entries("conflicts", self.conflicts, "rows have a text that elsewhere has another label (kept)")
        lines += entries("empty", self.empty, "rows have no text")
        lines += [x for reason, found in self.dropped.items() for x in entries("dropped", found, f"rows: {reason}")]
        return lines

    def _classes(self, classes: dict[str, int]) -> str:
        parts = [f"{label} {n:,}" for label, n in classes.items()]
        shown = ", ".join(parts) if len(parts) <= 8 else f"{', '.join(parts[:4])} ... {', '.join(parts[-3:])}"
        text = f"{len(parts)} in train: {shown}"
        if self.imbalance is not None:
            text += f"; largest/smallest {self.imbalance:.3g}"
        if self.rare:
            names = ", ".join(self.rare[:5]) + (" ..." if len(self.rare) > 5 else "")
            text += f"; a single row, kept in train, never measured: {names}"
        return text


def entry(name: str, text: str) -> str:
    return f"{name:<{NAMED}}{text}"


def in_words(lengths: Lengths) -> str:
    return f"median {lengths.median:,}, 95 % up to {lengths.p95:,}, longest {lengths.max:,}"


def leak(pair: str) -> str:
    earlier, later = pair.split("-")
    return f"rows of {later} have a text of {earlier}"


def entries(name: str, found: Finding, what: str) -> list[str]:
    if not found.count:
        return []
    places = [entry("", f"  {p.split} row {p.row}{f' ({p.note})' if p.note else ''}: {p.text!r}") for p in found.first]
    return [entry(name, f"{found.count:,} {what}"), *places]


# ---------------------------------------------------------------------------------------------- counting


def place(item: Item, note: str = "") -> Place:
    text = " ".join(item.text[: 4 * _WIDTH].split())
    text = text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
    return Place(split=item.split, row=item.number, text=text, note=note)


def finding(items: Sequence[Item], notes: Sequence[str] = ()) -> Finding:
    notes = notes or [""] * len(items)
    first = [place(item, note) for item, note in zip(items[:_SHOWN], notes[:_SHOWN], strict=True)]
    return Finding(count=len(items), first=tuple(first))


def make_report(
    source: str, task: TaskKind, columns: str, task_why: str, splits: Splits,
    empty: Sequence[Item], dropped: dict[str, list[Item]], notes: Sequence[str],
) -> DataReport:  # fmt: skip
    parts = {"train": splits.train, "control": splits.control, "calibration": splits.calibration, "test": splits.test}
    reports = {name: _split_report(items, task) for name, items in parts.items()}
    counts = reports["train"].classes
    return DataReport(
        source=source,
        task=task,
        columns=columns,
        task_why=task_why,
        splits=reports,
        imbalance=max(counts.values()) / min(counts.values()) if counts else None,
        rare=tuple(label for label, n in counts.items() if n == 1),
        duplicates=duplicates_of(splits.train),
        leakage=leakage_of(splits),
        conflicts=conflicts_of([*splits.train, *splits.validation, *splits.test], task),
        empty=finding(empty),
        dropped={reason: finding(items) for reason, items in dropped.items() if items},
        notes=(*notes, *splits.notes),
    )


def labels_of(items: Iterable[Item], task: TaskKind) -> Counter[str]:
    if task == "regress":
        return Counter()
    if task == "multilabel":
        return Counter(label for item in items for label in item.label)
    return Counter(item.label for item in items)


def _split_report(items: Sequence[Item], task: TaskKind) -> SplitReport:
    counts = labels_of(items, task)
    return SplitReport(
        rows=len(items),
        characters=quantiles([len(item.text) for item in items]),
        words=quantiles([item.words for item in items]),
        classes=dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))),
        targets=_targets([item.label for item in items]) if task == "regress" and items else None,
    )


def quantiles(values: list[int]) -> Lengths:
    values = sorted(values) or [0]
    last = len(values) - 1
    return Lengths(median=values[last // 2], p95=values[math.ceil(0.95 * last)], max=values[last])


def _targets(values: list[float]) -> Targets:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
    return Targets(min=min(values), mean=mean, max=max(values), std=math.sqrt(variance))


def duplicates_of(items: Sequence[Item]) -> Finding:
    seen: dict[bytes, Item] = {}
    repeats = [item for item in items if seen.setdefault(item.key, item) is not item]
    return finding(repeats, [f"as row {seen[item.key].number}" for item in repeats])


def leakage_of(splits: Splits) -> dict[str, Finding]:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    first = {name: {item.key: item for item in reversed(items)} for name, items in parts.items()}
    found: dict[str, Finding] = {}
    for earlier, later in (("train", "validation"), ("train", "test"), ("validation", "test")):
        leaks = [item for item in parts[later] if item.key in first[earlier]]
        if leaks:
            notes = [f"{earlier} row {first[earlier][item.key].number}" for item in leaks]
            found[f"{earlier}-{later}"] = finding(leaks, notes)
    return found


def conflicts_of(items: Sequence[Item], task: TaskKind) -> Finding:
    first: dict[bytes, Item] = {}
    other: dict[bytes, Item] = {}  # the first row that disagrees with the first of its text
    for item in items:
        if first.setdefault(item.key, item).label != item.label:
            other.setdefault(item.key, item)
    rows = [item for item in items if item.key in other]
    notes = []
    for item in rows[:_SHOWN]:
        rival = other[item.key] if item.label == first[item.key].label else first[item.key]
        notes.append(f"{_said(item.label)}, but {_said(rival.label)} in {rival.split} row {rival.number}")
    return finding(rows, notes)


def _said(label: object) -> str:
    said = "+".join(label) or "none" if isinstance(label, tuple) else str(label)
    return said if len(said) <= _WIDTH else said[: _WIDTH - 3] + "..."
