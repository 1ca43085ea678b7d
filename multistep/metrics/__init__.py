"""What a predictor is worth: values with standard errors, and the paired comparison of two on the same rows."""

from multistep.metrics.base import Counts, Metric, Scored, TaskLike, log_softmax
from multistep.metrics.counts import confusion
from multistep.metrics.judge import compare, judge, judge_harm, judge_losses
from multistep.metrics.known import ALIASES, METRICS, check_metric
from multistep.metrics.measure import calibration_error, measure, per_class

__all__ = [
    "ALIASES", "METRICS", "Counts", "Metric", "Scored", "TaskLike", "calibration_error", "check_metric", "compare",
    "confusion", "judge", "judge_harm", "judge_losses", "log_softmax", "measure", "per_class",
]  # fmt: skip
