"""The paired comparison of two predictors on the same rows, and the verdict.

Tests, all one-sided: exact McNemar for scores that are 0 or 1; paired t on the rows' pulls for other metrics of the
influence form; the swap test for metrics of the counts form.
Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions".
"""

from __future__ import annotations

import math

import numpy as np

from multistep.metrics.base import Scored, TaskLike
from multistep.metrics.counts import SWAPS, cells_of, swap_differences
from multistep.metrics.known import METRICS, check_metric
from multistep.metrics.measure import stderr_of
from multistep.metrics.power import FEWEST_ROWS, LARGE
from multistep.types import Comparison, Verdict

_ZERO_ONE = ("accuracy", "exact_match")


def compare(name: str, task: TaskLike, candidate: Scored, incumbent: Scored, seed: int = 0) -> Comparison:
    """Paired over the rows. Differences: candidate - incumbent, signed so that higher is better; p one-sided."""
    metric = METRICS[check_metric(name, task.kind)]
    n, sign = len(candidate.targets), 1.0 if metric.higher_is_better else -1.0
    if n == 0 or not np.array_equal(candidate.targets, incumbent.targets):
        raise ValueError("compare: candidate and incumbent must be scored on the same rows, at least one")
    if metric.influence is not None:
        new, new_pull_N = metric.influence(task, candidate)
        old, old_pull_N = metric.influence(task, incumbent)
        gain = sign * (new - old)
        gain_pull_N = sign * (new_pull_N - old_pull_N)
        stderr = stderr_of(gain_pull_N)
        p = mcnemar(gain_pull_N + gain) if metric.name in _ZERO_ONE else paired_t(gain, stderr, n)
    else:
        assert metric.of is not None
        cells = cells_of(task, candidate.targets, candidate.decisions, incumbent.decisions)
        new, old = float(metric.of(cells.once(0))[0]), float(metric.of(cells.once(1))[0])
        gain = sign * (new - old)
        w_BU = cells.resample(seed)
        spread = (metric.of(cells.counts(0, w_BU)) - metric.of(cells.counts(1, w_BU))).std()
        stderr = float(spread) if n > 1 else math.nan
        by_chance = sign * swap_differences(cells, metric.of, seed)
        p = float((1 + np.sum(by_chance >= gain - 1e-12)) / (SWAPS + 1))
    return Comparison(metric=metric.name, candidate=new, incumbent=old, difference=gain, stderr=stderr, p=p, n=n)


def mcnemar(gain_N: np.ndarray) -> float:
    """Exact: of the rows where only one is right, at least this many won by the candidate, were each a coin toss."""
    from scipy.special import bdtrc

    won, lost = int((gain_N > 0.5).sum()), int((gain_N < -0.5).sum())
    return float(bdtrc(won - 1, won + lost, 0.5)) if won else 1.0


def paired_t(gain: float, stderr: float, n: int) -> float:
    from scipy.special import stdtr

    if math.isnan(gain) or n < 2:
        return 1.0
    if stderr == 0:
        return 0.0 if gain > 0 else 1.0
    return float(stdtr(n - 1, -gain / stderr))


def judge(
    name: str,
    task: TaskLike,
    candidate: Scored,
    incumbent: Scored,
    seed: int = 0,
    alpha: float = 0.1,
) -> Verdict:
    """Accept a candidate that is better beyond noise on the metric; or not worse on it and better beyond noise on the
    loss. All else stays with the incumbent, which is the cheaper. Outputs that are not finite lose to any that are.
    Fewer than `FEWEST_ROWS` rows decide only for a large gain on the metric: `LARGE` of it, or of what a loss was."""
    if not np.isfinite(candidate.logits_NK).all():
        return Verdict(accept=False, rule="the candidate's outputs are not finite: refused")
    if not np.isfinite(incumbent.logits_NK).all():
        return Verdict(accept=True, rule="the incumbent's outputs are not finite, the candidate's are: better")
    first = compare(name, task, candidate, incumbent, seed)
    said, evidence = _said(first), [first]
    if first.n < FEWEST_ROWS:
        least = LARGE * (1.0 if METRICS[first.metric].higher_is_better else abs(first.incumbent))
        accept = first.difference >= least and first.difference > 0 and first.p <= alpha
        word = (
            "better, and by much"
            if accept
            else "worse"
            if first.difference < 0
            else f"too few for less than {least:.2g}"
        )
        rule = f"{said}, p = {first.p:.2g}, on {first.n} rows (< {FEWEST_ROWS}): {word}"
        return Verdict(accept=accept, rule=rule, evidence=(first,))
    if first.difference > 0 and first.p <= alpha:
        return Verdict(accept=True, rule=f"{said}, p = {first.p:.2g} <= {alpha:g}: better", evidence=(first,))
    loss = "mse" if task.kind == "regress" else "log_loss"
    if first.metric != loss:
        second = compare(loss, task, candidate, incumbent, seed)
        evidence.append(second)
        if first.difference >= 0 and second.difference > 0 and second.p <= alpha / 2:
            rule = f"{said}: not worse; {_said(second)}, p = {second.p:.2g} <= {alpha / 2:g}: better"
            return Verdict(accept=True, rule=rule, evidence=tuple(evidence))
    reason = "worse" if first.difference < 0 else f"p = {first.p:.2g} > {alpha:g}: not better beyond noise"
    return Verdict(
        accept=False, rule=f"{said}{': ' if first.difference < 0 else ', '}{reason}", evidence=tuple(evidence)
    )


def judge_losses(candidate_N: np.ndarray, incumbent_N: np.ndarray, alpha: float = 0.1) -> Verdict:
    """The verdict on the losses of the same examples, where no other metric is asked for: paired t, one-sided."""
    if not np.isfinite(candidate_N).all():
        return Verdict(accept=False, rule="the candidate's losses are not finite: refused")
    if not np.isfinite(incumbent_N).all():
        return Verdict(accept=True, rule="the incumbent's losses are not finite, the candidate's are: better")
    gain_N = np.asarray(incumbent_N, np.float64) - np.asarray(candidate_N, np.float64)
    gain, stderr = float(gain_N.mean()), stderr_of(gain_N)
    p = paired_t(gain, stderr, len(gain_N))
    found = Comparison(
        metric="loss", candidate=float(candidate_N.mean()), incumbent=float(incumbent_N.mean()), difference=gain,
        stderr=stderr, p=p, n=len(gain_N),
    )  # fmt: skip
    accept = gain > 0 and p <= alpha
    word = "better" if accept else "worse" if gain < 0 else "not better beyond noise"
    rule = f"loss gain {gain:+.4f} ± {stderr:.4f}, p = {p:.2g} {'<=' if p <= alpha else '>'} {alpha:g}: {word}"
    return Verdict(accept=accept, rule=rule, evidence=(found,))


def _said(c: Comparison) -> str:
    """'accuracy +0.0120 ± 0.0040'; for errors and losses the sign says gain, so the word does too."""
    word = "" if METRICS[c.metric].higher_is_better else " gain"
    return f"{c.metric}{word} {c.difference:+.4f} ± {c.stderr:.4f}"
