"""population: several members train side by side; the worst copies the best and goes on from its state with settings nudged.

A round: every member trains on, and is judged after a short cool-down. A member that is behind the best beyond noise is replaced by a
fork of the best whose live settings are each moved one step up or down. The last cool-down of the best is a long one.
Source: Jaderberg et al. 2017, "Population based training", arXiv 1711.09846.
Differs from the source: what is judged has decayed; a member is only replaced where a paired test says that it is behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from multistep.controllers.members import (
    COOL,
    ON_THE_WAY,
    Found,
    Ground,
    Member,
    ahead,
    alone,
    best_of,
    cooled,
    enough,
    says_something,
    stretched,
    worse,
)
from multistep.controllers.script import Does

SIZE, MOST_ROUNDS = 4, 8
BEHIND = 0.1  # the chance of taking a member for worse that is not
LAST = 0.2  # of the budget of training: the end's cool-down


def rounds(ground: Ground, size: int) -> int:
    """As many as leave every member a stretch that says something."""
    share = (1 - LAST) * ground.spare() / size
    return max((r for r in range(1, MOST_ROUNDS + 1) if says_something(ground, share / r)), default=0)


def population(ground: Ground) -> Found:
    """The state of the best member's end, or None."""
    size = next((s for s in range(SIZE, 1, -1) if rounds(ground, s) >= 2), 0)
    if not size:
        return (yield from alone(ground))
    draw, space, prior = Random(ground.seed), ground.space(), ground.prior()
    points = [{}, *(space.draw(draw) for _ in range(size - 1))]
    members = [Member(f"member {n + 1}", point) for n, point in enumerate(points)]
    count, kept = rounds(ground, size), LAST * ground.spare()
    best: Member | None = None
    for n in range(count):
        stretch = (ground.spare() - kept) / ((count - n) * len(members)) / (1 + COOL) - 2 * ground.overhead()
        if not (yield from enough(ground, stretch)):
            break
        yield from stretched(ground, "population", members, stretch, f"round {n + 1} of {count}")
        members = [m for m in members if m.alive]
        behind = yield from compared(ground, members, COOL * stretch)
        found = best_of(members)
        if found is None:  # all of them are lost; what the best of the last round came to stays
            break
        best = replace(found)
        if n + 1 < count:
            members = [_fork(m, best, space.nudge(best.point, prior, draw)) if m.name in behind else m for m in members]
    if best is None:
        return None
    share = ground.spare() - ground.overhead()
    if ground.training_updates(share) >= 1:
        yield from cooled(ground, [best], share, best.cooled, commit=True)
    return best.cooled


def compared(ground: Ground, members: Sequence[Member], share: float) -> Does[set[str]]:
    """Cool every member down, each against the best so far; the names of those that are behind one of the others, whichever of the two
    came first."""
    behind: set[str] = set()
    first: Member | None = None
    for member in members:
        against = None if first is None else first.cooled
        (outcome,) = yield from cooled(ground, [member], share, against, commit=True, stake=ON_THE_WAY)
        if not member.alive or worse(outcome, BEHIND):
            behind.add(member.name)
        elif first is None or ahead(outcome, BEHIND):
            behind |= set() if first is None else {first.name}
            first = member
    return behind


def _fork(member: Member, best: Member, point: dict[str, float]) -> Member:
    return Member(member.name, point, trunk=best.trunk, trained=best.trained)
