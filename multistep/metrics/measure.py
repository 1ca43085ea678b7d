"""Values with their standard errors, and the table per class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from multistep.metrics.base import Scored, TaskLike
from multistep.metrics.counts import cells_of, f1, ratio
from multistep.metrics.influence import calibration
from multistep.metrics.known import METRICS, check_metric
from multistep.types import MetricValue, UserError


def stderr_of(pull_N: np.ndarray) -> float:
    """The standard error of a value from the pulls of its rows; nan (unknown) with one row."""
    return float(pull_N.std(ddof=1) / math.sqrt(len(pull_N))) if len(pull_N) > 1 else math.nan


def measure(names: Sequence[str], task: TaskLike, scored: Scored, seed: int = 0) -> dict[str, MetricValue]:
    """Value and standard error of each metric, under the names given. With one row the error is nan: unknown."""
    if len(scored.targets) == 0:
        raise UserError("metrics: there are no rows to measure. Give at least one labelled row.")
    metrics = {name: METRICS[check_metric(name, task.kind)] for name in names}
    once = again = None
    values: dict[str, MetricValue] = {}
    for name, metric in metrics.items():
        if metric.influence is not None:
            value, pull_N = metric.influence(task, scored)
            values[name] = MetricValue(value, stderr_of(pull_N))
        elif metric.of is not None:
            if once is None or again is None:  # one bootstrap serves all
                cells = cells_of(task, scored.targets, scored.decisions)
                once, again = cells.once(0), cells.counts(0, cells.resample(seed))
            spread = float(metric.of(again).std()) if len(scored.targets) > 1 else math.nan
            values[name] = MetricValue(float(metric.of(once)[0]), spread)
    return values


def per_class(task: TaskLike, scored: Scored) -> list[dict[str, Any]]:
    """For each label: precision, recall, f1, support. Empty for regression."""
    if task.kind == "regress":
        return []
    c = cells_of(task, scored.targets, scored.decisions).once(0)
    precision, recall, score = ratio(c.tp, c.predicted)[0], ratio(c.tp, c.support)[0], f1(c)[0]
    return [
        {"label": label, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for label, p, r, f, n in zip(task.labels, precision, recall, score, c.support[0], strict=True)
    ]


def calibration_error(task: TaskLike, scored: Scored) -> float:
    """Expected calibration error over 15 bins of equal width."""
    return calibration(task, scored)[0]
