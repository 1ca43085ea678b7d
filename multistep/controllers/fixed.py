"""fixed: the incumbent, a head, and one fine-tuning with the given settings for all of the time. No judgement in between."""

from __future__ import annotations

from multistep.controllers import stages
from multistep.controllers.plan import Plan
from multistep.controllers.script import Does, Problem, Skip, Steps
from multistep.controllers.trunk import worth_training
from multistep.controllers.wealth import Purse


def fixed(problem: Problem) -> Does[Purse]:
    plan = Plan(problem)
    yield from plan.until(_models(plan))
    yield from stages.finish(plan)
    return plan.purse


def _models(plan: Plan) -> Steps:
    yield from stages.incumbent(plan)
    yield from stages.profile(plan)
    length, rows = yield from stages.encoder_rows(plan)
    if not length:
        return
    yield from stages.begin(plan, rows)
    action = plan.prior()
    if rows:
        yield Skip(stage="trunk", why=stages.PARTIAL)
    elif (yield from worth_training(plan, action)):
        why = "one run with the given settings"
        yield from plan.trial("trunk", action, why, start=plan.begins, share=plan.remaining)
