"""What a run has learnt of how to train, from its trials: for a run that is given more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from multistep.strategy import Average, Training, Trial
from multistep.types import Outcome

Made = Mapping[str, tuple[Trial, Outcome]]  # each state's trial, and what came of it


@dataclass(frozen=True)
class Learnt:
    """`action`: the training that a state came from. `scale`: what its rate came down to for what went wrong (a tenth when it began again,
    a half for a bad batch, a plateau's cuts). `ends`: the training at whose end the state is, and `carried`: what of that the state carries
    on by itself, to a training that differs in live fields alone; None where it is an average, which carries nothing."""

    action: Training
    scale: float
    ends: Training | None
    carried: float

    def rate(self, action: Training, lr: float) -> float:
        """What to ask for, so that `action` from this state trains at what `lr` came down to."""
        carries = self.ends is not None and action.same_but_live(self.ends)
        return lr * self.scale / (self.carried if carries else 1.0)

    def again(self) -> Training:
        """The training itself, at the rate to ask for."""
        rates = self.action.optimizer.model_dump()
        if "lr" not in rates:
            return self.action
        lr = self.rate(self.action, rates["lr"])
        return self.action.with_(optimizer=self.action.optimizer.with_(lr=lr))


def learnt(made: Made, state: str | None) -> Learnt | None:
    """Of a state; None where no training left it. A cool-down has the rate at which its trunk was left, which is not what to train with."""
    ends: tuple[Training, float] | None = None
    first = True
    while state is not None and state in made:
        trial, outcome = made[state]
        action, facts = trial.action, outcome.facts
        if isinstance(action, Average):
            state = next(iter(facts.get("members", ())), trial.start)  # the best of a soup
        elif not isinstance(action, Training):
            return None
        else:
            scale = float(facts.get("lr_scale", 1.0))
            if first:
                ends = action, 1.0 if _went_back(facts) else scale
            if trial.stage != "cool-down" or trial.start not in made:
                return Learnt(action, scale, *(ends or (None, 1.0)))
            state = trial.start
        first = False
    return None


def _went_back(facts: Mapping[str, object]) -> bool:
    """To the best state that a look had seen: its rate is in the facts, and nothing is carried on."""
    stopped, diagnosis = facts.get("stopped"), facts.get("diagnosis")
    by_patience = isinstance(stopped, Mapping) and stopped.get("event") == "no improvement"
    return by_patience or (isinstance(diagnosis, Mapping) and "best_lr" in facts)
