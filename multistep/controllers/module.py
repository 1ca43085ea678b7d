"""The scripts for any module: what `optimize` tries, in the order of what it costs.

fixed: one run with the given settings. race: learning rates first, then the winner. staged: the race, a trunk that is watched for
overfitting, a cool-down from its best state where it overfits, averages. The searches (searches.py) stand where race and trunk do.
Probes are compared only after their learning rate has decayed to zero (short-horizon bias: Wu et al. 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from multistep.config import OptimizerConfig, check_layer_decay
from multistep.controllers.diagnosing import WHY
from multistep.controllers.members import Found, Ground, legs
from multistep.controllers.script import BasePlan, Does, Skip, Steps, Target, beats
from multistep.controllers.searches import SEARCHES
from multistep.controllers.space import Point, Space, settled, space_of
from multistep.controllers.trunk import LEAST_UPDATES, PROBE_SHARE, PROBE_UPDATES, averages
from multistep.objectives import Objective
from multistep.optimizers.base import Regime
from multistep.schedules import Constant, Linear, Schedule
from multistep.strategy import (
    Action,
    AsGiven,
    Average,
    BatchGrowth,
    Diagnose,
    LayerDecay,
    Profile,
    ReadTest,
    TrainModule,
)
from multistep.types import Outcome, Spec, Unit

STEP = 3.0  # between the learning rates of the race: a module from elsewhere may want a rate far from the prior
MOST_PROBES = 5
COOL_SHARE = 0.15  # of what the trunk spent: decaying from its best state to zero
LEAST_SOLVER_UPDATES = 3  # of an optimizer that takes a closure: its updates are tens of others'
SOUP_SHARE = 0.2  # of what is left at most is kept for a soup; one that costs more is not made
FINISH_SHARE = 0.02  # of the budget: loading, judging, writing


class ModuleProblem(Spec):
    """What a script knows before the first trial. None: the run chooses."""

    objective: Objective
    metric: str
    optimizer: OptimizerConfig
    regime: Regime
    schedule: Schedule | None
    batch_size: int
    micro_batch: int
    clip: float
    dropout: float | None
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


ModuleScript = Callable[[ModuleProblem], Steps]


class _Plan(BasePlan):
    """What is left, what an update costs, and the trials so far."""

    of = "module"

    def __init__(self, problem: ModuleProblem):
        super().__init__(problem.budget, problem.target)
        self.problem = problem
        self.ends: list[str] = []  # of trainings that came to their end; all began at the weights as given

    def patience(self, stage: str, action: Action, commit: bool) -> int:
        return self.problem.patience if isinstance(action, TrainModule) and stage == "trunk" else 0

    def told(self, action: Action, outcome: Outcome) -> None:
        whole = outcome.ok and "diagnosis" not in outcome.facts and "stopped" not in outcome.facts
        if isinstance(action, TrainModule) and whole and outcome.state is not None:
            self.ends.append(outcome.state)

    # ------------------------------------------------------------------ the ground of a search (members.Ground)

    begins = None

    @property
    def least_updates(self) -> float:
        return float(LEAST_SOLVER_UPDATES if self.problem.optimizer.member.closure else PROBE_UPDATES)

    @property
    def seed(self) -> int:
        return self.problem.seed

    def overhead(self) -> float:
        return 1.1 * self.facts["judge_s"] if self.problem.unit == "seconds" else 0.0

    def training_updates(self, amount: float) -> float:
        return self.updates(amount)

    def prior(self) -> TrainModule:
        return self.strategy()

    def space(self) -> Space:
        """What the user has not fixed."""
        p = self.problem
        given = {
            "optimizer.lr": p.optimizer.lr, "dropout": p.dropout,
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
        """What training may take of what is left: the end needs a little, and so do two averages to be judged."""
        if self.problem.unit != "seconds":
            return self.remaining
        soup = self.soup_s(len(self.ends) + 2) if self.problem.soup else 0.0
        soup = soup if soup <= SOUP_SHARE * self.remaining else 0.0
        judged = 3 * self.facts["judge_s"] + self.facts["test_s"] + soup
        return max(0.0, self.remaining - judged - FINISH_SHARE * self.problem.budget)

    def soup_s(self, members: int) -> float:
        """Seconds to judge each member alone, every mixture, and the soup."""
        return 2 * members * self.facts["judge_s"]

    def strategy(self, lr: float | None = None, schedule: Schedule | None = None) -> TrainModule:
        p = self.problem
        rate = lr or p.optimizer.lr or p.optimizer.member.rates[p.regime].prior
        return TrainModule(
            optimizer=p.optimizer.at(rate), objective=p.objective, schedule=schedule or p.schedule or self._schedule(),
            batch_size=p.batch_size, micro_batch=p.micro_batch, clip=p.clip, dropout=p.dropout, bf16=p.bf16,
            clip_z=p.clip_z, layer_decay=p.layer_decay, freeze=p.freeze, batch_growth=p.batch_growth,
        )  # fmt: skip

    def _schedule(self) -> Schedule:
        """Decay to zero; a step that a solver found has its own length, and on the whole of train nothing has to be averaged away."""
        if not self.problem.optimizer.member.closure:
            return Linear()
        whole = self.problem.batch_size >= self.problem.rows["train"]
        return Constant(warmup=0.0) if whole else Linear(warmup=0.0)


def _begin(plan: _Plan) -> Steps:
    told = yield from plan.trial("profile", Profile(), "what an update and a judgement cost here")
    plan.facts = told.facts
    yield from plan.trial("incumbent", AsGiven(), "the module as it was given")


def _finish(plan: _Plan) -> Steps:
    yield from plan.trial("diagnose", Diagnose(), WHY)
    if plan.problem.rows.get("test"):
        yield from plan.trial("test", ReadTest(), "read once, at the end")


def _race(plan: _Plan) -> Does[float]:
    """Probes at rates around the prior, up while that helps, else down; each decays to zero. The rate to go on with."""
    prior = plan.strategy().optimizer.lr
    if plan.problem.optimizer.lr is not None:
        yield Skip(stage="race", why=f"the learning rate was given: {prior:g}")
        return prior
    if plan.problem.optimizer.member.closure:
        yield Skip(stage="race", why="a solved step has its own length: there is no learning rate to look for")
        return prior
    share = PROBE_SHARE * plan.spare()
    if plan.updates(share) < PROBE_UPDATES:
        why = f"a probe of {PROBE_SHARE:.0%} would be {plan.updates(share):.0f} updates (< {PROBE_UPDATES}): the prior {prior:g} is used"
        yield Skip(stage="race", why=why)
        return prior

    def probe(rate: float, why: str, against: str | None = None) -> Does[Outcome]:
        action = plan.strategy(rate, Linear())
        return (yield from plan.trial("race", action, why, share=share, against=against, commit=False))

    rate, best = prior, (yield from probe(prior, f"the prior learning rate {prior:.2g}"))
    direction, probes = STEP, 1
    while probes < MOST_PROBES:
        other = rate * direction
        told = yield from probe(other, f"learning rate {other:.2g} against {rate:.2g}", best.state)
        probes += 1
        if beats(told, best):
            rate, best = other, told
        elif direction == STEP and rate == prior:
            direction = 1 / STEP
        else:
            break
    return rate


def _enough(plan: _Plan, share: float) -> Does[bool]:
    least = LEAST_SOLVER_UPDATES if plan.problem.optimizer.member.closure else LEAST_UPDATES
    if plan.updates(share) >= least:
        return True
    yield Skip(stage="trunk", why=f"{plan.updates(share):.0f} updates fit into what is left (< {least})")
    return False


def _averages(plan: _Plan, state: str) -> Steps:
    needed = 2 * plan.facts["judge_s"]
    yield from averages(plan, state, needed, plan.problem.unit == "seconds" and plan.remaining < needed)


def _soup(plan: _Plan) -> Steps:
    """The probes and what came after them, all from the same weights: their mean, as far as it helps."""
    needed = plan.soup_s(len(plan.ends)) + plan.facts["test_s"]
    if len(plan.ends) < 2:
        yield Skip(
            stage="soup", why=f"{len(plan.ends)} training came to its end: a soup needs two from the same weights"
        )
    elif plan.problem.unit == "seconds" and plan.remaining < needed:
        yield Skip(stage="soup", why=f"{plan.remaining:.1f} s are left, judging mixtures and test takes {needed:.1f} s")
    else:
        why = f"greedy mean of {len(plan.ends)} trainings that began at the same weights"
        yield from plan.trial("soup", Average(which="soup", members=tuple(plan.ends)), why)


def fixed(problem: ModuleProblem) -> Steps:
    """One run with the given settings."""
    plan = _Plan(problem)
    yield from plan.until(_fixed(plan))
    yield from _finish(plan)


def _fixed(plan: _Plan) -> Steps:
    yield from _begin(plan)
    yield from plan.trial("trunk", plan.strategy(), "one run with the given settings", share=plan.spare())


def race(problem: ModuleProblem) -> Steps:
    """Learning rates first, then the winner for the time left."""
    plan = _Plan(problem)
    yield from plan.until(_raced(plan))
    yield from _finish(plan)


def _raced(plan: _Plan) -> Steps:
    yield from _begin(plan)
    rate = yield from _race(plan)
    share = plan.spare()
    if plan.target is not None:
        yield from legs(plan, {"optimizer.lr": rate})
    elif (yield from _enough(plan, share)):
        yield from plan.trial("trunk", plan.strategy(rate), f"lr {rate:.2g} for the time left", share=share)


def staged(problem: ModuleProblem) -> Steps:
    """The race, a trunk that is watched, a cool-down where it overfits, averages: the default."""
    return _searched(problem, _race_and_trunk)


def _searching(search: Callable[[Ground], Found]) -> ModuleScript:
    def script(problem: ModuleProblem) -> Steps:
        return _searched(problem, search)

    return script


def _searched(problem: ModuleProblem, train: Callable[[_Plan], Found]) -> Steps:
    plan = _Plan(problem)
    yield from plan.until(_trained(plan, train))
    yield from _finish(plan)


def _trained(plan: _Plan, train: Callable[[_Plan], Found]) -> Steps:
    yield from _begin(plan)
    state = yield from train(plan)
    if state is not None:
        yield from _averages(plan, state)
    if plan.problem.soup:
        yield from _soup(plan)


def _race_and_trunk(plan: _Plan) -> Found:
    rate, share = (yield from _race(plan)), plan.spare()
    if not (yield from _enough(plan, share)):
        return None
    if plan.target is not None:
        return (yield from legs(plan, {"optimizer.lr": rate}))
    why = f"lr {rate:.2g}, about {plan.updates(share):.0f} updates, {plan.problem.choice}"
    told = yield from plan.trial("trunk", plan.strategy(rate), why, share=share, watch=True)
    if "diagnosis" in told.facts or "stopped" in told.facts:
        return (yield from _cool_down(plan, told, share))
    return told.state


def _cool_down(plan: _Plan, paused: Outcome, share: float) -> Does[str | None]:
    """From the best state of a trunk that overfits or stands still: its learning rate decays to zero, and training is over."""
    lr, done = paused.facts["best_lr"], paused.facts["best_progress"]
    rest = min(plan.spare(), COOL_SHARE * done * share)
    if plan.updates(rest) < 1:
        yield Skip(stage="cool-down", why="no time is left for it")
        return paused.state
    why = f"from the best state (at {done:.0%} of the trunk) with lr {lr:.2g} to zero: more training would not help"
    action = plan.strategy(lr, Linear(warmup=0.0))
    return (yield from plan.trial("cool-down", action, why, start=paused.state, share=rest)).state


MODULE_CONTROLLERS: Mapping[str, ModuleScript] = {
    "staged": staged, "race": race, "fixed": fixed, **{name: _searching(search) for name, (search, _) in SEARCHES.items()},
}  # fmt: skip
