"""The polynomials by which Newton-Schulz steps bring singular values to 1: for each step the best for where the last one left them.

    s <- a s + b s^3 + c s^5, with (a, b, c) minimising max |1 - p(s)| over the interval [l, u] that the values are in

The best odd quintic meets its largest error four times with alternating sign: at l, at its two turning points q < r, and at u
(Remez). The composition of these is the best composition. For the first steps an interval not wider than CUSHION is taken, which
loses little at its lower end and much less is lost where a rounding error leaves it.
Source: Amsel, Persson, Musco and Gower 2025, "The Polar Express: optimal matrix sign methods and their application to the Muon
algorithm", arXiv 2505.16932: the greedy choice, the cushion, the safety factor for all but the last step. Written anew.
"""

from __future__ import annotations

from functools import cache

import numpy as np

Quintic = tuple[float, float, float]

LEAST = 1e-3  # of the singular values that come out near 1, relative to the Frobenius norm
CUSHION = 0.02407327424182761  # of the upper end; the source's
SAFETY = 1.01  # values up to this are kept from growing


@cache
def quintics(steps: int, least: float = LEAST) -> tuple[Quintic, ...]:
    """Of so many steps, for singular values in [least, 1]."""
    low, high, found = least, 1.0, []
    for _ in range(steps):
        a, b, c = best_quintic(max(low, CUSHION * high), high)
        ends = [a * s + b * s**3 + c * s**5 for s in (low, high)]
        centre = 2 / sum(ends)  # the cushion may have left [low, high] around another value than 1
        found.append((a * centre, b * centre, c * centre))
        low, high = ends[0] * centre, ends[1] * centre
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in found[:-1]]
    return (*safe, found[-1])


def best_quintic(low: float, high: float) -> Quintic:
    """The odd quintic nearest to 1 on [low, high]."""
    if low > (1 - 5e-6) * high:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    error = before = np.inf
    while before == np.inf or abs(before - error) > 1e-15:
        before = error
        rows = [[s, s**3, s**5, sign] for s, sign in ((low, 1), (q, -1), (r, 1), (high, -1))]
        a, b, c, error = np.linalg.solve(rows, np.ones(4)).tolist()
        root = (9 * b * b - 20 * a * c) ** 0.5  # where the derivative is zero
        q, r = (((-3 * b + sign * root) / (10 * c)) ** 0.5 for sign in (-1, 1))
    return a, b, c
