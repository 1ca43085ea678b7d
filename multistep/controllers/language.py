"""The scripts for tasks whose answer is a text: what a language run tries, in the order of what it costs.

fixed: cheap writers, then one training with the given settings. race: probes of the learning rate before it. staged: cheap writers;
from random weights a warm-up-stable trunk whose end is kept (more budget goes on there) and a cool-down from it, pretrained weights
decay straight to zero; averages; ways of decoding; a mixture with the n-gram model. What stands stays unless it is beaten.
Sources: Hu et al. 2024 (MiniCPM), arXiv 2404.06395 (a stable trunk that cool-downs fork from); Bergsma et al. 2025, arXiv 2502.15938
(straight to zero, where the end is known).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal

from multistep.config import FitConfig
from multistep.controllers.diagnosing import WHY
from multistep.controllers.script import Ask, BasePlan, Reserve, Skip, Steps
from multistep.controllers.trunk import LEAST_UPDATES, averages
from multistep.metrics.texts import LANGUAGE_METRICS
from multistep.objectives import NextToken, Seq2Seq, Span
from multistep.optimizers.base import Rate, Regime
from multistep.predictors.decoding import Beam
from multistep.schedules import Constant, Linear, Schedule
from multistep.strategy import (
    Action,
    AsGiven,
    Decode,
    Diagnose,
    FitWriter,
    Mix,
    Profile,
    ReadTest,
    Recount,
    Shape,
    TrainWriter,
)
from multistep.tasks.writing import LOSSES, Writing
from multistep.types import Outcome, Spec, Unit, Verdict

WriterName = Literal["ngram", "copy", "lead", "nearest", "dictionary", "extract", "passage", "choose"]

PROBE_SHARE, PROBE_UPDATES = 0.05, 200  # of the race; a shorter probe from scratch says nothing
COOL_SHARE = 0.3  # of a training from scratch: decaying from the trunk's learning rate to zero
COOL_AGAIN = 0.15  # of what a trunk took that overfits: decaying from its best state
MOST_EPOCHS = 4.0  # of pretrained weights: fine-tuning has converged before
SMOOTHING = 0.1  # of labels, for targets that have many right wordings
FINISH_SHARE = 0.03  # of the budget: loading, judging, writing
PASSES_AFTER = (
    6.0  # what ways of decoding may take, as a multiple of writing the calibration rows greedily, kept for the end
)
A_BEAM = 2.0  # what a beam costs, greedy = 1, before the first beams are measured
SCRATCH_RATE = 6e-3  # muon's, from random weights: for 600 updates and more 2e-2 is too high (LOG.md, 2026-11-25)
SPANS_RATE, SPANS_HEAD = (
    1.5e-4,
    10.0,
)  # adamw's, where an encoder gets a new head for answers: 4e-5 is too low (LOG.md, 2026-11-25)
RECOUNT = 3.0  # times what counting train took: twice with more text, and judging


class LanguageProblem(Spec):
    """What a script knows before the first trial."""

    task: Writing
    metric: str
    config: FitConfig
    pretrained: Literal["", "decoder", "seq2seq", "encoder"] = ""  # what --model names
    regime: Regime = "scratch"
    rows: dict[str, int]  # by split
    bytes: dict[str, int]  # of right answers, by split
    budget: float
    unit: Unit


LanguageScript = Callable[[LanguageProblem], Steps]


class _Plan(BasePlan):
    """What is left, what things cost, and the trials so far."""

    def __init__(self, problem: LanguageProblem):
        super().__init__(problem.budget)
        self.problem = problem
        self.families: dict[str, str] = {}
        self.incumbent: dict[str, Any] = {}
        self.count_s = 0.0  # that counting train took
        self.reserved = 0.0  # for the end

    @property
    def timed(self) -> bool:
        return self.problem.unit == "seconds"

    def patience(self, stage: str, action: Action, commit: bool) -> int:
        return self.problem.config.patience if stage == "trunk" else 0

    def told(self, action: Action, outcome: Outcome) -> None:
        self.families, self.incumbent = dict(outcome.families), outcome.incumbent or {}

    def reserve(self, amount: float) -> Generator[Ask, Outcome | None, None]:
        """Keep so much for the end, in place of what was kept so far."""
        amount = round(max(0.0, amount) if self.timed else 0.0, 3)
        self.remaining, self.reserved = max(0.0, self.remaining + self.reserved - amount), amount
        yield Reserve(name="end", amount=amount)

    @property
    def shape(self) -> Shape | None:
        return Shape(**self.facts["shape"]) if self.facts.get("shape") else None

    def updates(self, amount: float) -> float:
        """How many updates `amount` of the budget buys."""
        match self.problem.unit:
            case "seconds":
                return amount * self.facts["tokens_s"] / self.facts["batch_tokens"]
            case "updates":
                return amount
            case "tokens":
                return amount / self.facts["batch_tokens"]

    def epochs(self, amount: float) -> float:
        return self.updates(amount) * self.facts["batch_tokens"] / max(1, self.facts["train_tokens"])

    def spare(self) -> float:
        """What training may take of what is left: the end needs to be judged, and the reservations are gone already."""
        if not self.timed:
            return self.remaining
        return max(0.0, self.remaining - 3 * self.facts["judge_s"] - FINISH_SHARE * self.problem.budget)

    def _prior(self, kind: str, rates: Mapping[Regime, Rate]) -> float:
        regime = self.problem.regime
        if kind == "muon" and regime == "scratch":
            return SCRATCH_RATE
        return SPANS_RATE if kind == "adamw" and self.facts.get("fresh_head") else rates[regime].prior

    def strategy(self, lr: float | None = None, schedule: Schedule | None = None) -> TrainWriter:
        c, shape = self.problem.config, self.shape
        assert shape is not None
        optimizer = c.optimizer if c.optimizer.kind != "auto" else c.optimizer.with_(kind=self.facts["optimizer"])
        rate = lr or c.optimizer.lr or self._prior(optimizer.kind, optimizer.member.rates)
        smoothing = c.label_smoothing if c.label_smoothing is not None else SMOOTHING
        match shape.reads:
            case "pairs":
                objective = Seq2Seq(label_smoothing=smoothing)
            case "spans":
                objective = Span()
            case _:
                objective = NextToken(label_smoothing=c.label_smoothing or 0.0)
        return TrainWriter(
            optimizer=optimizer.at(rate), objective=c.objective or objective, schedule=schedule or Linear(), shape=shape,
            batch_size=self.facts["batch_rows"], micro_batch=c.micro_batch, clip=c.clip, clip_z=c.clip_z,
            layer_decay=c.layer_decay, batch_growth=c.batch_growth, bf16=self.facts["bf16"],
            head_lr=SPANS_HEAD if self.facts.get("fresh_head") else 1.0,
        )  # fmt: skip


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


def _begin(plan: _Plan) -> Generator[Ask, Outcome | None, None]:
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


def _race(plan: _Plan) -> Generator[Ask, Outcome | None, float]:
    """Probes around the prior, each decayed to zero; judged by their losses on the same rows."""
    prior, c = plan.strategy().optimizer.lr, plan.problem.config
    share = PROBE_SHARE * plan.spare()
    if c.optimizer.lr is not None:
        yield Skip(stage="race", why=f"the learning rate was given: {prior:g}")
        return prior
    if plan.updates(share) < PROBE_UPDATES:
        why = f"a probe of {PROBE_SHARE:.0%} would be {plan.updates(share):.0f} updates (< {PROBE_UPDATES}): the prior {prior:g} is used"
        yield Skip(stage="race", why=why)
        return prior
    best_rate, best = prior, None
    for rate, why in (
        (prior, f"the prior learning rate {prior:.2g}"),
        (2 * prior, "twice that"),
        (prior / 2, "half of it"),
    ):
        if rate < prior and best_rate > prior:
            break
        told = yield from plan.trial(
            "race", plan.strategy(rate, Linear()), why, share=share, against=best, commit=False
        )
        if best is None or (told.ok and Verdict(**told.facts["against_verdict"]).accept):
            best_rate, best = rate, told.state
    return best_rate


def _train(plan: _Plan, rate: float | None, watch: bool) -> Generator[Ask, Outcome | None, str | None]:
    """The trunk and what comes after it; the state of the end."""
    share, p = plan.spare(), plan.problem
    if p.regime != "scratch" and plan.epochs(share) > MOST_EPOCHS:
        share *= MOST_EPOCHS / plan.epochs(share)
    if plan.updates(share) < LEAST_UPDATES:
        yield Skip(stage="trunk", why=f"{plan.updates(share):.0f} updates fit into what is left (< {LEAST_UPDATES})")
        return None
    about = f"about {plan.updates(share):.0f} updates, {plan.epochs(share):.1f} epochs, {plan.facts['choice']}"
    if p.regime != "scratch" or not watch:
        action = plan.strategy(rate)
        why = f"lr {action.optimizer.lr:.2g} to zero, {about}"
        told = yield from plan.trial("trunk", action, why, share=share, watch=watch)
    else:
        action = plan.strategy(rate, Constant(warmup=0.03))
        why = f"lr {action.optimizer.lr:.2g} and staying there, {about}, the cool-down included"
        told = yield from plan.trial("trunk", action, why, share=(1 - COOL_SHARE) * share, commit=False, watch=True)
        if told.ok and "diagnosis" not in told.facts and "stopped" not in told.facts:
            return (
                yield from _cool(
                    plan, told.state, action, COOL_SHARE * share, "the rest: its learning rate decays to zero"
                )
            )
    if "diagnosis" in told.facts or "stopped" in told.facts:
        rest = min(plan.spare(), COOL_AGAIN * told.facts["best_progress"] * share)
        why = "from the best state, its learning rate decaying to zero: more training would not help"
        action = action.with_(optimizer=action.optimizer.with_(lr=max(1e-9, told.facts["best_lr"])))
        return (yield from _cool(plan, told.state, action, rest, why))
    return told.state


def _cool(
    plan: _Plan, state: str | None, action: TrainWriter, share: float, why: str
) -> Generator[Ask, Outcome | None, str | None]:
    share = min(share, plan.spare()) if plan.timed else share
    if plan.updates(share) < 1:
        yield Skip(stage="cool-down", why="no time is left for it")
        return state
    cooled = action.with_(schedule=Linear(warmup=0.0))
    return (yield from plan.trial("cool-down", cooled, why, start=state, share=share)).state


def _averages(plan: _Plan, state: str) -> Generator[Ask, Outcome | None, None]:
    needed = 2 * plan.facts["judge_s"]
    yield from averages(plan, state, needed, plan.timed and plan.remaining < needed)


def _decode(plan: _Plan) -> Generator[Ask, Outcome | None, None]:
    """Beams for what is written from pairs and prompts; a mixture for a language model of characters."""
    facts = plan.facts
    yield from plan.reserve(facts["test_s"])
    model, ngram = plan.incumbent.get("kind") == "model", plan.families.get("ngram")
    if plan.problem.task.kind == "lm":
        if "model" in plan.families and ngram is not None and facts["characters"]:
            why, model_state = "the two models make different mistakes", plan.families["model"]
            yield from plan.trial("mix", Mix(ngram=ngram), why, start=model_state)
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
        told = yield from plan.trial("decode", Decode(decoding=beam), f"{width} beams, length penalty {penalty:g}")
        if told.ok:
            beam_s = told.cost.wall_s / width
        if plan.incumbent["decoding"] == beam.model_dump():  # it writes the test
            yield from plan.reserve(width * beam_s * facts["test_rows"] / max(1, calibration))


def _recount(plan: _Plan) -> Generator[Ask, Outcome | None, None]:
    """Nothing is decided after this, so the held-out text is free to be counted."""
    if plan.incumbent.get("kind") not in ("ngram", "mixed"):
        return
    needed = RECOUNT * plan.count_s + plan.facts["calibration_s"]
    if plan.timed and plan.remaining < needed:
        yield Skip(stage="recount", why=f"{plan.remaining:.1f} s are left, counting again takes about {needed:.1f} s")
        return
    yield from plan.trial("recount", Recount(), "the held-out text counted too: nothing is left to decide with it")


def _finish(plan: _Plan) -> Generator[Ask, Outcome | None, None]:
    yield from _recount(plan)
    yield from plan.trial("diagnose", Diagnose(), WHY)
    if plan.problem.rows["test"]:
        yield from plan.trial("test", ReadTest(), "read once, at the end")


def _reserve(plan: _Plan) -> Generator[Ask, Outcome | None, None]:
    """Time for what comes after training."""
    if not plan.timed or plan.shape is None:
        return
    f = plan.facts
    written = plan.problem.task.writes and f["reads"] != "spans"
    decoding = (PASSES_AFTER if written else 1.0) * f["calibration_s"]
    counting = RECOUNT * plan.count_s  # 0 where nothing was counted
    yield from plan.reserve(min(f["test_s"] + decoding + counting, 0.3 * plan.remaining))


def _script(race: bool, whole: bool) -> LanguageScript:
    def script(problem: LanguageProblem) -> Steps:
        plan = _Plan(problem)
        yield from _begin(plan)
        if plan.shape is None:
            yield Skip(stage="trunk", why=plan.facts["why_no_model"])
        else:
            yield from _reserve(plan)
            rate = (yield from _race(plan)) if race else None
            state = yield from _train(plan, rate, watch=whole)
            if whole and state is not None:
                yield from _averages(plan, state)
            if whole:
                yield from _decode(plan)
        yield from _finish(plan)

    return script


def go_on(problem: LanguageProblem) -> Steps:
    """A finished run is given more budget: the trunk goes on where it was, with another cool-down from its new end."""
    plan = _Plan(problem)
    plan.facts = (yield from plan.trial("profile", Profile(), "throughput on this machine")).facts
    trunk = plan.families.get("trunk", plan.families.get("model"))
    if plan.shape is None or trunk is None:
        yield Skip(stage="trunk", why=plan.facts["why_no_model"] or "no training stands that could go on")
    else:
        yield from _reserve(plan)
        share, action = plan.spare(), plan.strategy(None, Constant(warmup=0.0))
        if plan.updates(share) < LEAST_UPDATES:
            yield Skip(
                stage="trunk", why=f"{plan.updates(share):.0f} updates fit into what is left (< {LEAST_UPDATES})"
            )
        else:
            why = f"on from {trunk}, about {plan.epochs(share):.1f} epochs, the cool-down included"
            told = yield from plan.trial(
                "trunk", action, why, start=trunk, share=(1 - COOL_SHARE) * share, commit=False, watch=True
            )
            state = yield from _cool(plan, told.state, action, COOL_SHARE * share, "its learning rate decays to zero")
            if state is not None:
                yield from _averages(plan, state)
        yield from _decode(plan)
    yield from _finish(plan)


LANGUAGE_CONTROLLERS: Mapping[str, LanguageScript] = {
    "staged": _script(race=True, whole=True), "race": _script(race=True, whole=False), "fixed": _script(race=False, whole=False),
}  # fmt: skip


def higher_is_better(metric: str) -> bool:
    return LANGUAGE_METRICS[metric].higher_is_better
