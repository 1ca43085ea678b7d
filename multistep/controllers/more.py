"""more: a finished run is given more budget. Goes on from the best encoder state; what stands stays unless it is beaten."""

from __future__ import annotations

from multistep.controllers import stages
from multistep.controllers.members import legs
from multistep.controllers.plan import Plan
from multistep.controllers.script import Does, Problem, Skip, Steps
from multistep.controllers.trunk import average, trunk
from multistep.controllers.wealth import Purse


def more(problem: Problem, purse: Purse | None = None) -> Does[Purse]:
    """`purse`: what the run has left of its wealth."""
    plan = Plan(problem, purse)
    yield from plan.until(_trained(plan))
    yield from stages.predict(plan)
    yield from stages.finish(plan)
    return plan.purse


def _trained(plan: Plan) -> Steps:
    yield from stages.profile(plan)
    length, rows = yield from stages.encoder_rows(plan)
    state = plan.families.get("encoder")
    if not length or rows:
        yield Skip(stage="trunk", why="the encoder cannot be trained in this time")
        return
    plan.choose_depth()
    if plan.target is not None:
        found = yield from legs(plan, {}, state)
    else:
        found = yield from trunk(plan, plan.prior(), state)
    if found is not None:
        yield from average(plan, found)
