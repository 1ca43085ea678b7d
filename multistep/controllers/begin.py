"""A run's controller from what it is given; what of that goes into the journal, and the controller again from there.

The record is `Noted`, "problem": {"of": what kind of run, "controller": its name, "problem": all that the script knows before its first
trial}. With it a journal alone says what was asked for, and why nothing else was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from multistep.budget import Budget
from multistep.controllers import CONTROLLERS
from multistep.controllers.answering import AnsweringProblem, answering
from multistep.controllers.decoding import DecodingProblem, tuning
from multistep.controllers.language import LANGUAGE_CONTROLLERS, go_on
from multistep.controllers.language_plan import LanguageProblem
from multistep.controllers.module import MODULE_CONTROLLERS
from multistep.controllers.module import go_on as go_on_module
from multistep.controllers.module_plan import ModuleProblem
from multistep.controllers.more import more
from multistep.controllers.phases import Phases
from multistep.controllers.script import Ask, Controller, Problem, Reserve, Scripted, Skip
from multistep.standing import Of
from multistep.strategy import Trial
from multistep.types import UserError, nearest

AnyProblem = Problem | LanguageProblem | ModuleProblem | AnsweringProblem | DecodingProblem
_PROBLEMS: Mapping[Of, type[AnyProblem]] = {
    "labels": Problem, "language": LanguageProblem, "module": ModuleProblem, "answers": AnsweringProblem, "ways": DecodingProblem,
}  # fmt: skip


def begin(problem: AnyProblem, name: str, past: Sequence[Mapping[str, Any]]) -> Controller:
    """`name`: of the controller, where there are several. `past`: the journal so far, which says how often a finished run was given
    more. Raises UserError on an unknown name."""
    match problem:
        case Problem():
            steps, total = _named(CONTROLLERS, name)(problem), Budget(amount=problem.budget, unit=problem.unit)
            return Phases(steps, lambda amount, left: more(problem.with_(budget=amount), left), total, past)
        case LanguageProblem():
            steps, total = _named(LANGUAGE_CONTROLLERS, name)(problem), Budget(amount=problem.budget, unit=problem.unit)
            return Phases(steps, lambda amount, left: go_on(problem.with_(budget=amount), left.purse), total, past)
        case ModuleProblem():
            steps, total = _named(MODULE_CONTROLLERS, name)(problem), Budget(amount=problem.budget, unit=problem.unit)
            return Phases(
                steps, lambda amount, left: go_on_module(problem.with_(budget=amount), name, left.purse), total, past
            )
        case AnsweringProblem():
            return Scripted(answering(problem))
        case DecodingProblem():
            return Scripted(tuning(problem))


def _named(scripts: Mapping[str, Any], name: str) -> Any:
    if name not in scripts:
        raise UserError(f"controller: {name!r} is not known.{nearest(name, list(scripts))}")
    return scripts[name]


def noted(problem: AnyProblem, name: str = "") -> dict[str, Any]:
    """The fields of the record."""
    of = next(of for of, kind in _PROBLEMS.items() if isinstance(problem, kind))
    facts = {"of": of, "controller": name, "problem": problem.model_dump(mode="json")}
    return {"what": "problem", "facts": facts}


def is_problem(record: Mapping[str, Any]) -> bool:
    return record["kind"] == "Noted" and record.get("what") == "problem"


def begin_again(record: Mapping[str, Any], past: Sequence[Mapping[str, Any]]) -> tuple[Of, Controller]:
    """The controller from the record. Raises UserError where that cannot be read."""
    facts = record.get("facts")
    if not isinstance(facts, Mapping) or facts.get("of") not in _PROBLEMS:
        raise UserError("journal: the problem that the controller was given cannot be read.")
    of: Of = facts["of"]
    problem = _PROBLEMS[of].parse(facts.get("problem") or {}, "problem")
    return of, begin(problem, str(facts.get("controller", "")), past)


# ---------------------------------------------------------------------------------------------- what is asked


def record_of(ask: Ask) -> dict[str, Any]:
    """The journal record of what a controller asks."""
    match ask:
        case Trial():
            return {"kind": "Asked", "trial": ask.model_dump(mode="json")}
        case Skip():
            return {"kind": "Skipped", "stage": ask.stage, "why": ask.why}
        case Reserve():
            return {"kind": "Reserved", "name": ask.name, "amount": ask.amount}


def same(now: Mapping[str, Any], lived: Mapping[str, Any]) -> bool:
    """Whether a record that lived says what is said now, as JSON has it."""
    return plain(now) == plain({key: lived.get(key) for key in now})


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
