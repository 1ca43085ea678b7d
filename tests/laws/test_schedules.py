"""Laws of the schedules: a number in 0..1, up while it warms up, never up again; closed forms; JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from multistep.schedules import (
    SCHEDULES,
    WSD,
    Constant,
    Cosine,
    Exponential,
    InverseSqrt,
    Linear,
    OneCycle,
    Plateau,
    Schedule,
    Step,
)  # fmt: skip
from multistep.types import UserError

ADAPTER: TypeAdapter[Any] = TypeAdapter(Schedule)
NEEDS_WARMUP = (InverseSqrt, OneCycle)
FIELDS: dict[type, list[dict[str, Any]]] = {  # every member at more than its defaults
    Linear: [{}], Constant: [{}], Cosine: [{}, {"floor": 0.1}], Step: [{}, {"drops": 5, "factor": 0.5}],
    Exponential: [{}, {"floor": 0.5}], InverseSqrt: [{}], OneCycle: [{}, {"start": 0.0, "floor": 0.05}],
    WSD: [{}, {"shape": "linear"}, {"decay": 0.4}, {"shape": "linear", "decay": 0.5}],
    Plateau: [{}, {"factor": 0.1, "patience": 5}],
}  # fmt: skip
MEMBERS = [
    member(warmup=warmup, **fields)
    for member in SCHEDULES
    for warmup in (0.0, 0.06, 0.5)
    for fields in FIELDS[member]
    if warmup or member not in NEEDS_WARMUP
]
ALL = pytest.mark.parametrize("schedule", MEMBERS, ids=repr)
KINDS = pytest.mark.parametrize("member", SCHEDULES)


def test_every_member_is_here() -> None:
    assert {type(schedule) for schedule in MEMBERS} == set(SCHEDULES) == set(FIELDS)


@ALL
def test_rises_while_warming_up_and_never_after(schedule: Any) -> None:
    warmup = schedule.warmup
    start = schedule.start if isinstance(schedule, OneCycle) else 0.0
    progress = np.linspace(0, 1, 401)
    values = np.array([schedule(float(p)) for p in progress])
    assert values.min() >= 0 and values.max() <= 1 and values.max() == pytest.approx(1.0, abs=0.01)
    assert (np.diff(values[progress <= warmup]) > 0).all()
    assert (np.diff(values[progress >= warmup]) <= 0).all()
    assert schedule(warmup) == 1.0
    if warmup:
        assert schedule(0.0) == start and schedule(warmup / 2) == pytest.approx((1 + start) / 2)


@ALL
def test_outside_of_the_segment_the_ends_count(schedule: Any) -> None:
    assert schedule(-0.1) == schedule(0.0) and schedule(1.7) == schedule(1.0)
    assert schedule(-math.inf) == schedule(0.0) and schedule(math.inf) == schedule(1.0)


@ALL
def test_the_end(schedule: Any) -> None:
    ends: dict[type, Callable[[], float]] = {
        Linear: lambda: 0.0, Constant: lambda: 1.0, Cosine: lambda: schedule.floor, Exponential: lambda: schedule.floor,
        Step: lambda: schedule.factor**schedule.drops, InverseSqrt: lambda: schedule.warmup**0.5,
        OneCycle: lambda: schedule.floor, WSD: lambda: 0.0, Plateau: lambda: 1.0,
    }  # fmt: skip
    assert schedule(1.0) == pytest.approx(ends[type(schedule)](), abs=1e-15)


@pytest.mark.parametrize(
    "schedule, points",
    [
        (Linear(warmup=0.2), {0.1: 0.5, 0.2: 1.0, 0.6: 0.5, 1.0: 0.0}),
        (Linear(warmup=0.0), {0.0: 1.0, 0.25: 0.75}),
        (Linear(), {1.0: 0.0}),
        (Constant(warmup=0.2), {0.05: 0.25, 0.2: 1.0}),
        (Constant(warmup=0.0), {0.0: 1.0}),
        (Constant(), {1.0: 1.0}),
        (Cosine(warmup=0.2), {0.1: 0.5, 0.4: 0.5 + 0.5**1.5, 0.6: 0.5, 0.8: 0.5 - 0.5**1.5, 1.0: 0.0}),
        (Cosine(warmup=0.0, floor=0.1), {0.0: 1.0, 1 / 3: 0.775, 0.5: 0.55, 2 / 3: 0.325, 1.0: 0.1}),
        (Step(warmup=0.0), {0.0: 1.0, 0.33: 1.0, 0.34: 0.1, 0.66: 0.1, 0.67: 0.01, 1.0: 0.01}),
        (Step(warmup=0.2, drops=3, factor=0.5), {0.1: 0.5, 0.39: 1.0, 0.41: 0.5, 0.61: 0.25, 0.79: 0.25, 0.81: 0.125}),
        (Exponential(warmup=0.0, floor=0.01), {0.0: 1.0, 0.25: 10**-0.5, 0.5: 0.1, 0.75: 10**-1.5, 1.0: 0.01}),
        (Exponential(warmup=0.2, floor=0.25), {0.1: 0.5, 0.2: 1.0, 0.6: 0.5, 1.0: 0.25}),
        (InverseSqrt(warmup=0.01), {0.005: 0.5, 0.01: 1.0, 0.04: 0.5, 0.16: 0.25, 0.25: 0.2, 1.0: 0.1}),
        (
            OneCycle(warmup=0.4, start=0.2),
            {0.0: 0.2, 0.1: 0.4, 0.3: 0.8, 0.4: 1.0, 0.6: 0.75, 0.7: 0.5, 0.8: 0.25, 1.0: 0},
        ),
        (OneCycle(warmup=0.5, start=0.0, floor=0.5), {0.25: 0.5, 0.5: 1.0, 0.75: 0.75, 1.0: 0.5}),
        (WSD(warmup=0.1, decay=0.4), {0.05: 0.5, 0.1: 1.0, 0.6: 1.0, 0.625: 0.75, 0.7: 0.5, 0.825: 0.25, 1.0: 0.0}),
        (WSD(warmup=0.0, decay=0.5, shape="linear"), {0.0: 1.0, 0.5: 1.0, 0.625: 0.75, 0.75: 0.5, 1.0: 0.0}),
        (WSD(warmup=0.0, decay=1.0), {0.0: 1.0, 0.25: 0.5, 0.81: 0.1}),
    ],
    ids=repr,
)
def test_closed_form(schedule: Any, points: dict[float, float]) -> None:
    assert {p: schedule(p) for p in points} == pytest.approx(points, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_a_staircase_has_equal_steps(n: int) -> None:
    schedule = Step(warmup=0.0, drops=n, factor=0.5)
    values = [schedule(p) for p in (np.arange(1000) + 0.5) / 1000]
    counts = np.unique(values, return_counts=True)[1]
    assert len(counts) == n + 1 and np.ptp(counts) <= 1


@ALL
def test_round_trip(schedule: Any) -> None:
    again = ADAPTER.validate_python(json.loads(schedule.model_dump_json()))
    assert again == schedule and type(again) is type(schedule)
    assert again(0.3) == schedule(0.3)


@KINDS
def test_bad_fields_are_named(member: Any) -> None:
    with pytest.raises(UserError, match=r"unknown key 'warmupp'\. Did you mean 'warmup'\?"):
        member.parse({"warmupp": 0.1})
    with pytest.raises(UserError, match="'warmup'"):
        member.parse({"warmup": 1.0})
    if member in NEEDS_WARMUP:
        with pytest.raises(UserError, match=r"'warmup': .*greater than 0"):
            member.parse({"warmup": 0.0})


def test_a_warmup_and_a_decay_share_one_segment() -> None:
    assert WSD(warmup=0.3, decay=0.7)(0.3) == pytest.approx(1.0)
    with pytest.raises(UserError, match=r"warmup 0\.5 and decay 0\.6 are more than the whole: lower one of them"):
        WSD.parse({"warmup": 0.5, "decay": 0.6})


@KINDS
def test_says_what_it_is_good_for(member: Any) -> None:
    assert 10 < len(member.good_for) <= 120 and member.good_for[-1] != "." and "good_for" not in member.model_fields
