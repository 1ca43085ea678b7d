"""more: a finished run is given more budget. Goes on from the best encoder state with what its training was found to need; where the run
had no time for the encoder, or not for all rows of the linear model, that comes first. What stands stays unless it is beaten."""

from __future__ import annotations

from multistep.controllers import stages
from multistep.controllers.members import legs
from multistep.controllers.phases import Left
from multistep.controllers.plan import Plan
from multistep.controllers.script import Does, Problem, Skip, Steps
from multistep.controllers.staged import encoder, more_linear, race_and_trunk
from multistep.controllers.trunk import average, trunk
from multistep.controllers.wealth import Purse


def more(problem: Problem, left: Left | None = None) -> Does[Purse]:
    """`left`: by the run so far."""
    left = left or Left()
    plan = Plan(problem, left.purse)
    yield from plan.until(_models(plan, left))
    yield from stages.predict(plan)
    yield from stages.refit(plan)
    yield from stages.finish(plan)
    return plan.purse


def _models(plan: Plan, left: Left) -> Steps:
    plan.learnt = left.training("encoder")
    yield from stages.profile(plan)
    length, rows = yield from stages.encoder_rows(plan)
    if linear := left.linear():
        tried = [f.features for f in linear if not f.max_rows]
        fitted = plan.problem.rows["train"] if tried else max(f.max_rows or 0 for f in linear)
        yield from more_linear(plan, fitted, not length or plan.scratch is not None, tried)
    if not length:
        return
    yield from stages.keep_refit(plan)
    state = plan.families.get("encoder")
    if state is None:
        yield from encoder(plan, rows, race_and_trunk)
        return
    if rows:
        yield Skip(stage="trunk", why=stages.PARTIAL)
        return
    plan.choose_depth()
    if plan.target is not None:
        found = yield from legs(plan, {}, state)
    else:
        found = yield from trunk(plan, plan.prior(), state)
    if found is not None:
        yield from average(plan, found)
