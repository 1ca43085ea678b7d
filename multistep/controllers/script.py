"""The contract of a controller, and the way ours are written: as a script that yields what it asks and receives outcomes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol

from multistep.config import FitConfig
from multistep.strategy import Action, Trial
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
Step = Generator[Ask, Outcome | None, Outcome]
Script = Callable[[Problem], Steps]


class BasePlan:
    """What every script keeps track of while it runs: the trials, by number, what is left of the budget, and what the profile found."""

    def __init__(self, budget: float):
        self.remaining = budget
        self.facts: dict[str, Any] = {}
        self._trials = 0

    def trial(
        self, stage: str, action: Action, why: str, *, start: str | None = None, share: float = 0.0,
        against: str | None = None, commit: bool = True, watch: bool = False,
    ) -> Step:  # fmt: skip
        """Ask for a trial and take in what came of it."""
        self._trials += 1
        trial = Trial(
            id=f"{self._trials:02d}-{stage}", stage=stage, action=action, start=start, share=round(share, 3), why=why,
            against=against, commit=commit, watch_gap=watch, patience=self.patience(stage, action, commit),
        )  # fmt: skip
        outcome = yield trial
        assert outcome is not None
        self.remaining = outcome.remaining
        self.told(action, outcome)
        return outcome

    def patience(self, stage: str, action: Action, commit: bool) -> int:
        """Looks without improvement after which such a trial stops; 0: never."""
        return 0

    def told(self, action: Action, outcome: Outcome) -> None:
        """Take in what else came of a trial."""


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
