"""The paired comparison of two predictors on the same rows, and the verdict (its rules: verdicts.py).

Tests, all one-sided: exact McNemar for scores that are 0 or 1; paired t on the rows' pulls for other metrics of the
influence form; the swap test for metrics of the counts form.
Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions".
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from multistep.metrics.base import Scored, TaskLike
from multistep.metrics.counts import SWAPS, cells_of, swap_differences
from multistep.metrics.known import METRICS, check_metric
from multistep.metrics.measure import stderr_of
from multistep.metrics.verdicts import ALPHA, better, finite, large_gain, mcnemar_p, not_worse, paired_t
from multistep.types import Comparison, Finite, Verdict

_ZERO_ONE = ("accuracy", "exact_match")


def compare(name: str, task: TaskLike, candidate: Scored, incumbent: Scored, seed: int = 0) -> Comparison:
    """Paired over the rows. Differences: candidate - incumbent, signed so that higher is better; p one-sided."""
    metric, p_worse = METRICS[check_metric(name, task.kind)], None
    n, sign = len(candidate.targets), 1.0 if metric.higher_is_better else -1.0
    if n == 0 or not np.array_equal(candidate.targets, incumbent.targets):
        raise ValueError("compare: candidate and incumbent must be scored on the same rows, at least one")
    if metric.influence is not None:
        new, new_pull_N = metric.influence(task, candidate)
        old, old_pull_N = metric.influence(task, incumbent)
        gain = sign * (new - old)
        gain_pull_N = sign * (new_pull_N - old_pull_N)
        stderr = stderr_of(gain_pull_N)
        if metric.name in _ZERO_ONE:
            return counted(metric.name, new, old, gain, stderr, gain_pull_N + gain)
        p, test = paired_t(gain, stderr, n), "t"
    else:
        assert metric.of is not None
        cells = cells_of(task, candidate.targets, candidate.decisions, incumbent.decisions)
        new, old = float(metric.of(cells.once(0))[0]), float(metric.of(cells.once(1))[0])
        gain = sign * (new - old)
        w_BU = cells.resample(seed)
        spread = (metric.of(cells.counts(0, w_BU)) - metric.of(cells.counts(1, w_BU))).std()
        stderr = float(spread) if n > 1 else math.nan
        by_chance = sign * swap_differences(cells, metric.of, seed)
        p, test = float((1 + np.sum(by_chance >= gain - 1e-12)) / (SWAPS + 1)), "swap"
        p_worse = float((1 + np.sum(by_chance <= gain + 1e-12)) / (SWAPS + 1))
    return Comparison(
        metric=metric.name, candidate=new, incumbent=old, difference=gain, stderr=stderr, p=p, n=n, test=test, p_worse=p_worse
    )  # fmt: skip


def counted(metric: str, new: float, old: float, gain: float, stderr: float, gain_N: np.ndarray) -> Comparison:
    """The comparison of scores that are 0 or 1 by exact McNemar. `gain_N`: 1 where only the candidate is right, -1 where only the
    incumbent is."""
    wins, losses = int((gain_N > 0.5).sum()), int((gain_N < -0.5).sum())
    return Comparison(
        metric=metric, candidate=new, incumbent=old, difference=gain, stderr=stderr, p=mcnemar_p(wins, losses),
        n=len(gain_N), test="mcnemar", wins=wins, losses=losses,
    )  # fmt: skip


def judge(
    name: str,
    task: TaskLike,
    candidate: Scored,
    incumbent: Scored,
    seed: int = 0,
    alpha: float = ALPHA,
) -> Verdict:
    """Accept a candidate that is better beyond noise on the metric; or does not look worse on it and is better beyond
    noise on the loss. All else stays with the incumbent, which is the cheaper. Outputs that are not finite lose to any that are.
    Few rows decide only for a large gain (`large_gain`)."""
    if refused := not_finite("outputs", candidate.logits_NK, incumbent.logits_NK):
        return refused
    first = compare(name, task, candidate, incumbent, seed)
    if least := large_gain(first):
        return better((first,), alpha, least)
    loss = _loss_of(task)
    found = better((first,), alpha)
    if found.accept or first.metric == loss:
        return found
    return better((first, compare(loss, task, candidate, incumbent, seed)), alpha)


def judge_harm(
    name: str, task: TaskLike, candidate: Scored, incumbent: Scored, seed: int = 0, alpha: float = ALPHA
) -> Verdict:
    """Accept a candidate that is not worse beyond noise, on the metric and on the loss. Outputs that are not finite are refused."""
    if (refused := not_finite("outputs", candidate.logits_NK, incumbent.logits_NK)) is not None:
        return refused
    names = dict.fromkeys([METRICS[check_metric(name, task.kind)].name, _loss_of(task)])
    return not_worse([compare(n, task, candidate, incumbent, seed) for n in names], alpha)


def _loss_of(task: TaskLike) -> str:
    return "mse" if task.kind == "regress" else "log_loss"


def judge_losses(candidate_N: np.ndarray, incumbent_N: np.ndarray, alpha: float = ALPHA) -> Verdict:
    """The verdict on the losses of the same examples, where no other metric is asked for: paired t, one-sided. Few of them decide only
    for a large gain (`large_gain`)."""
    if refused := not_finite("losses", candidate_N, incumbent_N):
        return refused
    compared = compare_losses(candidate_N, incumbent_N)
    return better((compared,), alpha, large_gain(compared))


def compare_losses(candidate_N: np.ndarray, incumbent_N: np.ndarray) -> Comparison:
    """Paired over the examples; lower is better."""
    gain_N = np.asarray(incumbent_N, np.float64) - np.asarray(candidate_N, np.float64)
    gain, stderr = float(gain_N.mean()), stderr_of(gain_N)
    return Comparison(
        metric="loss", candidate=float(candidate_N.mean()), incumbent=float(incumbent_N.mean()), difference=gain,
        stderr=stderr, p=paired_t(gain, stderr, len(gain_N)), n=len(gain_N), test="t",
    )  # fmt: skip


def not_finite(what: Literal["outputs", "losses"], candidate: np.ndarray, incumbent: np.ndarray) -> Verdict | None:
    """The verdict where numbers of one of them are not finite; None where all are."""
    sound = bool(np.isfinite(candidate).all()), bool(np.isfinite(incumbent).all())
    return None if all(sound) else finite(Finite(what=what, candidate=sound[0], incumbent=sound[1]))
