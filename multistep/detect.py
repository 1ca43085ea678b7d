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

from dataclasses import dataclass, field
from typing import Any

import numpy as np

SIGMAS = 6.0
MULTIPLE = 10.0  # of the mean, and of the worst at the start: an exploding norm is above both
MOVED = 0.1  # an exploding update moves the parameters by more than this share of them
SETTLED = 25  # norms are judged from so many on
_FIRST, _RECENT, _EVERY = 5, 20, 10  # losses: that began the segment, that stand; updates from look to look
_ABSOLUTE, _RELATIVE = 0.3, 0.75  # nats, of the first losses: above by both, ...
_NOISES, _NOISES_OF_ONE = (
    4.0,
    3.0,
)  # ... and by so many standard errors (by so many, where the very first loss is compared with)
_LOOKS = 2  # in a row
_LEARNT, _BELOW = 0.1, 0.2  # nats, of the first loss: below by more than both was learnt, before it was lost again


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

    The last 20 losses *stand* when their second half is not below their first and the learning rate has not risen meanwhile. A segment
    diverges when they stand, twice in a row, above the first five (or the very first) by 0.3, by three quarters of them and by four (three)
    standard errors, or where the first five were after 20 in a row were clearly below. Fine-tuning from a solved head rises at first
    too, but comes down again.
    """

    first: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    lowest: float = float("inf")  # mean of 20 losses in a row, looked at now and then
    lr: float = 0.0  # the last
    steady: int = 0  # updates since the learning rate last rose
    seen: int = 0
    looks: int = 0  # in a row that saw a divergence
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

    def diverges(self) -> dict[str, Any] | None:
        """The numbers of a divergence; None while all is well or nobody can say. To be asked after every update: it looks at every tenth,
        and has to see the same twice in a row."""
        if self.seen < _FIRST + _RECENT or self.seen % _EVERY:
            return None
        found = self._look()
        self.looks = self.looks + 1 if found is not None else 0
        self.lowest = min(self.lowest, float(np.mean(self.recent)))
        return found if self.looks >= _LOOKS else None

    def _look(self) -> dict[str, Any] | None:
        now, first = float(np.mean(self.recent)), float(np.mean(self.first))
        early, late = self.recent[: _RECENT // 2], self.recent[_RECENT // 2 :]
        noise = float(np.var(self.recent, ddof=1)) / _RECENT
        if self.steady < _RECENT or np.mean(late) < np.mean(early) - 4 * noise**0.5:
            return None
        of_first = max(float(np.var(self.first, ddof=1)), noise * _RECENT)  # five alone may lie together by chance
        stderr = (of_first / _FIRST + noise) ** 0.5
        single = (
            noise * (_RECENT + 1)
        ) ** 0.5  # of the very first: without a warm-up no other is that of the weights as they were
        ways = ((first, _NOISES * stderr), (self.first[0], _NOISES_OF_ONE * single))
        rises = [(now - level, max(_ABSOLUTE, _RELATIVE * abs(level), error)) for level, error in ways]
        rise, margin = max(rises, key=lambda way: way[0] - way[1])
        below = first - self.lowest
        if rise > margin:
            rule = f"{_RECENT} losses in a row stand {rise:.3g} above the first, more than {margin:.3g}"
        elif below > max(_LEARNT, _BELOW * abs(first), _NOISES * stderr) and now >= first - stderr:
            rule = f"{_RECENT} losses in a row stand where they began, after they were {below:.3g} below that"
        else:
            return None
        found = {"rule": rule, "first_loss": now - rise, "recent_loss": now, "stderr": stderr, "updates": self.seen}
        return found if below == -float("inf") else {**found, "lowest_loss": self.lowest}

    def blows_up(self) -> dict[str, Any] | None:
        """The numbers where the last losses are so far above the first that a bad batch now is no batch's fault; else None."""
        if self.seen < 2:
            return None
        before, now = min(self.first[0], float(np.mean(self.first))), float(np.mean(self.recent[-3:]))
        margin = max(1.0, abs(before))
        if not now - before > margin:
            return None
        rule = f"the last losses stand {now - before:.3g} above the first ones, more than {margin:.3g}"
        return {"rule": rule, "first_loss": before, "recent_loss": now, "updates": self.seen}
