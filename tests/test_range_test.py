"""The range test: the curve of a rising rate, on a copy, the same every time, and labelled as the weak evidence that it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_modules import blobs, network

import multistep
from multistep.types import Measure, UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")


def found(**more: Any) -> multistep.RangeTest:
    given: dict[str, Any] = {"objective": "cross_entropy", "train": blobs(300, 0), "optimizer": "sgd"}
    return multistep.lr_range_test(more.pop("module", network()), **{**given, **more})


def test_it_finds_where_the_loss_falls_and_where_it_falls_apart() -> None:
    result = found(low=1e-4, high=1e3)
    assert result.steepest is not None and result.diverged is not None
    assert 1e-3 < result.steepest < result.diverged < 1e3
    factors = [b / a for a, b in zip(result.rates, result.rates[1:], strict=False)]
    assert factors == pytest.approx([1e7 ** (1 / 99)] * len(factors)) and result.rates[0] == pytest.approx(1e-4)
    assert len(result.rates) == len(result.losses) < 100 and min(result.losses) < 0.8 * result.losses[0]
    assert "weak evidence" in str(result) and "falls apart at" in str(result)


def test_the_module_stays_and_the_curve_repeats() -> None:
    module = network(dropout=0.2)
    before = copy.deepcopy(module.state_dict())
    one, two = found(module=module, seed=5), found(module=module, seed=5)
    assert one == two
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("kind", ["adamw", "prodigy", "lion"])
def test_it_spans_what_the_optimizer_takes(kind: str) -> None:
    result = found(optimizer=kind, updates=30)
    assert result.optimizer == kind and len(result.rates) >= 10


@pytest.mark.parametrize(
    "more, words",
    [
        ({"optimizer": "newton_cg"}, "no rate to test"),
        ({"low": 1.0, "high": 0.1}, "low < high"),
        ({"updates": 3}, "updates or more"),
        ({"objective": "cross_entropi"}, "cross_entropy"),
    ],
)
def test_bad_input_is_named(more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        found(**more)


def test_memory_that_ran_out_is_no_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    from multistep import range_test

    real, straight = range_test.updates_of, found()

    def short(state: Any, rows: Any) -> Iterator[Measure]:
        for n, measure in enumerate(real(state, rows)):
            if n == 3:
                yield replace(measure, event="out of memory", loss_nats=float("nan"))
            yield measure

    monkeypatch.setattr(range_test, "updates_of", short)
    assert found() == straight and len(straight.rates) > 3
