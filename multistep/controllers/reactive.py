"""reactive: one training that is watched and corrected, every correction tried on a fork and judged before it is kept.

After each stretch of the trunk a short cool-down says what it is worth, paired with the last one that was a gain:

    gain        on as before
    plateau     no gain beyond noise: the rate is halved; then doubled; then the batch is doubled
    gap         worse while the training loss falls: more dropout and decay; smoother targets; a lower rate
    divergence  not finite, or no way back from spikes: back to the last good state with a third of the rate

No setting leaves what is searched (space.py), and what nobody may move stays: where the rate was given, a divergence ends training.
A correction is a transaction: from the state before the stretch the same stretch is trained with it, and after an equal cool-down it is
compared with what went on as before; where the time for that is not there, none is tried. The better one is committed, the other is as if
it had never been; ties go to what was there. What was refused is not tried again before something has helped; when nothing is left to
try, two more stretches without a gain end training.
"""

from __future__ import annotations

from dataclasses import replace

from multistep.controllers.members import (
    COOL,
    Found,
    Ground,
    Member,
    alone,
    better,
    cooled,
    says_something,
    stretched,
    worse,
)
from multistep.controllers.script import Does, Skip
from multistep.controllers.space import value_of
from multistep.types import Outcome

MOST_STRETCHES = 10
IDLE = 2  # stretches without a gain, and nothing left to try: training ends
BEHIND = 0.1  # the chance of seeing a gap where there is none
RATE, BACK = "optimizer.lr", 1 / 3  # of the rate after a divergence
DIVERGED = 2  # times that it is lowered
_CAUSES = {
    "plateau": ("half the rate", "twice the rate", "twice the batch"),
    "gap": ("more dropout", "more decay", "smoother targets", "half the rate"),
}
_MOVES: dict[str, tuple[str, float, float]] = {  # path, times, plus
    "half the rate": (RATE, 0.5, 0.0),
    "twice the rate": (RATE, 2.0, 0.0),
    "twice the batch": ("batch_size", 2.0, 0.0),
    "more dropout": ("dropout", 1.0, 0.1),
    "more decay": ("optimizer.weight_decay", 10.0, 0.01),
    "smoother targets": ("objective.label_smoothing", 1.0, 0.1),
}


def reactive(ground: Ground) -> Found:
    """The state of the best cool-down, or None."""
    spare = ground.spare()
    count = max((n for n in range(1, MOST_STRETCHES + 1) if says_something(ground, spare / n)), default=0)
    if not count:
        return (yield from alone(ground))
    member, best, share = Member("run", {}), None, ground.spare() / count
    refused: set[str] = set()
    diverged = idle = 0
    while (stretch := affordable(ground, share)) and idle < IDLE:
        before = member.trunk
        outcome = yield from judged_stretch(ground, member, stretch, "on as before", best)
        if outcome is None:
            diverged += 1
            rate, lower = value_at(ground, member, RATE), moved(ground, member, RATE, BACK)
            if lower is None or diverged > DIVERGED:
                why = "and no lower one may be tried" if lower is None else f"after it was lowered {DIVERGED} times"
                yield Skip(stage="reactive", why=f"training diverged at learning rate {rate:.2g}, {why}: it ends")
                break
            member = Member(member.name, {**member.point, RATE: lower}, trunk=before)
            continue
        if best is None or better(outcome):
            best, idle = replace(member), 0
            refused.clear()
            continue
        cause = "gap" if worse(outcome, BEHIND) and member.train_loss < best.train_loss else "plateau"
        better_one = yield from corrected(ground, member, before, stretch, share, cause, refused)
        if better_one is None:
            idle += 1
            continue
        member, idle = better_one, 0
        refused.clear()
        if member.merit > best.merit:
            best = replace(member)
    if idle == IDLE:
        yield Skip(stage="reactive", why=f"{IDLE} stretches without a gain, and no correction is left: training ends")
    return None if best is None else best.cooled


def affordable(ground: Ground, share: float) -> float:
    """The length of a stretch with its cool-down inside of `share`; 0 where that is too short to say something."""
    stretch = min(share, ground.spare()) / (1 + COOL) - 2 * ground.overhead()
    return stretch if ground.training_updates(stretch) >= ground.least_updates else 0.0


def judged_stretch(
    ground: Ground, member: Member, stretch: float, why: str, against: Member | None
) -> Does[Outcome | None]:
    """Train on and cool down, held against another member's end; None where that failed."""
    yield from stretched(ground, "reactive", [member], stretch, why)
    if not member.alive:
        return None
    (outcome,) = yield from cooled(ground, [member], COOL * stretch, against and against.cooled, commit=True)
    return outcome if member.alive else None


def corrected(
    ground: Ground, stayed: Member, before: str | None, stretch: float, share: float, cause: str, refused: set[str]
) -> Does[Member | None]:
    """Corrections for this cause, one after the other, each for the same `stretch` as what `stayed` as it was; the first that is better.
    None: none is."""
    for name in _CAUSES[cause]:
        path, times, plus = _MOVES[name]
        if name in refused or (value := moved(ground, stayed, path, times, plus)) is None:
            continue
        if affordable(ground, share) < stretch:
            break
        other = Member(name, {**stayed.point, path: value}, trunk=before)
        outcome = yield from judged_stretch(
            ground, other, stretch, f"{cause}: this in place of going on as before", stayed
        )
        if outcome is not None and better(outcome):
            return replace(other, name=stayed.name)
        refused.add(name)
    return None


def value_at(ground: Ground, member: Member, path: str) -> float:
    return member.point.get(path, value_of(ground.prior(), path))


def moved(ground: Ground, member: Member, path: str, times: float, plus: float = 0.0) -> float | None:
    """A member's setting, moved as far as what is searched goes; None where that is not at all, or nobody may move it."""
    axis = next((a for a in ground.space().axes if a.path == path), None)
    if axis is None:
        return None
    now = value_at(ground, member, path)
    value = axis.inside(times * now + plus)
    return None if value == now else value
