"""random: settings drawn blindly, each trained from the start and decayed to zero. The honest baseline of every other search.

    trials = the root of (updates that fit / the fewest that say something), between 2 and 12

Source: Bergstra and Bengio 2012, "Random search for hyper-parameter optimization", JMLR 13.
"""

from __future__ import annotations

from random import Random

from multistep.controllers.members import Found, Ground, alone, enough
from multistep.controllers.space import said
from multistep.schedules import Linear
from multistep.standing import early

MOST = 12


def count(ground: Ground) -> int:
    """As many trials as each of them has times the fewest updates: neither number nor length is worth nothing."""
    return max(2, min(MOST, int((ground.training_updates(ground.spare()) / ground.least_updates) ** 0.5)))


def random_search(ground: Ground) -> Found:
    """The state of the best, or None."""
    if ground.training_updates(ground.spare() / 2 - ground.overhead()) < ground.least_updates:
        return (yield from alone(ground))
    draw, space, trials = Random(ground.seed), ground.space(), count(ground)
    best, merit = None, float("-inf")
    for n in range(trials):
        share = ground.spare() / (trials - n) - ground.overhead()
        if not (yield from enough(ground, share)):
            break
        point = space.draw(draw)
        why = f"draw {n + 1} of {trials}: {said(point)}"
        told = yield from ground.trial("random", ground.at(point, Linear()), why, start=ground.begins, share=share)
        if told.ok and not early(told) and ground.merit(told) > merit:
            best, merit = told.state, ground.merit(told)
    return best
