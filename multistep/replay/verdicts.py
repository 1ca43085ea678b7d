"""Every verdict of a journal from its evidence: of trials on what stood, on their family, on a rival; and of looks while training.

The chance of an error that a trial's comparisons may take is that which its controller gave it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from multistep.metrics.verdicts import derived, problems
from multistep.replay.found import Found
from multistep.types import Admitted, Gain, NotWorse, Outcome, UserError, Verdict

Record = Mapping[str, Any]


def check(records: Sequence[Record], found: Found) -> None:
    allowed: dict[str, float] = {}
    for record in records:
        if record["kind"] == "Asked" and "alpha" in record["trial"]:
            allowed[record["trial"]["id"]] = record["trial"]["alpha"]
        if record["kind"] == "Noted" and (record.get("facts") or {}).get("which") == "soup":
            _soup(record, record["facts"].get("tried") or [], found)
        try:
            made = list(_verdicts(record))
        except (UserError, TypeError) as error:
            found.wrong(record, "a verdict", f"it cannot be read: {error}")
            continue
        for of, verdict in made:
            _one(record, of, verdict, found)
            alpha = _alpha(verdict)
            may = allowed.get(of.partition(", ")[0]) if record["kind"] == "Told" else None
            if alpha is not None and may is not None and alpha != may:
                found.wrong(record, f"{of}: an error was allowed with chance {alpha:g}", f"the trial allows {may:g}")


def _alpha(verdict: Verdict) -> float | None:
    by = verdict.by.quality if isinstance(verdict.by, Admitted) else verdict.by
    return by.alpha if isinstance(by, Gain | NotWorse) else None


def _soup(record: Record, tried: Sequence[Mapping[str, Any]], found: Found) -> None:
    """The best alone begins it; each further one is in it where the score of the mixture is no worse than before."""
    best = max((float(t["alone"]) for t in tried), default=0.0)
    for n, t in enumerate(tried):
        found.derived["verdicts"] += 1
        score = float(t["in the soup"] if n else t["alone"])
        taken = score >= best
        if bool(t["taken"]) != taken:
            word = {True: "in the soup", False: "left out"}
            found.wrong(
                record, f"{t['state']} is {word[bool(t['taken'])]}", f"{score:.6g} against {best:.6g}: {word[taken]}"
            )
        best = score if taken else best


def _verdicts(record: Record) -> Iterator[tuple[str, Verdict]]:
    """(of what, verdict)."""
    if record["kind"] == "Told":
        outcome = Outcome.parse(record["outcome"])
        if outcome.verdict is not None:
            yield str(record["trial"]), outcome.verdict
        for key, value in outcome.facts.items():
            if key.endswith("_verdict"):
                yield f"{record['trial']}, {key.removesuffix('_verdict')}", Verdict.parse(value, key)
    elif record["kind"] == "Event" and "evidence" in record:
        data = {"accept": False, "rule": record.get("rule", ""), "evidence": record["evidence"], "by": record.get("by")}
        yield f"{record.get('trial', '')}, {record['event']}", Verdict.parse(data, "event")


def _one(record: Record, of: str, verdict: Verdict, found: Found) -> None:
    found.derived["verdicts"] += 1
    again = derived(verdict)
    if again is None:
        found.unknown.append("by which rule its verdicts were made is not in it")
        return
    if (again.accept, again.rule) != (verdict.accept, verdict.rule):
        found.wrong(record, f"{of}: {_said(verdict)}", f"its evidence gives: {_said(again)}")
    for problem in problems(verdict):
        found.wrong(record, f"{of}: {_said(verdict)}", f"its evidence contradicts itself: {problem}")


def _said(verdict: Verdict) -> str:
    return f"{'accepted' if verdict.accept else 'refused'}, {verdict.rule}"
