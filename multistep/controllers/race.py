"""race: the incumbent, a head, a race of learning rates, and the winner for the rest of the time."""

from __future__ import annotations

from multistep.controllers import stages
from multistep.controllers.members import legs
from multistep.controllers.plan import Plan
from multistep.controllers.script import Does, Problem, Skip, Steps
from multistep.controllers.trunk import race_rates, worth_training
from multistep.controllers.wealth import Purse


def race(problem: Problem) -> Does[Purse]:
    plan = Plan(problem)
    yield from plan.until(_models(plan))
    yield from stages.predict(plan)
    yield from stages.finish(plan)
    return plan.purse


def _models(plan: Plan) -> Steps:
    yield from stages.incumbent(plan)
    yield from stages.profile(plan)
    length, rows = yield from stages.encoder_rows(plan)
    if not length:
        return
    yield from stages.begin(plan, rows)
    if rows:
        yield Skip(stage="trunk", why=stages.PARTIAL)
        return
    rate = yield from race_rates(plan, plan.prior(), plan.begins)
    action = plan.fine_tune(lr=rate, layers=plan.depth)
    if plan.target is not None:
        yield from legs(plan, {"optimizer.lr": rate})
    elif (yield from worth_training(plan, action)):
        why = f"the race's winner, lr {rate:.2g}"
        yield from plan.trial("trunk", action, why, start=plan.begins, share=plan.remaining)
