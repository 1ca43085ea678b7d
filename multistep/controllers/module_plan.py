"""What a script for any module knows and keeps track of: the problem, what things cost, the strategy that it begins with."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from multistep.config import OptimizerConfig, check_layer_decay
from multistep.controllers.script import BasePlan, Reserve, Steps, Target
from multistep.controllers.space import Point, Space, settled, space_of
from multistep.controllers.trunk import PROBE_UPDATES
from multistep.controllers.wealth import Purse
from multistep.metrics.power import FEWEST_ROWS
from multistep.objectives import Objective
from multistep.optimizers.base import Regime
from multistep.schedules import Constant, Linear, Schedule
from multistep.strategy import Action, BatchGrowth, LayerDecay, TrainModule
from multistep.types import Outcome, Spec, Unit

LEAST_SOLVER_UPDATES = 3  # of an optimizer that takes a closure: its updates are tens of others'
SOUP_SHARE = 0.2  # of what is left at most is kept for a soup; one that costs more is not made
FINISH_SHARE = 0.02  # of the budget: loading, judging, writing


class ModuleProblem(Spec):
    """What a script knows before the first trial. None: the run chooses."""

    objective: Objective
    objective_given: bool = (
        False  # as a dictionary or a specification, not by its name alone: a search leaves it as it is
    )
    metric: str
    optimizer: OptimizerConfig
    regime: Regime
    schedule: Schedule | None
    batch_size: int
    micro_batch: int
    clip: float
    dropout: float | None
    own_dropout: float | None = (
        None  # the module's, where all of its dropout layers have the same: a search begins there
    )
    patience: Annotated[int, Field(ge=0, le=1000)] = 0
    clip_z: Annotated[float, Field(ge=0)] = 0.0
    layer_decay: LayerDecay = 1.0
    freeze: tuple[str, ...] = ()
    soup: bool = False
    batch_growth: BatchGrowth = ()
    looks: Literal["auto", "epoch"] = (
        "auto"  # at validation while a segment is watched: every twentieth of it, or every epoch
    )
    bf16: bool
    budget: float
    unit: Unit
    rows: dict[str, int]  # by split; "test" only where there is one
    choice: str  # the rule that chose the optimizer
    seed: int = 0
    own_batches: bool = False  # a DataLoader has its own, which a search leaves alone
    higher_is_better: bool = False  # the metric
    target: Target | None = None

    @model_validator(mode="after")
    def _layers(self) -> Self:
        check_layer_decay(self.layer_decay, self.optimizer)
        return self


class Plan(BasePlan):
    """What is left, what an update costs, and the trials so far."""

    of = "module"

    def __init__(self, problem: ModuleProblem, purse: Purse | None = None):
        super().__init__(problem.budget, problem.target, purse)
        self.problem = problem
        self.timed = problem.unit == "seconds"
        self.ends: list[str] = []  # of trainings that came to their end; all began at the weights as given
        self.kept: dict[str, float] = {}  # seconds set aside, by what for
        self.base: TrainModule | None = None  # of a run that is given more: the training that made what stands

    def patience(self, stage: str, action: Action, commit: bool) -> int:
        return self.problem.patience if isinstance(action, TrainModule) and stage == "trunk" else 0

    def told(self, action: Action, outcome: Outcome) -> None:
        whole = outcome.ok and "diagnosis" not in outcome.facts and "stopped" not in outcome.facts
        if isinstance(action, TrainModule) and whole and outcome.state is not None:
            self.ends.append(outcome.state)

    def reserve(self, name: str, amount: float) -> Steps:
        """Set so much of the time aside, in place of what was set aside under this name; 0 gives it back."""
        before = self.kept.get(name, 0.0)
        amount = min(amount, self.remaining + before) if self.timed else 0.0
        if amount != before:
            self.remaining, self.kept[name] = self.remaining + before - amount, amount
            yield Reserve(name=name, amount=amount)

    # ------------------------------------------------------------------ the ground of a search (members.Ground)

    begins = None

    @property
    def least_updates(self) -> float:
        return float(LEAST_SOLVER_UPDATES if self.problem.optimizer.member.closure else PROBE_UPDATES)

    @property
    def seed(self) -> int:
        return self.problem.seed

    @property
    def few_rows(self) -> bool:
        return self.problem.rows["validation"] < FEWEST_ROWS

    def overhead(self) -> float:
        return 1.1 * self.facts["judge_s"] if self.timed else 0.0

    def training_updates(self, amount: float) -> float:
        return self.updates(amount)

    def prior(self) -> TrainModule:
        return self.strategy()

    def space(self) -> Space:
        """What the user has not fixed."""
        p = self.problem
        given = {
            "optimizer.lr": p.optimizer.lr, "dropout": p.dropout,
            "objective.label_smoothing": p.objective if p.objective_given else None,
            "optimizer.weight_decay": (p.optimizer.model_extra or {}).get("weight_decay"),
        }  # fmt: skip
        fixed = [path for path, value in given.items() if value is not None]
        return space_of(self.prior(), fixed, batches=not p.own_batches)

    def at(self, point: Point, schedule: Schedule) -> TrainModule:
        return settled(self.strategy(schedule=schedule), point)

    def merit(self, outcome: Outcome) -> float:
        found = outcome.metrics.get(self.problem.metric)
        return float("-inf") if found is None else found.value if self.problem.higher_is_better else -found.value

    # ------------------------------------------------------------------ costs

    def updates(self, amount: float) -> float:
        """How many updates `amount` of the budget buys."""
        grown = 1.0 + sum((1 - share) * 2**n for n, share in enumerate(self.problem.batch_growth))  # batches an update
        match self.problem.unit:
            case "seconds":
                return amount / max(1e-9, self.facts["update_s"] * grown)
            case "updates":
                return amount
            case "tokens":
                return amount / max(1.0, self.facts["tokens_an_update"] * grown)

    def spare(self) -> float:
        """What training may take of what is left; what comes after it is set aside already, but for a soup."""
        if not self.timed:
            return self.remaining
        soup = self.soup_s(len(self.ends) + 2) if self.problem.soup and self.base is None else 0.0
        return max(0.0, self.remaining - (soup if soup <= SOUP_SHARE * self.remaining else 0.0))

    def averages_s(self) -> float:
        """Seconds to judge both averages."""
        return 2 * self.facts["judge_s"]

    def finish_s(self) -> float:
        """Seconds that judging the end of a training takes, the test, loading and writing."""
        return self.facts["judge_s"] + self.facts["test_s"] + FINISH_SHARE * self.problem.budget

    def soup_s(self, members: int) -> float:
        """Seconds to judge each member alone, every mixture, and the soup."""
        return 2 * members * self.facts["judge_s"]

    # ------------------------------------------------------------------ the strategy

    def strategy(self, lr: float | None = None, schedule: Schedule | None = None) -> TrainModule:
        p = self.problem
        schedule = schedule or p.schedule or self._schedule()
        if self.base is not None:
            optimizer = self.base.optimizer
            return self.base.with_(schedule=schedule, optimizer=optimizer if lr is None else optimizer.with_(lr=lr))
        rate = lr or p.optimizer.lr or p.optimizer.member.rates[p.regime].prior
        return TrainModule(
            optimizer=p.optimizer.at(rate), objective=p.objective, schedule=schedule, batch_size=p.batch_size,
            micro_batch=p.micro_batch, clip=p.clip, dropout=p.own_dropout if p.dropout is None else p.dropout, bf16=p.bf16,
            clip_z=p.clip_z, layer_decay=p.layer_decay, freeze=p.freeze, batch_growth=p.batch_growth,
        )  # fmt: skip

    def _schedule(self) -> Schedule:
        """Decay to zero; a step that a solver found has its own length, and on the whole of train nothing has to be averaged away."""
        if not self.problem.optimizer.member.closure:
            return Linear()
        whole = self.problem.batch_size >= self.problem.rows["train"]
        return Constant(warmup=0.0) if whole else Linear(warmup=0.0)
