"""What a watch decides, from its looks at validation alone: for a training that lives, and for its journal when it is replayed.

    the gap (labels)   two rises in a row, by more than a twentieth in all, while the training loss fell
    overfitting        three looks in a row worse than the best, the last beyond two standard errors, while the training loss fell
    no improvement     `patience` looks in a row without a gain: the training ends
    plateau            `schedule.patience` looks in a row without a gain: the learning rate is cut

A gain is one over the same rows, against the last look that was a gain. What a look in an older journal does not say is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from multistep.diagnosis.training import Look
from multistep.metrics.verdicts import better, large_gain, paired_t
from multistep.schedules import Plateau
from multistep.types import Comparison

RISE = 1.05  # of the loss two looks before
ERRORS = 2.0  # standard errors that a rise above the best look is beyond


def gap_rises(seen: Sequence[Look]) -> bool:
    """Of labels, at the last of these looks."""
    if len(seen) < 3:
        return False
    first, second, third = (look.validation_loss for look in seen[-3:])
    return third > second > first and third > RISE * first and seen[-1].train_loss < seen[-3].train_loss


def rises(seen: Sequence[Look]) -> bool | None:
    """Of a module or of a model that writes, at the last of these looks."""
    best, now = best_of(seen), seen[-1]
    if len(seen) < 3 or not all(look.validation_loss > best for look in seen[-3:]):
        return False
    if not now.train_loss < seen[-3].train_loss:
        return False
    return None if now.rise_stderr is None else now.validation_loss - best > ERRORS * now.rise_stderr


def best_of(seen: Sequence[Look]) -> float:
    """The least loss so far; nan where none is finite."""
    return min((look.validation_loss for look in seen if math.isfinite(look.validation_loss)), default=math.nan)


def gains(seen: Sequence[Look]) -> list[bool | None]:
    """Whether each look was a gain; the first one always is."""
    found: list[bool | None] = []
    reference: Look | None = None
    for look in seen:
        now = True if reference is None else _gained(look, reference)
        if now is None:
            return [*found, *[None] * (len(seen) - len(found))]
        found.append(now)
        reference = look if now else reference
    return found


def _gained(look: Look, reference: Look) -> bool | None:
    if not math.isfinite(look.validation_loss):
        return False
    if not math.isfinite(reference.validation_loss):
        return True
    if look.gain is None or look.gain_stderr is None or look.rows is None:
        return None
    compared = Comparison(
        metric="loss", candidate=look.validation_loss, incumbent=reference.validation_loss, difference=look.gain,
        stderr=look.gain_stderr, p=paired_t(look.gain, look.gain_stderr, look.rows), n=look.rows, test="t",
    )  # fmt: skip
    return better((compared,), least=large_gain(compared)).accept


def decided(seen: Sequence[Look], overfitting: bool, patience: int, plateau: Plateau | None) -> list[str | None]:
    """What each look found: a name of the head of this file, or ""; from where an older journal does not say, None."""
    found: list[str | None] = []
    gained = gains(seen) if patience or plateau is not None else [True] * len(seen)
    without = since = cuts = 0
    for n in range(len(seen)):
        risen, gain = rises(seen[: n + 1]) if overfitting else False, gained[n]
        if risen is None or gain is None:
            return [*found, *[None] * (len(seen) - n)]
        without, since = (0, 0) if gain else (without + 1, since + 1)
        name = "overfitting" if risen else "no improvement" if patience and without >= patience else ""
        if not name and plateau is not None and not gain and may_cut(plateau, since, cuts):
            name, since, cuts = "plateau", 0, cuts + 1
        found.append(name)
    return found


def may_cut(plateau: Plateau, since: int, cuts: int) -> bool:
    """Whether so many looks without a gain, after so many cuts, are one more."""
    return since >= plateau.patience and plateau.factor ** (cuts + 1) >= plateau.floor * (1 - 1e-9)
