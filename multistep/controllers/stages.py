"""The stages that several controllers share: the first models, the head, prediction and the end of a run."""

from __future__ import annotations

from typing import Any

from multistep.controllers.diagnosing import diagnose, set_aside
from multistep.controllers.plan import Plan
from multistep.controllers.script import HARM, Does, Reserve, Skip, Step, Steps, left_out
from multistep.metrics.power import FEWEST_ROWS, LARGE
from multistep.predictors import Single
from multistep.strategy import FitHead, FitLinear, Predict, Profile, ReadTest, Refit

INCUMBENT_ROWS = (
    5000  # of the first model at least: 2 s on long reviews, 0.896 where 2,000 rows (1.3 s) give 0.873 (LOG.md)
)
REFIT = 2.2  # times what the linear model took: twice the same, with a few rows more
REFIT_SHARE = 0.03  # of the budget: what is set aside for it; else it takes what is left over
PARTIAL = "not even the frozen encoder can see all of train in this time"


def profile(plan: Plan) -> Step:
    outcome = yield from plan.trial(
        "profile", Profile(), "lengths and throughput on this machine", share=0.02 * plan.problem.budget
    )
    plan.facts = outcome.facts
    return outcome


def incumbent(plan: Plan) -> Step:
    """The failure-proof first model: a linear one on n-gram counts, on a subsample when the data is large."""
    rows = plan.problem.rows["train"]
    share = 0.05 * plan.problem.budget if plan.timed else 0.0
    take = None
    if plan.timed and plan.linear_s > share:
        take = max(INCUMBENT_ROWS, int(rows * share / plan.linear_s))
        take = None if take >= rows else take
    why = "the first servable model" + (f", on {take} of {rows} rows to stay within 5 % of the budget" if take else "")
    action = FitLinear(features=plan.problem.linear[0], max_rows=take)
    outcome = yield from plan.trial("incumbent", action, why, share=share)
    if plan.timed and take is None:
        plan.linear_s = max(0.2, outcome.cost.wall_s)
    elif plan.timed and take:
        plan.linear_s = max(0.2, outcome.cost.wall_s * rows / take)
    return outcome


def encoder_rows(plan: Plan) -> Does[tuple[int, int | None]]:
    """Choose truncation and rows for the encoder, and reserve the end of the run; (0, None) and a Skip when it cannot be."""
    if plan.facts["encoder"] == "none":
        yield Skip(stage="head", why=plan.facts["why_no_encoder"])
        length, rows = 0, None
    else:
        length, rows = plan.choose_length()
        if not length:
            need = plan.encode_s(sum(plan.problem.rows.values()), 128)
            why = f"encoding all texts at 128 tokens takes about {need:.0f} s of the {plan.remaining:.0f} s left"
            yield Skip(stage="head", why=f"{why}, and cut further the encoder would read too little")
    plan.max_length = length
    if plan.timed:
        kept = round(plan.finish_s(with_encoder=bool(length)), 2)
        yield Reserve(name="finish", amount=kept)
        plan.remaining = max(0.0, plan.remaining - kept)
    yield from set_aside(plan)
    return length, rows


def head(plan: Plan, rows: int | None, cut: int) -> Step:
    config = plan.problem.config
    cut = 0 if plan.reads_ids else cut
    action = FitHead(max_length=plan.max_length, max_rows=rows, bf16=plan.facts["precision"] == "bf16", cut=cut)
    why = f"a convex head on the frozen encoder, texts cut at {plan.max_length} tokens"
    if rows:
        why += f", {rows} rows of train (what the clock can pay)"
    if config.max_length:
        why += " (max_length was given)"
    return (yield from plan.trial("head", action, why, share=0.5 * plan.remaining if plan.timed else 0.0))


def begin(plan: Plan, rows: int | None) -> Steps:
    """The head of a pretrained encoder, its hidden states kept below the layers that the time after it can train; and how many those are."""
    if plan.scratch is None:
        layers, _ = plan.layers(max(0.0, plan.remaining - plan.encode_s(rows or plan.problem.rows["train"])))
        plan.begins = (yield from head(plan, rows, cut=plan.facts["n_layers"] - layers)).state
    plan.choose_depth()


def finish(plan: Plan) -> Steps:
    """Say what is the matter, give the reservation back and read test, once."""
    yield from diagnose(plan)
    if plan.timed:
        yield Reserve(name="finish", amount=0.0)
    if plan.problem.rows["test"]:
        yield from plan.trial("test", ReadTest(), "read once, at the end")
    else:
        yield Skip(stage="test", why="there is no test split")


def keep_refit(plan: Plan) -> Steps:
    """Set aside what a refit takes, where it is a small share of the budget: before training takes what there is."""
    needed = refit_s(plan)
    if 0 < needed <= REFIT_SHARE * plan.problem.budget and not left_out(plan.problem.config, "refit"):
        plan.refit_s = round(min(needed, plan.remaining), 2)
        plan.remaining -= plan.refit_s
        yield Reserve(name="refit", amount=plan.refit_s)


def refit_s(plan: Plan) -> float:
    """Seconds of solving the best linear model twice again; 0 where there is none on all of train, or they do not count."""
    _, took = plan.solved.get(plan.families.get("linear", ""), (None, 0.0))
    return REFIT * took if plan.timed else 0.0


def refit(plan: Plan) -> Steps:
    """The linear model that is served, solved again with the rows that judged it: after them nothing is decided."""
    if plan.refit_s:
        yield Reserve(name="refit", amount=0.0)
        plan.remaining, plan.refit_s = plan.remaining + plan.refit_s, 0.0
    of = plan.families.get("linear", "")
    served = plan.incumbent is not None and "linear" in plan.incumbent.models()
    if not served or of not in plan.solved:
        return
    if skipped := left_out(plan.problem.config, "refit"):
        yield from skipped
        return
    rows, needed = plan.problem.rows, refit_s(plan)
    if min(rows["control"], rows["calibration"]) < FEWEST_ROWS:
        yield Skip(
            stage="refit", why=f"{rows['calibration']} calibration rows are too few to see harm (< {FEWEST_ROWS})"
        )
    elif plan.timed and plan.remaining < needed:
        yield Skip(
            stage="refit", why=f"{plan.remaining:.1f} s are left, solving {of} twice again takes about {needed:.1f} s"
        )
    else:
        more, (fit, _) = rows["control"] + rows["calibration"], plan.solved[of]
        why = f"{of} with {more:,} validation rows in train: taken unless control rows in train make it worse on calibration rows"
        yield from plan.trial("refit", Refit(of=of, fit=fit), why, judges="", stake=HARM)


def predict(plan: Plan) -> Steps:
    """Blend of the families, calibration, thresholds: each around what is committed, on the calibration split."""
    if skipped := left_out(plan.problem.config, "predict"):
        yield from skipped
        return
    rows = plan.problem.rows["calibration"]
    if rows < FEWEST_ROWS:
        why = f"{rows} calibration rows are too few to decide on (< {FEWEST_ROWS}: only a gain of {LARGE:g} would be seen)"
        yield Skip(stage="predict", why=why)
        return
    if len(plan.families) > 1:
        yield from _predict(plan, "blend", "the families make different mistakes")
    if plan.problem.task == "regress":
        yield from _predict(plan, "calibrate", "scale and offset of the answers")
        return
    yield from _predict(plan, "calibrate", "probabilities that mean what they say")
    if plan.problem.metric not in ("accuracy", "log_loss", "auroc", "calibration_error"):
        yield from _predict(plan, "thresholds", f"decisions for {plan.problem.metric}")


def _predict(plan: Plan, what: Any, why: str) -> Step:
    base = plan.incumbent or Single(model="linear")
    action = Predict(what=what, base=base)
    return (yield from plan.trial("predict", action, f"{what}: {why}", judges="calibration"))
