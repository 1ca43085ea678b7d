"""Laws of the schedules: a number in 0..1, up while it warms up, never up again; known points; JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import TypeAdapter

from multistep.schedules import SCHEDULES, Constant, Linear, Schedule
from multistep.types import UserError

ADAPTER: TypeAdapter[Linear | Constant] = TypeAdapter(Schedule)
ALL = pytest.mark.parametrize("member", SCHEDULES)
WARMUPS = (0.0, 0.06, 0.5)


@ALL
@pytest.mark.parametrize("warmup", WARMUPS)
def test_rises_while_warming_up_and_never_after(member: type[Linear | Constant], warmup: float) -> None:
    schedule = member(warmup=warmup)
    progress = np.linspace(0, 1, 401)
    values = np.array([schedule(float(p)) for p in progress])
    assert values.min() >= 0 and values.max() == pytest.approx(1.0, abs=0.01)
    assert (np.diff(values[progress <= warmup]) > 0).all()
    assert (np.diff(values[progress >= warmup]) <= 0).all()
    if warmup:
        assert schedule(0.0) == 0 and schedule(warmup / 2) == pytest.approx(0.5)


@ALL
@pytest.mark.parametrize("warmup", WARMUPS)
def test_outside_of_the_segment_the_ends_count(member: type[Linear | Constant], warmup: float) -> None:
    schedule = member(warmup=warmup)
    assert schedule(-0.1) == schedule(0.0) and schedule(1.7) == schedule(1.0)


@pytest.mark.parametrize(
    "schedule, progress, value",
    [
        (Linear(warmup=0.2), 0.1, 0.5),
        (Linear(warmup=0.2), 0.2, 1.0),
        (Linear(warmup=0.2), 0.6, 0.5),
        (Linear(warmup=0.2), 1.0, 0.0),
        (Linear(warmup=0.0), 0.0, 1.0),
        (Linear(warmup=0.0), 0.25, 0.75),
        (Linear(), 1.0, 0.0),
        (Constant(warmup=0.2), 0.05, 0.25),
        (Constant(warmup=0.2), 0.2, 1.0),
        (Constant(warmup=0.0), 0.0, 1.0),
        (Constant(), 1.0, 1.0),
    ],
)
def test_closed_form(schedule: Linear | Constant, progress: float, value: float) -> None:
    assert schedule(progress) == pytest.approx(value, abs=1e-12)


@ALL
def test_round_trip_and_unknown_field(member: type[Linear | Constant]) -> None:
    schedule = member(warmup=0.125)
    again = ADAPTER.validate_python(json.loads(schedule.model_dump_json()))
    assert again == schedule and type(again) is member
    with pytest.raises(UserError, match=r"unknown key 'warmupp'\. Did you mean 'warmup'\?"):
        member.parse({"warmupp": 0.1})
    with pytest.raises(UserError, match="'warmup'"):
        member.parse({"warmup": 1.0})
