"""The stage before the test: what is the matter with the run, as far as the clock can pay for finding out.

What trials left in the journal costs nothing to look at. What rows of train would be called otherwise, and what more of them would
bring, is measured with a convex model: its price is set aside before training where it is a small share of the budget, and else
measured only in time that is left over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from multistep.controllers.script import Reserve, Skip, Steps
from multistep.diagnosis.rows import MOST_ROWS
from multistep.diagnosis.training import GAP_ROWS
from multistep.strategy import Diagnose

if TYPE_CHECKING:
    from multistep.controllers.plan import Plan

By = Literal["head", "linear"]

SHARE = 0.03  # of the budget: what may be set aside
WHY = "what is the matter, and what to do next"
RIDGE_FLOPS = 3e10  # a second; the fits of `evidence.by_head` in double precision, on one core
SCORE_S = 6e-7  # for each row and output: scores to probabilities
OVERHEAD_S = 0.3  # laws, resampling, words in another order
FOLDS_PATHS = 4.0  # what `evidence.by_linear` takes, in paths of strengths


def has_features(plan: Plan) -> bool:
    """Whether a head is solved on a pretrained encoder's features."""
    return plan.facts["encoder"] != "none" and plan.scratch is None and plan.max_length > 0


def measured_by(plan: Plan) -> By:
    """The convex model of the family that stands."""
    stands = plan.incumbent is not None and "encoder" in plan.incumbent.models()
    return "head" if stands and has_features(plan) else "linear"


def price_s(plan: Plan, by: By) -> float:
    """Seconds that measuring takes, about; 0 under budgets that do not count them."""
    if not plan.timed:
        return 0.0
    rows, seconds = plan.problem.rows["train"], OVERHEAD_S
    if plan.max_length:
        seconds += plan.encode_s(min(GAP_ROWS, rows))
    if by == "linear":
        return seconds + FOLDS_PATHS * plan.linear_s
    width, outputs, rows = plan.facts["hidden"], plan.problem.n_outputs, min(rows, MOST_ROWS)
    return seconds + 2 * rows * width * (6 * width + 10 * outputs) / RIDGE_FLOPS + SCORE_S * rows * outputs


def set_aside(plan: Plan) -> Steps:
    """Keep the price, where it is a small share of the budget: before training takes what there is."""
    price = price_s(plan, "head" if has_features(plan) else "linear")
    if plan.timed and price <= SHARE * plan.problem.budget:
        plan.kept_s = round(min(price, plan.remaining), 2)
        plan.remaining = max(0.0, plan.remaining - plan.kept_s)
        yield Reserve(name="diagnose", amount=plan.kept_s)


def diagnose(plan: Plan) -> Steps:
    """Measured where that can be paid; what is in the journal is looked at always."""
    if plan.kept_s:
        yield Reserve(name="diagnose", amount=0.0)
        plan.remaining, plan.kept_s = plan.remaining + plan.kept_s, 0.0
    by = measured_by(plan)
    price = price_s(plan, by)
    if price <= plan.remaining:
        how = "a convex head on the frozen encoder" if by == "head" else "the linear model, four times"
        yield from plan.trial("diagnose", Diagnose(by=by), f"{WHY}: labels and rows by {how}")
        return
    yield Skip(
        stage="diagnose",
        why=f"measuring labels and rows takes about {price:.1f} s of the {plan.remaining:.1f} s left: only the journal is looked at",
    )
    yield from plan.trial("diagnose", Diagnose(), WHY)
