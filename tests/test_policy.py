"""The policy: limits, latencies, the Pareto front and who may take the incumbent's place."""

from __future__ import annotations

import time

import pytest

from multistep.policy import Entry, Latency, Limit, admit, front, one_by_one, side_by_side
from multistep.types import Comparison, MetricValue, UserError, Verdict

NO = Verdict(accept=False, rule="no gain")
YES = Verdict(accept=True, rule="a gain")


def took(ms: float) -> Latency:
    return Latency(p50=ms, p95=2 * ms, p99=3 * ms, mean=ms, n=10)


def entry(name: str, value: float, ms: float) -> Entry:
    return Entry(name=name, predictor={}, metrics={"accuracy": MetricValue(value, 0.01)}, latency=took(ms))


def compared(difference: float, stderr: float) -> Comparison:
    return Comparison(
        metric="accuracy", candidate=0.9 + difference, incumbent=0.9, difference=difference, stderr=stderr, p=0.5, n=100
    )


@pytest.mark.parametrize(
    ("text", "statistic", "ms"), [("p95=20ms", "p95", 20.0), (" p99 = 1.5s", "p99", 1500.0), ("mean=3ms", "mean", 3.0)]
)
def test_a_limit_is_read(text: str, statistic: str, ms: float) -> None:
    assert Limit.read(text) == Limit(statistic=statistic, ms=ms)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("text", ["", "20ms", "p95=20", "p95=0ms", "p90=20ms", "p95=-3ms", "p95=nanms", "p95=1e9ms"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="p95=20ms"):
        Limit.read(text)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    entries = [entry("slow", 0.9, 9), entry("dominated", 0.8, 5), entry("fast", 0.7, 1), entry("good", 0.85, 4)]
    assert front(entries, "accuracy", True) == ("fast", "good", "slow")
    assert front(entries, "accuracy", False) == ("fast",)
    assert front([entry("b", 0.9, 2), entry("a", 0.8, 2)], "accuracy", True) == ("b",)


def test_requests_are_timed_after_a_warm_up_and_end_with_the_time() -> None:
    calls: list[int] = []
    found = one_by_one(calls.append, list(range(100)), seconds=0.0, least=7)
    assert found.n == 7 and calls == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]
    assert 0 <= found.p50 <= found.p95 <= found.p99


def test_what_breaks_the_limit_is_not_taken_however_good() -> None:
    assert not admit(YES, compared(0.1, 0.01), took(11), took(1), Limit(ms=20)).accept


def test_inside_the_limit_beats_outside_even_when_worse() -> None:
    assert admit(NO, compared(-0.1, 0.01), took(5), took(11), Limit(ms=20)).accept


def test_better_is_taken_though_it_is_slower() -> None:
    assert admit(YES, compared(0.05, 0.01), took(8), took(1), Limit(ms=20)).accept


def test_the_same_is_taken_when_it_is_cheaper_alone() -> None:
    assert admit(NO, compared(0.0, 0.005), took(5), took(10), None).accept
    assert not admit(NO, compared(0.0, 0.005), took(9.5), took(10), None).accept
    assert not admit(NO, compared(-0.008, 0.005), took(5), took(10), None).accept


def test_a_look_that_pays_nothing_is_taken_for_what_it_saves_alone() -> None:
    assert not admit(YES, compared(0.05, 0.01), took(8), took(5), None, saves=True).accept
    assert not admit(YES, compared(0.05, 0.01), took(9.5), took(10), None, saves=True).accept
    assert admit(YES, compared(0.05, 0.01), took(5), took(10), None, saves=True).accept
    assert admit(NO, compared(0.0, 0.005), took(5), took(10), None, saves=True).accept


def test_two_ways_are_timed_in_turns_on_the_same_requests() -> None:
    calls: list[tuple[str, int]] = []

    def slow(request: int) -> None:
        calls.append(("slow", request))
        time.sleep(0.002)

    def quick(request: int) -> None:
        calls.append(("quick", request))

    new, old = side_by_side(slow, quick, list(range(50)), seconds=0.0, least=6)
    assert new.n == old.n == 6 and new.p50 > 2 > old.p50
    assert calls[6:10] == [("slow", 0), ("quick", 0), ("quick", 1), ("slow", 1)]
