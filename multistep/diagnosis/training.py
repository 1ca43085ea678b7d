"""Rules about training: they read what trials left in the journal, and how a model does on rows that it was and was not trained on.

    divergence        a training of what is served went back three times for bad batches, was stopped by them, or diverged at every rate
    overfitting       at the end train has at most a quarter of validation's errors; or a watch saw validation rise while train fell
    underfitting      train and validation alike bad, and train still falls
    plateau           no gain beyond noise over the second half of the looks
    budget too small  a law fitted to the looks says that twice the training brings something beyond noise; or nothing was trained

Every threshold is a constant here; docs/diagnosis.md says where each comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from multistep.detect import RESTART_LR
from multistep.diagnosis.base import Diagnosis, percent, with_error
from multistep.diagnosis.curves import LEAST_POINTS, Law, doubled, fit_law, gain_of, is_fit
from multistep.types import Spec

ROLLBACKS = 3  # of one training: fewer are accidents
GAP_ROWS = 200  # of train, through the encoder: more cost as much as all the rest of a diagnosis
KNOWN_BY_HEART = 0.25  # errors on train, of those on validation
GAP = 0.05  # between the two, at least: of all answers, or of a guess's squared error
ALIKE, ALIKE_LOSS = 0.8, 0.9  # errors, or the loss, on train, of that on validation: no gap worth the name
BAD = 0.5  # of a guess's errors
STILL_FALLING = 0.02  # of the loss, over the last third of the looks
WORTH = 0.01  # of the loss: a smaller gain is not worth another run
EARLY = 0.1  # of the progress: looks before it see the warm-up, not the law
UNWATCHED = ("race", "again")  # stages of trainings that nobody looks at on the way: probes, and what repeats a trunk
_SAID = ("progress", "updates", "train_loss", "validation_loss", "change_stderr")


class Look(Spec):
    """At validation while a training ran. `change_stderr`: of the difference to the look before, paired over the rows; 0 at the first. Where
    a watch decides by the rows, with what it decides (`looks.py`; None in older journals): their number, how far the loss fell since the
    last look that was a gain and the error of that (None: there was none, or it is not finite), and the error of how far it is above the
    best look."""

    progress: float
    updates: int
    train_loss: float
    validation_loss: float
    change_stderr: float = 0.0
    rows: int | None = None
    gain: float | None = None
    gain_stderr: float | None = None
    rise_stderr: float | None = None

    def said(self) -> dict[str, Any]:
        """For the numbers of a diagnosis."""
        return {key: value for key, value in self.model_dump().items() if key in _SAID}


class Curve(Spec):
    """A point of the training loss: the mean of the last updates."""

    progress: float
    updates: int
    train_loss: float


class Trained(Spec):
    """A training, as the journal has it. `diagnosed`: what its watch named; `stopped`: by bad batches; `restarts`: how often it began again
    with a tenth of the rate, and `rollbacks` since then; `failed_lr`, `rule`: where and how it diverged last; `served`: what is served is made
    of it; `comparable`: its training loss is what validation is measured by, without smoothing or anything added; `floor`: the least that
    it can be, `end`: the log-loss of validation after it (None: another loss, or not known)."""

    trial: str
    stage: str
    lr: float
    rollbacks: int = 0
    restarts: int = 0
    stopped: bool = False
    diagnosed: str = ""
    failed_lr: float = 0.0
    rule: str = ""
    served: bool = False
    comparable: bool = True
    floor: float | None = None
    end: float | None = None
    looks: tuple[Look, ...] = ()
    curve: tuple[Curve, ...] = ()


class Fit(Spec):
    """Mean errors of a model on rows of train and on validation rows, with standard errors, and those of the best guess. `what`: such as
    "wrong answers" (a share of all) or "squared error"."""

    model: str
    what: str
    train: float
    train_stderr: float
    train_rows: int
    validation: float
    validation_stderr: float
    validation_rows: int
    guess: float

    @property
    def share(self) -> bool:
        return self.what.startswith("wrong")

    def said(self, value: float, stderr: float) -> str:
        return f"{percent(value)} ± {percent(stderr)}" if self.share else with_error(value, stderr)


class Advice(Spec):
    """What a user would type: go on with this run for as long again; another run that is regularized, at another learning rate ("LR"
    stands for it), with another model."""

    more_time: str
    regularized: str
    at_rate: str
    other_model: str

    def rate(self, lr: float) -> str:
        return self.at_rate.replace("LR", f"{lr:.2g}")


# ---------------------------------------------------------------------------------------------- events


def divergence(trained: Sequence[Trained], advice: Advice) -> Diagnosis | None:
    """Of the trainings that what is served is made of, the one that went back most often. Where nothing that was trained is served: of
    those that might have been, if none of them came through. A probe, or a member that lost, says what its rate does and nothing of
    what is served."""
    mine = [t for t in trained if t.served] or [t for t in trained if t.stage not in UNWATCHED]
    failed = [t for t in mine if t.diagnosed == "divergence" or t.stopped or t.rollbacks >= ROLLBACKS]
    if not failed or not (mine[0].served or len(failed) == len(mine)):
        return None
    worst = max(failed, key=lambda t: (t.diagnosed == "divergence", t.stopped, t.rollbacks))
    again = f"began again {_times(worst.restarts)}, each time with {RESTART_LR:g} of the rate"
    if worst.diagnosed == "divergence":
        last, words = worst.failed_lr, f"{worst.trial} diverged at learning rate {worst.failed_lr:.2g}: {worst.rule}"
        if worst.restarts:
            words = f"{worst.trial} diverged at learning rate {worst.lr:.2g}, {again}, and diverged at {last:.2g} too: {worst.rule}"
    else:
        last = worst.lr * RESTART_LR**worst.restarts
        how = "and was stopped" if worst.stopped else "with its learning rate halved each time"
        words = f"{worst.trial} at learning rate {last:.2g} went back {_times(worst.rollbacks)} for bad batches, {how}"
        if worst.restarts:
            words += f"; before, it had diverged at {worst.lr:.2g} and {again}"
    numbers = {
        "trial": worst.trial, "lr": worst.lr, "last_lr": last, "restarts": worst.restarts, "rollbacks": worst.rollbacks,
    }  # fmt: skip
    action = f"read the rows of the events above (a broken text?), then train at a third of the rate that failed last: {advice.rate(last / 3)}"
    return Diagnosis(name="divergence", numbers=numbers, words=words, action=action)


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def rise(seen: Sequence[Mapping[str, Any]]) -> str:
    """The words of a watch that saw validation rise while train fell; `seen`: its looks."""
    best = min(seen, key=lambda s: s["validation_loss"])
    first, now = (best if best is not seen[-1] else seen[0]), seen[-1]
    return (
        f"validation loss {first['validation_loss']:.4f} at {first['progress']:.0%} and {now['validation_loss']:.4f} at "
        f"{now['progress']:.0%}, while the training loss fell from {first['train_loss']:.4f} to {now['train_loss']:.4f}"
    )


# ---------------------------------------------------------------------------------------------- the gap


def overfitting(trained: Sequence[Trained], fit: Fit | None, advice: Advice) -> Diagnosis | None:
    """By the gap, where it was measured and is one; else by what a watch saw, although what stands now may have no gap: the run went back;
    else, where no gap was measured, by the losses of the last look, or of the end."""
    action = f"add rows; without them, regularize: {advice.regularized}"
    if fit is not None and _by_heart(fit):
        words = (
            f"{fit.model}: {fit.what} {fit.said(fit.train, fit.train_stderr)} on {fit.train_rows:,} rows of train and "
            f"{fit.said(fit.validation, fit.validation_stderr)} on {fit.validation_rows:,} of control: it knows train by heart"
        )
        return Diagnosis(name="overfitting", numbers=fit.model_dump(), words=words, action=action)
    risen = next((t for t in trained if t.diagnosed == "overfitting" and t.looks), None)
    if risen is not None:
        looks = [look.said() for look in risen.looks]
        words = f"{risen.trial}: {rise(looks)}"
        return Diagnosis(name="overfitting", numbers={"trial": risen.trial, "looks": looks}, words=words, action=action)
    if fit is not None:
        return None
    last = _last(trained)
    if last is not None and last.comparable:
        look = last.looks[-1]
        if look.train_loss > KNOWN_BY_HEART * look.validation_loss:
            return None
        words = f"{last.trial}: training loss {look.train_loss:.4f}, validation loss {look.validation_loss:.4f} at {look.progress:.0%}"
        return Diagnosis(name="overfitting", numbers={"trial": last.trial, **look.said()}, words=words, action=action)
    ended = _longest(trained)
    if ended is None or not _ends_by_heart(ended):
        return None
    loss = ended.curve[-1].train_loss
    words = f"{ended.trial}: training loss {loss:.4f} (it cannot be below {ended.floor:.4f}), validation loss {ended.end:.4f} at its end"
    numbers = {"trial": ended.trial, "train_loss": loss, "floor": ended.floor, "validation_loss": ended.end}
    return Diagnosis(name="overfitting", numbers=numbers, words=words, action=action)


def _ends_by_heart(t: Trained) -> bool:
    """Whether at the end of a training so little is left of its loss that it knows train by heart."""
    if not t.curve or t.floor is None or t.end is None:
        return False
    return t.curve[-1].train_loss - t.floor <= KNOWN_BY_HEART * t.end


def _by_heart(fit: Fit) -> bool:
    gap = fit.validation - fit.train
    noise = (fit.train_stderr**2 + fit.validation_stderr**2) ** 0.5
    least = GAP * (1.0 if fit.share else fit.guess)
    return gap > 2 * noise and gap >= least and fit.train <= KNOWN_BY_HEART * fit.validation


def underfitting(trained: Sequence[Trained], fit: Fit | None, advice: Advice) -> Diagnosis | None:
    """Only where something was trained under looks: else there is nothing that could still fall."""
    last = _last(trained)
    if last is None or last.diagnosed == "overfitting" or not _falls(last.looks):
        return None
    look = last.looks[-1]
    if fit is not None:
        if not (fit.train >= ALIKE * fit.validation and min(fit.train, fit.validation) >= BAD * fit.guess):
            return None
        words = (
            f"{fit.model}: {fit.what} {fit.said(fit.train, fit.train_stderr)} on train and "
            f"{fit.said(fit.validation, fit.validation_stderr)} on control, a guess {fit.said(fit.guess, 0.0).split(' ±')[0]}; the training "
            f"loss still falls ({last.looks[-_third(last.looks)].train_loss:.4f} to {look.train_loss:.4f})"
        )
        numbers: dict[str, Any] = {"trial": last.trial, **fit.model_dump()}
    else:
        if not last.comparable or look.train_loss < ALIKE_LOSS * look.validation_loss:
            return None
        words = (
            f"{last.trial}: training loss {look.train_loss:.4f} and validation loss {look.validation_loss:.4f} are alike, and both "
            "still fall"
        )
        numbers = {"trial": last.trial, **look.said()}
    action = f"train longer: {advice.more_time}; or faster: {advice.rate(2 * last.lr)}"
    return Diagnosis(name="underfitting", numbers=numbers, words=words, action=action)


def _third(looks: Sequence[Look]) -> int:
    return max(2, -(-len(looks) // 3))


def _falls(looks: Sequence[Look]) -> bool:
    """Both losses, over the last third of the looks: train's by 2 %, validation's beyond two standard errors."""
    late = looks[-_third(looks) :]
    fell = late[0].train_loss - late[-1].train_loss
    return len(looks) >= 3 and fell >= STILL_FALLING * abs(late[0].train_loss) and _gain(late) > 2 * _noise(late)


def _gain(looks: Sequence[Look]) -> float:
    return looks[0].validation_loss - looks[-1].validation_loss


def _noise(looks: Sequence[Look]) -> float:
    """Of the change from the first of these looks to the last."""
    return float(sum(look.change_stderr**2 for look in looks[1:])) ** 0.5


def _last(trained: Sequence[Trained]) -> Trained | None:
    """The last training that was looked at."""
    return next((t for t in reversed(trained) if t.looks and t.stage not in UNWATCHED), None)


# ---------------------------------------------------------------------------------------------- more of the same


def plateau(trained: Sequence[Trained], advice: Advice) -> Diagnosis | None:
    """The second half of the looks of the last training brought nothing."""
    last = _last(trained)
    if last is None or len(last.looks) < LEAST_POINTS or last.diagnosed == "overfitting":
        return None
    late = last.looks[(len(last.looks) - 1) // 2 :]
    gain, noise = _gain(late), _noise(late)
    if noise <= 0 or gain > 2 * noise:
        return None
    words = (
        f"{last.trial}: validation loss {late[0].validation_loss:.4f} at {late[0].progress:.0%} of the training and "
        f"{late[-1].validation_loss:.4f} at {late[-1].progress:.0%}, {len(late)} looks: no gain beyond noise (± {noise:.4f})"
    )
    numbers = {"trial": last.trial, "gain": gain, "stderr": noise, "looks": len(late), "since": late[0].progress}
    action = f"more time will not help: add rows, or take another model: {advice.other_model}"
    return Diagnosis(name="plateau", numbers=numbers, words=words, action=action)


def budget(
    trained: Sequence[Trained], untrained: str, advice: Advice, seed: int = 0, told: Mapping[str, Any] | None = None
) -> Diagnosis | None:
    """What twice the training would bring, by the law of the looks. `untrained`: why there was none although there is a model to train.
    `told`: numbers that a journal has of it; a law among them that fits these looks is the law, and its error, that of draws, is taken
    as it is."""
    if untrained and not trained:
        return Diagnosis(
            name="budget too small", numbers={"trained": 0}, words=untrained, action=f"give it more: {advice.more_time}"
        )
    last = _longest(trained)
    if last is None or last.diagnosed == "overfitting":
        return None
    which, updates_S, loss_S = _points(last)
    if len(updates_S) < LEAST_POINTS or not np.isfinite(loss_S).all():
        return None
    if told is None or "law" not in told:
        law, found = fit_law(updates_S, loss_S), doubled(updates_S, loss_S, seed)
    else:
        law = Law.parse(told["law"])
        law = law if is_fit(law, updates_S, loss_S) else fit_law(updates_S, loss_S)
        found = gain_of(law, float(told["stderr"]), len(loss_S))
    assert found is not None
    numbers = {
        "trial": last.trial, "loss_of": which, "points": len(loss_S), "law": law.model_dump(), "loss": found.now, "gain": found.value,
        "stderr": found.stderr, "low": found.low,
    }  # fmt: skip
    said = (
        f"the {which} loss of {last.trial} at {len(loss_S)} points fits L = {law.limit:.3g} + {law.scale:.3g} (t/T)^-{law.power:.2g}: "
        f"twice the training would lower it from {found.now:.3g} by about {with_error(found.value, found.stderr)}"
    )
    if which == "training" and _ends_by_heart(last):
        words = f"{said}: which says nothing of validation, for it knows train by heart"
        return Diagnosis(name="budget too small", numbers=numbers, words=words)
    if found.beyond_noise and found.value >= WORTH * found.now:
        return Diagnosis(
            name="budget too small", numbers=numbers, words=said, action=f"give it more: {advice.more_time}"
        )
    reason = (
        f"nothing beyond noise (95 %, {len(loss_S)} points)" if not found.beyond_noise else "too little to be worth it"
    )
    return Diagnosis(name="budget too small", numbers=numbers, words=f"{said}: {reason}")


def _longest(trained: Sequence[Trained]) -> Trained | None:
    """The last training with a curve, or looks. A probe of the race is none, nor what repeats a trunk for the mean of both; a cool-down, whose
    curve is that of its falling rate, only where nothing else was trained."""
    known = [t for t in reversed(trained) if (t.looks or t.curve) and t.stage not in UNWATCHED]
    return next((t for t in known if t.stage != "cool-down"), known[0] if known else None)


def _points(training: Trained) -> tuple[str, np.ndarray, np.ndarray]:
    """Which loss, updates [S] and losses [S]: of validation where it was looked at often enough, else of train."""
    looks = [look for look in training.looks if look.progress >= EARLY]
    if len(looks) >= LEAST_POINTS:
        pairs, which = [(look.updates, look.validation_loss) for look in looks], "validation"
    else:
        pairs = [(point.updates, point.train_loss) for point in training.curve if point.progress >= EARLY]
        which = "training"
    updates_S, loss_S = (np.array([pair[i] for pair in pairs], np.float64) for i in (0, 1))
    return which, np.maximum(updates_S, 1.0), loss_S
