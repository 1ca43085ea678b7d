"""The contract of a controller, and the way ours are written: as a script that yields what it asks and receives outcomes.

A script may yield several trials at once, as a tuple: they are asked one after the other, may be told in any order, and the script goes
on with all of their outcomes. Until then the controller says `Wait`, so that a pool of workers knows when to tell.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar

from multistep.config import FitConfig
from multistep.controllers.wealth import Purse, Wealth
from multistep.standing import Of, early, eligible
from multistep.strategy import Action, Trial
from multistep.text import NgramFeatures
from multistep.types import Outcome, Spec, TaskKind, Unit, Verdict

HARM = 0.1  # of the level, for what seldom harms: at the whole of it every sixth would be refused by chance


class Skip(Spec):
    """A stage that is not begun, and why."""

    stage: str
    why: str


class Reserve(Spec):
    """Set `amount` of the budget aside under `name`; it no longer counts as remaining. 0 gives it back."""

    name: str
    amount: float


class Wait(Spec):
    """Nothing can be asked before a trial that is outstanding is told."""


class Target(Spec):
    """A score at which training ends: `value` of `metric`, reached with its standard error."""

    metric: str
    value: float
    higher_is_better: bool


def left_out(config: FitConfig, stage: str) -> list[Skip]:
    """What says so, where a stage is not wanted; empty where it is."""
    return [Skip(stage=stage, why=f"left out: skip={stage} was given")] if stage in config.skip else []


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
    higher_is_better: bool = True  # the metric
    target: Target | None = None

    @property
    def sign(self) -> float:
        return 1.0 if self.higher_is_better else -1.0


T = TypeVar("T")
Ask = Trial | Skip | Reserve
Does = Generator[Ask | tuple[Trial, ...], Any, T]  # a part of a script that comes back with a T
Steps = Does[None]
Step = Does[Outcome]
Script = Callable[[Problem], Does[Purse]]  # comes back with what is left of its wealth


class Reached(Exception):
    """The target stands: what trains ends here. Caught by `BasePlan.until`."""


class BasePlan:
    """What every script keeps track of while it runs: the trials, by number, what is left of the budget, and what the profile found.
    `purse`: what an earlier part of the run has left of its wealth."""

    of: Of = "answers"

    def __init__(self, budget: float, target: Target | None = None, purse: Purse | None = None):
        self.remaining = budget
        self.facts: dict[str, Any] = {}
        self.target = target
        self.reached = ""  # by what, once it was
        self._armed = False  # whether reaching it ends what goes on
        self.purse: Purse = {} if purse is None else purse
        self._trials = 0

    def trial(
        self, stage: str, action: Action, why: str, *, start: str | None = None, share: float = 0.0,
        against: str | None = None, commit: bool = True, watch: bool = False, judges: str = "control",
        stake: float = 1.0,
    ) -> Step:  # fmt: skip
        """Ask for a trial and take in what came of it. `judges`: the split that looks at it; empty: a look
        that finds nothing new, and pays nothing; `stake`: what of its level a look may have that is a long shot."""
        trial = self.asked(
            stage, action, why, start=start, share=share, against=against, commit=commit, watch=watch, judges=judges,
            stake=stake,
        )  # fmt: skip
        outcome = yield trial
        assert outcome is not None
        self.took(trial, outcome, judges)
        self._stop()
        return outcome

    def together(self, trials: Sequence[Trial]) -> Does[list[Outcome]]:
        """Ask for several trials that do not wait for each other; their outcomes, in the same order."""
        outcomes: Sequence[Outcome] = yield tuple(trials)
        self.remaining = min(o.remaining for o in outcomes)
        for trial, outcome in zip(trials, outcomes, strict=True):
            self.took(trial, outcome.with_(remaining=self.remaining))
        self._stop()
        return list(outcomes)

    def asked(
        self, stage: str, action: Action, why: str, *, start: str | None = None, share: float = 0.0,
        against: str | None = None, commit: bool = True, watch: bool = False, judges: str = "control",
        stake: float = 1.0, among: int = 1,
    ) -> Trial:  # fmt: skip
        """The next trial, with the chance of an error that it may have. A probe ships nothing: its comparisons are free. `among`: how many
        are asked together, this one with them."""
        self._trials += 1
        wealth = self.purse.setdefault(judges if commit and judges else "free", Wealth())
        return Trial(
            id=f"{self._trials:02d}-{stage}", stage=stage, action=action, start=start, share=round(share, 3), why=why,
            against=against, commit=commit, watch_gap=watch, patience=self.patience(stage, action, commit),
            alpha=wealth.level(stake, among),
        )  # fmt: skip

    def took(self, trial: Trial, outcome: Outcome, judges: str = "control") -> None:
        """Take in what came of a trial."""
        self.remaining = outcome.remaining
        taken = eligible(self.of, trial, outcome) and (outcome.verdict is None or outcome.verdict.accept)
        if judges and trial.commit:
            self._settle(trial, outcome, self.purse.setdefault(judges, Wealth()), taken)
        self.told(trial.action, outcome)
        if self.target is None or self.reached or not taken:
            return
        found = outcome.metrics.get(self.target.metric)
        sign = 1.0 if self.target.higher_is_better else -1.0
        if found is not None and sign * (found.value - self.target.value) >= found.stderr:
            better = "above" if self.target.higher_is_better else "below"
            said = f"{found.value:.4g} ± {found.stderr:.2g}"
            self.reached = (
                f"{self.target.metric} {said} of {trial.id} is a standard error {better} {self.target.value:g}"
            )

    def _stop(self) -> None:
        if self.reached and self._armed:
            raise Reached

    def _settle(self, trial: Trial, outcome: Outcome, wealth: Wealth, taken: bool) -> None:
        """Pay for the comparison with what stands, or earn what was found: what is only cheaper is no find, nor what is rolled back."""
        verdict = outcome.verdict
        if verdict is not None and verdict.evidence:
            found = any(c.difference > 0 and c.p <= trial.alpha for c in verdict.evidence)
            wealth.settle(trial.alpha, taken and found)

    def until(self, steps: Steps) -> Steps:
        """The steps, to their end or to where the target stands."""
        self._armed = True
        try:
            yield from steps
        except Reached:
            yield Skip(stage="training", why=f"all that is left of it: {self.reached}")
        finally:
            self._armed = False

    def patience(self, stage: str, action: Action, commit: bool) -> int:
        """Looks without improvement after which such a trial stops; 0: never."""
        return 0

    def told(self, action: Action, outcome: Outcome) -> None:
        """Take in what else came of a trial."""


def beats(probe: Outcome, best: Outcome) -> bool:
    """Whether a probe's rate is the better one: it came to its end, and the other did not or is behind it. One that diverged is back where it
    began, and what it is worth there says nothing of its rate."""
    if not probe.ok or early(probe):
        return False
    return early(best) or Verdict(**probe.facts["against_verdict"]).accept


class Controller(Protocol):
    def ask(self) -> Ask | Wait | None:
        """The next thing to do; `Wait` while that depends on a trial that is outstanding; None at the end."""
        ...

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        """What came of a trial that was asked for. Several may be outstanding; they are told in any order."""
        ...


class Scripted:
    """A controller from the steps of a script. `result`: what the script came back with, at its end."""

    def __init__(self, steps: Does[Any]):
        self._steps, self.result = steps, None
        self._begun = self._ended = False
        self._queue: deque[Trial] = deque()  # of several that were yielded at once: not asked yet
        self._group: tuple[Trial, ...] = ()  # whose outcomes the script waits for
        self._alone = False  # it waits for one outcome, not for a list
        self._told: dict[str, Outcome] = {}

    def ask(self) -> Ask | Wait | None:
        if self._ended:
            return None
        if self._queue:
            return self._queue.popleft()
        if len(self._told) < len(self._group):
            return Wait()
        outcomes = [self._told[t.id] for t in self._group]
        answer = (outcomes[0] if self._alone else outcomes) if self._group else None
        self._group, self._told = (), {}
        try:
            asked = self._steps.send(answer) if self._begun else next(self._steps)
        except StopIteration as end:
            self._ended, self.result = True, end.value
            return None
        self._begun = True
        if isinstance(asked, tuple):
            assert asked, "an empty group waits for ever"
            self._group, self._alone = asked, False
            self._queue.extend(asked[1:])
            return asked[0]
        if isinstance(asked, Trial):
            self._group, self._alone = (asked,), True
        return asked

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        assert any(t.id == trial.id for t in self._group) and trial.id not in self._told, (
            f"{trial.id} is not outstanding"
        )
        self._told[trial.id] = outcome
