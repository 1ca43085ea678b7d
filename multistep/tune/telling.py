"""What a segment of training says of itself: the facts of its trial, and records of the journal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from multistep.state import TrainState
from multistep.strategy import Trial
from multistep.types import Measure

if TYPE_CHECKING:
    from multistep.tune.segment import Keeper


def facts(state: TrainState, keeper: Keeper) -> dict[str, Any]:
    said: dict[str, Any] = {
        "train_loss": mean_recent(keeper.losses),
        "rollbacks": keeper.rollbacks,
        "progress": state.segment.progress(),
        "update": state.counters.update,
        "curve": keeper.curve,
        "lr_scale": state.counters.lr_scale,  # what the rate came down to
    }
    if keeper.restarts:
        said["restarts"] = keeper.restarts
    if state.counters.micro_batch:
        said["micro_batch"] = state.counters.micro_batch
    return said


def stopped(state: TrainState, keeper: Keeper) -> dict[str, Any]:
    """What a training says that too many bad batches ended: where it was, and the rate it had there but for the halvings, which the state
    carries on."""
    assert state.strategy is not None
    found, progress = {"event": "bad batches", "rollbacks": keeper.rollbacks}, state.segment.progress()
    lr = state.strategy.optimizer.lr * state.strategy.schedule(progress)
    return {"stopped": found, "best_progress": progress, "best_lr": lr}


def memory(trial: Trial, measure: Measure, state: TrainState, keeper: Keeper) -> dict[str, Any]:
    old, new, rows = measure.micro_batch, state.counters.micro_batch, keeper.named(measure.rows)
    return {
        "trial": trial.id, "event": measure.event, "update": measure.update, "rows": rows, "back_to": state.counters.update,
        "micro_batch_before": old, "micro_batch": new,
        "action": f"{new} examples at once in place of {old}, for the rest of the run; the batch of an update stays as large",
    }  # fmt: skip


def measured(trial: Trial, measure: Measure, state: TrainState, recent: list[float]) -> dict[str, Any]:
    return {
        "trial": trial.id, "update": measure.update, "tokens": measure.tokens, "loss_nats": mean_recent(recent),
        "lr": measure.lr, "grad_norm": measure.grad_norm, "progress": state.segment.progress(),
    }  # fmt: skip


def mean_recent(values: list[float]) -> float:
    return float(np.mean(values[-50:])) if values else float("nan")
