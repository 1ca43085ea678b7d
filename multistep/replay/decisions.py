"""What the controller asks, told what came of its trials, and what stands after each: both as the journal has them, or a finding."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from multistep.controllers import Controller, Wait
from multistep.controllers.begin import begin_again, is_problem, plain, record_of, same
from multistep.replay.found import Found
from multistep.report.summary import describe
from multistep.standing import Of, Stood, after, settlement
from multistep.strategy import Average, Refit, Trial
from multistep.types import Comparison, Finite, NotWorse, Outcome, UserError, Verdict

Record = Mapping[str, Any]
_ASKS = ("Asked", "Skipped", "Reserved")
_SETTLED = ("Committed", "RolledBack")
# What code for whole journals raises on one that was changed: it reads facts that are gone, or of another type.
LOST = (KeyError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError, IndexError, StopIteration)


class Lived(NamedTuple):
    """A trial that came to its end: the record that says so, what came of it, and what stood after it."""

    told: Record
    outcome: Outcome
    stood: Stood


def check(records: Sequence[Record], found: Found) -> dict[str, Lived]:
    """What came of each trial, and what stood after it; nothing where no controller can be made."""
    start = next(r for r in records if is_problem(r))
    try:
        of, controller = begin_again(start, records)
    except (UserError, *LOST) as error:
        found.wrong(start, "what the controller was given", f"no controller can be made of it: {error}")
        return {}
    standings = _stands(records, of, found)
    _asks(records, controller, standings, found)
    _pick(records, standings, found)
    return standings


# ---------------------------------------------------------------------------------------------- what stands


def _stands(records: Sequence[Record], of: Of, found: Found) -> dict[str, Lived]:
    """Go through what was told; compare what was settled. What came of each trial, and what stood after it."""
    asked: dict[str, Trial] = {}
    standings: dict[str, Lived] = {}
    stood, due, last = Stood(), None, None
    for record in records:
        kind = record["kind"]
        if kind in _SETTLED:
            _settled(record, due, found)
            due = None
            continue
        if kind not in (*_ASKS, "Told", "Finished"):
            continue
        if due is not None and last is not None:
            found.wrong(last, f"nothing was settled after {due['trial']}", f"it follows: {_decision(due)}")
            due = None
        if kind == "Asked":
            trial = Trial.parse(record["trial"])
            asked[trial.id] = trial
        elif kind == "Told":
            last, trial = record, asked.get(record["trial"])
            if trial is None or trial.id in standings:
                found.wrong(
                    record,
                    f"what came of {record['trial']}",
                    "it was not asked for" if trial is None else "it was told before",
                )
                continue
            outcome = Outcome.parse(record["outcome"])
            _rivals(record, of, trial, outcome, stood, found)
            try:
                stood, committed = after(of, stood, trial, outcome)
            except LOST as error:
                found.wrong(record, f"what came of {trial.id}", f"what stands after it cannot be said: {error!r}")
                continue
            standings[trial.id], due = Lived(record, outcome, stood), settlement(stood, trial, outcome, committed)
    return standings


def _settled(record: Record, due: Mapping[str, Any] | None, found: Found) -> None:
    found.derived["decisions"] += 1
    if due is None or due["trial"] != record["trial"]:
        found.wrong(record, f"{record['trial']} was settled", "there was nothing to be settled about it here")
    elif due["kind"] != record["kind"]:
        found.wrong(record, f"{record['trial']} was {_word(record)}", f"it follows: {_decision(due)}")
    else:
        now, lived = plain_record(due), {**record, "evidence": _evidence(record["evidence"])}
        for key in (k for k in now if now[k] != lived.get(k)):
            found.wrong(record, f"{key} {_short(record.get(key))}", f"from what was told follows {_short(now[key])}")


def _evidence(compared: Any) -> Any:
    """As a comparison is written now: an older journal does not have all of its fields. What is none stays as it is."""
    try:
        return [plain_record(Comparison.parse(c).model_dump()) for c in compared]
    except (UserError, TypeError):
        return compared


def plain_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """As a journal has it: numbers that are not finite are their names."""
    from multistep.journal import finite

    return plain(finite(record))


def _word(record: Mapping[str, Any]) -> str:
    return "committed" if record["kind"] == "Committed" else "rolled back"


def _decision(due: Mapping[str, Any]) -> str:
    return f"{due['trial']} is {_word(due)} ({due['rule']})"


def _rivals(record: Record, of: Of, trial: Trial, outcome: Outcome, stood: Stood, found: Found) -> None:
    """Whom it was compared with: the best of its family as it stood, and whom the trial names. Where there was one the verdict has to be
    there, and its name; models that write did not always name theirs."""
    facts = outcome.facts
    family = stood.families.get(str(facts.get("family")))
    for name, rival, due in (("family", family, of == "labels"), ("against", trial.against, True)):
        key = f"{name}_rival"
        if key in facts and facts[key] != rival:
            found.wrong(record, f"{trial.id} was compared with {facts[key]}", f"{rival} stood")
        keys = [f"{name}_verdict", *([] if of == "language" else [key])]
        if outcome.ok and rival is not None and due and (missing := [k for k in keys if k not in facts]):
            found.wrong(record, f"nothing of {' and '.join(missing)} of {trial.id}", f"it is compared with {rival}")
    _rules(record, trial, outcome, family, stood, found)


def _rules(record: Record, trial: Trial, outcome: Outcome, best: str | None, stood: Stood, found: Found) -> None:
    """Who takes a place by not being worse: a refit, and the mean of equal trainings that of one of them. All else has to be better."""
    action, facts = trial.action, outcome.facts
    equal = isinstance(action, Average) and action.which == "mean" and best in action.members
    unless_it_harms = isinstance(action, Refit) or (equal and best in stood.states())
    try:
        of_family = Verdict.parse(facts["family_verdict"], "family_verdict") if "family_verdict" in facts else None
    except (UserError, TypeError):
        return  # verdicts.py says so
    for what, verdict, harmless in (
        ("its family", of_family, equal), ("what stands", outcome.verdict, unless_it_harms)
    ):  # fmt: skip
        if verdict is None or verdict.by is None or isinstance(verdict.by, Finite):
            continue
        if isinstance(verdict.by, NotWorse) != harmless:
            due = "it is taken unless it harms" if harmless else "it had to be better"
            found.wrong(record, f"{trial.id} against {what}: {verdict.rule}", due)


def _pick(records: Sequence[Record], standings: Mapping[str, Lived], found: Found) -> None:
    """Of a tuning: what is served from then on is what stands at its end."""
    for record in records:
        if record["kind"] != "Finished" or "pick" not in record or not standings:
            continue
        stands = (list(standings.values())[-1].stood.incumbent or {}).get("name")
        if record["pick"] != stands:
            found.wrong(record, f"{record['pick']} was picked", f"{stands} stands")


# ---------------------------------------------------------------------------------------------- what is asked


def _asks(records: Sequence[Record], controller: Controller, standings: Mapping[str, Lived], found: Found) -> None:
    """The controller, told the same, asks the same, in the same order. After the first ask that does not follow nothing more does."""
    asked = deque(r for r in records if r["kind"] in _ASKS)
    outstanding: dict[str, Trial] = {}
    told: Record | None = None
    while True:
        try:
            ask = controller.ask()
        except (UserError, *LOST) as error:
            where = told if told is not None else records[0]
            found.wrong(where, "what came of the last trial", f"the controller cannot go on from it: {error!r}")
            return
        if isinstance(ask, Wait):
            lived = next((trial for name in standings if (trial := outstanding.pop(name, None)) is not None), None)
            if lived is None:
                for later in asked:
                    waits = " or ".join(outstanding)
                    found.wrong(later, _asked(later), f"nothing is asked before it is told what came of {waits}")
                return
            told, outcome, stood = standings[lived.id]
            controller.tell(lived, outcome.with_(incumbent=stood.incumbent, families=dict(stood.families)))
            continue
        if ask is None:
            for record in asked:
                found.wrong(record, _asked(record), "the controller asks nothing more")
            return
        if not asked:
            if records[-1]["kind"] == "Finished":
                follows = f"the controller asks on: {_asked(record_of(ask))}"
                found.wrong(records[-1], "the run is finished", follows)
            return
        record = asked.popleft()
        found.derived["asks"] += 1
        if told is not None and record["n"] < told["n"]:
            found.wrong(
                record, _asked(record), f"it was not told yet what came of {told['trial']}: record {told['n']} says it"
            )
        if not same(record_of(ask), record):
            found.wrong(record, _asked(record), f"the controller asks: {_difference(record_of(ask), record)}")
            return
        if isinstance(ask, Trial):
            outstanding[ask.id] = ask


def _asked(record: Mapping[str, Any]) -> str:
    match record["kind"]:
        case "Asked":
            trial = record["trial"]
            return f"{trial.get('id')} is asked for: {trial.get('why')}"
        case "Skipped":
            return f"{record['stage']} is left out: {record['why']}"
        case _:
            return f"{record['amount']} is reserved for {record['name']}"


def _difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    """The ask; where it is nearly the same, what of it is not."""
    if now["kind"] != "Asked" or then["kind"] != "Asked" or now["trial"]["id"] != then["trial"].get("id"):
        return _asked(now)
    new, old = plain(now["trial"]), then["trial"]
    parts = [
        f"{key} {describe(new[key]) if key == 'action' else _short(new[key])}"
        for key in new
        if new[key] != old.get(key)
    ]
    return f"{new['id']} with {'; '.join(parts)}"


def _short(value: Any) -> str:
    return f"{value}" if not isinstance(value, dict | list) else f"{value!r:.80}"
