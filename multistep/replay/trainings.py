"""What went wrong in trainings and what was done about it, and what watches saw: each from what the records before it say.

    a bad batch       the learning rate is half of what it was
    divergence        the rule follows from its numbers; the rate is that of the trial times what was done to it; it begins again with a
                      tenth, three times at most, and a probe never
    a watch's looks   overfitting, no improvement and cuts are what its looks give, and nothing else is
    the end           the trial's facts count what was done, and say what ended it

Whether a batch was bad, and how far a training was when it diverged, is taken as it is written. A process that died, or that ran out of
memory in a step, goes on from a snapshot that is older than its last record: until an event says where, it may stand wherever it has stood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from typing import Any, NamedTuple

from multistep import detect
from multistep.detect import MAX_RESTARTS, MAX_ROLLBACKS, RESTART_LR
from multistep.diagnosed import AT_THE_END
from multistep.diagnosis.looks import decided, gains, gap_rises
from multistep.diagnosis.training import Look, rise
from multistep.replay.found import Found
from multistep.schedules import Plateau
from multistep.strategy import FineTune, Training, Trial
from multistep.types import Outcome

Record = Mapping[str, Any]
_BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)  # of numbers that are none
_CLOSE = 1e-9  # relative: the same number, computed again
_ENDS = ("overfitting", "no improvement")  # what ends a training at a look


class _At(NamedTuple):
    """Where a training may stand: what its rate is multiplied with, bad batches since it began, how often it began again."""

    scale: float
    rollbacks: int = 0
    restarts: int = 0


@dataclass
class _Live:
    """A training that was asked for and has not ended. `begins`: what its rate may be multiplied with where it begins; `whole`: nothing
    was taken back; `lost`: an event did not follow, and nothing is said of those after it; `said`: what was named, and done at looks."""

    trial: Trial
    begins: tuple[float, ...]
    now: set[_At] = field(default_factory=set)
    been: set[_At] = field(default_factory=set)
    whole: bool = True
    lost: bool = False
    said: list[Record] = field(default_factory=list)
    micro: list[int] = field(default_factory=list)
    silent: set[str] = field(default_factory=set)  # what its looks decide nothing on, since the rows are too few
    over: Record | None = None  # the record that ended it

    def __post_init__(self) -> None:
        self.moved({_At(scale) for scale in self.begins})

    @property
    def probe(self) -> bool:
        return not self.trial.commit and not self.trial.watch_gap

    @property
    def lr(self) -> float:
        assert isinstance(self.trial.action, Training)
        return float(self.trial.action.optimizer.model_dump().get("lr") or 0.0)

    def moved(self, now: set[_At]) -> None:
        self.now = now
        self.been |= now

    def back(self) -> None:
        self.now, self.whole, self.over = set(self.been), False, None


def check(records: Sequence[Record], found: Found) -> None:
    live: dict[str, _Live] = {}
    ends: dict[str, tuple[float, ...]] = {}
    micro: set[int] = set()
    for record in records:
        kind, name = record["kind"], str(record.get("trial"))
        if kind == "Asked":
            trial = Trial.parse(record["trial"])
            if isinstance(trial.action, Training):
                live[trial.id] = _Live(trial, tuple(dict.fromkeys((1.0, *ends.get(trial.start or "", ())))))
        elif kind == "Noted" and record.get("what") == "looks" and name in live:
            live[name].silent = {str(what) for what in record["facts"].get("silent", ())}
        elif kind == "Resumed":
            for one in live.values():
                one.back()
        elif kind in ("Event", "Diagnosed") and name not in live and record.get("at") != AT_THE_END:
            found.wrong(record, f"something of {name}", "no such training goes on here")
        elif kind in ("Event", "Diagnosed", "Told") and name in live:
            one = live[name]
            if kind != "Told" and one.over is not None and record.get("event") != "resumed":
                found.wrong(record, f"more of {name}", f"it had ended, by record {one.over['n']}")
            try:
                if kind == "Event":
                    _event(record, one, found)
                elif kind == "Diagnosed":
                    _diagnosed(record, one, found)
                else:
                    ends[name] = _told(record, live.pop(name), micro, found)
            except _BROKEN as error:
                found.wrong(record, f"numbers of {name}", f"they cannot be read: {error!r}")


# ---------------------------------------------------------------------------------------------- what was done


def _event(record: Record, one: _Live, found: Found) -> None:
    event = record["event"]
    if event == "resumed":
        one.back()
    elif event == "out of memory":
        one.back()
        if "micro_batch" in record:
            old, new = int(record["micro_batch_before"]), int(record["micro_batch"])
            if new != (old + 1) // 2:
                found.wrong(record, f"{new} examples at once in place of {old}", f"half of them are {(old + 1) // 2}")
            one.micro.append(new)
    elif event == "divergence":
        _began_again(record, one, found)
    elif event in ("plateau", "no improvement"):
        one.said.append(record)
        one.over = record if event in _ENDS else None
        if event == "plateau":
            assert isinstance(one.trial.action, Training)
            schedule = one.trial.action.schedule
            factor = schedule.factor if isinstance(schedule, Plateau) else 1.0
            _step(record, one, {s._replace(scale=factor * s.scale) for s in one.now}, found)
    elif "lr_scale" in record:  # a bad batch
        may = {
            s._replace(scale=s.scale / 2, rollbacks=s.rollbacks + 1) for s in one.now if s.rollbacks <= MAX_ROLLBACKS
        }
        _step(record, one, may, found)


def _step(record: Record, one: _Live, may: set[_At], found: Found) -> None:
    """Of what may stand after an event, what has the learning rate that it says."""
    if one.lost:
        return
    found.derived["events"] += 1
    scale = float(record["lr_scale"])
    now = {s for s in may if isclose(s.scale, scale, rel_tol=_CLOSE)}
    if now:
        one.moved(now)
        return
    one.lost = True
    rates = " or ".join(f"{s:.6g}" for s in sorted({s.scale for s in may}))
    follows = f"from what was done before follows times {rates}" if may else "by what was done before it had ended"
    found.wrong(record, f"{record['event']}: {one.trial.id} goes on with its learning rate times {scale:.6g}", follows)


def _began_again(record: Record, one: _Live, found: Found) -> None:
    numbers = record["numbers"]
    then = [s for s in one.now if isclose(s.scale, float(numbers["lr_scale"]), rel_tol=_CLOSE)]
    again = {s.restarts + 1 for s in then if s.restarts < MAX_RESTARTS and not one.probe}
    _step(record, one, {_At(begin * RESTART_LR**n, 0, n) for begin in one.begins for n in again}, found)
    _rule(record, one, found)


def _rule(record: Record, one: _Live, found: Found) -> None:
    numbers = record["numbers"]
    if not detect.follows(numbers):
        found.wrong(record, f"{one.trial.id} diverged: {numbers['rule']}", "its numbers do not say so")
    rate = one.lr * float(numbers["lr_scale"])
    if not isclose(rate, float(numbers["lr"]), rel_tol=_CLOSE):
        found.wrong(record, f"{one.trial.id} diverged at {numbers['lr']:.6g}", f"its learning rate was {rate:.6g}")


def _diagnosed(record: Record, one: _Live, found: Found) -> None:
    one.said.append(record)
    one.over = record
    if record["name"] != "divergence" or one.lost:
        return
    found.derived["events"] += 1
    numbers = record["numbers"]
    then = [s for s in one.now if isclose(s.scale, float(numbers["lr_scale"]), rel_tol=_CLOSE)]
    if not any(one.probe or s.restarts >= MAX_RESTARTS for s in then):
        counts = " or ".join(str(n) for n in sorted({s.restarts for s in one.now}))
        follows = (
            f"it began again {counts} times, with another rate"
            if not then
            else f"it may begin again {MAX_RESTARTS} times"
        )
        found.wrong(record, f"{one.trial.id} ends diverged at its learning rate times {numbers['lr_scale']}", follows)
    _rule(record, one, found)
    words = f"at learning rate {numbers['lr']:.2g} {numbers['rule']}"
    if record["words"] != words:
        found.wrong(record, f"of {one.trial.id}: {record['words']}", f"its numbers say: {words}")


# ---------------------------------------------------------------------------------------------- the end


def _told(record: Record, one: _Live, micro: set[int], found: Found) -> tuple[float, ...]:
    """Check the facts of a training's end; what its rate may be multiplied with there."""
    facts, name = Outcome.parse(record["outcome"]).facts, one.trial.id
    at = one.now
    if "rollbacks" in facts and not one.lost:
        done = int(facts["rollbacks"]), int(facts.get("restarts", 0))
        at = {s for s in one.now if (s.rollbacks, s.restarts) == done}
        if not at:
            counts = " or ".join(f"{b} and {a}" for b, a in sorted({(s.rollbacks, s.restarts) for s in one.now}))
            said = f"{name} went back {done[0]} times since it began, and began again {done[1]} times"
            found.wrong(record, said, f"its events say: {counts}")
    fits = facts.get("micro_batch")
    if fits is not None and fits not in {*micro, *one.micro}:
        found.wrong(record, f"{fits} examples at once fitted into memory", "no event says that more did not")
    micro |= {int(fits)} if fits else set()
    _named(record, one, facts, found)
    _looks(record, one, facts, found)
    return (1.0, *(s.scale for s in at))


def _name(record: Record) -> str:
    return str(record["name"] if record["kind"] == "Diagnosed" else record["event"])


def _named(record: Record, one: _Live, facts: Mapping[str, Any], found: Found) -> None:
    """What ended a training is said twice: when it was seen, and in the facts of its end."""
    ended = [facts[key] for key in ("diagnosis", "stopped") if key in facts]
    for fields in ended:
        name = fields.get("name") or fields.get("event")
        same = [r for r in one.said if _name(r) == name]
        if name == "bad batches":
            _bad_batches(record, one, fields, facts, found)
        elif not same:
            found.wrong(record, f"{one.trial.id} ended with {name}", "no record before says so")
        elif not any(all(r.get(key) == value for key, value in fields.items()) for r in same):
            other = next(key for key, value in fields.items() if same[-1].get(key) != value)
            found.wrong(
                same[-1], f"{name}: {other} {same[-1].get(other)}", f"the end of {one.trial.id} has {fields[other]}"
            )
    last = [r for r in one.said if _name(r) != "plateau"]
    if last and not ended and one.whole:
        found.wrong(last[-1], f"{_name(last[-1])} ends {one.trial.id}", f"record {record['n']} does not say so")
    if facts.get("diagnosis", {}).get("name") == "divergence":
        failed = float(facts["diagnosis"]["numbers"]["lr"])
        if not isclose(float(facts["best_lr"]), failed, rel_tol=_CLOSE):
            found.wrong(
                record, f"{one.trial.id} had the learning rate {facts['best_lr']}", f"it diverged at {failed:.6g}"
            )


def _bad_batches(record: Record, one: _Live, fields: Mapping[str, Any], facts: Mapping[str, Any], found: Found) -> None:
    """One more of them than a training may have, and the rate that it stood at, but for the halvings."""
    if one.lost:
        return
    assert isinstance(one.trial.action, Training)
    here = [s for s in one.now if s.rollbacks == int(fields["rollbacks"]) == MAX_ROLLBACKS + 1]
    if not here:
        counts = " or ".join(str(n) for n in sorted({s.rollbacks for s in one.now}))
        found.wrong(record, f"{fields['rollbacks']} bad batches ended {one.trial.id}", f"its events say: {counts}")
    lr = one.lr * one.trial.action.schedule(float(facts["best_progress"]))
    if not isclose(float(facts["best_lr"]), lr, rel_tol=_CLOSE):
        found.wrong(record, f"{one.trial.id} had the learning rate {facts['best_lr']}", f"its schedule says {lr:.6g}")


# ---------------------------------------------------------------------------------------------- looks


def _looks(record: Record, one: _Live, facts: Mapping[str, Any], found: Found) -> None:
    """What a watch did at every look of the training, as it ended: those before it began again are only in their events."""
    trial, action, looks = one.trial, one.trial.action, facts.get("looks")
    assert isinstance(action, Training)
    said = [r for r in one.said if _name(r) != "divergence"]
    if looks is None:
        if said:
            found.unchecked.append("what watches saw: their looks are not in it")
        return
    seen = [Look(**look) for look in looks]
    plateau = action.schedule if isinstance(action.schedule, Plateau) and "plateau" not in one.silent else None
    patience = 0 if "patience" in one.silent else trial.patience
    gap = trial.watch_gap and "overfitting" not in one.silent
    names: list[str | None]
    if isinstance(action, FineTune) and not patience and plateau is None:
        names = ["overfitting" if gap and gap_rises(seen[: n + 1]) else "" for n in range(len(seen))]
        names[-1:] = names[-1:] if "diagnosis" in facts else [""]  # the end is looked at, and nothing is done
    else:
        names = decided(seen, gap and not isinstance(action, FineTune), patience, plateau)
    if None in names:
        found.unchecked.append("what watches decided: what they read of the rows is not in it")
    for n, says, follows in _apart(seen):
        found.wrong(
            record,
            f"a gain of {says:.6g} at {seen[n].progress:.0%} of {trial.id}",
            f"its losses are {follows:.6g} apart",
        )
    matched: list[Record] = []
    for n, name in enumerate(names):
        here = [r for r in said if _at_look(r) == looks[n]]
        matched += here
        if name is None:
            continue
        where = f"at {seen[n].progress:.0%} of {trial.id}"
        for r in here:
            found.derived["events"] += 1
            if _name(r) != name:
                found.wrong(r, f"{_name(r)} {where}", f"its looks give: {name or 'nothing'}")
            else:
                _numbers(r, looks[: n + 1], seen[: n + 1], where, found)
        if name and not here:
            found.wrong(record, f"nothing was seen {where}", f"its looks give: {name}")
        elif name in _ENDS and n + 1 < len(names):
            found.wrong(record, f"{trial.id} went on after {name} {where}", "it ends a training")
    for r in said:
        if one.whole and not facts.get("restarts") and not any(r is m for m in matched):
            found.wrong(r, f"{_name(r)} of {trial.id}", f"no look of it has these numbers (record {record['n']})")


def _apart(seen: Sequence[Look]) -> list[tuple[int, float, float]]:
    """Looks whose gain is not the difference of the losses that it is one between: which, that gain, and the difference."""
    found = []
    reference: Look | None = None
    for n, (look, gained) in enumerate(zip(seen, gains(seen), strict=True)):
        if reference is not None and look.gain is not None:
            apart = reference.validation_loss - look.validation_loss
            if not abs(apart - look.gain) <= 1e-6 * max(1.0, abs(reference.validation_loss)):
                found.append((n, look.gain, apart))
        reference = look if gained else reference
    return found


def _at_look(record: Record) -> Any:
    """The look at which a record was written."""
    numbers = record["numbers"]
    return numbers["now"] if "now" in numbers else numbers["checks"][-1]


def _numbers(record: Record, looks: Sequence[Any], seen: Sequence[Look], where: str, found: Found) -> None:
    """Whether what a record says of the looks so far is so."""
    numbers = record["numbers"]
    expected: dict[str, Any] = {"checks": list(looks)}
    if "now" in numbers:
        best = min(looks, key=lambda look: float(look["validation_loss"]))
        expected = {"best": best, "now": looks[-1], "checks": len(looks)}
    if numbers != expected:
        found.wrong(record, f"{_name(record)} {where}: its numbers", "they are not those of its looks")
    evidence, last = record.get("evidence"), seen[-1]
    if evidence and last.gain is not None and not isclose(float(evidence[0]["difference"]), last.gain, rel_tol=_CLOSE):
        found.wrong(
            record, f"{_name(record)} {where}: a gain of {evidence[0]['difference']}", f"the look has {last.gain}"
        )
    if record["kind"] == "Diagnosed" and record["words"] != (words := rise([look.model_dump() for look in seen])):
        found.wrong(record, f"{_name(record)} {where}: {record['words']}", f"its looks say: {words}")
