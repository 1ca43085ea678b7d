"""What the rows of a comparison say: means with intervals, paired differences from the best, the level that the best reach and when.

Everything is over seeds. Intervals are Student's; differences are paired by seed and two-sided, their p corrected over all
comparisons with the best one. Sources: Student 1908; Holm 1979, "A simple sequentially rejective multiple test procedure".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from multistep.types import Spec

ALPHA = 0.05


class Mean(NamedTuple):
    """A mean over seeds, its standard error and its 95 % interval; nan where one seed cannot tell."""

    value: float
    stderr: float
    low: float
    high: float


class Against(Spec):
    """One optimizer against the best, over the seeds that both have. `gain` is negative where it is worse than the best."""

    gain: float
    low: float
    high: float
    p: float  # Holm-corrected
    n: int
    apart: bool  # whether it is worse beyond noise


def mean_of(values: Sequence[float]) -> Mean:
    """Raises StatisticsError when there are none."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Mean(mean, math.nan, math.nan, math.nan)
    stderr = statistics.stdev(values) / math.sqrt(len(values))
    half = _quantile(len(values) - 1) * stderr
    return Mean(mean, stderr, mean - half, mean + half)


def _quantile(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - ALPHA / 2))


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided paired t-test; 1 with fewer than two pairs."""
    from scipy.special import stdtr

    if len(differences) < 2:
        return 1.0
    found = mean_of(differences)
    if found.stderr == 0:
        return 1.0 if found.value == 0 else 0.0
    return float(2 * stdtr(len(differences) - 1, -abs(found.value / found.stderr)))


def holm(ps: Sequence[float]) -> list[float]:
    """Each p times the number of tests from it on, smallest first; never below one before it, never above 1."""
    corrected, running = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        running = max(running, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = running
    return corrected


def against_best(scores: Mapping[str, Mapping[int, float]], best: str, sign: float) -> dict[str, Against]:
    """Every other optimizer against the best, from {optimizer: {seed: score}}; `sign` +1 where higher is better, -1 where lower is."""
    others = [name for name in scores if name != best]
    gains = {n: [sign * (v - scores[best][s]) for s, v in scores[n].items() if s in scores[best]] for n in others}
    others = [n for n in others if gains[n]]
    corrected = holm([paired_p(gains[n]) for n in others])
    found = {}
    for name, p in zip(others, corrected, strict=True):
        gain = mean_of(gains[name])
        found[name] = Against(
            gain=gain.value, low=gain.low, high=gain.high, p=p, n=len(gains[name]), apart=p <= ALPHA and gain.value < 0
        )  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------- curves

Point = tuple[float, float, float, float]  # progress, seconds, updates, score


def aligned(curves: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """The looks of all seeds side by side, counted from the end: where updates are slow a seed has fewer, and all have the last one."""
    return list(zip(*(reversed(c) for c in curves), strict=False))[::-1]


def mean_curve(curves: Sequence[Sequence[Sequence[float | None]]]) -> list[Point]:
    """The mean over seeds at every mark that all of them have, where all scores are finite."""
    points = []
    for marks in aligned(curves):
        if all(m[3] is not None for m in marks):
            progress, seconds, updates, score = (statistics.fmean(float(m[i] or 0.0) for m in marks) for i in range(4))
            points.append((progress, seconds, updates, score))
    return points


def reaches(curve: Sequence[Point], level: float, sign: float) -> tuple[float, float] | None:
    """(seconds, updates) at which a curve first is at the level, on a straight line between two looks; None when it never is."""
    before: Point | None = None
    for point in curve:
        if sign * (point[3] - level) >= 0:
            if before is None or sign * (before[3] - level) >= 0:
                return point[1], point[2]
            share = (level - before[3]) / (point[3] - before[3])
            return before[1] + share * (point[1] - before[1]), before[2] + share * (point[2] - before[2])
        before = point
    return None
