"""The scripts for tasks whose answer is a text: what a language run tries, in the order of what it costs.

fixed: cheap writers, then one training with the given settings. race: probes of the learning rate before it. staged: cheap writers;
from random weights a warm-up-stable trunk whose end is kept (more budget goes on there) and a cool-down from it, pretrained weights
decay straight to zero; averages; ways of decoding; a mixture with the n-gram model. The searches (searches.py) stand where race and
trunk do. What stands stays unless it is beaten.
Sources: Hu et al. 2024 (MiniCPM), arXiv 2404.06395 (a stable trunk that cool-downs fork from); Bergsma et al. 2025, arXiv 2502.15938
(straight to zero, where the end is known).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from multistep.controllers.diagnosing import WHY
from multistep.controllers.language_plan import PROBE_UPDATES, LanguageProblem, Plan, fewest
from multistep.controllers.members import Found, legs
from multistep.controllers.script import Does, Skip, Steps, beats, left_out
from multistep.controllers.searches import SEARCHES
from multistep.controllers.space import Point
from multistep.controllers.trunk import LEAST_UPDATES, averages
from multistep.controllers.wealth import Purse
from multistep.predictors.decoding import Beam
from multistep.schedules import Constant, Linear
from multistep.standing import diverged
from multistep.strategy import AsGiven, Decode, Diagnose, FitWriter, Mix, Profile, ReadTest, Recount, TrainWriter
from multistep.tasks.writing import LOSSES
from multistep.types import Outcome

WriterName = Literal["ngram", "copy", "lead", "nearest", "dictionary", "extract", "passage", "choose"]
LanguageScript = Callable[[LanguageProblem], Does[Purse]]

PROBE_SHARE = 0.05  # of what is left, for each probe of the race
COOL_SHARE = 0.3  # of a training from scratch: decaying from the trunk's learning rate to zero
COOL_AGAIN = 0.15  # of what a trunk took that overfits: decaying from its best state
MOST_EPOCHS = 4.0  # of pretrained weights: fine-tuning has converged before
PASSES_AFTER = (
    6.0  # what ways of decoding may take, as a multiple of writing the calibration rows greedily, kept for the end
)
A_BEAM = 2.0  # what a beam costs, greedy = 1, before the first beams are measured
MIX = 3.0  # what a mixture takes, as a multiple of judging the calibration rows: both models, and the weights
RECOUNT = 3.0  # times what counting train took: twice with more text, and judging


# ---------------------------------------------------------------------------------------------- stages


def cheap_writers(problem: LanguageProblem) -> list[tuple[WriterName, int, str]]:
    """(writer, count, why), the cheapest first."""
    match problem.task.kind, problem.task.answers:
        case "lm", _:
            return [("ngram", 0, "the first servable model: counts of bytes")]
        case "translate", _:
            return [("copy", 0, "the first servable model"), ("dictionary", 0, "word by word"),
                    ("nearest", 0, "the translation of the most similar source")]  # fmt: skip
        case "summarize", _:
            return [("lead", 1, "the first servable model: the first sentence"), ("lead", 2, "the first two"),
                    ("lead", 3, "the first three"), ("nearest", 0, "the summary of the most similar text"),
                    ("extract", 0, "the sentences that a convex ranking likes best")]  # fmt: skip
        case "answer", "passage":
            return [("lead", 1, "the first servable model: the first sentence of the passage"),
                    ("passage", 0, "a span that a convex ranking likes best")]  # fmt: skip
        case "answer", "choices":
            return [("choose", 0, "the choice that a convex ranking likes best")]
        case "chat", _ if problem.metric in LOSSES and problem.pretrained:
            return []  # the model as it was given is the first that can be served
        case "chat", _ if problem.metric in LOSSES:
            return [("ngram", 0, "the first servable model: counts of bytes")]
        case _:
            return [("nearest", 0, "the answer to the most similar question of train")]


def _begin(plan: Plan) -> Steps:
    why = "tokenizer, lengths and throughput on this machine"
    plan.facts = (yield from plan.trial("profile", Profile(), why)).facts
    for n, (writer, count, why) in enumerate(cheap_writers(plan.problem)):
        told = yield from plan.trial("writer" if n else "incumbent", FitWriter(writer=writer, count=count), why)
        if writer == "ngram":
            plan.count_s = told.cost.wall_s
    if plan.problem.pretrained and plan.shape is not None and plan.facts["given"]:
        first = not cheap_writers(plan.problem)
        why = "the first servable model: the pretrained one as it is" if first else "the pretrained model as it is"
        yield from plan.trial("incumbent" if first else "given", AsGiven(shape=plan.shape), why)


def _race(plan: Plan) -> Does[float]:
    """Probes around the prior, each decayed to zero; judged by their losses on the same rows."""
    prior, c = plan.strategy().optimizer.lr, plan.problem.config
    if skipped := left_out(c, "race"):
        yield from skipped
        return prior
    share = PROBE_SHARE * plan.spare()
    if c.optimizer.lr is not None:
        yield Skip(stage="race", why=f"the learning rate was given: {prior:g}")
        return prior
    if (n := plan.deciding) < (least := fewest(plan.problem.metric)):
        yield Skip(stage="race", why=f"{n} control records (< {least}) cannot tell rates apart: the prior {prior:g}")
        return prior
    if plan.updates(share) < PROBE_UPDATES:
        why = f"a probe of {PROBE_SHARE:.0%} would be {plan.updates(share):.0f} updates (< {PROBE_UPDATES}): the prior {prior:g} is used"
        yield Skip(stage="race", why=why)
        return prior
    best_rate: float = prior
    best: Outcome | None = None
    for rate, why in (
        (prior, f"the prior learning rate {prior:.2g}"),
        (2 * prior, "twice that"),
        (prior / 2, "half of it"),
    ):
        if rate < prior and best_rate > prior:
            break
        against = None if best is None else best.state
        told = yield from plan.trial(
            "race", plan.strategy(rate, Linear()), why, share=share, against=against, commit=False
        )
        if best is None or beats(told, best):
            best_rate, best = rate, told
    return best_rate


def _train(plan: Plan, rate: float | None, watch: bool) -> Does[str | None]:
    """The trunk and what comes after it; the state of the end."""
    share, p = plan.spare(), plan.problem
    if p.regime != "scratch" and plan.epochs(share) > MOST_EPOCHS:
        share *= MOST_EPOCHS / plan.epochs(share)
    if plan.updates(share) < LEAST_UPDATES:
        yield Skip(stage="trunk", why=f"{plan.updates(share):.0f} updates fit into what is left (< {LEAST_UPDATES})")
        return None
    about = f"about {plan.updates(share):.0f} updates, {plan.epochs(share):.1f} epochs, {plan.facts['choice']}"
    given = p.config.schedule != Linear()
    if p.regime != "scratch" or not watch or given:
        action = plan.strategy(rate)
        course = f"by the schedule {p.config.schedule.kind}" if given else "to zero"
        why = f"lr {action.optimizer.lr:.2g} {course}, {about}"
        told = yield from plan.trial("trunk", action, why, share=share, watch=watch)
        return (yield from _after(plan, told, action, share))
    action = plan.strategy(rate, Constant(warmup=0.03))
    why = f"lr {action.optimizer.lr:.2g} and staying there, {about}, the cool-down included"
    told = yield from plan.trial("trunk", action, why, share=(1 - COOL_SHARE) * share, commit=False, watch=True)
    return (yield from _after(plan, told, action, share, "the rest: its learning rate decays to zero"))


def _after(plan: Plan, told: Outcome, action: TrainWriter, share: float, why: str = "") -> Does[str | None]:
    """What follows a trunk; the state of the end. `share`: of the trunk and what follows; `why`: of the cool-down that one has coming which
    stayed at its rate. None where it diverged: it is where it began then, and there is nothing to cool down from or to average."""
    facts = told.facts
    if diverged(told):
        yield Skip(stage="cool-down", why="the training diverged, and stands where it began: no cool-down, no averages")
        return None
    if "diagnosis" in facts or "stopped" in facts:
        rest = min(plan.spare(), COOL_AGAIN * facts["best_progress"] * share)
        why = "from the best state, its learning rate decaying to zero: more training would not help"
        action = action.with_(optimizer=action.optimizer.with_(lr=max(1e-9, facts["best_lr"])))
        return (yield from _cool(plan, told.state, action, rest, why))
    if why and told.ok:
        return (yield from _cool(plan, told.state, action, COOL_SHARE * share, why))
    return told.state


def _cool(plan: Plan, state: str | None, action: TrainWriter, share: float, why: str) -> Does[str | None]:
    share = min(share, plan.spare()) if plan.timed else share
    if plan.updates(share) < 1:
        yield Skip(stage="cool-down", why="no time is left for it")
        return state
    cooled = action.with_(schedule=Linear(warmup=0.0))
    return (yield from plan.trial("cool-down", cooled, why, start=state, share=share)).state


def _averages(plan: Plan, state: str) -> Steps:
    if skipped := left_out(plan.problem.config, "average"):
        yield from skipped
        return
    needed = 2 * plan.facts["judge_s"]
    yield from averages(plan, state, needed, plan.timed and plan.remaining < needed)


def _decode(plan: Plan) -> Steps:
    """Beams for what is written from pairs and prompts; a mixture for a language model of characters."""
    facts = plan.facts
    yield from plan.reserve(facts["test_s"])
    if skipped := left_out(plan.problem.config, "predict"):
        yield from skipped
        return
    model, ngram = plan.incumbent.get("kind") == "model", plan.families.get("ngram")
    if plan.problem.task.kind == "lm":
        if "model" in plan.families and ngram is not None and facts["characters"]:
            why, model_state = "the two models make different mistakes", plan.families["model"]
            yield from plan.trial("mix", Mix(ngram=ngram), why, start=model_state, judges="calibration")
        return
    if not model or facts["reads"] == "spans" or plan.problem.metric in LOSSES:
        return
    calibration = min(facts["judged_rows"], plan.problem.rows["calibration"])
    beam_s = A_BEAM * facts["calibration_s"]  # of the calibration rows
    for beams, penalty in ((4, 1.0), (8, 1.0), (4, 1.5)):
        if beams == 8 and plan.incumbent["decoding"]["kind"] != "beam":
            yield Skip(stage="decode", why="4 beams did not help, so 8 are not tried")
            break
        width = plan.incumbent["decoding"].get("beams", beams) if penalty != 1.0 else beams
        test_s = max(plan.reserved, width * beam_s * facts["test_rows"] / max(1, calibration))
        needed = width * beam_s + test_s - plan.reserved
        if plan.timed and plan.remaining < needed:
            yield Skip(stage="decode", why=f"{plan.remaining:.0f} s are left, {width} beams take about {needed:.0f} s")
            continue
        beam = Beam(beams=width, length_penalty=penalty, max_new_tokens=facts["new_tokens"])
        if plan.incumbent["decoding"] == beam.model_dump():  # of a run that was given more
            continue
        why = f"{width} beams, length penalty {penalty:g}"
        told = yield from plan.trial("decode", Decode(decoding=beam), why, judges="calibration")
        if told.ok:
            beam_s = told.cost.wall_s / width
        if plan.incumbent["decoding"] == beam.model_dump():  # it writes the test
            yield from plan.reserve(width * beam_s * facts["test_rows"] / max(1, calibration))


def _recount(plan: Plan) -> Steps:
    """Nothing is decided after this, so the held-out text is free to be counted."""
    if plan.incumbent.get("kind") not in ("ngram", "mixed"):
        return
    needed = RECOUNT * plan.count_s + plan.facts["calibration_s"]
    if plan.timed and plan.remaining < needed:
        yield Skip(stage="recount", why=f"{plan.remaining:.1f} s are left, counting again takes about {needed:.1f} s")
        return
    why = "the held-out text counted too: nothing is left to decide with it"
    yield from plan.trial("recount", Recount(), why, judges="calibration")


def _finish(plan: Plan) -> Steps:
    yield from _recount(plan)
    yield from plan.trial("diagnose", Diagnose(), WHY)
    if plan.problem.rows["test"]:
        yield from plan.trial("test", ReadTest(), "read once, at the end")


def _reserve(plan: Plan) -> Steps:
    """Time for what comes after training."""
    if not plan.timed or plan.shape is None:
        return
    f = plan.facts
    written = plan.problem.task.writes and f["reads"] != "spans"
    decoding = (PASSES_AFTER if written else MIX if plan.count_s else 1.0) * f["calibration_s"]
    counting = RECOUNT * plan.count_s + f["calibration_s"] if plan.count_s else 0.0
    yield from plan.reserve(min(f["test_s"] + decoding + counting, 0.3 * plan.remaining))


def _script(train: Callable[[Plan], Found], whole: bool) -> LanguageScript:
    """`train`: what stands between the cheap writers and prediction. `whole`: averages and ways of decoding too."""

    def script(problem: LanguageProblem) -> Does[Purse]:
        plan = Plan(problem)
        yield from plan.until(_models(plan, train, whole))
        if whole and plan.shape is not None:
            yield from _decode(plan)
        yield from _finish(plan)
        return plan.purse

    return script


def _models(plan: Plan, train: Callable[[Plan], Found], whole: bool) -> Steps:
    yield from _begin(plan)
    if plan.shape is None:
        yield Skip(stage="trunk", why=plan.facts["why_no_model"])
        return
    yield from _reserve(plan)
    state = yield from train(plan)
    if whole and state is not None:
        yield from _averages(plan, state)


def _staged(plan: Plan) -> Found:
    return (yield from _raced(plan, watch=True))


def _raced(plan: Plan, watch: bool = False) -> Found:
    rate = yield from _race(plan)
    if plan.target is not None:
        return (yield from legs(plan, {"optimizer.lr": rate}))
    return (yield from _train(plan, rate, watch=watch))


def _fixed(plan: Plan) -> Found:
    return (yield from _train(plan, None, watch=False))


def go_on(problem: LanguageProblem, purse: Purse | None = None) -> Does[Purse]:
    """A finished run is given more budget: the trunk goes on where it was, with another cool-down from its new end; where nothing was
    trained, what the run would have trained. `purse`: what the run has left of its wealth."""
    plan = Plan(problem, purse)
    yield from plan.until(_gone_on(plan))
    if plan.shape is not None and {"trunk", "model"} & set(plan.families):
        yield from _decode(plan)
    yield from _finish(plan)
    return plan.purse


def _gone_on(plan: Plan) -> Steps:
    if plan.timed:
        yield from plan.reserve(0.0)  # what the run has kept for an end that is past
    plan.facts = (yield from plan.trial("profile", Profile(), "throughput on this machine")).facts
    plan.count_s = plan.facts.get("count_s", 0.0)
    if plan.shape is None:
        yield Skip(stage="trunk", why=plan.facts["why_no_model"])
        return
    beams = (plan.incumbent.get("decoding") or {}).get("beams", 0)  # judged as they are written
    plan.facts = {**plan.facts, "judge_s": max(1.0, A_BEAM * beams) * plan.facts["judge_s"]}
    yield from _reserve(plan)
    if (found := plan.facts.get("trained")) is None:
        state = yield from _TRAININGS[plan.problem.config.controller](plan)
    else:
        state = yield from _on_from(plan, found["state"], found["settings"])
    if state is not None:
        yield from _averages(plan, state)


def _on_from(plan: Plan, start: str, settings: Point) -> Found:
    """From a trained state, at the settings that a race or a search had found for it."""
    point = {axis.path: settings[axis.path] for axis in plan.space().axes if axis.path in settings}
    if plan.target is not None:
        return (yield from legs(plan, point, start))
    share, action = plan.spare(), plan.at(point, Constant(warmup=0.0))
    if plan.updates(share) < LEAST_UPDATES:
        yield Skip(stage="trunk", why=f"{plan.updates(share):.0f} updates fit into what is left (< {LEAST_UPDATES})")
        return None
    epochs = f"about {plan.epochs(share):.1f} epochs"
    why = f"on from {start}, lr {action.optimizer.lr:.2g}, {epochs}, the cool-down included"
    kept = (1 - COOL_SHARE) * share
    told = yield from plan.trial("trunk", action, why, start=start, share=kept, commit=False, watch=True)
    return (yield from _after(plan, told, action, share, "its learning rate decays to zero"))


_TRAININGS: Mapping[str, Callable[[Plan], Found]] = {
    "staged": _staged, "race": _raced, "fixed": _fixed, **{name: search for name, (search, _) in SEARCHES.items()},
}  # fmt: skip
LANGUAGE_CONTROLLERS: Mapping[str, LanguageScript] = {
    name: _script(train, whole=name not in ("race", "fixed")) for name, train in _TRAININGS.items()
}
