"""Members of a search against each other: what is behind and what is ahead, by which evidence; and what has not decayed is not ranked."""

from __future__ import annotations

import math
from typing import Any

import pytest
from papers import counted, lost
from test_controllers import Machine, problem

from multistep.controllers.members import Member, ahead, better, cooled, worse
from multistep.controllers.plan import Plan
from multistep.controllers.population import compared
from multistep.controllers.script import Scripted, Wait
from multistep.metrics.verdicts import better as judged
from multistep.metrics.verdicts import finite, mcnemar_p
from multistep.strategy import Trial
from multistep.types import Comparison, Finite, MetricValue, Outcome, Verdict

LEVEL = 0.1


def told(*evidence: Comparison, alpha: float = 0.025, least: float = 0.0) -> Outcome:
    """What came of a trial that was held against another; all of the evidence is kept, as of one that is not accepted."""
    verdict = judged(evidence, alpha, least)
    return of(verdict.with_(evidence=evidence))


def of(verdict: Verdict) -> Outcome:
    return Outcome(state="x", facts={"against_verdict": verdict.model_dump()})


def swapped(difference: float, p: float, p_worse: float | None) -> Comparison:
    return Comparison(
        metric="f1_macro", candidate=0.6 + difference, incumbent=0.6, difference=difference, stderr=0.02, p=p, p_worse=p_worse, n=400,
        test="swap",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        ((counted(0, 1),), False), ((counted(0, 3),), False), ((counted(0, 4),), True), ((counted(10, 30),), True),
        ((counted(30, 10),), False), ((counted(0, 0),), False),
        ((swapped(-0.01, 1.0, 0.5),), False), ((swapped(-0.01, 0.96, 0.05),), True), ((swapped(-0.01, 1.0, None),), False),
        ((lost(-0.02),), True), ((lost(-0.01),), False), ((lost(0.02),), False),
        ((counted(20, 14), lost(-0.05)), False),  # the metric speaks against it
        ((counted(10, 30), lost(0.05)), True),  # and for it
        ((counted(12, 12), lost(-0.05)), True), ((counted(12, 12), lost(-0.013, 0.0085)), False),  # half of the level
        ((counted(12, 13), lost(-0.05)), True), ((counted(12, 13), lost(0.05)), False),
    ],
)  # fmt: skip
def test_behind_beyond_noise(evidence: tuple[Comparison, ...], expected: bool) -> None:
    assert worse(told(*evidence), LEVEL) == expected


def test_one_row_or_none_cannot_be_behind() -> None:
    one = lost(-0.5).with_(n=1, stderr=float("nan"), p=1.0)
    assert not worse(told(one), LEVEL)
    assert not worse(Outcome(state="x"), LEVEL) and worse(Outcome(ok=False, failure="it diverged"), LEVEL)


def test_chance_is_as_seldom_as_the_level() -> None:
    """Of all outcomes of ten tosses those that are called behind have a chance of at most the level, and nearly that."""
    exactly = [math.comb(10, k) / 2**10 for k in range(11)]
    chance = sum(exactly[k] for k in range(11) if worse(told(counted(k, 10 - k)), LEVEL))
    assert 0.05 < chance <= LEVEL


def test_few_rows_are_behind_by_much_or_not_at_all() -> None:
    def few(losses: int) -> Comparison:
        return counted(0, losses).with_(n=20, difference=-losses / 20)

    assert few(4).p == 1.0 and not worse(told(few(4), least=0.25), LEVEL) and worse(told(few(4)), LEVEL)
    assert worse(told(few(6), least=0.25), LEVEL)


def test_ahead_at_any_level() -> None:
    assert 0.025 < mcnemar_p(30, 18) < LEVEL
    assert ahead(told(counted(30, 18)), LEVEL) and not better(told(counted(30, 18)))
    assert not ahead(told(counted(18, 30)), LEVEL) and better(told(counted(40, 10)))
    broken, mended = (of(finite(Finite(what="outputs", candidate=c, incumbent=not c))) for c in (False, True))
    assert worse(broken, LEVEL) and not ahead(broken, LEVEL) and ahead(mended, LEVEL) and not worse(mended, LEVEL)


# ---------------------------------------------------------------------------------------------- on a ground


def ground() -> Plan:
    plan = Plan(problem())
    plan.facts, plan.max_length, plan.depth = Machine(problem()).profile(), 64, 6
    return plan


def drive(steps: Any, outcomes: list[Outcome]) -> Any:
    """What the steps come back with, told these outcomes in turn."""
    script, outstanding = Scripted(steps), []
    while (ask := script.ask()) is not None:
        if isinstance(ask, Wait):
            script.tell(outstanding.pop(0), outcomes.pop(0))
        else:
            assert isinstance(ask, Trial)
            outstanding.append(ask)
    assert not outcomes
    return script.result


@pytest.mark.parametrize(("second", "behind"), [((30, 18), {"a"}), ((18, 30), {"b"}), ((24, 24), set())])
def test_of_two_members_the_one_behind_is_found_whichever_came_first(second: tuple[int, int], behind: set[str]) -> None:
    members = [Member("a", {}, trunk="1"), Member("b", {}, trunk="2")]
    metrics = {"f1_macro": MetricValue(0.8, 0.01)}
    outcomes = [Outcome(state="a", metrics=metrics), told(counted(*second)).with_(metrics=metrics)]
    assert drive(compared(ground(), members, 10.0), outcomes) == behind


@pytest.mark.parametrize("fact", ["", "diagnosis", "stopped"])
def test_a_branch_that_did_not_get_to_its_end_is_not_ranked(fact: str) -> None:
    member = Member("a", {}, trunk="1", cooled="old", merit=0.5)
    outcome = Outcome(
        state="new", metrics={"f1_macro": MetricValue(0.8, 0.01)}, facts={fact: {"name": "divergence"}} if fact else {}
    )
    drive(cooled(ground(), [member], 10.0, None, commit=True), [outcome])
    assert (member.alive, member.cooled, member.merit) == ((False, "old", 0.5) if fact else (True, "new", 0.8))
