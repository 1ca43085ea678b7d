"""A training segment as a trial runs it: fork a state, train under watch, keep the end on disk. For any module and for texts."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from multistep.budget import Budget, Clock
from multistep.state import TrainState, read_folder, write_folder
from multistep.strategy import Training, Trial
from multistep.train import TrainData
from multistep.tune.segment import Keeper, Record, run_segment, stretch
from multistep.tune.watch import Looks


def run_training(
    trial: Trial, action: Training, state: TrainState, data: TrainData, watch: Looks | None, states: Path, clock: Clock,
    stop: Callable[[], int], kept: dict[str, Any],
) -> Generator[Record, None, tuple[dict[str, Any], dict[str, int]]]:  # fmt: skip
    """Train `state` for the trial's share; the facts of how it went, and what was spent. `state` has the weights of `trial.start`;
    where only live fields changed since, its optimizer goes on too. `kept`: goes into the state's JSON."""
    meta, tensors = read_folder(states / trial.start) if trial.start else ({}, {})
    budget = Budget(amount=max(trial.share, 1e-3), unit=clock.budget.unit)
    if "strategy" in meta and action.same_but_live(before := type(action)(**meta["strategy"])):
        state.begin(before, Budget(**meta["segment"]["total"]))
        state.restore({"meta": meta, "tensors": tensors})  # moments and place in the data go on
    state.begin(action, budget)
    keeper = Keeper(states, trial.id, clock, watch)
    if keeper.load(state):
        if budget.unit == "seconds":  # loading took time, and the end of the run stays where it is
            left = (1 - state.segment.progress()) * state.segment.total.amount
            stretch(state, max(1e-3, min(left, clock.remaining())))
        yield "Event", {"trial": trial.id, "event": "resumed", "update": state.counters.update}
    facts = yield from run_segment(trial, state, data, keeper, watch, stop)
    if watch is not None:
        facts["looks"] = watch.looks()
    if watch is not None and ("diagnosis" in facts or "stopped" in facts):
        facts |= watch.back_to_best(state)
    state.settle(training=False)
    snapshot = state.snapshot()
    write_folder(
        states / trial.id, {**snapshot["meta"], "start": trial.start, "strategy": action.model_dump(), **kept},
        snapshot["tensors"],
    )  # fmt: skip
    keeper.clear()
    return facts, keeper.spent


def averaged(states: Path, start: str, which: str) -> dict[str, Any] | None:
    """The averaged weights that a training kept, by their names in a state; None where the tail had no time to begin."""
    meta, tensors = read_folder(states / start)
    if which == "tail" and not meta["counters"]["tail_count"]:
        return None
    prefix = f"{which}."
    values = {f"model.{k.removeprefix(prefix)}": v for k, v in tensors.items() if k.startswith(prefix)}
    return values | {k: v for k, v in tensors.items() if k.startswith("buffer.")}
