"""The records are whole and in their order; the clock only goes on; what was left is what the budget, the clock and the reservations
leave; no training begins with nothing left; the test is read at the end, once for every time that the run was given its budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from multistep.budget import Budget
from multistep.controllers.begin import is_problem
from multistep.journal import KINDS
from multistep.replay.found import Found
from multistep.strategy import Training, Trial
from multistep.types import Outcome, UserError

Record = Mapping[str, Any]
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "Started": ("budget",), "Resumed": ("budget",), "Asked": ("trial",), "Told": ("trial", "outcome"),
    "Committed": ("trial", "incumbent", "families", "rule", "evidence"), "Skipped": ("stage", "why"),
    "RolledBack": ("trial", "incumbent", "families", "rule", "evidence"), "Reserved": ("name", "amount"),
    "TestRead": ("trial", "metrics"), "Noted": ("what",), "Event": ("event",),
}  # fmt: skip
_ASKS = ("Asked", "Skipped", "Reserved")
_ROUND_S = 0.0015  # the clock is written to milliseconds


def whole(records: Sequence[Record], found: Found) -> list[Record]:
    """The records that can be gone through: with a number, a clock and what their kind needs. All others are findings; but what cannot be
    read of a journal that does not hold its controller's problem was written by another version."""
    found.saw(len(records))
    old = not any(map(is_problem, records))
    kept, expected = [], 0
    for record in records:
        n = record["n"]
        if not isinstance(n, int):
            record = {**record, "n": expected}
            found.wrong(record, f"it is number {n!r}", f"number {expected} is expected here")
        elif n != expected:
            found.wrong(record, f"it is number {n}", f"number {expected} is expected here: a line is missing, or moved")
        expected = record["n"] + 1
        if problem := _problem(record):
            found.wrong(record, problem, "a record of this kind has to be whole")
        elif problem := _unread(record):
            if old:
                found.unknown.append("its records are those of another version")
            else:
                found.wrong(record, f"what cannot be read: {problem}", "a record of this kind has to be whole")
        else:
            kept.append(record)
    return kept


def _problem(record: Record) -> str:
    kind, clock = record["kind"], record.get("clock")
    if kind not in KINDS:
        return f"it is a {kind!r}"
    missing = [key for key in _NEEDS.get(kind, ()) if key not in record]
    if missing:
        return f"nothing of {' and '.join(missing)}"
    counts = [clock.get(k) for k in ("wall_s", "updates", "tokens")] if isinstance(clock, Mapping) else [None]
    if not all(isinstance(c, int | float) and math.isfinite(c) for c in counts):
        return f"its clock is {clock!r}"
    return ""


def _unread(record: Record) -> str:
    """What of it is not what a record of its kind holds."""
    try:
        match record["kind"]:
            case "Asked":
                Trial.parse(record["trial"], "trial")
            case "Told":
                Outcome.parse(record["outcome"], "outcome")
            case "Started" | "Resumed":
                Budget.parse(record["budget"], "budget")
            case "Reserved":
                float(record["amount"])
    except (UserError, ValidationError, TypeError, ValueError) as error:
        return str(error)
    return ""


# ---------------------------------------------------------------------------------------------- clock and budget


def clock(records: Sequence[Record], found: Found) -> None:
    """Time never goes back; counts go back only where a process died, to those of the last finished trial, and not beyond them where memory
    ran out; and what was left is right."""
    total, held, left = Budget(amount=math.inf), {}, math.inf
    before, told, over = {"wall_s": 0.0, "updates": 0, "tokens": 0}, {"updates": 0, "tokens": 0}, False
    for record in records:
        now, kind = record["clock"], record["kind"]
        if now["wall_s"] < before["wall_s"]:
            found.wrong(
                record,
                f"the clock stands at {now['wall_s']} s",
                f"it stood at {before['wall_s']} s before: it went back",
            )
        # Where memory ran out the updates since the last snapshot are made again.
        undone = kind == "Event" and record.get("event") == "out of memory"
        for unit in ("updates", "tokens"):
            least = told[unit] if kind == "Resumed" or undone else before[unit]
            if now[unit] < least or (kind == "Resumed" and now[unit] != least):
                found.wrong(record, f"{now[unit]} {unit} were made", f"{least} had been made before")
        match kind:
            case "Started" | "Resumed":
                more = Budget(**record["budget"])
                left = more.amount if kind == "Started" or over else left
                total, over = more, False
            case "Reserved":
                amount = max(0.0, float(record["amount"]))
                left = max(0.0, left + held.get(record["name"], 0.0) - amount)
                held[record["name"]] = amount
            case "Asked":
                trial = Trial.parse(record["trial"])
                if isinstance(trial.action, Training) and trial.share > 0 and left <= 0:
                    found.wrong(
                        record, f"a training of {trial.share:g} {total.unit} begins", "nothing of the budget was left"
                    )
            case "Told":
                left = float(Outcome.parse(record["outcome"]).remaining)
                _left(record, left, total, sum(held.values()), before, found)
                told = now
            case "Finished":
                over = True
        before = now


def _left(record: Record, left: float, total: Budget, held: float, before: Record, found: Found) -> None:
    """What was left is measured after the record before, and before this one is written."""
    found.derived["amounts left"] += 1
    key = "wall_s" if total.unit == "seconds" else total.unit
    slack = _ROUND_S if total.unit == "seconds" else 1e-9 * total.amount
    least = max(0.0, total.amount - record["clock"][key] - held) - slack
    most = max(0.0, total.amount - (before if total.unit == "seconds" else record["clock"])[key] - held) + slack
    if not least <= left <= most:
        where = f"{most:.6g}" if total.unit != "seconds" else f"{least:.3f} to {most:.3f}"
        follows = f"{total}, {record['clock'][key]:g} spent and {held:g} reserved leave {where}"
        found.wrong(record, f"{left:.6g} {total.unit} are left", follows)


# ---------------------------------------------------------------------------------------------- the test


def test(records: Sequence[Record], found: Found) -> None:
    """Read once, at the end: nothing is asked or decided after it, but in a finished run that was given more."""
    for phase in _phases(records):
        read: Record | None = None
        again = False  # a process died after it had read the test, before it could say so
        for record in phase:
            kind = record["kind"]
            if kind == "TestRead":
                found.derived["test readings"] += 1
                if read is not None and not (again and read["trial"] == record["trial"]):
                    found.wrong(record, "the test is read", f"it was read before, by record {read['n']}")
                read, again = record, False
            elif read is None:
                continue
            elif kind == "Resumed":
                again = True
            elif kind == "Told" and record["trial"] == read["trial"]:
                if record["outcome"].get("metrics") != read["metrics"]:
                    found.wrong(record, "other scores", f"record {read['n']} read others on the test")
                again = False
            elif kind in (*_ASKS, "Told", "Committed", "RolledBack"):
                found.wrong(record, "something is decided", f"the test was read before, by record {read['n']}")


def _phases(records: Sequence[Record]) -> Iterator[list[Record]]:
    """The run, and every time that it was given more after its end."""
    phase: list[Record] = []
    for n, record in enumerate(records):
        if record["kind"] == "Resumed" and n and records[n - 1]["kind"] == "Finished":
            yield phase
            phase = []
        phase.append(record)
    yield phase
