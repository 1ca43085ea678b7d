"""The report on language data: lengths, duplicates, leakage and what was dropped or mended, said before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from multistep.data import report
from multistep.data.cells import Record
from multistep.data.report import Finding, Lengths, entries, entry
from multistep.data.shapes import Layout
from multistep.data.split import Item, Splits
from multistep.types import Spec


class RecordLengths(Spec):
    """Rows of a split, and their lengths in characters; `contexts` of passages, None where there are none."""

    rows: int
    sources: Lengths
    targets: Lengths  # of the first right answers
    contexts: Lengths | None = None


class LanguageReport(Spec):
    """JSON-able; `lines()` says it in words. Findings count rows; they are equal when source (and passage) are."""

    source: str
    task: str
    shape: str
    splits: dict[str, RecordLengths]  # train, control, calibration, test
    duplicates: Finding
    leakage: dict[str, Finding]  # "train-test": rows of test whose source is in train; only pairs that leak
    passages: dict[str, int]  # "train-test": rows of test whose passage, with another question, is in train
    conflicts: Finding  # rows whose source has another first answer elsewhere; nothing for lm
    empty: Finding
    remarks: dict[str, Finding]  # what was odd or mended -> rows
    dropped: dict[str, Finding]  # reason -> rows
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        train = self.splits["train"]
        sides = (
            [("targets", train.targets)]
            if self.task == "lm"
            else [("sources", train.sources), ("targets", train.targets)]
        )
        sides += [("contexts", train.contexts)] if train.contexts else []
        lines = [
            entry("data", f"{self.source}: {self.shape}"),
            entry("task", f"{self.task} (as asked)"),
            entry("rows", " · ".join(f"{name} {part.rows:,}" for name, part in self.splits.items())),
            *(entry("", note) for note in self.notes),
            *(
                entry("lengths" if i == 0 else "", f"{name}: {report.in_words(n)} characters (train)")
                for i, (name, n) in enumerate(sides)
            ),
        ]
        lines += entries("duplicates", self.duplicates, "rows of train repeat a source of train")
        lines += [x for pair, found in self.leakage.items() for x in entries("leakage", found, report.leak(pair))]
        if not self.leakage:
            lines.append(entry("leakage", "none between the splits"))
        for pair, count in self.passages.items():
            lines.append(
                entry("", f"{count:,} {report.leak(pair).replace('a text', 'a passage')}, with another question")
            )
        lines += entries("conflicts", self.conflicts, "rows have a source that elsewhere has another answer (kept)")
        lines += entries("empty", self.empty, "rows have no text to start from")
        lines += [x for what, found in self.remarks.items() for x in entries("remark", found, f"rows: {what}")]
        lines += [x for reason, found in self.dropped.items() for x in entries("dropped", found, f"rows: {reason}")]
        return lines


def make_report(
    source: str, layout: Layout, splits: Splits, records: Mapping[tuple[str, int], Record], empty: Sequence[Item],
    dropped: Mapping[str, Sequence[Item]], remarks: Mapping[str, Sequence[Item]], notes: Sequence[str],
) -> LanguageReport:  # fmt: skip
    """`records`: by (split, row)."""
    parts = {"train": splits.train, "control": splits.control, "calibration": splits.calibration, "test": splits.test}
    lengths = {name: _lengths([records[i.split, i.number] for i in items]) for name, items in parts.items()}
    lm = layout.task == "lm"
    everything = [*splits.train, *splits.validation, *splits.test]
    return LanguageReport(
        source=source, task=layout.task, shape=layout.why, splits=lengths, duplicates=report.duplicates_of(splits.train),
        leakage=report.leakage_of(splits), passages=_passages(splits, records),
        conflicts=Finding() if lm else report.conflicts_of(everything, "classify"), empty=report.finding(empty),
        remarks={what: report.finding(items) for what, items in remarks.items()},
        dropped={reason: report.finding(items) for reason, items in dropped.items()},
        notes=tuple(dict.fromkeys([*notes, *splits.notes])),
    )  # fmt: skip


def _lengths(records: Sequence[Record]) -> RecordLengths:
    contexts = [len(r.context) for r in records if r.context]
    return RecordLengths(
        rows=len(records),
        sources=report.quantiles([len(r.source) for r in records]),
        targets=report.quantiles([len(r.targets[0]) for r in records if r.targets]),
        contexts=report.quantiles(contexts) if contexts else None,
    )


def _passages(splits: Splits, records: Mapping[tuple[str, int], Record]) -> dict[str, int]:
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    rows = {name: {item.key for item in items} for name, items in parts.items()}
    contexts = {name: [records[item.split, item.number].context for item in items] for name, items in parts.items()}
    found = {}
    for earlier, later in (("train", "validation"), ("train", "test"), ("validation", "test")):
        known = set(contexts[earlier]) - {""}
        pairs = zip(parts[later], contexts[later], strict=True)
        if shared := sum(context in known and item.key not in rows[earlier] for item, context in pairs):
            found[f"{earlier}-{later}"] = shared
    return found
