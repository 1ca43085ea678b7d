"""What stands after each trial, as a function of what stood, the trial and what came of it: for the run that lives, and for its journal
when it is replayed. No torch.

    labels            an accepted way to predict takes the incumbent's place; else the best state of a family does, when it is better than
                      what stands, or takes its place among several models that answer together; one that is only better than its own
                      family is kept for a blend
    module, language  what is accepted takes the incumbent's place, of a module also the best state that a look went back to; a language run
                      keeps from where training goes on, too
    answers, ways     of tuning: what is admitted takes the place of what stands, and every way that was measured is kept
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import TypeAdapter

from multistep.policy import Entry, Limit
from multistep.predictors import Predictor, Single
from multistep.strategy import Predict, Profile, Refit, Trial
from multistep.types import Outcome, Verdict

Of = Literal["labels", "module", "language", "answers", "ways"]
_PREDICTOR: TypeAdapter[Predictor] = TypeAdapter(Predictor)


@dataclass(frozen=True)
class Stood:
    """`incumbent`: what is served, as JSON. `families`: the best state of each. `entries`: of tuning, what was measured; `stood`: their
    names that have stood; `refused`: what was not measured to its end, and why; `rule`: by which the last was taken. `refits`: the state
    that is served in place of one that was judged."""

    incumbent: dict[str, Any] | None = None
    families: Mapping[str, str] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    stood: tuple[str, ...] = ()
    refused: tuple[dict[str, str], ...] = ()
    rule: str = ""
    refits: Mapping[str, str] = field(default_factory=dict)

    @property
    def entry(self) -> Entry:
        """The one that stands."""
        return next(e for e in reversed(self.entries) if e.name == self.stood[-1])

    def best(self, metric: str, higher_is_better: bool, limit: Limit | None) -> Entry:
        """Of what has stood and keeps the limit, what was best: what broke it is no measure of what keeps it. Else what stands."""
        sign = 1.0 if higher_is_better else -1.0
        kept = [e for e in self.entries if e.name in self.stood and e.latency.within(limit)]
        return max(kept, key=lambda e: sign * e.metrics[metric].value, default=self.entry)

    def states(self) -> tuple[str, ...]:
        """Of a run: the states that what stands is made of, as they were judged."""
        if self.incumbent is None:
            return ()
        if "state" in self.incumbent:
            return tuple(self.incumbent[key] for key in ("state", "ngram") if key in self.incumbent)
        return tuple(
            self.families[m] for m in _PREDICTOR.validate_python(self.incumbent).models() if m in self.families
        )


After = tuple[Stood, bool]  # what stands, and whether the incumbent is another


def after(of: Of, stood: Stood, trial: Trial, outcome: Outcome) -> After:
    """What stands after a trial of such a run. Depends on these alone, so it replays."""
    rules: Mapping[Of, Callable[[Stood, Trial, Outcome], After]] = {
        "labels": labels, "module": module, "language": language, "answers": answers, "ways": ways,
    }  # fmt: skip
    return rules[of](stood, trial, outcome)


def settlement(stood: Stood, trial: Trial, outcome: Outcome, committed: bool) -> dict[str, Any] | None:
    """The record that says what was decided; None where nothing was to be decided."""
    verdict = outcome.verdict
    if not committed and verdict is None:
        return None
    return {
        "kind": "Committed" if committed else "RolledBack",
        "trial": trial.id,
        "stage": trial.stage,
        "state": outcome.state,
        "incumbent": stood.incumbent,
        "families": dict(stood.families),
        "metrics": outcome.metrics,
        "rule": verdict.rule if verdict is not None else "the first servable model",
        "evidence": [c.model_dump() for c in verdict.evidence] if verdict is not None else [],
    }


def _accepted(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.accept


def _better(outcome: Outcome) -> bool:
    """Than the best of its own family, where there was one."""
    return "family_verdict" not in outcome.facts or Verdict(**outcome.facts["family_verdict"]).accept


def diverged(outcome: Outcome) -> bool:
    """Whether a training is back where it began, since it diverged at every rate that was tried."""
    return outcome.facts.get("diagnosis", {}).get("name") == "divergence"


def early(outcome: Outcome) -> bool:
    """Whether a training did not come to its end, so that its rate has not decayed: it says nothing of what it was tried for."""
    return bool({"diagnosis", "stopped"} & set(outcome.facts))


def eligible(of: Of, trial: Trial, outcome: Outcome) -> bool:
    """Whether what a trial left may take the incumbent's place, were it better: what these rules, a controller's account of the gains it
    found and the target of a run have in common. Of tuning, admission is all in the verdict."""
    facts = outcome.facts
    match of:
        case "labels" if isinstance(trial.action, Predict | Refit):
            return outcome.ok
        case "labels":
            whole = outcome.ok and trial.commit and "diagnosis" not in facts and outcome.state is not None
            return whole and facts.get("family") is not None and _better(outcome)
        case "module":  # the best state that a look went back to is whole; what diverged is back where it began
            return outcome.ok and trial.commit and outcome.state is not None and not diverged(outcome)
        case "language":
            early = facts.get("stopped", {}).get("event") == "no improvement"  # it is judged after its cool-down
            return outcome.ok and trial.commit and "diagnosis" not in facts and not early and "standing" in facts
        case _:
            return outcome.ok


# ---------------------------------------------------------------------------------------------- runs


def labels(stood: Stood, trial: Trial, outcome: Outcome) -> After:
    facts = outcome.facts
    if isinstance(trial.action, Profile) or not eligible("labels", trial, outcome):
        return stood, False
    if isinstance(trial.action, Predict):
        if not _accepted(outcome.verdict):
            return stood, False
        predictor = _PREDICTOR.validate_python(facts["predictor"])
        return replace(stood, incumbent=predictor.model_dump(mode="json")), True
    assert outcome.state is not None
    if isinstance(trial.action, Refit):  # what stands is what was judged; only what is served of it is another
        taken = _accepted(outcome.verdict)
        return (replace(stood, refits={**stood.refits, trial.action.of: outcome.state}) if taken else stood), taken
    family: str = facts["family"]
    families = {**stood.families, family: outcome.state}
    if stood.incumbent is not None and facts.get("in_place"):  # judged as a member of what stands
        taken = _accepted(outcome.verdict)
        return (replace(stood, families=families) if taken else stood), taken
    if stood.incumbent is None or _accepted(outcome.verdict):
        return replace(stood, incumbent=Single(model=family).model_dump(mode="json"), families=families), True
    if family not in _PREDICTOR.validate_python(stood.incumbent).models():
        return replace(stood, families=families), False  # a better member for a blend to come
    return stood, False


def module(stood: Stood, trial: Trial, outcome: Outcome) -> After:
    if not eligible("module", trial, outcome) or outcome.state is None:
        return stood, False
    if stood.incumbent is not None and not _accepted(outcome.verdict):
        return stood, False
    incumbent = {"kind": "module", "state": outcome.state}
    return replace(stood, incumbent=incumbent, families={"module": outcome.state}), True


def language(stood: Stood, trial: Trial, outcome: Outcome) -> After:
    facts = outcome.facts
    if not outcome.ok or "standing" not in facts:
        return stood, False
    standing, family, families = facts["standing"], facts["family"], dict(stood.families)
    if trial.stage == "trunk" and not diverged(outcome):
        families["trunk"] = standing["state"]  # from where more budget goes on
    if family == "ngram":
        families["ngram"] = standing["state"]
    if not eligible("language", trial, outcome):
        return replace(stood, families=families), False
    if _better(outcome) and family in ("model", "spans"):
        families[family] = standing["state"]
    if stood.incumbent is None or _accepted(outcome.verdict):
        return replace(stood, incumbent=standing, families=families), True
    return replace(stood, families=families), False


# ---------------------------------------------------------------------------------------------- tuning


def answers(stood: Stood, trial: Trial, outcome: Outcome) -> After:
    refused = (*stood.refused, *outcome.facts.get("refused", []))
    if "entry" not in outcome.facts:
        return replace(stood, refused=refused), False
    now, taken = _taken(replace(stood, refused=refused), outcome)
    e = now.entry
    standing = {"name": e.name, "predictor": e.predictor, "engine": e.engine, "recipe": e.facts.get("recipe")}
    return replace(now, incumbent=standing), taken


def ways(stood: Stood, trial: Trial, outcome: Outcome) -> After:
    if "looked" in outcome.facts:
        return stood, False
    if "refused" in outcome.facts:
        why = outcome.verdict.rule if outcome.verdict is not None else ""
        return replace(stood, refused=(*stood.refused, {"name": outcome.facts["refused"], "why": why})), False
    now, taken = _taken(stood, outcome)
    e = now.entry
    return replace(now, incumbent={"name": e.name, "decoding": e.predictor, "engine": e.engine}), taken


def _taken(stood: Stood, outcome: Outcome) -> After:
    """One more way that was measured; whether it takes the place of another."""
    verdict = outcome.verdict
    rule = "what stood before" if verdict is None else verdict.rule
    entry = Entry(**outcome.facts["entry"]).with_(rule=rule)
    measured = replace(stood, entries=(*stood.entries, entry))
    if verdict is not None and not verdict.accept:
        return measured, False
    return replace(measured, stood=(*stood.stood, entry.name), rule=rule), verdict is not None
