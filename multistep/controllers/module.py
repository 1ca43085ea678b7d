"""The scripts for any module: what `optimize` tries, in the order of what it costs.

fixed: one run with the given settings. race: learning rates first, then the winner. staged: the race, a trunk that is watched for
overfitting, a cool-down from its best state where it overfits, averages. The searches (searches.py) stand where race and trunk do.
What comes after training is set aside before it. A finished run that is given more budget goes on from its best state.
Probes are compared only after their learning rate has decayed to zero (short-horizon bias: Wu et al. 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from multistep.controllers.diagnosing import WHY
from multistep.controllers.members import Found, legs
from multistep.controllers.module_plan import LEAST_SOLVER_UPDATES, ModuleProblem, Plan
from multistep.controllers.script import Does, Skip, Steps, beats
from multistep.controllers.searches import SEARCHES
from multistep.controllers.trunk import LEAST_UPDATES, PROBE_SHARE, PROBE_UPDATES, averages, souped
from multistep.controllers.wealth import Purse
from multistep.metrics.power import FEWEST_ROWS
from multistep.schedules import Linear
from multistep.standing import diverged
from multistep.strategy import AsGiven, Diagnose, Profile, ReadTest, TrainModule
from multistep.types import Outcome

STEP = 3.0  # between the learning rates of the race: a module from elsewhere may want a rate far from the prior
MOST_PROBES = 5
COOL_SHARE = 0.15  # of what the trunk spent: decaying from its best state to zero

ModuleScript = Callable[[ModuleProblem], Does[Purse]]


# ---------------------------------------------------------------------------------------------- beginning and end


def _profile(plan: Plan) -> Does[Outcome]:
    told = yield from plan.trial("profile", Profile(), "what an update and a judgement cost here")
    plan.facts = told.facts
    return told


def _set_aside(plan: Plan, whole: bool) -> Steps:
    """Keep the time for what comes after training: a training that was killed and goes on takes all that is not kept."""
    yield from plan.reserve("finish", plan.finish_s())
    if whole:
        yield from plan.reserve("average", plan.averages_s())


def _finish(plan: Plan) -> Steps:
    """Say what is the matter, give back what was set aside and read test, once."""
    yield from plan.trial("diagnose", Diagnose(), WHY)
    for name in tuple(plan.kept):
        yield from plan.reserve(name, 0.0)
    if plan.problem.rows.get("test"):
        yield from plan.trial("test", ReadTest(), "read once, at the end")


# ---------------------------------------------------------------------------------------------- training


def _race(plan: Plan) -> Does[float]:
    """Probes at rates around the prior, up while that helps, else down; each decays to zero. The rate to go on with."""
    prior = plan.strategy().optimizer.lr
    if plan.problem.optimizer.lr is not None:
        yield Skip(stage="race", why=f"the learning rate was given: {prior:g}")
        return prior
    if plan.problem.optimizer.member.closure:
        yield Skip(stage="race", why="a solved step has its own length: there is no learning rate to look for")
        return prior
    if plan.few_rows:
        rows = plan.problem.rows["validation"]
        why = f"{rows} validation rows (< {FEWEST_ROWS}) cannot tell rates apart: the prior {prior:g} is used"
        yield Skip(stage="race", why=why)
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


def _enough(plan: Plan, share: float) -> Does[bool]:
    least = LEAST_SOLVER_UPDATES if plan.problem.optimizer.member.closure else LEAST_UPDATES
    if plan.updates(share) >= least:
        return True
    yield Skip(stage="trunk", why=f"{plan.updates(share):.0f} updates fit into what is left (< {least})")
    return False


def _fixed(plan: Plan) -> Found:
    why = "one run with the given settings"
    return (yield from plan.trial("trunk", plan.strategy(), why, share=plan.spare())).state


def _raced(plan: Plan) -> Found:
    rate = yield from _race(plan)
    share = plan.spare()
    if plan.target is not None:
        return (yield from legs(plan, {"optimizer.lr": rate}))
    if not (yield from _enough(plan, share)):
        return None
    return (yield from plan.trial("trunk", plan.strategy(rate), f"lr {rate:.2g} for the time left", share=share)).state


def _race_and_trunk(plan: Plan) -> Found:
    rate, share = (yield from _race(plan)), plan.spare()
    if not (yield from _enough(plan, share)):
        return None
    if plan.target is not None:
        return (yield from legs(plan, {"optimizer.lr": rate}))
    why = f"lr {rate:.2g}, about {plan.updates(share):.0f} updates, {plan.problem.choice}"
    return (yield from _trunk(plan, rate, share, why))


def _trunk(plan: Plan, rate: float | None, share: float, why: str, start: str | None = None) -> Found:
    """A training that is watched, and a cool-down from its best state where it overfits or stands still. None: it diverged at any rate."""
    told = yield from plan.trial("trunk", plan.strategy(rate), why, start=start, share=share, watch=True)
    if diverged(told):
        why = f"the training diverged, at learning rate {told.facts['best_lr']:.2g} too: it is back where it began, "
        yield Skip(stage="cool-down", why=f"{why}so there is nothing to cool down or to average")
        return None
    if "diagnosis" in told.facts or "stopped" in told.facts:
        return (yield from _cool_down(plan, told, share))
    return told.state


def _cool_down(plan: Plan, paused: Outcome, share: float) -> Found:
    """From the best state of a trunk that overfits or stands still: its learning rate decays to zero, and training is over."""
    lr, done = paused.facts["best_lr"], paused.facts["best_progress"]
    rest = min(plan.spare(), COOL_SHARE * done * share)
    if plan.updates(rest) < 1:
        yield Skip(stage="cool-down", why="no time is left for it")
        return paused.state
    why = f"from the best state (at {done:.0%} of the trunk) with lr {lr:.2g} to zero: more training would not help"
    action = plan.strategy(lr, Linear(warmup=0.0))
    return (yield from plan.trial("cool-down", action, why, start=paused.state, share=rest)).state


# ---------------------------------------------------------------------------------------------- averages


def _averages(plan: Plan, state: str) -> Steps:
    needed = plan.averages_s()
    yield from averages(plan, state, needed, plan.timed and plan.remaining < needed)


# ---------------------------------------------------------------------------------------------- scripts


def _script(name: str) -> ModuleScript:
    def script(problem: ModuleProblem) -> Does[Purse]:
        plan = Plan(problem)
        yield from plan.until(_begun(plan, name))
        yield from _finish(plan)
        return plan.purse

    return script


def _begun(plan: Plan, name: str) -> Steps:
    yield from _profile(plan)
    yield from plan.trial("incumbent", AsGiven(), "the module as it was given")
    yield from _from_given(plan, name)


def _from_given(plan: Plan, name: str) -> Steps:
    """What this controller makes of the weights as given."""
    train, whole = _TRAINS[name]
    yield from _set_aside(plan, whole)
    state = yield from train(plan)
    yield from plan.reserve("average", 0.0)
    if whole and state is not None:
        yield from _averages(plan, state)
    if whole and plan.problem.soup:
        yield from souped(plan, plan.soup_s(len(plan.ends)), "trainings")


def go_on(problem: ModuleProblem, name: str, purse: Purse | None = None) -> Does[Purse]:
    """A finished run is given more budget: from its best state on, with the settings that made it; what stands stays unless it is beaten.
    `name`: of the run's controller, which tries what it would have tried where nothing that was trained stands. `purse`: what the run has
    left of its wealth."""
    plan = Plan(problem, purse)
    yield from plan.until(_gone_on(plan, name))
    yield from _finish(plan)
    return plan.purse


def _gone_on(plan: Plan, name: str) -> Steps:
    told = yield from _profile(plan)
    if told.facts.get("made_by") is None:
        yield from _from_given(plan, name)
        return
    plan.base, start = TrainModule.parse(told.facts["made_by"]), told.families["module"]
    yield from _set_aside(plan, whole=True)
    share = plan.spare()
    if plan.target is not None:
        state = yield from legs(plan, {}, start)
    elif (yield from _enough(plan, share)):
        why = f"on from {start} with the settings that made it, lr {plan.base.optimizer.lr:.2g}, about {plan.updates(share):.0f} updates"
        state = yield from _trunk(plan, None, share, why, start)
    else:
        state = None
    yield from plan.reserve("average", 0.0)
    if state is not None:
        yield from _averages(plan, state)


# How each of them trains, and whether averages, and a soup where one was asked for, come after it.
_TRAINS: Mapping[str, tuple[Callable[[Plan], Found], bool]] = {
    "staged": (_race_and_trunk, True), "race": (_raced, False), "fixed": (_fixed, False),
    **{name: (search, True) for name, (search, _) in SEARCHES.items()},
}  # fmt: skip

MODULE_CONTROLLERS: Mapping[str, ModuleScript] = {name: _script(name) for name in _TRAINS}
