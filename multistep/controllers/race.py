"""race: the incumbent, a head, a race of learning rates, and the winner for the rest of the time."""

from __future__ import annotations

from multistep.controllers import plan as stages
from multistep.controllers.plan import Plan
from multistep.controllers.script import Problem, Skip, Steps
from multistep.controllers.trunk import race_rates, worth_training


def race(problem: Problem) -> Steps:
    plan = Plan(problem)
    yield from stages.incumbent(plan)
    yield from stages.profile(plan)
    length, rows = yield from stages.encoder_rows(plan)
    if length:
        layers, _ = plan.layers(plan.remaining)
        start = None
        if plan.scratch is None:
            start = (yield from stages.head(plan, rows, cut=plan.facts["n_layers"] - layers)).state
        rate = yield from race_rates(plan, plan.fine_tune(layers=layers), start)
        action = plan.fine_tune(lr=rate, layers=layers)
        if rows:
            yield Skip(stage="trunk", why=stages.PARTIAL)
        elif (yield from worth_training(plan, action)):
            yield from plan.trial(
                "trunk", action, f"the race's winner, lr {rate:.2g}", start=start, share=plan.remaining
            )
    yield from stages.predict(plan)
    yield from stages.finish(plan)
