"""bayes: settings that Optuna's tree-structured Parzen estimator proposes from what came of the last; a hopeless one is stopped early.

Every trial trains a third, is judged after a short cool-down, and only goes on, from where it was, when it is not behind the best at
its third: paired over the examples. The first trial is the prior. What was stopped is told to the
estimator with its early score, what diverged with the worst so far: of a trial that failed it reads nothing.
Sources: Bergstra et al. 2011 (TPE); Akiba et al. 2019, arXiv 1907.10902 (Optuna).
Differs from the sources: an early score is one after a cool-down, never that of a training in its middle.
"""

from __future__ import annotations

import math
from typing import Any

from multistep.controllers.members import (
    COOL,
    ON_THE_WAY,
    Found,
    Ground,
    Member,
    alone,
    cooled,
    enough,
    stretched,
    worse,
)
from multistep.controllers.random import count

FIRST = 1 / 3  # of a trial's training: after it the hopeless are stopped
BEHIND = 0.1  # the chance of stopping one that is not behind
DRAWN = 3  # trials after the prior that are drawn at random, before the estimator has anything to go by


def _share(ground: Ground, trials: int) -> float:
    """Of each of so many trials, without what judging it twice costs."""
    return ground.spare() / trials - 4 * ground.overhead()


def _fits(ground: Ground, trials: int) -> bool:
    return ground.training_updates(FIRST * _share(ground, trials) / (1 + COOL)) >= ground.least_updates


def _lost(study: Any, asked: Any, merits: list[float]) -> None:
    """What diverged is as bad as the worst that was measured; passed over where nothing was yet."""
    import optuna

    if known := [m for m in merits if math.isfinite(m)]:
        study.tell(asked, min(known))
    else:
        study.tell(asked, state=optuna.trial.TrialState.FAIL)


def bayes(ground: Ground) -> Found:
    """The state of the best trial, or None."""
    import optuna

    trials = max((n for n in range(2, count(ground) + 1) if _fits(ground, n)), default=0)
    if not trials:
        return (yield from alone(ground))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=ground.seed, n_startup_trials=1 + DRAWN)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    space = ground.space()
    study.enqueue_trial(space.nearest(ground.prior()))  # what comes of the prior is told where the prior is
    best: Member | None = None
    merits: list[float] = []  # that were measured so far
    at_a_third: Member | None = None  # the best early score so far
    for n in range(trials):
        share = _share(ground, trials - n)
        if not (yield from enough(ground, FIRST * share / (1 + COOL))):
            break
        asked: Any = study.ask()
        point = space.suggest(asked)
        member = Member(f"trial {n + 1}", {} if n == 0 else point)
        stretch = share / (1 + COOL * (1 + FIRST))
        yield from stretched(ground, "bayes", [member], FIRST * stretch, f"the first third, of {trials} trials")
        if member.alive:
            against = None if at_a_third is None else at_a_third.cooled
            (early,) = yield from cooled(
                ground, [member], FIRST * COOL * stretch, against, commit=True, stake=ON_THE_WAY
            )
        if not member.alive:
            _lost(study, asked, merits)
            continue
        merits.append(member.merit)
        asked.report(member.merit, 1)
        hopeless = at_a_third is not None and worse(early, BEHIND)
        if at_a_third is None or member.merit > at_a_third.merit:
            at_a_third = Member(member.name, member.point, cooled=member.cooled, merit=member.merit)
        if not hopeless:
            yield from stretched(ground, "bayes", [member], (1 - FIRST) * stretch, "not behind: on to the end")
            if member.alive:
                yield from cooled(ground, [member], COOL * stretch, None, commit=True)
        if hopeless:
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            continue
        merits.append(member.merit)
        if member.alive:
            study.tell(asked, member.merit)
        else:
            _lost(study, asked, merits)
        if best is None or member.merit > best.merit:
            best = member
    return (best or at_a_third or Member("none", {})).cooled
