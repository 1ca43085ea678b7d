"""The scripts for any module: what `optimize` tries, in the order of what it costs.

fixed: one run with the given settings. race: learning rates first, then the winner. staged: the race, a trunk that is watched for
overfitting, a cool-down from its best state where it overfits, averages. Probes are compared only after their learning rate has
decayed to zero (short-horizon bias: Wu et al. 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

from multistep.config import OptimizerConfig
from multistep.controllers.script import Ask, Skip, Steps
from multistep.controllers.trunk import LEAST_UPDATES, PROBE_SHARE, PROBE_UPDATES
from multistep.objectives import Objective
from multistep.optimizers.base import Regime
from multistep.schedules import Linear, Schedule
from multistep.strategy import Action, AsGiven, Average, Profile, ReadTest, TrainModule, Trial
from multistep.types import Outcome, Spec, Unit, Verdict

STEP = 3.0  # between the learning rates of the race: a module from elsewhere may want a rate far from the prior
MOST_PROBES = 5
COOL_SHARE = 0.15  # of what the trunk spent: decaying from its best state to zero
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
    bf16: bool
    budget: float
    unit: Unit
    rows: dict[str, int]  # by split; "test" only where there is one
    choice: str  # the rule that chose the optimizer


ModuleScript = Callable[[ModuleProblem], Steps]


class _Plan:
    """What is left, what an update costs, and the trials so far."""

    def __init__(self, problem: ModuleProblem):
        self.problem, self.remaining = problem, problem.budget
        self.facts: dict[str, Any] = {}
        self._trials = 0

    def trial(
        self, stage: str, action: Action, why: str, *, start: str | None = None, share: float = 0.0,
        against: str | None = None, commit: bool = True, watch: bool = False,
    ) -> Generator[Ask, Outcome | None, Outcome]:  # fmt: skip
        self._trials += 1
        trial = Trial(
            id=f"{self._trials:02d}-{stage}", stage=stage, action=action, start=start, share=round(share, 3), why=why,
            against=against, commit=commit, watch_gap=watch,
        )  # fmt: skip
        outcome = yield trial
        assert outcome is not None
        self.remaining = outcome.remaining
        return outcome

    def updates(self, amount: float) -> float:
        """How many updates `amount` of the budget buys."""
        match self.problem.unit:
            case "seconds":
                return amount / max(1e-9, self.facts["update_s"])
            case "updates":
                return amount
            case "tokens":
                return amount / max(1.0, self.facts["tokens_an_update"])

    def spare(self) -> float:
        """What training may take of what is left: the end needs a little, and so do two averages to be judged."""
        if self.problem.unit != "seconds":
            return self.remaining
        judged = 3 * self.facts["judge_s"] + self.facts["test_s"]
        return max(0.0, self.remaining - judged - FINISH_SHARE * self.problem.budget)

    def strategy(self, lr: float | None = None, schedule: Schedule | None = None) -> TrainModule:
        p = self.problem
        rate = lr or p.optimizer.lr or p.optimizer.member.rates[p.regime].prior
        return TrainModule(
            optimizer=p.optimizer.at(rate), objective=p.objective, schedule=schedule or p.schedule or Linear(),
            batch_size=p.batch_size, micro_batch=p.micro_batch, clip=p.clip, dropout=p.dropout, bf16=p.bf16,
        )  # fmt: skip


def _begin(plan: _Plan) -> Generator[Ask, Outcome | None, None]:
    told = yield from plan.trial("profile", Profile(), "what an update and a judgement cost here")
    plan.facts = told.facts
    yield from plan.trial("incumbent", AsGiven(), "the module as it was given")


def _finish(plan: _Plan) -> Generator[Ask, Outcome | None, None]:
    if plan.problem.rows.get("test"):
        yield from plan.trial("test", ReadTest(), "read once, at the end")


def _race(plan: _Plan) -> Generator[Ask, Outcome | None, float]:
    """Probes at rates around the prior, up while that helps, else down; each decays to zero. The rate to go on with."""
    prior = plan.strategy().optimizer.lr
    if plan.problem.optimizer.lr is not None:
        yield Skip(stage="race", why=f"the learning rate was given: {prior:g}")
        return prior
    share = PROBE_SHARE * plan.spare()
    if plan.updates(share) < PROBE_UPDATES:
        why = f"a probe of {PROBE_SHARE:.0%} would be {plan.updates(share):.0f} updates (< {PROBE_UPDATES}): the prior {prior:g} is used"
        yield Skip(stage="race", why=why)
        return prior

    def probe(rate: float, why: str, against: str | None = None) -> Generator[Ask, Outcome | None, Outcome]:
        action = plan.strategy(rate, Linear())
        return (yield from plan.trial("race", action, why, share=share, against=against, commit=False))

    rate, first = prior, (yield from probe(prior, f"the prior learning rate {prior:.2g}"))
    state, direction, probes = first.state, STEP, 1
    while probes < MOST_PROBES:
        other = rate * direction
        told = yield from probe(other, f"learning rate {other:.2g} against {rate:.2g}", state)
        probes += 1
        if told.ok and Verdict(**told.facts["against_verdict"]).accept:
            rate, state = other, told.state
        elif direction == STEP and rate == prior:
            direction = 1 / STEP
        else:
            break
    return rate


def _enough(plan: _Plan, share: float) -> Generator[Ask, Outcome | None, bool]:
    if plan.updates(share) >= LEAST_UPDATES:
        return True
    yield Skip(stage="trunk", why=f"{plan.updates(share):.0f} updates fit into what is left (< {LEAST_UPDATES})")
    return False


def _averages(plan: _Plan, state: str) -> Generator[Ask, Outcome | None, None]:
    if plan.problem.unit == "seconds" and plan.remaining < 2 * plan.facts["judge_s"]:
        yield Skip(
            stage="average", why=f"{plan.remaining:.1f} s are left, two averages take {2 * plan.facts['judge_s']:.1f} s"
        )
        return
    yield from plan.trial("average", Average(which="ema"), "exponential moving average of the weights", start=state)
    yield from plan.trial("average", Average(which="tail"), "mean of the last quarter's weights", start=state)


def fixed(problem: ModuleProblem) -> Steps:
    plan = _Plan(problem)
    yield from _begin(plan)
    share = plan.spare()
    yield from plan.trial("trunk", plan.strategy(), "one run with the given settings", share=share)
    yield from _finish(plan)


def race(problem: ModuleProblem) -> Steps:
    plan = _Plan(problem)
    yield from _begin(plan)
    rate = yield from _race(plan)
    share = plan.spare()
    if (yield from _enough(plan, share)):
        yield from plan.trial("trunk", plan.strategy(rate), f"lr {rate:.2g} for the time left", share=share)
    yield from _finish(plan)


def staged(problem: ModuleProblem) -> Steps:
    plan = _Plan(problem)
    yield from _begin(plan)
    rate = yield from _race(plan)
    share = plan.spare()
    if (yield from _enough(plan, share)):
        why = f"lr {rate:.2g}, about {plan.updates(share):.0f} updates, {problem.choice}"
        told = yield from plan.trial("trunk", plan.strategy(rate), why, share=share, watch=True)
        state = told.state
        if "diagnosis" in told.facts:
            state = yield from _cool_down(plan, told, share)
        if state is not None:
            yield from _averages(plan, state)
    yield from _finish(plan)


def _cool_down(plan: _Plan, paused: Outcome, share: float) -> Generator[Ask, Outcome | None, str | None]:
    """From the best state of a trunk that overfits: its learning rate decays to zero, and training is over."""
    lr, done = paused.facts["best_lr"], paused.facts["best_progress"]
    rest = min(plan.spare(), COOL_SHARE * done * share)
    if plan.updates(rest) < 1:
        yield Skip(stage="cool-down", why="no time is left for it")
        return paused.state
    why = f"from the best state (at {done:.0%} of the trunk) with lr {lr:.2g} to zero: more training would overfit"
    action = plan.strategy(lr, Linear(warmup=0.0))
    return (yield from plan.trial("cool-down", action, why, start=paused.state, share=rest)).state


MODULE_CONTROLLERS: Mapping[str, ModuleScript] = {"staged": staged, "race": race, "fixed": fixed}
