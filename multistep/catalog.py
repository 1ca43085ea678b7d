"""What there is to choose from: the lists behind `multistep list`, and the schema of a configuration file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from multistep.config import KINDS, FitConfig
from multistep.controllers import CONTROLLERS
from multistep.metrics import ALIASES, METRICS
from multistep.metrics.texts import LANGUAGE_ALIASES, LANGUAGE_METRICS
from multistep.objectives import OBJECTIVES
from multistep.optimizers import CONVEX_SOLVERS
from multistep.predictors import PREDICTORS
from multistep.predictors.ways import WAYS
from multistep.schedules import SCHEDULES
from multistep.tasks import TASKS
from multistep.tasks.writing import WHAT, Writing
from multistep.types import Spec, UserError, nearest

Row = dict[str, Any]


def _kind(member: type[Spec]) -> str:
    return member.model_fields["kind"].default


def _said(thing: Any) -> str:
    """The first sentence of a docstring, or of its module's."""
    import sys

    text = thing.__doc__ if thing.__doc__ and not thing.__doc__.startswith("!") else ""
    text = text or sys.modules[thing.__module__].__doc__ or ""
    return " ".join(text.split("\n\n")[0].split())


def _optimizers() -> list[Row]:
    rows: list[Row] = []
    for kind, member in KINDS.items():
        rates = {regime: f"{r.prior:g} ({r.low:g} to {r.high:g})" for regime, r in member.rates.items()}
        rows.append(
            {"name": kind, **rates, "bytes a parameter": member.bytes_a_parameter, "times AdamW": member.cost,
             "gradients": member.gradients, "products": member.products,
             "for": member.good_for, "not for": member.wrong_for}
        )  # fmt: skip
    return rows


def _members(members: tuple[type[Any], ...]) -> Callable[[], list[Row]]:
    return lambda: [{"name": _kind(m), "for": m.good_for} for m in members]


_MODELS = (
    ("auto", "most texts: a pretrained encoder that knows the script, else a small one from scratch"),
    ("FOLDER or org/name", "a script or a subject that an encoder of Hugging Face's was made for"),
    (
        "lstm",
        "labels of long texts with no pretrained encoder at hand; words, 64 wide, from scratch; learns in seconds on a CPU",
    ),
    ("none", "the least time and memory: the linear model on n-grams alone, which every run has in any case"),
)

LISTS: Mapping[str, Callable[[], list[Row]]] = {
    "models": lambda: [{"name": name, "for": why} for name, why in _MODELS],
    "optimizers": _optimizers,
    "solvers": lambda: [{"name": _kind(m), "what": _said(m)} for m in CONVEX_SOLVERS],
    "objectives": _members(OBJECTIVES),
    "schedules": _members(SCHEDULES),
    "metrics": lambda: [
        {"name": m.name, "also": ", ".join(a for a, n in ALIASES.items() if n == m.name), "tasks": ", ".join(m.tasks),
         "better": "higher" if m.higher_is_better else "lower"}
        for m in METRICS.values()
    ],
    "language-metrics": lambda: [
        {"name": m.name, "also": ", ".join(a for a, n in LANGUAGE_ALIASES.items() if n == m.name), "tasks": ", ".join(m.tasks),
         "better": "higher" if m.higher_is_better else "lower", "counted": m.signature}
        for m in LANGUAGE_METRICS.values()
    ],
    "decodings": lambda: [{"name": _kind(m), "what": _said(m)} for m in WAYS],
    "controllers": lambda: [{"name": name, "what": _said(script)} for name, script in CONTROLLERS.items()],
    "predictors": lambda: [{"name": _kind(m), "what": _said(m)} for m in PREDICTORS],
    "tasks": lambda: [
        *({"name": _kind(m), "what": _said(m), "metric": "by the labels"} for m in TASKS),
        *({"name": kind, "what": what, "metric": Writing(kind=kind).default_metric} for kind, what in WHAT.items()),
    ],
}  # fmt: skip


def rows_of(name: str) -> list[Row]:
    """The members of a list, one row each. Raises UserError naming the nearest list."""
    if name not in LISTS:
        raise UserError(f"list: there is no list of {name!r}.{nearest(name, list(LISTS))}")
    return LISTS[name]()


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file. Editors complete and check keys with it."""
    schema = FitConfig.model_json_schema()
    members = []
    for kind, member in KINDS.items():
        of_kind = member.model_json_schema()
        lr = of_kind["properties"]["lr"]
        of_kind["properties"]["lr"] = {"anyOf": [{k: v for k, v in lr.items() if k != "default"}, {"type": "null"}]}
        of_kind["required"] = [r for r in of_kind.get("required", []) if r != "lr"]
        of_kind["properties"]["kind"] = {"enum": [kind, "auto"] if kind == "adamw" else [kind]}
        members.append(of_kind)
    schema["$defs"]["OptimizerConfig"] = {"anyOf": members}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "multistep fit"}
