"""Laws of every specification in the lists: JSON there and back; frozen; an unknown field is an error that names it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from multistep.budget import Budget
from multistep.config import FitConfig
from multistep.controllers import Problem, Reserve, Skip
from multistep.objectives import OBJECTIVES
from multistep.optimizers import CONVEX_SOLVERS, GRADIENT_OPTIMIZERS, SECOND_ORDER, AdamW
from multistep.predictors import (
    PREDICTORS,
    Affine,
    Blend,
    Cascade,
    Conformal,
    Costs,
    Isotonic,
    Predictor,
    Single,
    Temperature,
    Thresholds,
    Vector,
)
from multistep.schedules import SCHEDULES
from multistep.strategy import (
    AsGiven,
    Average,
    FineTune,
    FitHead,
    FitLinear,
    Predict,
    Profile,
    ReadTest,
    TrainModule,
    Trial,
)
from multistep.tasks import TASKS, Classify, Multilabel, Regress
from multistep.text import NgramFeatures
from multistep.types import Comparison, Cost, MetricValue, Outcome, Spec, UserError, Verdict

FEATURES = NgramFeatures()
BASE = Single(model="linear")
COMPARISON = Comparison(metric="accuracy", candidate=0.9, incumbent=0.8, difference=0.1, stderr=0.02, p=0.01, n=200)
VERDICT = Verdict(accept=True, rule="better", evidence=(COMPARISON,))
EXAMPLES: list[Spec] = [
    *(member() for member in (*OBJECTIVES, *SCHEDULES, *GRADIENT_OPTIMIZERS, *SECOND_ORDER, *CONVEX_SOLVERS)),
    AdamW(lr=1e-5, weight_decay=0.0),
    Classify(labels=("a", "ü")), Multilabel(labels=("a", "b", "c")), Regress(mean=0.1, scale=1e-3),
    BASE, Temperature(inner=BASE, temperature=1.5), Affine(inner=BASE, slope=0.9, intercept=-0.1),
    Thresholds(inner=Temperature(inner=BASE, temperature=0.7), offsets=(0.1, -0.2)),
    Blend(members=(BASE, Single(model="encoder")), weights=(0.25, 0.75)),
    Vector(inner=BASE, scales=(1.0, 0.5), offsets=(0.0, 0.1)),
    Isotonic(inner=BASE, curves=(((0.1, 0.9), (0.2, 0.8)),)),
    Costs(inner=BASE, matrix=((0.0, 1.0), (5.0, 0.0))),
    Cascade(first=BASE, second=Single(model="encoder"), below=0.7),
    Conformal(inner=BASE, coverage=0.9, least=0.2, rows=99),
    FEATURES,
    FitLinear(features=FEATURES, l2s=(0.1, 0.01), max_rows=100), FitHead(max_length=64, cut=3),
    FineTune(trains="all"), TrainModule(dropout=0.2), AsGiven(),
    Profile(), Average(which="ema"), Predict(what="blend", base=BASE), ReadTest(),
    Trial(id="01-trunk", stage="trunk", action=FineTune(), share=3.5, why="because", against="head", commit=False),
    Trial(id="02-predict", stage="predict", action=Predict(what="calibrate", base=Temperature(inner=BASE, temperature=2))),
    Skip(stage="race", why="no time"), Reserve(name="finish", amount=2.0),
    Problem(
        task="classify", n_outputs=2, metric="accuracy", rows={"train": 10}, characters={"train": 100}, budget=60.0,
        unit="seconds", config=FitConfig(data="x.csv"), linear=(FEATURES,),
    ),
    FitConfig(data="x.csv"), FitConfig(data="x.csv", text=("a", "b"), budget="5000 updates"),
    Budget(amount=2.5, unit="tokens"), Cost(wall_s=0.25, updates=3, tokens=70), COMPARISON, VERDICT,
    Outcome(
        state="01-head", metrics={"accuracy": MetricValue(0.9, 0.01)}, verdict=VERDICT, cost=Cost(updates=3),
        facts={"family": "linear"}, incumbent=BASE.model_dump(), families={"linear": "01-head"},
    ),
]  # fmt: skip
ALL = pytest.mark.parametrize("spec", EXAMPLES, ids=lambda s: type(s).__name__)


def test_every_member_of_every_list_is_here() -> None:
    lists = [OBJECTIVES, SCHEDULES, (*GRADIENT_OPTIMIZERS, *SECOND_ORDER), CONVEX_SOLVERS, PREDICTORS, TASKS]
    assert {member for members in lists for member in members} <= {type(e) for e in EXAMPLES}
    for members in lists:
        kinds = [member.model_fields["kind"].default for member in members]
        assert len(set(kinds)) == len(kinds), "a kind names one member"


@ALL
def test_round_trip(spec: Spec) -> None:
    text = spec.model_dump_json()
    again = type(spec).model_validate(json.loads(text))
    assert again == spec and again.model_dump_json() == text
    assert type(spec).parse(json.loads(json.dumps(spec.model_dump(mode="json")))) == spec
    assert spec.with_() == spec


@ALL
def test_unknown_field_is_named_with_the_nearest(spec: Spec) -> None:
    known = next((f for f in type(spec).model_fields if f != "kind"), "kind")
    wrong = f"{known}x"
    with pytest.raises(UserError) as caught:
        type(spec).parse({**spec.model_dump(), wrong: 1})
    message = str(caught.value)
    assert message.startswith(f"unknown key {wrong!r}.") and "\n" not in message
    assert f"Did you mean {known!r}?" in message or known in message
    with pytest.raises(UserError, match=f"unknown key 'trial.{wrong}'"):
        type(spec).parse({**spec.model_dump(), wrong: 1}, where="trial")


@ALL
def test_frozen(spec: Spec) -> None:
    field = next(iter(type(spec).model_fields), None)
    if field is not None:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(spec, field, None)


@ALL
def test_json_schema(spec: Spec) -> None:
    schema = json.loads(json.dumps(type(spec).model_json_schema()))
    own = schema["$defs"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema  # predictors nest
    assert own["additionalProperties"] is False


@pytest.mark.parametrize(
    "data, message",
    [
        ({"optimizer": {"kind": "adamw", "lrr": 1e-3}}, r"unknown key 'optimizer\.adamw\.lrr'\. Did you mean 'lr'\?"),
        ({"optimizer": {"kind": "adamw", "lr": "fast"}}, r"'optimizer\.adamw\.lr': .*\(got 'fast'\)"),
        ({"optimizer": {"kind": "adamw", "lr": -1.0}}, r"'optimizer\.adamw\.lr': .*greater than 0"),
        (
            {"schedule": {"kind": "linear", "warmupp": 0.1}},
            r"unknown key 'schedule\.linear\.warmupp'\. Did you mean 'warmup'",
        ),
        ({"schedule": {"kind": "cosin"}}, r"'schedule': .*'linear'.*'constant'"),
        ({"batch_size": 0}, r"'batch_size': .*greater than or equal to 1"),
        ({"trains": "bottom"}, r"'trains': .*'top' or 'all'"),
        ({"dropout": 1.0}, r"'dropout': .*less than 1"),
    ],
)
def test_errors_inside_a_strategy_name_the_place(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FineTune.parse(data)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UserError, match=r"'stage' is missing\."):
        Trial.parse({"id": "x", "action": {"kind": "profile"}})


def test_predictors_nest_in_json() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Predictor)
    nested = Blend(
        members=(Thresholds(inner=Temperature(inner=BASE, temperature=2.0), offsets=(0.0, 1.0)), BASE),
        weights=(0.5, 0.5),
    )
    again = adapter.validate_python(json.loads(nested.model_dump_json()))
    assert again == nested and isinstance(again.members[0].inner, Temperature)
    assert isinstance(nested, BaseModel)
