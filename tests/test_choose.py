"""`auto`: each rule by the facts that make it hold, the facts that a module gives, and the words in the journal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import multistep
from multistep.budget import parse_budget
from multistep.config import KINDS, OptimizerConfig
from multistep.controllers.choose import Facts, choose, is_convex
from multistep.loader import rows_of
from multistep.modules import _facts
from multistep.objectives import (
    BinaryCrossEntropy,
    CrossEntropy,
    Huber,
    MeanAbsoluteError,
    MeanSquaredError,
    Penalized,
    RDrop,
)

pytestmark = pytest.mark.usefixtures("torch_seeded")
GIB = 2.0**30
LINEAR: dict[str, Any] = {
    "regime": "scratch", "parameters": 30, "linear": True, "convex": True, "smooth": True, "whole": True, "rows": 200, "width": 9,
}  # fmt: skip
SMALL = {**LINEAR, "linear": False, "parameters": 5_000, "hidden": 2_000, "regression": True}
LARGE: dict[str, Any] = {"regime": "scratch", "parameters": 10_000_000, "memory_bytes": 16 * GIB, "convex": True}


@pytest.mark.parametrize(
    "facts, kind, words",
    [
        (LINEAR, "newton_cg", "one linear layer"),
        ({**LINEAR, "regime": "fine_tune"}, "newton_cg", "convex"),
        ({**LINEAR, "rows": 10**8}, "adamw", "calibrated default"),
        ({**LINEAR, "whole": False}, "adamw", "calibrated default"),
        ({**LINEAR, "updates": 9.0}, "adamw", "calibrated default"),
        ({**LINEAR, "updates": 10.0}, "newton_cg", "fit in one batch"),
        ({**LINEAR, "convex": False}, "adamw", "calibrated default"),
        ({**LINEAR, "smooth": False}, "adamw", "calibrated default"),
        ({**LINEAR, "gradual": True}, "adamw", "calibrated default"),
        (SMALL, "newton_cg", "5,000 parameters and 200 rows"),
        ({**SMALL, "parameters": 5_001}, "adamw", "calibrated default"),
        ({**SMALL, "width": 10**6}, "adamw", "calibrated default"),
        ({**SMALL, "regression": False}, "adamw", "calibrated default"),
        ({**SMALL, "smooth": False}, "adamw", "calibrated default"),
        ({**SMALL, "regime": "fine_tune"}, "adamw", "fine-tune"),
        (LARGE, "adamw", "calibrated default"),
        ({**LARGE, "regime": "adapter"}, "adamw", "adapter"),
        ({**LARGE, "parameters": 10**9}, "adafactor", "1,000,000,000 parameters (> 70% of 16.0 GiB)"),
        ({**LARGE, "parameters": 10**9, "regime": "fine_tune"}, "adafactor", "41.0 GiB"),
        ({**LARGE, "parameters": 10**9, "memory_bytes": 80 * GIB}, "adamw", "default"),
        ({**LARGE, "hidden": 4_999_999}, "adamw", "calibrated default for any network"),
        ({**LARGE, "hidden": 8_000_000}, "muon", "80% of 10,000,000 parameters"),
        ({**LARGE, "hidden": 8_000_000, "regime": "fine_tune"}, "adamw", "fine-tune"),
        ({**LARGE, "parameters": 600_000, "hidden": 500_000}, "muon", "hidden matrices"),
        ({**LARGE, "parameters": 600_000, "hidden": 499_999}, "adamw", "calibrated default for any network"),
    ],
)
def test_each_rule(facts: dict[str, Any], kind: str, words: str) -> None:
    config, rule = choose(OptimizerConfig(), Facts(**facts))
    assert config.kind == kind and words in rule and rule.startswith(f"auto: {kind}, ")
    assert config.at(config.member.rates["scratch"].prior).kind == kind


def test_what_was_given_stays() -> None:
    for kind in KINDS:
        given = OptimizerConfig(kind=kind)
        assert choose(given, Facts(**LINEAR)) == (given, f"{kind} was given")
    config, rule = choose(OptimizerConfig.model_validate({"lr": 0.01, "weight_decay": 0.1}), Facts(**LINEAR))
    assert config.kind == "adamw" and config.at(0.01).weight_decay == 0.1
    assert rule == "auto: adamw, whose lr and weight_decay were given"


def test_which_losses_are_convex() -> None:
    assert all(
        is_convex(o) for o in (CrossEntropy(), BinaryCrossEntropy(), MeanSquaredError(), Huber(), Penalized(l2=1.0))
    )
    assert not any(
        is_convex(o) for o in (CrossEntropy(focal_gamma=2.0), MeanAbsoluteError(), Penalized(l1=0.1), RDrop())
    )


def test_the_facts_of_a_module() -> None:
    rows = rows_of((torch.randn(50, 8), torch.zeros(50, dtype=torch.long)), "train", "cpu")

    def facts(module: nn.Module, budget: str = "100 updates") -> Facts:
        return _facts(module, CrossEntropy(), rows, "scratch", parse_budget(budget), "cpu", ())

    one = facts(nn.Sequential(nn.Linear(8, 3)))
    assert one.linear and one.convex and one.whole and one.smooth and one.parameters == 27 and one.updates == 100
    assert one.elements == 400 and one.memory_bytes > GIB / 4
    deep = facts(nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 3)), "500 tokens")
    assert not deep.linear and deep.smooth and deep.hidden == 160 and deep.updates == 10
    assert not facts(nn.Sequential(nn.Linear(8, 20), nn.Dropout(0.1), nn.Linear(20, 3))).smooth
    assert facts(nn.Sequential(nn.Linear(8, 20), nn.Dropout(0.0), nn.Linear(20, 3)), "5s").updates is None
    assert not facts(nn.Sequential(nn.Linear(8, 20), nn.BatchNorm1d(20), nn.Linear(20, 3))).smooth


def test_the_journal_and_the_page_say_which_rule() -> None:
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    result = multistep.optimize(
        nn.Linear(4, 3), objective="cross_entropy", train=(x, y), validation=(x, y), budget="12 updates"
    )
    said = [r["facts"]["rule"] for r in result.records() if r.get("what") == "optimizer"]
    assert len(said) == 1 and said[0].startswith("auto: newton_cg, for one linear layer") and "240 inputs" in said[0]
    assert said[0] in result.explain()
    skipped = [r["why"] for r in result.records() if r["kind"] == "Skipped"]
    assert any("a solved step has its own length" in why for why in skipped)
    trunk = next(
        r["trial"]["action"] for r in result.records() if r["kind"] == "Asked" and r["trial"]["stage"] == "trunk"
    )
    assert trunk["schedule"]["kind"] == "constant" and trunk["batch_size"] == 60
