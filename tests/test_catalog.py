"""`list` and `schema`: every member is there with its facts, and the schema says yes and no to what `fit` takes and refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from multistep.catalog import LISTS, config_schema, rows_of
from multistep.cli import run
from multistep.config import KINDS, FitConfig
from multistep.objectives import OBJECTIVES
from multistep.schedules import SCHEDULES
from multistep.types import UserError


@pytest.mark.parametrize("name", sorted(LISTS))
def test_every_list_names_each_member_once_and_says_something(name: str) -> None:
    rows = rows_of(name)
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) >= 2
    for row in rows:
        assert all(str(v).strip() for k, v in row.items() if k not in ("also", "bytes a parameter", "products")), row


def test_the_measured_costs_are_listed() -> None:
    rows = {row["name"]: row for row in rows_of("optimizers")}
    assert rows["adamw"]["times AdamW"] == 1.0
    for kind, member in KINDS.items():
        row = rows[kind]
        assert (row["times AdamW"], row["bytes a parameter"]) == (member.cost, member.bytes_a_parameter)
        assert (row["gradients"], row["products"]) == (member.gradients, member.products)


def test_lists_are_whole() -> None:
    assert [r["name"] for r in rows_of("optimizers")] == list(KINDS)
    assert len(rows_of("objectives")) == len(OBJECTIVES) and len(rows_of("schedules")) == len(SCHEDULES)


def test_the_command_line_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "optimizers"]) == 0
    text = capsys.readouterr().out
    assert "newton_cg" in text and "schedule_free" in text and "not for" in text
    assert run(["list", "schedules", "--json"]) == 0
    assert [r["name"] for r in json.loads(capsys.readouterr().out)["schedules"]] == [
        r["name"] for r in rows_of("schedules")
    ]
    assert run(["list", "optimiser"]) == 2
    assert "optimizers" in capsys.readouterr().err


def test_the_schema_prints_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads(json.dumps(config_schema()))
    assert set(schema["properties"]) == set(FitConfig.model_fields) and schema["additionalProperties"] is False
    kinds = [m["properties"]["kind"]["enum"][0] for m in schema["$defs"]["OptimizerConfig"]["anyOf"]]
    assert kinds == list(KINDS)
    assert all("lr" not in m["required"] for m in schema["$defs"]["OptimizerConfig"]["anyOf"])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_optimizer_can_be_asked_for(kind: str) -> None:
    config = FitConfig.parse({"data": "x.csv", "optimizer": {"kind": kind, "weight_decay": 0.05}})
    made: Any = config.optimizer.at(0.01)
    assert made.kind == kind and made.lr == 0.01 and made.weight_decay == 0.05
    assert FitConfig.parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    "data, message",
    [
        ({"optimizer": {"kind": "adamm"}}, "'adamm' is not an optimizer. Did you mean 'adam'"),
        ({"optimizer": {"kind": "lion", "beta3": 0.9}}, "unknown key 'optimizer.beta3'"),
        ({"optimizer": {"kind": "lion", "beta1": 2}}, "'optimizer.beta1'"),
        ({"optimizer": {"lr": -1}}, "'optimizer.lr'"),
        ({"objective": {"kind": "hubert"}}, "'objective'"),
        ({"objective": {"kind": "cross_entropy"}, "label_smoothing": 0.1}, "label_smoothing"),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        FitConfig.parse({"data": "x.csv", **data})
    assert message in str(caught.value) and "\n" not in str(caught.value)
