"""What a replay finds: the decisions that do not follow, what cannot be derived, and how much was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from multistep.report.words import clip
from multistep.types import Spec

SORTS = ("asks", "verdicts", "decisions", "events", "diagnoses", "amounts left", "test readings")  # of what is derived
_WIDTH = 180  # of what is said, and of what follows


class Finding(Spec):
    """A decision that does not follow: the record's number and kind, what the journal says, and what follows from its evidence."""

    n: int
    kind: str
    says: str
    follows: str

    def __str__(self) -> str:
        return f"record {self.n} ({self.kind}): the journal says {self.says}; {self.follows}"


class Replayed(Spec):
    """`derived`: how many decisions of each sort were derived again; those that do not follow are counted too. `unchecked`: what an older
    version did not write enough of; all else was."""

    journal: str
    records: int
    derived: dict[str, int]
    findings: tuple[Finding, ...]
    unknown: tuple[str, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.findings and not self.unknown

    def __str__(self) -> str:
        counts = ", ".join(f"{what} {n}" for what, n in self.derived.items())
        if self.findings:
            n = len(self.findings)
            return f"{self.journal}: {n} {'decision does' if n == 1 else 'decisions do'} not follow ({counts})"
        if self.unknown:
            return f"{self.journal}: cannot be replayed: {'; '.join(dict.fromkeys(self.unknown))}"
        all_of_it = f"{self.journal}: all follows from its evidence ({counts or 'nothing was decided yet'})"
        return f"{all_of_it}; not checked: {'; '.join(self.unchecked)}" if self.unchecked else all_of_it


class Found:
    """Collects what is found while a journal is gone through."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.unknown: list[str] = []
        self.unchecked: list[str] = []
        self.derived: Counter[str] = Counter(dict.fromkeys(SORTS, 0))
        self._records = 0

    def wrong(self, record: Mapping[str, Any], says: str, follows: str) -> None:
        finding = Finding(n=record["n"], kind=record["kind"], says=clip(says, _WIDTH), follows=clip(follows, _WIDTH))
        if finding not in self.findings:
            self.findings.append(finding)

    def saw(self, records: int) -> None:
        self._records = records

    def replayed(self, journal: str) -> Replayed:
        findings = tuple(sorted(self.findings, key=lambda f: f.n))
        derived = {sort: n for sort, n in self.derived.items() if n}
        return Replayed(
            journal=journal, records=self._records, derived=derived, findings=findings, unknown=tuple(self.unknown),
            unchecked=tuple(dict.fromkeys(self.unchecked)),
        )  # fmt: skip
