"""What searches over strategies are made of: members that train on from saved states, and are compared after equal cool-downs.

A member's trunk keeps its learning rate (warm-up first); a branch from its end decays to zero and is what is judged. So nothing that
has decayed is ever compared with what has not (short-horizon bias: Wu et al. 2018), and a member that is left alone goes on later
where it was: nothing starts again. Sources: Hu et al. 2024 (MiniCPM), arXiv 2404.06395; Haegele et al. 2024, arXiv 2405.18392.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from multistep.controllers.script import Does, Skip, Step
from multistep.controllers.space import Point, Space, said
from multistep.metrics import verdicts
from multistep.schedules import Constant, Linear, Schedule
from multistep.standing import diverged, early
from multistep.strategy import Action, Training, Trial
from multistep.types import Gain, Outcome, Verdict

LEGS = (1 / 8, 1 / 8, 1 / 4, 1 / 2)  # of a trunk that ends where a target stands
ON_THE_WAY = 0.25  # the stake of a cool-down that is not the last
COOL = 0.25  # of what a stretch of a trunk takes: its cool-down
WARMUP = 0.06  # of the first stretch

Found = Does[str | None]
Group = Does[list[Outcome]]


class Ground(Protocol):
    """Where a search trains: a run on labelled texts, on any module, or on a model that writes."""

    remaining: float

    @property
    def least_updates(self) -> float:
        """A stretch that is shorter says nothing."""
        ...

    @property
    def seed(self) -> int: ...

    @property
    def begins(self) -> str | None:
        """The state at which every training begins; None: the model as it is given."""
        ...

    @property
    def few_rows(self) -> bool:
        """Whether the rows that judge are too few to tell settings apart."""
        ...

    def spare(self) -> float:
        """What training may take of what is left."""
        ...

    def overhead(self) -> float:
        """Of the budget, what a trial takes beside its training: loading, judging, writing."""
        ...

    def training_updates(self, amount: float) -> float:
        """How many updates `amount` of the budget buys."""
        ...

    def space(self) -> Space:
        """What may be moved."""
        ...

    def at(self, point: Point, schedule: Schedule) -> Action:
        """The prior strategy with a point's settings."""
        ...

    def prior(self) -> Training: ...

    def merit(self, outcome: Outcome) -> float:
        """The metric that decides, higher is better."""
        ...

    def trial(
        self, stage: str, action: Action, why: str, *, start: str | None = None, share: float = 0.0,
        against: str | None = None, commit: bool = True,
    ) -> Step: ...  # fmt: skip

    def asked(
        self, stage: str, action: Action, why: str, *, start: str | None = None, share: float = 0.0,
        against: str | None = None, commit: bool = True, stake: float = 1.0, among: int = 1,
    ) -> Trial: ...  # fmt: skip

    def together(self, trials: Sequence[Trial]) -> Group: ...


@dataclass
class Member:
    """One line of training. `trunk`: the state where its learning rate still is what it was; `cooled`: the end of its last branch."""

    name: str
    point: Point
    trunk: str | None = None
    cooled: str | None = None
    merit: float = float("-inf")  # of `cooled`
    trained: float = 0.0  # of the budget, in its trunk
    train_loss: float = float("inf")  # at the trunk's end
    alive: bool = True


def stretched(ground: Ground, stage: str, members: Sequence[Member], share: float, why: str) -> Group:
    """Train every member's trunk on for `share` each. One that fails is not alive afterwards."""
    trials = []
    for m in members:
        schedule = Constant(warmup=0.0 if m.trunk else WARMUP)
        words = f"{m.name} ({said(m.point)}): {why}"
        start = m.trunk or ground.begins
        trials.append(ground.asked(stage, ground.at(m.point, schedule), words, start=start, share=share, commit=False))
    outcomes = yield from ground.together(trials)
    for member, outcome in zip(members, outcomes, strict=True):
        member.alive = outcome.ok and outcome.state is not None and "diagnosis" not in outcome.facts
        if member.alive:
            member.trunk, member.trained = outcome.state, member.trained + share
            member.train_loss = outcome.facts.get("train_loss", float("inf"))
    return outcomes


def cooled(
    ground: Ground, members: Sequence[Member], share: float, against: str | None, commit: bool, stake: float = 1.0
) -> Group:
    """A branch of every member that decays to zero, from its trunk's end, for `share` each; compared with the state `against`. `stake`:
    of the level at which it may become what stands; small for one on the way, so that the last one still has it. A branch that did not
    get to its end is not alive: it has not decayed."""
    trials = []
    for m in members:
        words = f"{m.name}: what it is worth once its learning rate has decayed"
        action = ground.at(m.point, Linear(warmup=0.0))
        trials.append(
            ground.asked(
                "cool-down", action, words, start=m.trunk, share=share, against=against, commit=commit, stake=stake, among=len(members)
            )
        )  # fmt: skip
    outcomes = yield from ground.together(trials)
    for member, outcome in zip(members, outcomes, strict=True):
        member.alive = outcome.ok and outcome.state is not None and not early(outcome)
        if member.alive:
            member.cooled, member.merit = outcome.state, ground.merit(outcome)
    return outcomes


def enough(ground: Ground, amount: float) -> Does[bool]:
    """Whether `amount` is long enough to train for; a Skip where it is not."""
    updates = ground.training_updates(amount)
    if updates >= ground.least_updates:
        return True
    yield Skip(stage="trunk", why=f"{updates:.0f} updates fit into what is left (< {ground.least_updates:.0f})")
    return False


def alone(ground: Ground) -> Found:
    """Where there is no time for several: one training with the prior, decaying to zero. None: it was not begun, or diverged at any rate."""
    share = ground.spare() - ground.overhead()
    if not (yield from enough(ground, share)):
        return None
    why = "one training with the prior: there is no time for several"
    told = yield from ground.trial("trunk", ground.at({}, Linear()), why, start=ground.begins, share=share)
    return None if diverged(told) else told.state


def says_something(ground: Ground, share: float) -> bool:
    """Whether a stretch and its cool-down fit into such a share, with what two trials cost beside their training."""
    return ground.training_updates(share / (1 + COOL) - 2 * ground.overhead()) >= ground.least_updates


def best_of(members: Sequence[Member]) -> Member | None:
    """The one of the highest merit; of equals the first."""
    alive = [m for m in members if m.alive and m.cooled is not None]
    return max(alive, key=lambda m: m.merit, default=None)


def _against(outcome: Outcome) -> Verdict | None:
    """The verdict on it and on what it was held against."""
    found = outcome.facts.get("against_verdict")
    return None if found is None or not outcome.ok else Verdict.model_validate(found)


def better(outcome: Outcome) -> bool:
    """Whether it beat what it was held against, beyond noise, at the level of its trial."""
    found = _against(outcome)
    return found is not None and found.accept


def ahead(outcome: Outcome, level: float) -> bool:
    """The same at any level: as seldom as `level` by chance."""
    found = _against(outcome)
    if found is None or not found.evidence:
        return found is not None and found.accept
    return verdicts.better(found.evidence, level, _least(found)).accept


def worse(outcome: Outcome, level: float) -> bool:
    """Whether it failed, or is behind what it was held against, beyond noise: as seldom as `level` by chance. By the rule that makes a
    candidate better, from the other side: the metric decides, and the loss where it does not speak against that."""
    found = _against(outcome)
    if found is None or not found.evidence:
        return not outcome.ok or (found is not None and not found.accept)
    return verdicts.better([verdicts.mirrored(c) for c in found.evidence], level, _least(found)).accept


def _least(verdict: Verdict) -> float:
    """The gain, and so the loss, that rows which are too few for less may decide on."""
    return verdict.by.least if isinstance(verdict.by, Gain) else 0.0


def legs(ground: Ground, point: Point, trunk: str | None = None) -> Found:
    """One trunk in legs, each with its cool-down, so that it can end where a target stands; the state of the best. `trunk`: the state that
    it goes on from."""
    member, whole = Member("trunk", point, trunk), ground.spare()
    best, merit, carried = None, float("-inf"), 0.0
    for n, leg in enumerate(LEGS, 1):
        leg += carried
        share = min(leg * whole, ground.spare()) - 2 * ground.overhead()
        if n < len(LEGS) and ground.training_updates(share / (1 + COOL)) < ground.least_updates:
            carried = leg  # too short alone: the next one is longer
            continue
        if not (yield from enough(ground, share / (1 + COOL))):
            break
        carried = 0.0
        yield from stretched(ground, "trunk", [member], share / (1 + COOL), f"{leg:.0%} of the time for it")
        if not member.alive:
            break
        yield from cooled(ground, [member], share * COOL / (1 + COOL), None, commit=True)
        if member.alive and member.merit > merit:
            best, merit = member.cooled, member.merit
    return best
