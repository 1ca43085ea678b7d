"""The script that tunes how a finished model writes: what stands is measured, then a fixed ladder from the cheap to the dear, then what
Optuna proposes, as long as the budget lasts.

Every candidate is compared with what stands then, on the same records, and pays for the look (`Wealth`: what is most likely to help comes
first, and every look that finds nothing makes the next one harder). A candidate whose cost what is left cannot pay is skipped.
Engines come first, since what is faster makes all that follows cheaper: those that write what our own writes, or nearly.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from multistep.controllers.choices import CHOOSERS, Proposals
from multistep.controllers.script import BasePlan, Does, Skip, Steps
from multistep.controllers.ways import Family, Space, limits_of, neighbours, suggested
from multistep.metrics.power import FEWEST_ROWS
from multistep.metrics.texts import LANGUAGE_METRICS
from multistep.policy import Limit
from multistep.predictors.best_of import BestOf
from multistep.predictors.decoding import Beam, Greedy, Sample
from multistep.predictors.draft_revise import DraftRevise
from multistep.predictors.few_shot import FewShot
from multistep.predictors.mbr import Mbr, Utility
from multistep.predictors.vote import Vote
from multistep.predictors.ways import Way, one_text, plain, read_way, texts, words
from multistep.strategy import Action, Profile, TryWay
from multistep.tasks.writing import Writing
from multistep.types import Outcome, Spec

CHEAPER = ("engine",)  # stages whose candidates are taken for what they save
WIDTHS = (2, 4, 8)  # of beams
PENALTIES = (0.6, 1.4)  # of length, beside 1, for the best width
DRAWS, WARM, COOL = (
    16,
    0.7,
    0.5,
)  # candidates of minimum Bayes risk and their temperature; best of n wants likelier ones
SHOTS = 4  # examples at most
SEARCHED = 8  # candidates of the sampler at most: each one more makes all of them harder to take
AGAIN = 20  # asks in a row that give what was tried already: the space is used up
A_TEXT = 0.5  # what one more text for a request costs, the first = 1, before one was measured
MARGIN = 1.2  # what is begun has to end
_UTILITIES: dict[str, Utility] = {
    "bleu": "bleu", "chrf": "chrf", "rouge1": "rougeL", "rouge2": "rougeL", "rougeL": "rougeL", "f1": "f1",
}  # fmt: skip

Try = Does[Outcome | None]


class DecodingProblem(Spec):
    """What the script knows before the first trial."""

    task: Writing
    metric: str
    default: Way  # that stands
    engine: dict[str, Any] = Field(default_factory=dict)  # that writes as it stands; empty: our own
    prompts: bool  # whether the model reads prompts
    examples: int  # records of train that prompts could show
    limit: Limit | None
    budget: float  # seconds
    seed: int
    controller: str = "staged"  # or one of choices.CHOOSERS


class _Plan(BasePlan):
    """What is left, what things cost, and what is known by name."""

    def __init__(self, problem: DecodingProblem):
        super().__init__(problem.budget)
        self.problem = problem
        self.sign = 1.0 if LANGUAGE_METRICS[problem.metric].higher_is_better else -1.0
        self.known: dict[str, float | None] = {}  # name -> quality, higher is better; None: refused
        self.seed = problem.seed
        self.judged = 0  # records
        self._text_s = 0.0  # what stands takes for a trial, as if it followed one text
        self._factor: dict[bool, float] = {}  # what the last draws and what the last others took, of what was thought

    def told(self, action: Action, outcome: Outcome) -> None:
        standing = outcome.incumbent or {}
        self.engine, self.way = standing.get("engine") or {}, standing.get("decoding")
        if isinstance(action, Profile):
            self.engines = outcome.facts.get("engines", [])
            self.judged = int(outcome.facts["judged"])
            self._text_s = outcome.cost.wall_s / _work(self.problem.default)
            self.known[words(self.problem.default)] = self._quality(outcome)
        elif isinstance(action, TryWay):
            if "refused" not in outcome.facts:
                thought_s = max(1e-9, action.share * self._text_s * _work(action.way))
                self._factor[_drawn(action.way)] = outcome.cost.wall_s / thought_s
            self.known[_key(action.way, action.share)] = self._quality(outcome)

    def _quality(self, outcome: Outcome) -> float | None:
        found = outcome.metrics.get(self.problem.metric)
        return None if found is None else self.sign * found.value

    def needs_s(self, way: Way) -> float:
        """What trying it takes, as the last one of its kind did."""
        return MARGIN * self._text_s * _work(way) * self._factor.get(_drawn(way), 1.0)

    def try_(self, stage: str, way: Way, why: str, engine: dict[str, Any] | None = None, share: float = 1.0) -> Try:
        """None where it was tried already, or what is left cannot pay for it. `engine`: another one than writes by now; `share`: of
        the judged records."""
        if _key(way, share) in self.known and engine is None:
            return None
        needed = share * self.needs_s(way)
        if self.remaining < needed:
            self.known[_key(way, share)] = None  # what is left only gets less
            yield Skip(stage=stage, why=f"{words(way)}: {self.remaining:.0f} s are left, it takes about {needed:.0f} s")
            return None
        runs_on = self.engine if engine is None else engine
        action = TryWay(way=way, engine=runs_on, share=share)
        judges = "" if share < 1 or stage in CHEAPER else "calibration"
        return (yield from self.trial(stage, action, f"{words(way)}: {why}", judges=judges))

    # ------------------------------------------------------------------ the candidates of a search (choices.Choices)

    def every(self) -> list[tuple[Way, str]]:
        return ladder(self.problem)

    def suggested(self, trial: Any) -> Way:
        return suggested(trial, _space(self.problem))

    def neighbours(self, candidate: Way) -> list[Way]:
        return neighbours(candidate, _space(self.problem))

    def now(self) -> Way | None:
        return None if self.way is None else read_way(self.way)

    def merit(self, outcome: Outcome) -> float | None:
        return self._quality(outcome)

    def latency_ms(self, outcome: Outcome) -> float:
        return float(outcome.facts["ms"])

    def attempt(self, stage: str, candidate: Way, why: str, share: float = 1.0) -> Try:
        return (yield from self.try_(stage, candidate, why, share=share))


def _key(way: Way, share: float) -> str:
    return words(way) if share == 1.0 else f"{words(way)} on {share:g} of the records"


def _drawn(way: Way) -> bool:
    return isinstance(plain(way), Sample)


def _work(way: Way) -> float:
    return 1.0 + A_TEXT * (texts(way) - 1)


def ladder(problem: DecodingProblem) -> list[tuple[Way, str]]:
    """What is tried in any case, the cheap first, and why."""
    limits: dict[str, Any] = limits_of(plain(problem.default))
    found: list[tuple[Way, str]] = [(Greedy(**limits), "the cheapest")]
    found += [(Beam(beams=width, **limits), f"{width} texts are followed") for width in WIDTHS]
    if problem.prompts and problem.examples >= SHOTS:
        greedy, half = Greedy(**limits), SHOTS // 2
        found += [
            (FewShot(inner=greedy, k=half), "the nearest examples, as turns"),
            (FewShot(inner=greedy, k=half, template="text"), "the nearest examples, in one turn"),
            (FewShot(inner=greedy, k=SHOTS, choose="seed", seed=problem.seed), "the same examples for all"),
        ]
    if problem.prompts:
        found.append((DraftRevise(inner=Greedy(**limits)), "the model looks at its answer again"))
    warm = Sample(temperature=WARM, seed=problem.seed, **limits)
    utility = _UTILITIES.get(problem.metric)
    if utility is None:
        found.append(
            (Vote(inner=warm, n=DRAWS, reads=_reads(problem)), "right answers agree more often than wrong ones")
        )
    else:
        wide = Beam(beams=WIDTHS[-1], **limits)
        found.append((Mbr(inner=wide, n=WIDTHS[-1], utility=utility), "the most typical of a beam's texts"))
    cool = Sample(temperature=COOL, seed=problem.seed, **limits)
    scorer = "grounded" if problem.task.kind == "summarize" else "likelihood"
    found.append((BestOf(inner=cool, n=DRAWS // 2, scorer=scorer), "the best of some draws"))
    if utility is not None:
        found.append((Mbr(inner=warm, n=DRAWS, utility=utility), "the most typical of many draws"))
    return found


def _reads(problem: DecodingProblem) -> Any:
    return "number" if problem.metric == "numbers" or problem.task.answers == "number" else "text"


def _space(problem: DecodingProblem) -> Space:
    utility = _UTILITIES.get(problem.metric)
    chooses: Family = "vote" if utility is None else "mbr"
    families: list[Family] = ["beam", chooses, "best_of"]
    if problem.task.kind == "chat":
        families.append("draw")
    if problem.prompts and problem.examples >= SHOTS:
        families.append("few_shot")
    return Space(
        families=tuple(families), base=plain(problem.default), utility=utility, numbers=_reads(problem) == "number",
        examples=problem.examples,
    )  # fmt: skip


def tuning(problem: DecodingProblem) -> Steps:
    """The whole script."""
    plan = _Plan(problem)
    yield from plan.trial("measure", Profile(), "what stands: its metric and the latency of a request")
    if plan.judged < FEWEST_ROWS:
        yield Skip(stage="ladder", why=f"all: {plan.judged} records are too few to decide on (< {FEWEST_ROWS})")
        return
    if problem.controller != "staged":
        yield from CHOOSERS[problem.controller](plan)
        return
    yield from _engines(plan)
    for way, why in ladder(problem):
        yield from plan.try_("ladder", way, why)
    yield from _penalties(plan)
    if plan.way not in (None, problem.default.model_dump(mode="json")):
        yield from _engines(plan)
    yield from _searched(plan)


def _engines(plan: _Plan) -> Steps:
    """What stands, on each engine that could write it."""
    way = plan.problem.default if plan.way is None else read_way(plan.way)
    for engine in plan.engines if one_text(way) else []:
        if engine["runtime"] != plan.engine:
            yield from plan.try_("engine", way, f"on {engine['name']}", engine["runtime"])


def _penalties(plan: _Plan) -> Steps:
    """Other length penalties for the width of beam that was best."""
    limits = limits_of(plain(plan.problem.default))
    beams = [Beam(beams=width, **limits) for width in WIDTHS]
    tried = [(quality, -b.beams, b) for b in beams if (quality := plan.known.get(words(b))) is not None]
    if tried:
        best = max(tried, key=lambda t: t[:2])[2]
        for penalty in PENALTIES:
            yield from plan.try_(
                "ladder", best.with_(length_penalty=penalty), f"the best width, {penalty:g} for length"
            )


def _searched(plan: _Plan) -> Steps:
    """What Optuna proposes, up to its number of candidates or the end of the budget."""
    search = Proposals(plan.suggested, plan.seed)
    found = passed = 0
    while found < SEARCHED and passed < AGAIN:
        way = search.ask()
        if words(way) in plan.known:
            search.pass_over()
            passed += 1
            continue
        told = yield from plan.try_("search", way, "proposed by the sampler")
        if told is None:  # the time is over for this one; a cheaper one may fit
            search.pass_over()
            passed += AGAIN // 4
            continue
        search.tell(plan.known[words(way)], told.facts["ms"])
        found, passed = found + 1, 0
