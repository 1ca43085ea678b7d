"""The contract of a controller, and the way ours are written: as a script that yields what it asks and receives outcomes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Protocol

from multistep.config import FitConfig
from multistep.strategy import Trial
from multistep.text import NgramFeatures
from multistep.types import Outcome, Spec, TaskKind, Unit


class Skip(Spec):
    """A stage that is not begun, and why."""

    stage: str
    why: str


class Reserve(Spec):
    """Set `amount` of the budget aside under `name`; it no longer counts as remaining. 0 gives it back."""

    name: str
    amount: float


class Problem(Spec):
    """What a controller knows before the first trial."""

    task: TaskKind
    n_outputs: int
    metric: str
    rows: dict[str, int]  # by split
    characters: dict[str, int]  # by split
    budget: float
    unit: Unit
    config: FitConfig
    linear: tuple[NgramFeatures, ...]  # feature sets for the linear family, the calibrated default first


Ask = Trial | Skip | Reserve
Steps = Generator[Ask, Outcome | None, None]
Script = Callable[[Problem], Steps]


class Controller(Protocol):
    def ask(self) -> Ask | None:
        """The next thing to do; None at the end. A trial is told before the next ask."""
        ...

    def tell(self, trial: Trial, outcome: Outcome) -> None: ...


class Scripted:
    """A controller from the steps of a script."""

    def __init__(self, steps: Steps):
        self._steps = steps
        self._outcome: Outcome | None = None

    def ask(self) -> Ask | None:
        outcome, self._outcome = self._outcome, None
        try:
            return self._steps.send(outcome)
        except StopIteration:
            return None

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        self._outcome = outcome
