"""fixed: the incumbent, a head, and one fine-tuning with the given settings for all of the time. No judgement in between."""

from __future__ import annotations

from multistep.controllers import plan as stages
from multistep.controllers.plan import Plan
from multistep.controllers.script import Problem, Skip, Steps
from multistep.controllers.trunk import worth_training


def fixed(problem: Problem) -> Steps:
    plan = Plan(problem)
    yield from stages.incumbent(plan)
    yield from stages.profile(plan)
    length, rows = yield from stages.encoder_rows(plan)
    if length:
        layers, _ = plan.layers(plan.remaining)
        start = None
        if plan.scratch is None:
            start = (yield from stages.head(plan, rows, cut=plan.facts["n_layers"] - layers)).state
        action = plan.fine_tune(layers=layers)
        if rows:
            yield Skip(stage="trunk", why=stages.PARTIAL)
        elif (yield from worth_training(plan, action)):
            yield from plan.trial("trunk", action, "one run with the given settings", start=start, share=plan.remaining)
    yield from stages.finish(plan)
