"""How few rows decide: the power of the exact test against its definition, and `judge` on both sides of the fewest rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, norm

from multistep.metrics import Scored, judge
from multistep.metrics.power import FEWEST_ROWS, LARGE, chance_to_see, detectable, fewest_rows, least_wins
from multistep.tasks import Classify, Regress

TASK = Classify(labels=("a", "b"))


@pytest.mark.parametrize(("alpha", "wins"), [(0.5, 1), (0.25, 2), (0.1, 4), (0.05, 5), (0.01, 7)])
def test_a_coin_is_called_unfair_after_so_many_wins(alpha: float, wins: int) -> None:
    assert least_wins(alpha) == wins and 0.5**wins <= alpha < 0.5 ** (wins - 1)


@pytest.mark.parametrize("gain", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("rows", [10, 21, 200])
def test_the_power_is_that_of_the_binomial(gain: float, rows: int) -> None:
    assert chance_to_see(gain, rows) == pytest.approx(binom.sf(least_wins() - 1, rows, gain), abs=1e-12)


def test_the_fewest_rows_are_the_first_with_enough_power() -> None:
    assert chance_to_see(LARGE, FEWEST_ROWS - 1) < 0.8 <= chance_to_see(LARGE, FEWEST_ROWS)
    assert fewest_rows(0.05) > 4 * FEWEST_ROWS


def test_the_smallest_gain_that_is_seen() -> None:
    stderr, seen = 0.01, detectable(0.01, 1000, zero_one=False)
    assert norm.sf(norm.isf(0.1) - seen / stderr) == pytest.approx(0.8)
    assert detectable(1e-9, 10, zero_one=True) == 0.4 and detectable(1e-9, 10, zero_one=False) < 1e-6


def answers(n: int, right: int) -> Scored:
    """The first `right` of n rows answered right."""
    said = np.where(np.arange(n) < right, 0, 1)
    return Scored(np.zeros(n, np.int64), np.eye(2)[said] * 2.0, said)


@pytest.mark.parametrize(
    ("n", "won", "accept"),
    [(FEWEST_ROWS - 1, 4, False), (FEWEST_ROWS - 1, 5, True), (FEWEST_ROWS, 4, True), (FEWEST_ROWS, 1, False)],
)
def test_few_rows_decide_only_for_a_large_gain(n: int, won: int, accept: bool) -> None:
    verdict = judge("accuracy", TASK, answers(n, 10 + won), answers(n, 10))
    assert verdict.accept == accept
    assert ("too few" in verdict.rule) == (n < FEWEST_ROWS and not accept)


@pytest.mark.parametrize(("n", "accept"), [(FEWEST_ROWS - 1, False), (FEWEST_ROWS, True)])
def test_few_rows_do_not_decide_by_the_loss(n: int, accept: bool) -> None:
    surer = answers(n, n)
    assert judge("accuracy", TASK, surer._replace(logits_NK=5 * surer.logits_NK), surer).accept == accept


@pytest.mark.parametrize(("shrink", "accept"), [(0.9, False), (0.85, True)])
def test_few_rows_and_a_loss(shrink: float, accept: bool) -> None:
    """The gain is a share of what the loss was: 0.19 and 0.28 of it."""
    off = np.linspace(0.9, 1.1, 10)
    old, new = (Scored(np.zeros(10), k * off[:, None], k * off) for k in (1.0, shrink))
    assert judge("mse", Regress(), new, old).accept == accept
