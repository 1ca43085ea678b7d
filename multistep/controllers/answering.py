"""The script that tunes how a finished run answers: what stands is measured, then engines, decisions, models, calibrations, cascades,
each around what stands by then, as long as the budget lasts; at the end the promise, where one was asked for.

Every candidate is compared with what stands on rows that it was not fitted on. What may be taken for its quality pays for the look
(`Wealth`: the strongest ideas come first, and every look that finds nothing makes the next one harder). Engines and cascades can only be
cheaper, and pay nothing; a cascade's shares go up from the cheapest.
"""

from __future__ import annotations

from typing import Any

from multistep.controllers.choices import CHOOSERS
from multistep.controllers.script import BasePlan, Does, Skip, Steps
from multistep.metrics import METRICS
from multistep.metrics.power import FEWEST_ROWS
from multistep.policy import Limit
from multistep.predictors import Predictor
from multistep.predictors.recipe import Decision, Recipe, calibrations, wants_thresholds
from multistep.strategy import Action, Profile, Promise, Serving, TryRecipe
from multistep.tasks import Task
from multistep.types import Outcome, Spec

AGAIN = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65)  # shares of the rows that a cascade asks again
WORTH = 2.0  # times the cheap model's latency that the costly one has to take for a cascade
FASTER = 0.9  # of what stands: an engine that is not faster than this is not tried
MARGIN = 1.2  # what is begun has to end
CHEAPER = ("engine", "lengths", "cascade")  # stages whose candidates are taken for what they save

Try = Does[Outcome | None]


class AnsweringProblem(Spec):
    """What the script knows before the first trial."""

    task: Task
    metric: str  # "cost" where `costs` are given
    models: tuple[str, ...]  # that the run has: "linear", "encoder", and "encoder@32" where texts are cut at 32 tokens
    default: Predictor  # that stands
    engine: dict[str, Any]  # what the encoder runs on as it stands; empty: torch as it was trained
    limit: Limit | None
    budget: float  # seconds
    rows: int  # to fit and judge on
    costs: tuple[tuple[float, ...], ...] | None = None
    coverage: float | None = None
    seed: int = 0
    controller: str = "staged"  # or one of choices.CHOOSERS

    @property
    def families(self) -> tuple[str, ...]:
        """The models on whole texts."""
        return tuple(m for m in self.models if "@" not in m)


class _Plan(BasePlan):
    """What is left, what a trial costs, what is known of models and engines."""

    def __init__(self, problem: AnsweringProblem):
        super().__init__(problem.budget)
        self.problem = problem
        self.standing: dict[str, Any] = {}
        self.ms: dict[str, float] = {}  # of each model, as the encoder runs by then
        self.engines: list[dict[str, Any]] = []
        self._known: set[str] = set()
        self._trial_s = 0.0
        self.seed = problem.seed

    @property
    def thresholds(self) -> bool:
        return self.problem.metric != "cost" and wants_thresholds(self.problem.task, self.problem.metric)

    def told(self, action: Action, outcome: Outcome) -> None:
        self.standing = outcome.incumbent or {}
        if isinstance(action, Profile):
            self.ms, self.engines = dict(outcome.facts["models"]), list(outcome.facts["engines"])
        self._trial_s = max(self._trial_s, outcome.cost.wall_s if isinstance(action, TryRecipe) else 0.0)

    @property
    def made(self) -> Recipe | None:
        """How what stands was made."""
        found = self.standing.get("recipe")
        return None if found is None else Recipe.parse(found)

    @property
    def recipe(self) -> Recipe | None:
        """What candidates are made around: what stands, with a decision that can be fitted here. Thresholds that another metric wanted
        cannot where this one has no use for any."""
        made = self.made
        if made is not None and made.decision == "thresholds" and not self.thresholds:
            return made.with_(decision="likeliest")
        return made

    def try_(
        self, stage: str, recipe: Recipe, why: str, engine: dict[str, Any] | None = None, share: float = 1.0
    ) -> Try:
        """None where it was tried already, or what is left cannot pay for it. `share`: of the rows."""
        action = TryRecipe(recipe=recipe, engine=engine or {}, share=share)
        key = f"{recipe} {engine or self.standing.get('engine')} {share:g}"
        if key in self._known or (recipe == self.made and engine is None):
            return None
        self._known.add(key)
        needed = MARGIN * self._trial_s
        if self.remaining < needed:
            yield Skip(stage=stage, why=f"{recipe}: {self.remaining:.0f} s are left, it takes about {needed:.0f} s")
            return None
        free = share < 1 or stage in CHEAPER
        return (yield from self.trial(stage, action, f"{recipe}: {why}", judges="" if free else "calibration"))

    # ------------------------------------------------------------------ the candidates of a search (choices.Choices)

    def every(self) -> list[tuple[Recipe, str]]:
        """Models alone and together with every calibration and decision; then cascades."""
        p, found = self.problem, []
        together = [p.families] if len(p.families) > 1 else []
        for models in (*((m,) for m in p.families), *together):
            for how in calibrations(p.task):
                for decision in self._decisions():
                    recipe = Recipe(models=models, calibration=how, decision=decision, costs=self._costs(decision))
                    found.append((recipe, "of the list"))
        whole = Recipe(models=p.families, calibration=calibrations(p.task)[0])
        firsts = p.families[:1] if len(p.families) > 1 and p.task.kind != "regress" else ()
        found += [(whole.with_(first=first, again=again), "a cascade") for first in firsts for again in AGAIN]
        return found

    def _decisions(self) -> list[Decision]:
        if self.problem.costs is not None:
            return ["likeliest", "costs"]
        return ["likeliest", "thresholds"] if self.thresholds else ["likeliest"]

    def _costs(self, decision: str) -> tuple[tuple[float, ...], ...] | None:
        return self.problem.costs if decision == "costs" else None

    def suggested(self, trial: Any) -> Recipe:
        p = self.problem
        sets = [*((m,) for m in p.models), *([p.families] if len(p.families) > 1 else [])]
        models = sets[trial.suggest_int("models", 0, len(sets) - 1)]
        decision = trial.suggest_categorical("decision", self._decisions())
        recipe = Recipe(
            models=models, calibration=trial.suggest_categorical("calibration", list(calibrations(p.task))), decision=decision,
            costs=self._costs(decision),
        )  # fmt: skip
        cheap = [m for m in p.models if m not in models] if p.task.kind != "regress" else []
        if cheap and trial.suggest_categorical("cascade", [False, True]):
            first = cheap[trial.suggest_int("first", 0, len(p.models) - 1) % len(cheap)]
            return recipe.with_(first=first, again=trial.suggest_categorical("again", list(AGAIN)))
        return recipe

    def neighbours(self, candidate: Recipe) -> list[Recipe]:
        p, found = self.problem, []
        found += [candidate.with_(calibration=how) for how in calibrations(p.task)]
        found += [candidate.with_(decision=d, costs=self._costs(d)) for d in self._decisions()]
        found += [candidate.with_(models=(m,), first=None, again=0.0) for m in p.models]
        if len(p.families) > 1:
            found.append(candidate.with_(models=p.families, first=None, again=0.0))
        if p.task.kind != "regress":
            firsts = [m for m in p.models if m not in candidate.models]
            found += [candidate.with_(first=first, again=again) for first in firsts[:2] for again in AGAIN]
        return [other for other in found if other != candidate]

    def now(self) -> Recipe | None:
        return self.recipe

    def merit(self, outcome: Outcome) -> float | None:
        found = outcome.metrics.get(self.problem.metric)
        if found is None:
            return None
        lower = self.problem.metric == "cost" or not METRICS[self.problem.metric].higher_is_better
        return -found.value if lower else found.value

    def latency_ms(self, outcome: Outcome) -> float:
        return float(outcome.facts.get("ms", 0.0))

    def attempt(self, stage: str, candidate: Recipe, why: str, share: float = 1.0) -> Try:
        few = round(share * self.problem.rows) < FEWEST_ROWS  # nothing can be fitted to them: all at once
        return (yield from self.try_(stage, candidate, why, share=1.0 if few else share))


def answering(problem: AnsweringProblem) -> Steps:
    """The whole script."""
    plan = _Plan(problem)
    yield from plan.trial("measure", Profile(), "what stands, each model and each engine: outputs and latency")
    if problem.rows < FEWEST_ROWS:
        yield Skip(stage="models", why=f"all: {problem.rows} rows are too few to decide on (< {FEWEST_ROWS})")
    elif plan.recipe is None:
        yield Skip(
            stage="models", why="all: what stands is a nest of blends or cascades: its parts are not taken apart"
        )
    elif problem.controller != "staged":
        yield from CHOOSERS[problem.controller](plan)
    else:
        yield from _engines(plan)
        yield from _decisions(plan)  # what was asked for comes before what may help
        yield from _models(plan)
        yield from _calibrations(plan)
        yield from _cascades(plan)
    if problem.coverage is not None:
        why = f"the right label among the candidates with probability {problem.coverage:g}"
        yield from plan.trial("promise", Promise(coverage=problem.coverage), why)
    yield from plan.trial("serving", Serving(), "how many texts together, on how many threads")


def _taken(told: Outcome | None) -> bool:
    return told is not None and told.verdict is not None and told.verdict.accept


def _engines(plan: _Plan) -> Steps:
    """The encoder on other engines, the fastest first; the first that is taken stays."""
    recipe = plan.recipe
    if recipe is None or not any(m.startswith("encoder") for m in recipe.names()):
        return
    for engine in sorted(plan.engines, key=lambda e: e["ms"]):
        if engine["ms"] > FASTER * plan.ms["encoder"]:
            why = f"{engine['ms']:.3g} ms where {plan.ms['encoder']:.3g} ms stand: not faster"
            yield Skip(stage="engine", why=f"{engine['name']}: {why}")
            continue
        told = yield from plan.try_("engine", recipe, f"the encoder on {engine['name']}", engine["runtime"])
        if _taken(told):
            for name in plan.ms:
                if name.startswith("encoder"):
                    plan.ms[name] *= engine["ms"] / plan.ms["encoder"] if name != "encoder" else 1.0
            plan.ms["encoder"] = engine["ms"]
            return


def _models(plan: _Plan) -> Steps:
    """Each family alone, both blended, and the encoder on shorter texts."""
    recipe, families = plan.recipe, plan.problem.families
    if recipe is None:
        return
    plain = recipe.with_(first=None, again=0.0)
    if len(families) > 1 and set(recipe.models) != set(families):
        yield from plan.try_("models", plain.with_(models=families), "the families make different mistakes")
    for name in sorted(plan.ms, key=lambda m: plan.ms[m]):
        if name in families:
            yield from plan.try_("models", plain.with_(models=(name,)), "one model alone")
    now = plan.recipe
    assert now is not None
    if "encoder" not in now.names():
        return
    for name in sorted((m for m in plan.problem.models if "@" in m), key=lambda m: int(m.partition("@")[2])):
        short = tuple(name if m == "encoder" else m for m in now.models)
        length = name.partition("@")[2]
        told = yield from plan.try_("lengths", now.with_(models=short), f"the encoder reads {length} tokens")
        if _taken(told):
            return


def _calibrations(plan: _Plan) -> Steps:
    for how in calibrations(plan.problem.task):
        if (recipe := plan.recipe) is not None and recipe.calibration != how:
            yield from plan.try_("calibrate", recipe.with_(calibration=how), "probabilities that mean what they say")


def _decisions(plan: _Plan) -> Steps:
    recipe, costs = plan.recipe, plan.problem.costs
    if recipe is None:
        return
    if costs is not None:
        if recipe.decision != "costs" or recipe.costs != costs:
            yield from plan.try_("decide", recipe.with_(decision="costs", costs=costs), "what costs least on average")
    elif plan.thresholds:
        other = "likeliest" if recipe.decision == "thresholds" else "thresholds"
        yield from plan.try_("decide", recipe.with_(decision=other), f"decisions for {plan.problem.metric}")
    elif plan.made != recipe.with_(decision="likeliest"):
        yield from plan.try_("decide", recipe.with_(decision="likeliest"), "what decides was made for something else")


def _cascades(plan: _Plan) -> Steps:
    """A model that is much cheaper than what stands answers where it is sure."""
    recipe = plan.recipe
    if recipe is None or plan.problem.task.kind == "regress" or recipe.first is not None:
        return
    whole = sum(plan.ms[m] for m in recipe.models)
    cheap = [m for m in sorted(plan.ms, key=lambda m: plan.ms[m]) if WORTH * plan.ms[m] <= whole]
    if not cheap:
        least = min(plan.ms, key=lambda m: plan.ms[m])
        yield Skip(
            stage="cascade",
            why=f"cascade: {least} ({plan.ms[least]:.3g} ms) is not much cheaper than what stands ({whole:.3g} ms)",
        )
        return
    for first in cheap[:2]:
        for again in AGAIN:
            why = f"{first} is sure of {1 - again:.0%}"
            told = yield from plan.try_("cascade", recipe.with_(first=first, again=again), why)
            if _taken(told):
                return
