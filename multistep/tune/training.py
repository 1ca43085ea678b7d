"""A training segment as a trial runs it: fork a state, train under watch, keep the end on disk. For any module and for texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from multistep import team
from multistep.budget import Budget, Clock
from multistep.state import TrainState, read_folder, write_folder
from multistep.strategy import Training, Trial
from multistep.train import TrainData
from multistep.tune.segment import Keeper, Record, run_segment, stretch
from multistep.tune.watch import Looks, Watch


def run_training(
    trial: Trial, action: Training, state: TrainState, data: TrainData, watch: Watch | None, states: Path, clock: Clock,
    stop: Callable[[], int], kept: dict[str, Any], *, share: float | None = None, rest: bool = False, micro_batch: int = 0,
    numbers: Sequence[int] = (),
) -> Generator[Record, None, tuple[dict[str, Any], dict[str, int]]]:  # fmt: skip
    """Train `state` for the trial's share (or for `share` of the budget, in its unit); the facts of how it went, and what was spent.
    `state` has the weights of `trial.start` and goes on from there. `kept`: goes into the state's JSON. `rest`: what is left of a
    segment that was stopped in its middle is gone on with, where only live fields change. `micro_batch`: that fitted before, or 0.
    `numbers`: of the rows of train in the user's file, by which events name them.
    A run that was stopped after the end was on disk, while it was judged, takes it from there.
    A team trains together, but with optimizers that ask for curvature; raises `Assisted` at the end in all processes but the first."""
    together = not action.optimizer.products  # which ask one process for curvature
    with team.joint(together):
        amount = max(trial.share if share is None else share, 1e-3)
        waited = team.wait()  # for those that had to make ready what the first one had
        if clock.budget.unit == "seconds":
            amount = max(1e-3, amount - waited)
        total = Budget(amount=team.first(amount), unit=clock.budget.unit)
        begin(state, states / trial.start if trial.start else None, action, total, rest, micro_batch)
        if isinstance(watch, Looks):
            watch.meet()
        team.first_tensors(state.model.parameters())
        keeper = Keeper(team.own(states), trial.id, clock, watch, numbers)
        ended = _ended(states / trial.id, trial) if team.leads() else None
        if team.first(ended is not None):
            facts = keeper.recall(state, *ended) if ended else {}
            yield "Event", {"trial": trial.id, "event": "resumed", "update": state.counters.update}
        else:
            if keeper.load(state):
                yield "Event", {"trial": trial.id, "event": "resumed", "update": state.counters.update}
            facts = yield from run_segment(trial, state, data, keeper, watch, stop)
            if watch is not None:
                facts["looks"] = watch.looks()
            seen = facts.get("diagnosis", {}).get("name") == "overfitting" or (
                facts.get("stopped", {}).get("event") == "no improvement"
            )
            if isinstance(watch, Looks) and seen:
                facts |= watch.back_to_best(state)
            if team.leads():
                meta, tensors = keeper.end(state, facts)
                write_folder(
                    states / trial.id,
                    {**meta, "trial": _json(trial), "start": trial.start, "strategy": action.model_dump(), **kept}, tensors,
                )  # fmt: skip
        state.settle(training=False)
        team.wait()  # until the end is on disk, a resumed run goes on from what each process kept
        keeper.clear()
        if isinstance(watch, Looks):  # last: until here a resumed run may go back to the best state
            watch.clear()
        if not team.leads():
            shutil.rmtree(team.own(states), ignore_errors=True)
            raise team.Assisted
    return facts, keeper.spent


def _ended(folder: Path, trial: Trial) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The end of this very trial's training, where it is on disk already."""
    if not (folder / "state.json").exists():
        return None
    meta, tensors = read_folder(folder)
    return (meta, tensors) if "ended" in meta and meta.get("trial") == _json(trial) else None


def _json(trial: Trial) -> Any:
    return json.loads(json.dumps(trial.model_dump(mode="json")))


def begin(
    state: TrainState, start: Path | None, action: Training, budget: Budget, rest: bool, micro_batch: int
) -> None:
    """Begin a trial's segment with a state that has the weights of `start`. Where a training left them, it is gone on with as
    `TrainState.begin` has it: in the data, and with the optimizer's moments where they fit."""
    meta, tensors = read_folder(start) if start is not None else ({}, {})
    paused = False
    if "strategy" in meta and meta["strategy"]["kind"] == action.model_dump()["kind"]:
        before = type(action)(**meta["strategy"])
        state.begin(before, Budget(**meta["segment"]["total"]))
        state.restore({"meta": meta, "tensors": tensors})
        paused = rest and state.segment.progress() < 1 and action.same_but_live(before)
    if paused:
        state.adjust(action)
        stretch(state, budget.amount)
    else:
        state.begin(action, budget)
    fitted = [n for n in (micro_batch, state.counters.micro_batch) if n]
    state.counters.micro_batch = min(fitted, default=0)


def averaged(states: Path, start: str, which: str) -> dict[str, Any] | None:
    """The averaged weights that a training kept, by their names in a state; None where the tail had no time to begin."""
    meta, tensors = read_folder(states / start)
    if which == "tail" and not meta["counters"]["tail_count"]:
        return None
    prefix = f"{which}."
    values = {f"model.{k.removeprefix(prefix)}": v for k, v in tensors.items() if k.startswith(prefix)}
    return values | {k: v for k, v in tensors.items() if k.startswith("buffer.")}
