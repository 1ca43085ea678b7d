"""What is seen of a training that goes wrong, from its losses and norms alone: bad batches, exploding norms, divergence. No torch.

    nonfinite           a loss, a gradient or an update that is not finite
    spike               a loss above mean + 6 sigma of the recent ones, and above twice the worst of the first 20
    exploding gradient  a norm above mean + 6 sigma, ten times the mean and ten times the worst of the first 25
    exploding update    the same of the update by its learning rate, where it moves the parameters by over a tenth
    divergence          losses that stand clearly above the first of the segment, or where they began after they were below that

All but the update are seen before the update is made. Source: PaLM-style z-scores, see PAPERS.md; the multiples are ours: norms have
heavy tails, and near the end of fine-tuning one wrong label has a gradient many times the mean (of 23 trainings that went well no norm
was above ten times their median).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# What a segment does about it (tune/segment.py); a journal is checked by them.
MAX_ROLLBACKS = 3  # for bad batches; at one more it stops, or has diverged
MAX_RESTARTS = 3
RESTART_LR = 0.1  # of the learning rate that diverged
SIGMAS = 6.0
MULTIPLE = 10.0  # of the mean, and of the worst at the start: an exploding norm is above both
MOVED = 0.1  # an exploding update moves the parameters by more than this share of them
SETTLED = 25  # norms are judged from so many on
_FIRST, _RECENT, _EVERY = 5, 20, 10  # losses: that began the segment, that stand; updates from look to look
_LOOKS, _STUCK = 2, 5  # in a row
_ABSOLUTE, _RELATIVE, _NOISES = 0.5, 0.75, 4.0  # nats, of the first losses, standard errors
_LONG = 0.3  # nats, of what lasts longer
_LEARNT, _BELOW = 0.1, 0.2  # nats, of the first losses: below by more than both was learnt, before it was lost again


@dataclass
class Detector:
    """Sees a loss that is not finite, or one far above all that was seen: before the update is made.

    A spike is above mean + 6 sigma of the recent losses and above twice the worst of the first 20: small losses near the end of
    fine-tuning have heavy tails that are no spikes.
    """

    mean: float = 0.0
    variance: float = 0.0
    worst_at_start: float = 0.0
    seen: int = 0

    def see(self, loss_nats: float, grad_norm: float, exploding: bool = False) -> str:
        """'' when all is well (and the loss is remembered), else the event's name (and it is not). `exploding`: the gradient's norm."""
        if not (abs(loss_nats) < float("inf") and abs(grad_norm) < float("inf")):  # NaN compares false
            return "nonfinite"
        limit = max(self.mean + SIGMAS * self.variance**0.5, 2 * self.worst_at_start)
        if self.seen >= 20 and loss_nats > limit:
            return "spike"
        if exploding:
            return "exploding gradient"
        if self.seen < 20:
            self.worst_at_start = max(self.worst_at_start, loss_nats)
        weight = max(0.02, 1 / (self.seen + 1))
        delta = loss_nats - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta**2)
        self.seen += 1
        return ""


@dataclass
class Norms:
    """Running mean and variance of norms, by which `clip_z` tells the gradient that stands out, and `explodes` the one that is not used.

        z = (norm - mean) / deviation;  norm <- mean + (limit^2 / z) deviation  where z > limit

    Source: Kumar et al. 2025 (ZClip), arXiv 2504.02507: decay 0.97, 25 updates before the first is clipped; the further out, the
    shorter. Differs from the source: the first norms are averaged evenly. Clipped norms are remembered as what they became.
    """

    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    worst_at_start: float = 0.0

    def limit(self, norm: float, z: float) -> float:
        """What a gradient's norm becomes; the same norm when it does not stand out, or when z is 0."""
        deviation = self.variance**0.5
        if not z or self.seen < SETTLED or not self.mean + z * deviation < norm < float("inf"):
            return norm
        return self.mean + (z * deviation) ** 2 / (norm - self.mean)

    def explodes(self, norm: float) -> bool:
        """Whether a finite norm is out of all proportion to what was seen."""
        limit = max(self.mean + SIGMAS * self.variance**0.5, MULTIPLE * self.mean, MULTIPLE * self.worst_at_start)
        return self.seen >= SETTLED and limit < norm < float("inf")

    def see(self, norm: float) -> None:
        if self.seen < SETTLED:
            self.worst_at_start = max(self.worst_at_start, norm)
        weight = max(0.03, 1 / (self.seen + 1))
        delta = norm - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta**2)
        self.seen += 1


@dataclass
class Course:
    """The losses of a segment since it began, and whether they say that it diverges.

    The last 20 losses *stand* when their second half is not below their first and the learning rate has not risen meanwhile. *Clearly
    above* the first five (or those of them before they blew up, or the very first) is by 0.5, by three quarters of them and by four
    standard errors. A segment diverges when its losses

        stand clearly above the first ones, twice in a row;
        stand where the first ones were after 20 in a row were clearly below, twice in a row;
        stand above them by 0.3 (and as much of the rest), five times in a row; or
        were far above once (by 1 and twice them) and then stand where the first ones were or higher, five times in a row.

    Looked at every ten updates. Fine-tuning from a solved head rises at first too, but comes down again.
    """

    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    lowest: float = float("inf")  # mean of 20 losses in a row, at the looks before
    highest: float = -float("inf")  # mean of five losses in a row, so far
    lr: float = 0.0  # the last
    steady: int = 0  # updates since the learning rate last rose
    seen: int = 0
    found: int = 0  # looks in a row that saw one of the first two ways
    stuck: int = 0  # looks in a row that saw one of the others
    worst: float = -float("inf")  # of the losses that are recent ...
    worst_at: int = 0  # ... and the place in the data of its batch

    def see(self, loss_nats: float, lr: float, position: int) -> None:
        """Take in the loss of the batch at `position`, of which an update was made with the learning rate `lr`."""
        self.steady = 0 if lr > self.lr * (1 + 1e-9) else self.steady + 1
        self.lr, self.seen = lr, self.seen + 1
        if len(self.first) < _FIRST:
            self.first.append(loss_nats)
        if self.seen % _RECENT == 1:
            self.worst = -float("inf")
        if loss_nats > self.worst:
            self.worst, self.worst_at = loss_nats, position
        self.recent.append(loss_nats)
        del self.recent[:-_RECENT]
        if self.seen >= _FIRST:
            self.highest = max(self.highest, sum(self.recent[-_FIRST:]) / _FIRST)

    def diverges(self) -> dict[str, Any] | None:
        """The numbers of a divergence; None while all is well or nobody can say. To be asked after every update."""
        if self.seen < _FIRST + _RECENT or self.seen % _EVERY:
            return None
        now, rule, first, stderr = self._look()
        numbers = {"rule": rule, "first_loss": first, "recent_loss": now, "stderr": stderr, "updates": self.seen}
        if self.lowest < float("inf"):
            numbers |= {"lowest_loss": self.lowest, "highest_loss": self.highest}
        self.lowest = min(self.lowest, now)
        return numbers if self.found >= _LOOKS or self.stuck >= _STUCK else None

    def _look(self) -> tuple[float, str, float, float]:
        """The mean of the recent losses, what is wrong with it, what it was compared with, and the standard error of that."""
        before, now = self._before(), float(np.mean(self.recent))
        level = float(np.mean(before))
        early, late = self.recent[: _RECENT // 2], self.recent[_RECENT // 2 :]
        noise = float(np.var(self.recent, ddof=1)) / _RECENT
        of_one = max(float(np.var(before, ddof=1)) if len(before) > 1 else 0.0, noise * _RECENT)
        stderr = (
            of_one / len(before) + noise
        ) ** 0.5  # a few may lie together by chance, so those of the recent ones count too
        margin = max(_ABSOLUTE, _RELATIVE * abs(level), _NOISES * stderr)
        of_first = (noise * (_RECENT + 1)) ** 0.5  # without a warm-up no other is that of the weights as they were
        margin_of_first = max(_ABSOLUTE, _RELATIVE * abs(self.first[0]), _NOISES * of_first)
        stands = self.steady >= _RECENT and np.mean(late) >= np.mean(early) - 4 * noise**0.5
        least = min(level, self.first[0])
        blown = self.highest - least > max(_far(least), 2 * _NOISES * stderr)
        low_margin = max(_LONG, _RELATIVE * abs(level), _NOISES * stderr)
        self.stuck = self.stuck + 1 if stands and (now - level > low_margin or (blown and now >= least)) else 0
        rule = ""
        if stands and now - level > margin:
            rule = _above(now, level, margin, "first")
        elif stands and now - self.first[0] > margin_of_first:
            level, stderr = self.first[0], of_first
            rule = _above(now, level, margin_of_first, "very first")
        elif (
            stands
            and level - self.lowest > max(_LEARNT, _BELOW * abs(level), _NOISES * stderr)
            and now >= level - stderr
        ):
            rule = _lost(level, self.lowest)
        self.found = self.found + 1 if rule else 0
        if self.stuck >= _STUCK and not rule:
            rule, level = _stuck(now, least, self.highest), least
        return now, rule, level, stderr

    def _before(self) -> list[float]:
        """The first losses, without those after one that stands far above the very first."""
        limit = self.first[0] + _far(self.first[0])
        end = next((n for n, loss in enumerate(self.first) if loss > limit), len(self.first))
        return self.first[:end]

    def blows_up(self) -> dict[str, Any] | None:
        """The numbers where the last losses are so far above the first that a bad batch now is no batch's fault; else None."""
        if self.seen < 2:
            return None
        level, now = float(np.mean(self._before())), float(np.mean(self.recent[-3:]))
        if not now - level > _blown(level):
            return None
        return {"rule": _blew_up(now, level), "first_loss": level, "recent_loss": now, "updates": self.seen}


def _far(level: float) -> float:
    return max(1.0, 2 * abs(level))


def _blown(level: float) -> float:
    return max(1.0, abs(level))


# ---------------------------------------------------------------------------------------------- the words, and the same from a journal


def _above(now: float, level: float, margin: float, which: str) -> str:
    return f"{_RECENT} losses in a row stand {now - level:.3g} above the {which}, more than {margin:.3g}"


def _lost(level: float, lowest: float) -> str:
    return f"{_RECENT} losses in a row stand where they began, after they were {level - lowest:.3g} below that"


def _stuck(now: float, least: float, highest: float) -> str:
    high = f"stand {now - least:.3g} above the first, {_STUCK} times"
    return f"after a rise by {highest - least:.3g} {_RECENT} losses in a row {high}"


def _blew_up(now: float, level: float) -> str:
    return f"the last losses stand {now - level:.3g} above the first ones, more than {_blown(level):.3g}"


def follows(numbers: Mapping[str, Any]) -> bool:
    """Whether the rule of a divergence is what its numbers give. Raises KeyError, TypeError, ValueError where they are none. How many good
    batches lay between bad ones is not among them: that is taken as it is said."""
    rule = str(numbers["rule"])
    if "recent_loss" not in numbers:
        return rule.startswith(f"{MAX_ROLLBACKS + 1} bad batches")
    now, level = float(numbers["recent_loss"]), float(numbers["first_loss"])
    if "stderr" not in numbers:
        return now - level > _blown(level) and rule == _blew_up(now, level)
    stderr = float(numbers["stderr"])
    lowest, highest = (float(numbers.get(key, math.nan)) for key in ("lowest_loss", "highest_loss"))
    margin = max(_ABSOLUTE, _RELATIVE * abs(level), _NOISES * stderr)
    below = max(_LEARNT, _BELOW * abs(level), _NOISES * stderr)
    given = {
        _above(now, level, margin, "first"): now - level > margin,
        _above(now, level, margin, "very first"): now - level > margin,
        _lost(level, lowest): level - lowest > below and now >= level - stderr,
        _stuck(now, level, highest): now >= level,
    }
    return given.get(rule, False)
