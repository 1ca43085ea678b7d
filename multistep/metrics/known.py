"""The list of metrics, their other names, and which tasks they fit."""

from __future__ import annotations

from collections.abc import Mapping

from multistep.metrics import counts, influence
from multistep.metrics.base import Metric
from multistep.types import TaskKind, UserError, nearest

_BOTH: tuple[TaskKind, ...] = ("classify", "multilabel")
_LIST = (
    Metric("accuracy", True, "decisions", ("classify",), influence=influence.accuracy),
    Metric("f1_macro", True, "decisions", _BOTH, of=counts.f1_macro),
    Metric("f1_micro", True, "decisions", _BOTH, of=counts.f1_micro),
    Metric("f1_weighted", True, "decisions", _BOTH, of=counts.f1_weighted),
    Metric("precision_macro", True, "decisions", _BOTH, of=counts.precision_macro),
    Metric("recall_macro", True, "decisions", _BOTH, of=counts.recall_macro),
    Metric("mcc", True, "decisions", ("classify",), of=counts.mcc),
    Metric("exact_match", True, "decisions", ("multilabel",), influence=influence.exact_match),
    Metric("auroc", True, "probabilities", _BOTH, influence=influence.auroc),
    Metric("log_loss", False, "probabilities", _BOTH, influence=influence.log_loss),
    Metric("calibration_error", False, "probabilities", _BOTH, influence=influence.calibration),
    Metric("mse", False, "decisions", ("regress",), influence=influence.mse),
    Metric("rmse", False, "decisions", ("regress",), influence=influence.rmse),
    Metric("mae", False, "decisions", ("regress",), influence=influence.mae),
    Metric("r2", True, "decisions", ("regress",), influence=influence.r2),
    Metric("pearson", True, "decisions", ("regress",), influence=influence.pearson),
    Metric("spearman", True, "decisions", ("regress",), influence=influence.spearman),
)
METRICS: Mapping[str, Metric] = {m.name: m for m in _LIST}
# Other names people use. "f1" is the mean over classes also when there are two: no class is "the positive one" here.
ALIASES: Mapping[str, str] = {
    "acc": "accuracy", "f1": "f1_macro", "macro_f1": "f1_macro", "micro_f1": "f1_micro", "weighted_f1": "f1_weighted",
    "precision": "precision_macro", "recall": "recall_macro", "auc": "auroc",
    "roc_auc": "auroc", "nll": "log_loss", "logloss": "log_loss", "cross_entropy": "log_loss", "matthews": "mcc",
    "ece": "calibration_error", "subset_accuracy": "exact_match",
}  # fmt: skip


def check_metric(name: str, task_kind: TaskKind) -> str:
    """The metric's own name ("f1" -> "f1_macro"). Raises UserError when there is none, or it does not fit."""
    name = ALIASES.get(name, name)
    fitting = [m.name for m in _LIST if task_kind in m.tasks]
    if name not in METRICS:
        raise UserError(f"metric: {name!r} is not known.{nearest(name, [*METRICS, *ALIASES])}")
    if name not in fitting:
        raise UserError(f"metric: {name!r} does not fit the task {task_kind}. Use one of {', '.join(fitting)}.")
    return name
