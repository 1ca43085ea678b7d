"""Which objectives a task on labels may be trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multistep.objectives import BinaryCrossEntropy, CrossEntropy, Huber, MeanAbsoluteError, MeanSquaredError, Objective
from multistep.types import TaskKind, UserError

_FITS: Mapping[TaskKind, tuple[type[Any], ...]] = {
    "classify": (CrossEntropy,),
    "multilabel": (BinaryCrossEntropy,),
    "regress": (MeanSquaredError, MeanAbsoluteError, Huber),
}


def check_objective(objective: Objective | None, task: TaskKind, n_outputs: int) -> None:
    """Raises UserError when an objective that was asked for does not fit the task."""
    if objective is None:
        return
    core = objective.core()
    if not isinstance(core, _FITS[task]):
        fitting = ", ".join(m.model_fields["kind"].default for m in _FITS[task])
        raise UserError(
            f"objective: {type(core).model_fields['kind'].default!r} does not fit the task {task}. Use {fitting}, or a wrapper around it."
        )
    weights = core.class_weights if isinstance(core, CrossEntropy) else None
    if weights is not None and len(weights) != n_outputs:
        raise UserError(
            f"objective.class_weights: {len(weights)} weights for {n_outputs} classes. Give one a class, in sorted order."
        )
