"""staged, the default: calibrated prior -> short race whose probes decay to zero -> trunk, again if there is time -> averaging -> prediction.

There is an incumbent from the first minutes on; what the clock cannot finish is not begun; the end of the run is reserved first.
The searches over strategies (random, halving, population, bayes, reactive) stand where the race and the trunk do; all else is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from multistep.controllers import stages
from multistep.controllers.members import Found, legs
from multistep.controllers.plan import ALL_LAYERS_EPOCHS, SEARCHED_EPOCHS, Plan
from multistep.controllers.script import Does, Problem, Script, Skip, Steps, left_out
from multistep.controllers.trunk import average, race_rates, soup, trunk, worth_training
from multistep.controllers.wealth import Purse
from multistep.strategy import FitLinear
from multistep.text import NgramFeatures

LONG_SHOT = 0.25  # the stake of other features: what comes later needs the level more
Train = Callable[[Plan], Found]


def staged(problem: Problem) -> Does[Purse]:
    """A calibrated prior, a short race, one trunk or the mean of several, averages, prediction: the default."""
    return _run(problem, race_and_trunk, ALL_LAYERS_EPOCHS)


def searching(search: Train, what: str) -> Script:
    """The same around a search over strategies."""

    def script(problem: Problem) -> Does[Purse]:
        return _run(problem, search, SEARCHED_EPOCHS)

    script.__doc__ = what
    return script


def _run(problem: Problem, train: Train, all_layers: float) -> Does[Purse]:
    plan = Plan(problem, all_layers=all_layers)
    yield from plan.until(_models(plan, train))
    yield from stages.predict(plan)
    yield from stages.refit(plan)
    yield from stages.finish(plan)
    return plan.purse


def _models(plan: Plan, train: Train) -> Steps:
    first = yield from stages.incumbent(plan)  # needs no profile, so that it stands a few seconds sooner
    yield from stages.profile(plan)
    length, rows = yield from stages.encoder_rows(plan)
    yield from more_linear(plan, first.facts["rows"], long=not length or plan.scratch is not None)
    if length:
        yield from stages.keep_refit(plan)
        yield from encoder(plan, rows, train)


def more_linear(plan: Plan, fitted: int, long: bool, tried: Collection[NgramFeatures] = ()) -> Steps:
    """The linear family on all rows, where `fitted` rows were not all, and with other features than those that were `tried`: all of
    them where no pretrained encoder is, else what is nearly free."""
    rows, features = plan.problem.rows["train"], plan.problem.linear
    if skipped := left_out(plan.problem.config, "linear"):
        yield from skipped
        return
    if fitted < rows:
        if plan.timed and plan.linear_s > (0.9 if long else 0.2) * plan.remaining:
            yield Skip(
                stage="linear",
                why=f"all {rows} rows take about {plan.linear_s:.0f} s of the {plan.remaining:.0f} s left",
            )
            return
        yield from plan.trial("linear", FitLinear(features=features[0]), f"all {rows} rows", share=0.5 * plan.remaining)
    for other in features[1:]:
        if other in tried:
            continue
        if plan.timed and plan.linear_s * 1.5 > (0.5 if long else 0.03) * plan.remaining:
            yield Skip(
                stage="linear",
                why=f"other features take about {1.5 * plan.linear_s:.1f} s each: more than they are worth here",
            )
            return
        share = (0.4 if long else 0.06) * plan.remaining
        yield from plan.trial("linear", FitLinear(features=other), "other features", share=share, stake=LONG_SHOT)


def encoder(plan: Plan, rows: int | None, train: Train) -> Steps:
    """Head, training, averages."""
    yield from stages.begin(plan, rows)
    if rows and plan.scratch is None:
        yield Skip(stage="trunk", why=stages.PARTIAL)
        return
    if scratch := plan.scratch:
        epochs = plan.epochs(plan.remaining, plan.depth)
        if epochs < scratch.least_epochs:
            why = f"an encoder from scratch would see {epochs:.1f} epochs (< {scratch.least_epochs:g})"
            yield Skip(stage="trunk", why=why)
            return
    if not (yield from worth_training(plan, plan.prior())):
        return
    state = yield from train(plan)
    if state is not None:
        yield from average(plan, state)
        yield from soup(plan)


def race_and_trunk(plan: Plan) -> Found:
    rate = yield from race_rates(plan, plan.prior(), plan.begins)
    if plan.target is not None:
        return (yield from legs(plan, {"optimizer.lr": rate}))
    return (yield from trunk(plan, plan.fine_tune(lr=rate, layers=plan.depth), plan.begins))
