"""more: a finished run is given more budget. Goes on from the best encoder state; what stands stays unless it is beaten."""

from __future__ import annotations

from multistep.controllers import stages
from multistep.controllers.plan import Plan
from multistep.controllers.script import Does, Problem, Skip
from multistep.controllers.trunk import average, trunk
from multistep.controllers.wealth import Purse


def more(problem: Problem, purse: Purse | None = None) -> Does[Purse]:
    """`purse`: what the run has left of its wealth."""
    plan = Plan(problem, purse)
    yield from stages.profile(plan)
    length, rows = yield from stages.encoder_rows(plan)
    state = plan.families.get("encoder")
    if not length or rows:
        yield Skip(stage="trunk", why="the encoder cannot be trained in this time")
    else:
        plan.choose_depth()
        found = yield from trunk(plan, plan.prior(), state)
        if found is not None:
            yield from average(plan, found)
    yield from stages.predict(plan)
    yield from stages.finish(plan)
    return plan.purse
