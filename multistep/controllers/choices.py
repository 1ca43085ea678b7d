"""Searches over ways to predict, for labels (recipes) and for texts (ways) alike: what the controllers do where nothing is trained.

    fixed        what stands is measured and stays
    race         every candidate of the list once, each against what stands by then
    reactive     neighbours of what stands; what is taken is where it goes on, until no neighbour is better
    halving      many candidates on a few rows, the better half on twice as many, and the last ones on all of them
    population   the best few so far have children: neighbours drawn at random
    bayes        Optuna's tree-structured Parzen estimator, quality against latency
    random       drawn blindly: the honest baseline

What is taken was compared with what stood on all rows; a look at a part of them takes nothing.
Sources: as of the searches over strategies; Bergstra et al. 2011 (TPE); Ozaki et al. 2022 (with several objectives).
No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Generic, Protocol, TypeVar

from multistep.controllers.script import Does, Steps
from multistep.types import Outcome

C = TypeVar("C")
MOST = 20  # candidates of a search: each one more makes all of them harder to take
PARENTS = 4
RUNGS = 3  # a quarter of the rows, half, all
_DRAWN_AT_RANDOM = 4  # of the asks, before the estimator has anything to go by
_AGAIN = 20  # asks in a row that give what was tried already: the space is used up


class Choices(Protocol[C]):
    """The candidates of one tuning, and how one is tried."""

    seed: int

    def every(self) -> Sequence[tuple[C, str]]:
        """The list, with a reason for each: the cheap first."""
        ...

    def suggested(self, trial: Any) -> C:
        """Any candidate; a trial of Optuna draws its numbers."""
        ...

    def neighbours(self, candidate: C) -> list[C]:
        """Those that differ in one thing."""
        ...

    def now(self) -> C | None:
        """What stands; None where it is none of these."""
        ...

    def merit(self, outcome: Outcome) -> float | None:
        """Its quality, higher is better; None where it was refused before it was judged."""
        ...

    def latency_ms(self, outcome: Outcome) -> float:
        """The latency of a request."""
        ...

    def attempt(self, stage: str, candidate: C, why: str, share: float = 1.0) -> Does[Outcome | None]:
        """Try a candidate on such a share of the rows; None where that was done, or what is left cannot pay for it."""
        ...


class Proposals(Generic[C]):
    """What a sampler of Optuna's proposes. `ask` gives a candidate, `tell` takes in what came of it; one after the other."""

    def __init__(self, suggested: Callable[[Any], C], seed: int, blind: bool = False):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        informed = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_DRAWN_AT_RANDOM)
        sampler = optuna.samplers.RandomSampler(seed=seed) if blind else informed
        self._suggested = suggested
        self._study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        self._trial: Any = None
        self._worst: float | None = None  # that was measured

    def ask(self) -> C:
        self._trial = self._study.ask()
        return self._suggested(self._trial)

    def tell(self, merit: float | None, ms: float) -> None:
        """`merit`: higher is better; None where it was not measured: then as bad as the worst so far, or passed over where nothing was
        measured yet."""
        known = [m for m in (merit, self._worst) if m is not None]
        if not known:
            self.pass_over()
            return
        self._worst = min(known)
        self._study.tell(self._trial, [self._worst if merit is None else merit, ms])

    def pass_over(self) -> None:
        """What was asked for is known already, cannot be paid for, or came to nothing."""
        import optuna

        self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL)


def fixed(choices: Choices[Any]) -> Steps:
    """What stands stays."""
    yield from ()


def race(choices: Choices[Any]) -> Steps:
    """Every candidate of the list once."""
    for candidate, why in choices.every():
        yield from choices.attempt("race", candidate, why)


def proposed(choices: Choices[Any], stage: str, most: int, blind: bool) -> Steps:
    """What a sampler proposes, up to so many candidates or the end of the budget."""
    proposals = Proposals(choices.suggested, choices.seed, blind)
    found = passed = 0
    while found < most and passed < _AGAIN:
        told = yield from choices.attempt(
            stage, proposals.ask(), "drawn blindly" if blind else "proposed by the sampler"
        )
        if told is None:  # known, or the time is over for this one; a cheaper one may fit
            proposals.pass_over()
            passed += 1
            continue
        proposals.tell(choices.merit(told), choices.latency_ms(told))
        found, passed = found + 1, 0


def bayes(choices: Choices[Any]) -> Steps:
    """What the estimator proposes."""
    yield from proposed(choices, "bayes", MOST, blind=False)


def random(choices: Choices[Any]) -> Steps:
    """What is drawn blindly."""
    yield from proposed(choices, "random", MOST, blind=True)


def reactive(choices: Choices[Any]) -> Steps:
    """Neighbours of what stands."""
    moved, tried = True, 0
    while moved and tried < MOST and (here := choices.now()) is not None:
        moved = False
        for other in choices.neighbours(here):
            told = yield from choices.attempt("reactive", other, "a neighbour of what stands")
            tried += told is not None
            moved = told is not None and told.verdict is not None and told.verdict.accept
            if moved or tried >= MOST:
                break


def population(choices: Choices[Any]) -> Steps:
    """Children of the best few."""
    random = Random(choices.seed)
    known: list[tuple[float, Any]] = []
    for candidate, why in choices.every()[:PARENTS]:
        told = yield from choices.attempt("population", candidate, why)
        if told is not None and (merit := choices.merit(told)) is not None:
            known.append((merit, candidate))
    if (here := choices.now()) is not None:
        known.append((max((m for m, _ in known), default=0.0), here))
    passed = tried = 0
    while known and tried < MOST - PARENTS and passed < _AGAIN:
        known = sorted(known, key=lambda k: -k[0])[:PARENTS]
        merit, parent = known[random.randrange(len(known))]
        others = choices.neighbours(parent)
        child = others[random.randrange(len(others))] if others else parent
        told = yield from choices.attempt("population", child, "a neighbour of one of the best")
        if told is None:
            passed += 1
            continue
        tried, passed = tried + 1, 0
        if (found := choices.merit(told)) is not None:
            known.append((found, child))


def halving(choices: Choices[Any]) -> Steps:
    """Many candidates on a few rows, few on all of them."""
    proposals = Proposals(choices.suggested, choices.seed, blind=True)
    left: list[Any] = []
    for _ in range(_AGAIN):
        candidate = proposals.ask()
        proposals.pass_over()
        if len(left) < 2**RUNGS and candidate not in left:
            left.append(candidate)
    for rung in range(RUNGS):
        share = 0.5 ** (RUNGS - 1 - rung)
        merits: list[tuple[float, Any]] = []
        for candidate in left:
            told = yield from choices.attempt("halving", candidate, f"{share:.0%} of the rows, {len(left)} left", share)
            if told is not None and (merit := choices.merit(told)) is not None:
                merits.append((merit, candidate))
        merits.sort(key=lambda m: -m[0])
        left = [candidate for _, candidate in merits[: max(1, len(left) // 2)]]


CHOOSERS: Mapping[str, Callable[[Choices[Any]], Steps]] = {
    "fixed": fixed, "race": race, "reactive": reactive, "halving": halving, "population": population, "bayes": bayes,
    "random": random,
}  # fmt: skip
