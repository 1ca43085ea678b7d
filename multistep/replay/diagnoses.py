"""What was said to be the matter at the end of a run: by the rules, from the trials that were told and from what was measured for it.

What was measured is in the facts of the trial that diagnoses (an older journal has none: it is said to be unchecked). It is taken as it is
written, and so are the rows whose labels are likely to be wrong, and the standard error of a law's gain, which is that of draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

from multistep.diagnosed import AT_THE_END, Known, diagnoses
from multistep.diagnosis import Diagnosis
from multistep.replay.decisions import LOST, Lived, plain_record
from multistep.replay.found import Found
from multistep.strategy import Diagnose, Trial
from multistep.types import Outcome, UserError

Record = Mapping[str, Any]
_CLOSE = 1e-6  # relative: the same number, computed on another machine


def check(records: Sequence[Record], standings: Mapping[str, Lived], found: Found) -> None:
    """`standings`: what came of each trial, and what stood after it."""
    asked: dict[str, Trial] = {}
    past: list[tuple[Trial, Outcome]] = []
    said: dict[str, list[Record]] = {}
    over: set[str] = set()
    report: Mapping[str, Any] = {}
    for record in records:
        kind = record["kind"]
        if kind == "Data":
            report = record.get("report") or {}
        elif kind == "Asked":
            trial = Trial.parse(record["trial"])
            asked[trial.id] = trial
        elif kind == "Resumed":
            said.clear()  # what a process that died had begun to say is said again
        elif (kind == "Diagnosed" and record.get("at") == AT_THE_END) or _not_found(record):
            trial = asked.get(str(record.get("trial")))
            if trial is None or not isinstance(trial.action, Diagnose) or trial.id in over:
                found.wrong(record, f"a diagnosis by {record.get('trial')}", "no trial that diagnoses goes on here")
            else:
                said.setdefault(trial.id, []).append(record)
        elif kind == "Told":
            trial, lived = asked.get(record["trial"]), standings.get(record["trial"])
            if trial is None or lived is None or lived.told is not record:
                continue
            over.add(trial.id)
            if isinstance(trial.action, Diagnose):
                _check(record, lived, past, report, said.pop(trial.id, []), found)
            past.append((trial, lived.outcome))


def _not_found(record: Record) -> bool:
    return record["kind"] == "Noted" and record.get("what") == "not found"


def _check(
    told: Record, lived: Lived, past: Sequence[tuple[Trial, Outcome]], report: Mapping[str, Any], said: Sequence[Record],
    found: Found,
) -> None:  # fmt: skip
    facts = lived.outcome.facts
    if "known" not in facts:
        if said or "diagnosed" in facts:
            found.unchecked.append("its diagnoses: what they were made of is not in it")
        return
    try:
        known = _known(facts["known"], report, said)
        law = next((n for name, n in _numbers(said) if name == "budget too small"), None)
        expected = diagnoses(past, known, law)
    except (UserError, *LOST) as error:
        found.wrong(told, "what its diagnoses were made of", f"nothing can be said of it: {error!r}")
        return
    if (states := lived.stood.states()) != known.served:
        found.wrong(told, f"{', '.join(known.served)} is served", f"{', '.join(states)} stands")
    if facts.get("diagnosed") != (names := [d.name for d in expected if d.found]):
        found.wrong(told, f"it found {facts.get('diagnosed')}", f"from what was told follows {names}")
    _compare(told, expected, said, found)


def _known(fields: Any, report: Mapping[str, Any], said: Sequence[Record]) -> Known:
    """With the report, and the rows that are named where labels are noisy."""
    known = Known.parse({**fields, "report": dict(report)}, "known")
    suspects = next((n["suspects"] for name, n in _numbers(said) if name == "noisy labels" and "suspects" in n), ())
    measured = known.measured
    if measured is None or measured.noise is None:
        return known
    return known.with_(measured=measured.with_(noise=measured.noise.with_(suspects=tuple(suspects))))


def _numbers(said: Sequence[Record]) -> list[tuple[str, Any]]:
    """By name, of all that was said."""
    named = [(str(r.get("name")), r.get("numbers")) for r in said if r["kind"] == "Diagnosed"]
    return [*named, *((n, f["numbers"]) for r in said if _not_found(r) for n, f in r["facts"].items())]


def _compare(told: Record, expected: Sequence[Diagnosis], said: Sequence[Record], found: Found) -> None:
    """Every diagnosis is there once, as it follows, and no other is."""
    left: dict[str, Diagnosis] = {d.name: d for d in expected}
    for record in said:
        parts = record["facts"].items() if _not_found(record) else [(str(record.get("name")), record)]
        for name, fields in parts:
            found.derived["diagnoses"] += 1
            due = left.pop(name, None)
            if due is None or due.found == _not_found(record):
                follows = "nothing of it" if due is None else due.words
                found.wrong(
                    record,
                    f"{name} is {'not ' if _not_found(record) else ''}found",
                    f"from what was told follows: {follows}",
                )
                continue
            now = plain_record(due.model_dump())
            for key in ("numbers", "words", *(("action",) if due.found else ())):
                then = fields.get(key)
                if not _same(now[key], then):
                    said_here, follows = _short(then, now[key]), _short(now[key], then)
                    found.wrong(record, f"{name}: {said_here}", f"from what was told follows: {follows}")
    for name, due in left.items():
        found.derived["diagnoses"] += 1
        found.wrong(told, f"nothing of {name}", f"from what was told follows: {due.words}")


def _same(now: Any, then: Any) -> bool:
    if isinstance(now, dict) and isinstance(then, dict):
        return now.keys() == then.keys() and all(_same(now[k], then[k]) for k in now)
    if isinstance(now, list) and isinstance(then, list):
        return len(now) == len(then) and all(map(_same, now, then))
    if isinstance(now, float) and isinstance(then, int | float):
        return isclose(now, then, rel_tol=_CLOSE, abs_tol=1e-12)
    return now == then


def _short(value: Any, other: Any) -> str:
    """A word, or of numbers the first that differ."""
    if not (isinstance(value, dict) and isinstance(other, dict)):
        return str(value)
    return ", ".join(f"{k} {v!r:.60}" for k, v in value.items() if k not in other or not _same(v, other[k])) or str(
        value
    )
