"""Confident learning against a plain reading of the paper, left-out answers against refits, and laws against curves that are known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge as Reference

from multistep.diagnosis import doubled, doubled_rows, fit_law, suspects
from multistep.diagnosis.confident import counted_as
from multistep.models.ridge import fit_ridge, logits, one_hot, sharpness


def plain(p_NK: np.ndarray, given_N: np.ndarray) -> tuple[list[int], float]:
    """(counted labels, share off the diagonal of the calibrated joint), row by row as section 3.1 of the paper has it."""
    k = p_NK.shape[1]
    threshold = [np.mean([p_NK[n, j] for n in range(len(p_NK)) if given_N[n] == j]) for j in range(k)]
    counts, said = np.zeros((k, k)), []
    for n, i in enumerate(given_N):
        over = [j for j in range(k) if p_NK[n, j] >= threshold[j]]
        said.append(max(over, key=lambda j: p_NK[n, j]) if over else -1)
        if over:
            counts[i, said[-1]] += 1
    joint = np.array([counts[i] / max(counts[i].sum(), 1e-12) * (given_N == i).sum() for i in range(k)])
    return said, 1 - np.trace(joint) / joint.sum()


def told(n: int, k: int, flipped: float, seed: int, sure: float = 4.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(probabilities of a good model, given labels, rows whose label was changed)."""
    rng = np.random.default_rng(seed)
    right = rng.integers(k, size=n)
    z = sure * np.eye(k)[right] + rng.standard_normal((n, k))
    bad = rng.permutation(n)[: round(flipped * n)]
    given = right.copy()
    given[bad] = (right[bad] + rng.integers(1, k, size=len(bad))) % k
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True), given, bad


@pytest.mark.parametrize("k", [2, 3, 10])
def test_the_joint_is_the_papers(k: int) -> None:
    p, given, _ = told(400, k, 0.1, seed=k, sure=2.0)
    said, share = plain(p, given)
    assert counted_as(p, given).tolist() == said
    assert suspects(p, given).share == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("flipped", [0.05, 0.1, 0.3])
def test_flipped_labels_are_found_and_counted(flipped: float) -> None:
    p, given, bad = told(2000, 5, flipped, seed=1)
    found = suspects(p, given)
    named = set(found.rows_M.tolist())
    assert len(named & set(bad.tolist())) / len(named) > 0.95
    assert abs(found.share - flipped) < 3 * found.stderr + 0.01 and 0 < found.stderr < 0.02


def test_clean_labels_and_labels_without_rows() -> None:
    p, given, _ = told(2000, 5, 0.0, seed=2)
    assert suspects(p, given).share < 0.01
    rare = np.where(given == 4, 3, given)  # nobody is labelled 4 any more
    assert (counted_as(p, rare) != 4).all()
    with pytest.raises(ValueError, match="do not fit"):
        suspects(p, given[:-1])


@pytest.mark.parametrize("l2", [0.1, 3.0])
def test_left_out_answers_are_those_of_refits(l2: float) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 6)) + 2.0, one_hot(rng.integers(3, size=30), 3)
    found = fit_ridge(x, y, (l2,))
    whole = Reference(alpha=l2).fit(x, y)
    np.testing.assert_allclose(found.scores(x), whole.predict(x), atol=1e-8)
    for i in range(30):
        rest = np.arange(30) != i
        again = Reference(alpha=l2).fit(x[rest], y[rest])
        np.testing.assert_allclose(found.left_out_NK[i], again.predict(x[i : i + 1])[0], atol=1e-8)
    with pytest.raises(ValueError, match="three rows"):
        fit_ridge(x[:2], y[:2])


def test_scores_become_probabilities() -> None:
    """Scores whose logits are known: the factor comes back."""
    rng = np.random.default_rng(0)
    score = rng.standard_normal((20_000, 3))
    p = np.exp(2.5 * score)
    drawn = (rng.random(20_000)[:, None] > (p / p.sum(1, keepdims=True)).cumsum(1)).sum(1)
    assert sharpness(score, one_hot(drawn, 3), exclusive=True) == pytest.approx(2.5, rel=0.1)
    yes = rng.random((20_000, 3)) < 1 / (1 + np.exp(-logits(score, 1.5, exclusive=False)))
    assert sharpness(score, yes.astype(float), exclusive=False) == pytest.approx(1.5, rel=0.1)


# ---------------------------------------------------------------------------------------------- laws

T = np.array([100, 200, 400, 800, 1600.0])


@pytest.mark.parametrize(("limit", "scale", "power"), [(0.5, 0.3, 0.4), (0.0, 1.0, 0.1), (2.0, 0.05, 1.5)])
def test_a_law_is_found_again(limit: float, scale: float, power: float) -> None:
    loss = limit + scale * (T / 1600) ** -power
    law = fit_law(T, loss)
    assert law.loss(3200) == pytest.approx(limit + scale * 2**-power, rel=2e-3)
    found = doubled(T, loss)
    assert found is not None and found.beyond_noise
    assert found.value == pytest.approx(scale * (1 - 2**-power), rel=0.02)


def test_what_does_not_fall_promises_nothing() -> None:
    flat, rising = doubled(T, 0.5 + 0.02 * np.array([1, -1, 1, -1, 1])), doubled(T, np.linspace(0.4, 0.6, 5))
    assert flat is not None and not flat.beyond_noise
    assert rising is not None and rising.value == pytest.approx(0.0, abs=1e-3) and not rising.beyond_noise
    assert doubled(T[:3], T[:3]) is None and doubled(T, np.full(5, np.nan)) is None
    with pytest.raises(ValueError, match="three points"):
        fit_law(T[:2], T[:2])


def test_an_interval_covers_and_chance_seldom_promises() -> None:
    """Of 20 flat curves with noise at most two promise something; of falling ones most intervals hold the truth."""
    rng = np.random.default_rng(0)
    t = np.linspace(100, 1000, 10)
    flat = [doubled(t, 1.0 + 0.02 * rng.standard_normal(10)) for _ in range(20)]
    assert sum(f is not None and f.beyond_noise for f in flat) <= 2
    law = 0.5 + 0.5 * (t / 1000) ** -0.5
    truth = 0.5 * (1 - 2**-0.5)
    falling = [doubled(t, law + 0.01 * rng.standard_normal(10)) for _ in range(20)]
    assert sum(f is not None and abs(f.value - truth) < 2.4 * f.stderr for f in falling) >= 15


def test_rows_judged_again_give_the_interval_of_a_learning_curve() -> None:
    rng = np.random.default_rng(0)
    sizes, uniform_V = np.array([100, 200, 400, 800.0]), rng.random(2000)
    falls = (uniform_V[None, :] < 0.4 * (sizes / 100)[:, None] ** -0.5).astype(float)
    flat = (uniform_V[None, :] < 0.2 + 0.0 * sizes[:, None]).astype(float)
    assert doubled_rows(sizes, falls).beyond_noise
    assert doubled_rows(sizes, falls).value == pytest.approx(0.4 * 8**-0.5 * (1 - 2**-0.5), rel=0.4)
    assert not doubled_rows(sizes, flat).beyond_noise
