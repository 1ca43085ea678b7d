"""Budgets: what can be written, and the clock that spends, reserves, saves and goes on."""

from __future__ import annotations

import json

import pytest

from multistep.budget import Budget, Clock, parse_budget
from multistep.session import more_of
from multistep.types import UserError


@pytest.mark.parametrize(
    "text, amount, unit",
    [
        ("30s", 30, "seconds"),
        ("30 sec", 30, "seconds"),
        ("10m", 600, "seconds"),
        ("10min", 600, "seconds"),
        ("1.5h", 5400, "seconds"),
        ("1h30m", 5400, "seconds"),
        ("1h 30m 15s", 5415, "seconds"),
        ("1d", 86400, "seconds"),
        (" 2H ", 7200, "seconds"),
        ("90", 90, "seconds"),
        (90, 90, "seconds"),
        (0.5, 0.5, "seconds"),
        ("1e3s", 1000, "seconds"),
        ("5000 updates", 5000, "updates"),
        ("1 update", 1, "updates"),
        ("200updates", 200, "updates"),
        ("2e6 tokens", 2_000_000, "tokens"),
        ("2.5E6 Tokens", 2_500_000, "tokens"),
    ],
)
def test_what_can_be_written(text: str | float, amount: float, unit: str) -> None:
    budget = parse_budget(text)
    assert (budget.amount, budget.unit) == (amount, unit)
    assert parse_budget(budget) is budget


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "-5m",
        "5 parsecs",
        "m",
        "1h30",
        "1,5h",
        "nan",
        "inf",
        "tokens",
        "5 m x",
        "1e",
        "--",
        "True",
        "10m 5 updates",
    ],
)
def test_what_cannot(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_budget(text)
    message = str(caught.value)
    assert message.startswith(f"budget: {text!r} is not a budget. Write 30s") and "\n" not in message


@pytest.mark.parametrize("text", ["0", "0s", "0 updates", "0.0h", "1e999s", "1e999 tokens"])
def test_nothing_and_infinity_are_no_budgets(text: str) -> None:
    with pytest.raises(UserError, match="must be above zero"):
        parse_budget(text)


@pytest.mark.parametrize("amount", [90.0, 0.1, 1 / 3, 1e-7, 123456.789, 1731601.0, 1e16, 2e6, 0.4])
@pytest.mark.parametrize("unit", ["seconds", "updates", "tokens"])
def test_its_text_parses_back(amount: float, unit: str) -> None:
    budget = Budget.parse({"amount": amount, "unit": unit})
    assert parse_budget(str(budget)) == budget


def test_its_text_is_plain() -> None:
    assert [str(parse_budget(t)) for t in ("10m", "2e6 tokens", "1 update", "1.5s")] == [
        "600s", "2000000 tokens", "1 updates", "1.5s",
    ]  # fmt: skip


def test_plus() -> None:
    assert parse_budget("10m").plus(parse_budget("30s")) == parse_budget("630s")
    with pytest.raises(UserError, match=r"cannot add updates to a run budgeted in seconds\. Give \+N in seconds"):
        parse_budget("10m").plus(parse_budget("5 updates"))


class Now:
    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


def test_clock_in_seconds() -> None:
    now = Now()
    clock = Clock(parse_budget("60s"), now)
    assert clock.spent() == 0 and clock.remaining() == 60
    now.s += 12.5
    clock.spend(updates=10, tokens=999)
    assert clock.wall_s == clock.spent() == 12.5 and clock.remaining() == 47.5
    now.s += 100
    assert clock.remaining() == 0 and clock.spent() == 112.5


def test_the_time_before_the_clock_was_made_can_count() -> None:
    now = Now()
    assert Clock(parse_budget("60s"), now, started=990.0).remaining() == 50


@pytest.mark.parametrize("unit", ["updates", "tokens"])
def test_counts_do_not_depend_on_the_wall(unit: str) -> None:
    now = Now()
    clock = Clock(parse_budget(f"100 {unit}"), now)
    now.s += 1e6
    clock.spend(**{unit: 30})
    clock.spend(updates=1, tokens=1)
    assert clock.spent() == 31 and clock.remaining() == 69


def test_more_of_a_budget() -> None:
    had = Budget(amount=300.0)
    assert more_of(had, "+5m") == more_of(had, "10m") == more_of(had, "600") == Budget(amount=600.0)
    refused = {"5m": "is not more", "1m": r"or \+60s", "+9 updates": "cannot add", "9000 updates": "cannot add"}
    for asked, said in refused.items():
        with pytest.raises(UserError, match=said):
            more_of(had, asked)


def test_reserve() -> None:
    clock = Clock(parse_budget("60s"), Now())
    clock.reserve("finish", 10)
    clock.reserve("predict", 5)
    assert clock.remaining() == 45
    clock.reserve("finish", 20)
    assert clock.remaining() == 35
    clock.reserve("finish", 0)
    clock.reserve("predict", -3)
    assert clock.remaining() == 60
    clock.reserve("finish", 1000)
    assert clock.remaining() == 0


def test_a_saved_clock_goes_on_with_what_was_left() -> None:
    now = Now()
    clock = Clock(parse_budget("60s"), now)
    now.s += 20
    clock.spend(updates=7, tokens=300)
    saved = json.loads(json.dumps(clock.save()))
    now.s += 5000  # nothing ran
    again = Clock(parse_budget("60s"), now)
    again.restore(saved)
    assert again.remaining() == 40 and (again.updates, again.tokens) == (7, 300)
    now.s += 1.5
    again.spend(updates=1)
    assert again.save() == {"wall_s": 21.5, "updates": 8, "tokens": 300}
