"""A run's controller, and after it one more for every time that the finished run was given more budget. The rows that judge are the same
ones, so what is left of their wealth goes on from one to the next; so does what training was found to need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from multistep.budget import Budget
from multistep.controllers.learnt import Learnt, learnt
from multistep.controllers.script import Ask, Does, Scripted, Wait
from multistep.controllers.wealth import Purse
from multistep.strategy import FitLinear, Trial
from multistep.types import Outcome


@dataclass
class Left:
    """What the phases so far leave to the next. `purse`: of their wealth; `made`: each state's trial and what came of it; `families`:
    the best state of each."""

    purse: Purse = field(default_factory=dict)
    made: dict[str, tuple[Trial, Outcome]] = field(default_factory=dict)
    families: Mapping[str, str] = field(default_factory=dict)

    def training(self, family: str) -> Learnt | None:
        """What the training behind the best state of a family was found to need."""
        return learnt(self.made, self.families.get(family))

    def linear(self) -> list[FitLinear]:
        """The linear models that were fitted so far."""
        return [trial.action for trial, _ in self.made.values() if isinstance(trial.action, FitLinear)]


class Phases:
    """`first`: the steps of the run; `more`: those after it, for so much more of the budget and with what the ones before it left. `past`:
    the journal so far."""

    def __init__(
        self, first: Does[Purse], more: Callable[[float, Left], Does[Purse]], budget: Budget, past: Sequence[Mapping[str, Any]]
    ):  # fmt: skip
        totals = [budget, *(Budget(**r["budget"]) for r in past if r["kind"] == "Resumed")]
        resumed = [n for n, r in enumerate(past) if r["kind"] == "Resumed"]
        self._more = [  # what every extension of a finished run added
            total.amount - before.amount
            for n, before, total in zip(resumed, totals, totals[1:], strict=False)
            if past[n - 1]["kind"] == "Finished"
        ]
        self._make, self._prefix = more, 0
        self._left = Left()
        self._now = Scripted(first)

    def ask(self) -> Ask | Wait | None:
        ask = self._now.ask()
        while ask is None and self._more:
            self._prefix += 1
            self._left.purse = self._now.result or {}
            self._now = Scripted(self._make(self._more.pop(0), self._left))
            ask = self._now.ask()
        if isinstance(ask, Trial) and self._prefix:
            return ask.with_(id=f"{self._name()}{ask.id}")
        return ask

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        if outcome.ok and outcome.state is not None:
            self._left.made[outcome.state] = trial, outcome
        self._left.families = outcome.families
        self._now.tell(trial.with_(id=trial.id.removeprefix(self._name())), outcome)

    def _name(self) -> str:
        """Before the ids of a later phase: those of the first have none."""
        return f"{self._prefix + 1}-" if self._prefix else ""
