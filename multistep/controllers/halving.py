"""halving: several settings train a little; the better half trains on from where it was, again and again.

    rungs R, 2^R members;  in every rung each member that is left has budget / (R * members left)

The prior is the first member. Ranked after equal cool-downs; of equals the one that was asked first stays, which is the prior. Where the
rows that judge are too few to tell settings apart (power.FEWEST_ROWS) all are equals: what is better by much is committed all the same.
Sources: Jamieson and Talwalkar 2016, arXiv 1502.07943 (successive halving); Li et al. 2020, arXiv 1810.05934 (ASHA).
Differs from the sources: members are paused and thaw, nothing restarts; what is compared has decayed.
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
    alone,
    best_of,
    cooled,
    enough,
    says_something,
    stretched,
)

MOST_RUNGS = 4


def rungs(ground: Ground) -> int:
    """As many as leave every member of the first rung a stretch that says something."""
    spare = ground.spare()
    return max((r for r in range(1, MOST_RUNGS + 1) if says_something(ground, spare / (r * 2**r))), default=0)


def halving(ground: Ground) -> Found:
    """The state of the last member's end, or None."""
    if not (count := rungs(ground)):
        return (yield from alone(ground))
    draw, space = Random(ground.seed), ground.space()
    points = [{}, *(space.draw(draw) for _ in range(2**count - 1))]
    members = [Member(f"member {n + 1}", point) for n, point in enumerate(points)]
    best: Member | None = None
    for rung in range(count):
        stretch = ground.spare() / ((count - rung) * len(members)) / (1 + COOL) - 2 * ground.overhead()
        if not (yield from enough(ground, stretch)):
            break
        why = f"rung {rung + 1} of {count}, {len(members)} left"
        yield from stretched(ground, "halving", members, stretch, why)
        members = [m for m in members if m.alive]
        if not members:
            break
        stake = 1.0 if rung + 1 == count else ON_THE_WAY
        yield from cooled(ground, members, COOL * stretch, None, commit=True, stake=stake)
        members = ranked(ground, [m for m in members if m.alive])
        if not members:
            break
        found = members[0] if ground.few_rows else best_of([*members, *([best] if best is not None else [])])
        best = found and replace(found)  # as it is now: what a later rung makes of that member may be worse
        members = members[: max(1, len(members) // 2)]
    return None if best is None else best.cooled


def ranked(ground: Ground, members: Sequence[Member]) -> list[Member]:
    """The best first; in the order in which they were proposed where the rows are too few to say more."""
    return list(members) if ground.few_rows else sorted(members, key=lambda m: -m.merit)
