"""What answers are judged by while their making is tuned: a metric, or what they cost."""

from __future__ import annotations

import math

import numpy as np

from multistep.controllers.answering import AnsweringProblem
from multistep.metrics import METRICS, Scored, compare, judge, measure
from multistep.metrics.measure import stderr_of
from multistep.metrics.verdicts import better, large_gain, paired_t
from multistep.predictors.costs import cost_N
from multistep.types import Comparison, MetricValue, Verdict


class Quality:
    """Of a problem. `right_or_wrong`: a metric of answers that are; a loss says of every row how far it is off."""

    def __init__(self, problem: AnsweringProblem):
        self.problem = problem
        self.name = "cost" if problem.costs is not None else problem.metric
        self.higher_is_better = problem.costs is None and METRICS[problem.metric].higher_is_better
        self.fitted_for = problem.task.default_metric if problem.costs is not None else problem.metric
        self.right_or_wrong = self.higher_is_better and problem.task.kind != "regress"

    def measured(self, scored: Scored) -> dict[str, MetricValue]:
        p = self.problem
        names = tuple(dict.fromkeys([self.fitted_for, *p.task.metrics]))
        found = measure(names, p.task, scored, seed=p.seed)
        if p.costs is not None:
            costs = cost_N(p.costs, scored.targets, scored.decisions)
            found = {"cost": MetricValue(float(costs.mean()), stderr_of(costs)), **found}
        return found

    def judged(self, candidate: Scored, incumbent: Scored, alpha: float) -> Verdict:
        """The paired verdict."""
        p = self.problem
        if p.costs is None:
            return judge(p.metric, p.task, candidate, incumbent, p.seed, alpha)
        compared = self._costs(candidate, incumbent, 0.0)
        return better((compared,), alpha, large_gain(compared))

    def compared(self, candidate: Scored, incumbent: Scored, made_up: bool) -> Comparison:
        """On the metric. `made_up`: of costs, one row on which the two differ by what a mistake costs on average is in the error."""
        p = self.problem
        if p.costs is None:
            return compare(p.metric, p.task, candidate, incumbent, p.seed)
        cost_KK = np.asarray(p.costs, dtype=np.float64)
        dearer_KK = np.abs(cost_KK - np.diag(cost_KK)[:, None])[~np.eye(len(cost_KK), dtype=bool)]
        return self._costs(candidate, incumbent, float(dearer_KK.mean()) if made_up else 0.0)

    def _costs(self, candidate: Scored, incumbent: Scored, row: float) -> Comparison:
        new, old = (cost_N(self.problem.costs, s.targets, s.decisions) for s in (candidate, incumbent))
        gain, n = float((old - new).mean()), len(old)
        stderr = math.hypot(stderr_of(old - new), row / n)
        return Comparison(
            metric="cost", candidate=float(new.mean()), incumbent=float(old.mean()), difference=gain, stderr=stderr,
            p=paired_t(gain, stderr, n), n=n, test="t",
        )  # fmt: skip
