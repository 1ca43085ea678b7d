"""A segment of gradient training under watch: recovers from bad batches, keeps itself on disk, stops at a diagnosis or a signal.

On disk there are only snapshots taken every few updates (`states/<trial>.live.<position>`): a killed run goes on from the last
one, and so does a roll back, which makes both the same under budgets in updates or tokens, bit for bit.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

from multistep.budget import Budget, Clock
from multistep.state import TrainState, read_folder, write_folder
from multistep.strategy import Trial
from multistep.train import TrainData, train
from multistep.tune.watch import Watch
from multistep.types import Interrupted, Measure

SNAPSHOT_UPDATES = 25
MAX_ROLLBACKS = 3
_LOOKED = "watch."  # before the names of tensors that a watch remembers
CURVE_PROGRESS, CURVE_UPDATES = 0.05, 50  # between points of the training loss; a point is the mean of so many updates
_SAVE_SHARE = 0.01  # at most this share of the time goes into writing snapshots to disk

Record = tuple[str, dict[str, Any]]


def run_segment(
    trial: Trial, state: TrainState, data: TrainData, keeper: Keeper, watch: Watch | None, stop: Callable[[], int]
) -> Generator[Record, None, dict[str, Any]]:
    """Train to the end of the segment; the facts of how it went. Rolls back and halves after a bad batch, three times at most."""
    action = state.strategy
    assert action is not None
    seen, last_said = keeper.losses, time.monotonic()
    try:
        for measure in train(state, data, bf16=action.bf16):
            keeper.spend(measure)
            if measure.event:
                yield "Event", _roll_back(trial, measure, state, keeper)
                if keeper.rollbacks > MAX_ROLLBACKS:
                    break
                continue
            seen.append(measure.loss_nats)
            keeper.note(state)
            if watch is not None and (found := watch.look(state, seen)):
                yield found.kind, {"trial": trial.id, **found.fields}
                if found.ends:
                    return {**_facts(state, keeper), found.ends: found.fields}
            if measure.update % SNAPSHOT_UPDATES == 0:  # after the look: a resumed segment does not look again
                keeper.snapshot(state)
            if time.monotonic() - last_said > 1.0:
                last_said = time.monotonic()
                yield "Measured", _measured(trial, measure, state, seen[-50:])
            if signal := stop():
                raise Interrupted(signal)
    except Interrupted:  # here, or thrown in where a record is given out
        keeper.save()
        raise
    return _facts(state, keeper)


def _facts(state: TrainState, keeper: Keeper) -> dict[str, Any]:
    return {
        "train_loss": mean_recent(keeper.losses),
        "rollbacks": keeper.rollbacks,
        "progress": state.segment.progress(),
        "update": state.counters.update,
        "curve": keeper.curve,
    }


def _roll_back(trial: Trial, measure: Measure, state: TrainState, keeper: Keeper) -> dict[str, Any]:
    """Go back to the last snapshot, halve the learning rate and leave the batch out; the record of it."""
    position, segment = state.counters.position, state.segment
    lr_scale = state.counters.lr_scale / 2
    keeper.roll_back(state)
    state.counters.position, state.counters.lr_scale = position, lr_scale
    state.segment.wall_s, state.segment.updates, state.segment.tokens = segment.wall_s, segment.updates, segment.tokens
    keeper.snapshot(state)
    gone = keeper.rollbacks > MAX_ROLLBACKS
    done = "stopped: too many bad batches" if gone else "rolled back, learning rate halved, batch left out"
    return {
        "trial": trial.id, "event": measure.event, "update": measure.update, "loss_nats": measure.loss_nats,
        "grad_norm": measure.grad_norm, "rows": list(measure.rows), "back_to": state.counters.update,
        "lr_scale": lr_scale, "action": done,
    }  # fmt: skip


def _measured(trial: Trial, measure: Measure, state: TrainState, recent: list[float]) -> dict[str, Any]:
    return {
        "trial": trial.id, "update": measure.update, "tokens": measure.tokens, "loss_nats": mean_recent(recent),
        "lr": measure.lr, "grad_norm": measure.grad_norm, "progress": state.segment.progress(),
    }  # fmt: skip


def stretch(state: TrainState, share: float) -> None:
    """A paused segment goes on so that what is left of it takes `share`."""
    done = state.segment.progress()
    old = state.segment.total
    total = share / max(1e-6, 1 - done)
    factor = total / old.amount
    state.segment.total = Budget(amount=total, unit=old.unit)
    state.segment.wall_s *= factor
    state.segment.updates = round(state.segment.updates * factor)
    state.segment.tokens = round(state.segment.tokens * factor)


def mean_recent(values: list[float]) -> float:
    return float(np.mean(values[-50:])) if values else float("nan")


# ---------------------------------------------------------------------------------------------- on disk


class Keeper:
    """The last good snapshot, in memory, and on disk as often as that costs little; and what the trial has spent so far.

    `spent`, `losses` and the gap watch's memory travel with the snapshot, so that a resumed trial decides as the straight one.
    """

    def __init__(self, folder: Path, trial: str, clock: Clock, watch: Watch | None):
        self.folder, self.trial, self.clock, self.watch = folder, trial, clock, watch
        self.spent = {"updates": 0, "tokens": 0}
        self.losses: list[float] = []  # of the last updates, in nats
        self.curve: list[dict[str, float]] = []  # progress, updates, train_loss: the mean of the last updates
        self.rollbacks = 0
        self._tokens = 0
        self._last: dict[str, Any] = {}
        self._saved_at = time.monotonic()
        self._cost_s = 0.1

    def load(self, state: TrainState) -> bool:
        """Go on from the newest snapshot on disk, if there is one."""
        found = self._on_disk()
        if found:
            meta, tensors = read_folder(found[-1])
            state.restore({"meta": meta, "tensors": tensors})
            memory = meta["memory"]
            self.spent, self.losses, self.rollbacks = memory["spent"], memory["losses"], memory["rollbacks"]
            self.curve = memory["curve"]
            self.clock.spend(**self.spent)
            if self.watch is not None:
                looked = {k.removeprefix(_LOOKED): v for k, v in tensors.items() if k.startswith(_LOOKED)}
                self.watch.remember(memory["watch"], looked)
        self._take(state)
        return bool(found)

    def spend(self, measure: Measure) -> None:
        """Pay for one update: on the run's clock and in the trial's own account."""
        updates, tokens = (0 if measure.event else 1), measure.tokens - self._tokens
        self._tokens = measure.tokens
        self.rollbacks += 1 if measure.event else 0
        self.spent = {"updates": self.spent["updates"] + updates, "tokens": self.spent["tokens"] + tokens}
        self.clock.spend(updates, tokens)

    def note(self, state: TrainState) -> None:
        """A point of the curve, where enough has happened since the last one."""
        progress, update = state.segment.progress(), state.counters.update
        first = {"progress": 0.0, "updates": update - self.spent["updates"]}
        last = self.curve[-1] if self.curve else first
        if progress - last["progress"] >= CURVE_PROGRESS and update - last["updates"] >= CURVE_UPDATES:
            self.curve.append({"progress": progress, "updates": update, "train_loss": mean_recent(self.losses)})

    def snapshot(self, state: TrainState) -> None:
        self._take(state)
        if time.monotonic() - self._saved_at > self._cost_s / _SAVE_SHARE:
            self.save()

    def _take(self, state: TrainState) -> None:
        self._last = state.snapshot(into=self._last.get("tensors"))
        self._tokens = state.counters.tokens
        del self.losses[:-50]
        memory, looked = self.watch.memory() if self.watch is not None else ({}, {})
        self._last["meta"]["memory"] = {
            "spent": self.spent, "losses": list(self.losses), "rollbacks": self.rollbacks, "curve": list(self.curve),
            "watch": memory,
        }  # fmt: skip
        self._last["tensors"] |= {f"{_LOOKED}{k}": v for k, v in looked.items()}

    def save(self) -> None:
        """Write the last snapshot; the one before it is deleted after."""
        started = time.monotonic()
        old = self._on_disk()
        new = self.folder / f"{self.trial}.live.{self._last['meta']['counters']['position']}"
        if not new.exists():
            write_folder(new, self._last["meta"], self._last["tensors"])
            for path in old:
                shutil.rmtree(path)
        self._saved_at = time.monotonic()
        self._cost_s = max(0.05, self._saved_at - started)

    def roll_back(self, state: TrainState) -> None:
        state.restore(self._last)
        self._tokens = state.counters.tokens

    def clear(self) -> None:
        for path in self._on_disk():
            shutil.rmtree(path)

    def _on_disk(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.trial}.live.*"), key=lambda p: int(p.name.rsplit(".", 1)[1]))
