"""What a row keeps of each test example, and the comparison of two systems on the same examples.

One seed and right or wrong: exact McNemar (McNemar 1947), two-sided. Else a paired t over the examples, each with the mean of its
differences over the seeds: an example is one observation, however many seeds read it, since its seeds are not independent.
Many comparisons: Holm 1979. Scores are such that higher is better: 1 or 0, or minus the nats of a row per character of the mean row.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student


class Difference(NamedTuple):
    """Theirs - ours, its standard error over examples, the p-value of both sides, and how many seeds were paired."""

    value: float
    stderr: float
    p: float
    seeds: int


def pack_right(right_N: np.ndarray) -> str:
    """'3080:...': booleans as bits, base64."""
    return f"{len(right_N)}:{base64.b64encode(np.packbits(right_N.astype(bool)).tobytes()).decode()}"


def unpack_right(packed: str) -> np.ndarray:
    count, _, text = packed.partition(":")
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=int(count))
    return bits.astype(np.float64)


def pack_nats(nats_N: np.ndarray) -> str:
    """32-bit floats, base64."""
    return base64.b64encode(np.asarray(nats_N, "<f4").tobytes()).decode()


def unpack_nats(packed: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed), "<f4").astype(np.float64)


def compared(theirs: Mapping[int, np.ndarray], ours: Mapping[int, np.ndarray]) -> Difference | None:
    """Scores [N] by seed of two systems; None where they have no seed in common. Raises ValueError for other examples."""
    seeds = sorted(set(theirs) & set(ours))
    if not seeds:
        return None
    if len({len(scores[seed]) for scores in (theirs, ours) for seed in seeds}) > 1:
        raise ValueError("compared: the rows are of different test examples; measure both systems with the same ones")
    gains = np.stack([theirs[seed] - ours[seed] for seed in seeds])
    gain_N = gains.mean(0)
    count = len(gain_N)
    value, stderr = float(gain_N.mean()), float(gain_N.std(ddof=1) / math.sqrt(count))
    if len(seeds) == 1 and set(np.unique(gain_N)) <= {-1.0, 0.0, 1.0}:
        won, lost = int((gain_N > 0).sum()), int((gain_N < 0).sum())
        p = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    elif stderr == 0:
        p = 1.0 if value == 0 else 0.0
    else:
        p = float(2 * student.sf(abs(value) / stderr, count - 1))
    return Difference(value, stderr, p, len(seeds))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values by name: the smallest times their number, the next times one less, never falling, 1 at most."""
    found: dict[str, float] = {}
    highest = 0.0
    for done, name in enumerate(sorted(p, key=lambda n: p[n])):
        highest = max(highest, min(1.0, (len(p) - done) * p[name]))
        found[name] = highest
    return found
