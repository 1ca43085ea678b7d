"""What a test on so many rows can see: the smallest gain that it finds four times out of five, and how many rows a gain needs.

A paired comparison whose difference has the standard error s finds a gain of (z(1 - alpha) + z(power)) s with that power. Answers that
are right or wrong have a floor besides: as many rows must be won, and none lost, as a coin needs to be called unfair.
Source: Cohen 1988, "Statistical power analysis for the behavioral sciences", chapter 2; McNemar 1947 for the floor.
"""

from __future__ import annotations

import math
from statistics import NormalDist

ALPHA = 0.1  # of `judge`
POWER = 0.8
LARGE = 0.25  # a gain that mends every fourth answer and spoils none: what few rows may still decide on


def least_wins(alpha: float = ALPHA) -> int:
    """How many rows have to be won, without one lost, before the exact test says yes."""
    return math.ceil(math.log2(1 / alpha) - 1e-9)


def chance_to_see(gain: float, rows: int, alpha: float = ALPHA) -> float:
    """The power of the exact test where every row is won with the chance `gain` and none is lost."""
    missed = sum(math.comb(rows, k) * gain**k * (1 - gain) ** (rows - k) for k in range(least_wins(alpha)))
    return 1.0 - missed


def fewest_rows(gain: float = LARGE, alpha: float = ALPHA, power: float = POWER) -> int:
    """The fewest rows on which such a gain is seen with this power."""
    return next(n for n in range(1, 10**6) if chance_to_see(gain, n, alpha) >= power)


FEWEST_ROWS = fewest_rows()  # 21: with fewer, only large gains change the course of a run and nothing is fitted


def detectable(stderr: float, rows: int, zero_one: bool, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest gain that would be seen with this power. `stderr`: of paired differences on so many rows; `zero_one`: answers are
    right or wrong, so that a gain comes in steps of one row."""
    z = NormalDist().inv_cdf(1 - alpha) + NormalDist().inv_cdf(power)
    return max(z * stderr, least_wins(alpha) / max(1, rows) if zero_one else 0.0)
