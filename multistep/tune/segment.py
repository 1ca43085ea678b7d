"""A segment of gradient training under watch: recovers from what goes wrong, keeps itself on disk, stops at a diagnosis or a signal.

    a bad batch      back to the last snapshot, half the learning rate, the batch left out; after three more the training ends, or,
                     where they came close together, it has diverged
    divergence       back to the segment's beginning, a tenth of the learning rate, for what is left of it; three times at most
    out of memory    the batch again in micro-batches of half the size, down to one; in the middle of a step: from the last snapshot on

On disk there are only snapshots taken every few updates (`states/<trial>.live.<number>`): a killed run goes on from the last
one, and so does a roll back, which makes both the same under budgets in updates or tokens, bit for bit. Several processes keep them
in a folder each, stop at the same update and go on from the newest snapshot that all of them have.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from multistep import processes, team
from multistep.allocation import out_of_memory, release
from multistep.budget import Budget, Clock
from multistep.detect import MAX_RESTARTS, MAX_ROLLBACKS, RESTART_LR, Course
from multistep.state import TrainState, read_folder, remove_folder, write_folder
from multistep.strategy import Trial
from multistep.train import TrainData, at_once, is_finite, train
from multistep.tune.telling import facts, mean_recent, measured, memory, stopped
from multistep.tune.watch import Watch
from multistep.types import Interrupted, Measure

SNAPSHOT_UPDATES = 25
# With fewer good ones between them too many bad batches are no batch's fault, but the learning rate's.
CLOSE_UPDATES = 100
# Of the segment: what diverges later has no time to begin again, and its beginning is not kept in memory.
RESTART_UNTIL = 0.75
_LOOKED = "watch."  # before the names of tensors that a watch remembers
CURVE_PROGRESS, CURVE_UPDATES = 0.05, 50  # between points of the training loss; a point is the mean of so many updates
_SAVE_SHARE = 0.01  # at most this share of the time goes into writing snapshots to disk
_A_RESTART = 10**9  # in the numbers of snapshots on disk: a segment that begins again goes back in the data

Record = tuple[str, dict[str, Any]]


def run_segment(
    trial: Trial, state: TrainState, data: TrainData, keeper: Keeper, watch: Watch | None, stop: Callable[[], int]
) -> Generator[Record, None, dict[str, Any]]:
    """Train to the end of the segment; the facts of how it went."""
    last_said, again, device = time.monotonic(), True, state.trained[0][1].device
    try:
        while again:  # once, and once more for every divergence
            again = False
            for measure in _updates(state, data, keeper):
                keeper.spend(measure)
                if measure.event == "out of memory":
                    yield "Event", memory(trial, measure, state, keeper)
                    continue
                due = not measure.event and measure.update % SNAPSHOT_UPDATES == 0
                if due and not is_finite(state):  # what the samples of the updates have missed must not be kept
                    measure = replace(measure, event="nonfinite")
                diverged = keeper.course.blows_up() if measure.event else keeper.took(measure, state)
                if measure.event and (diverged is None or not keeper.can_restart(state)):
                    yield "Event", _roll_back(trial, measure, state, keeper)
                    if keeper.rollbacks <= MAX_ROLLBACKS:
                        continue
                    if not keeper.came_close(state):
                        return {**facts(state, keeper), **stopped(state, keeper)}
                    diverged = {
                        "rule": f"{keeper.rollbacks} bad batches with {keeper.good_since} good ones between them"
                    }
                if diverged is not None and keeper.can_restart(state):
                    kind, fields, ended = _begin_again(trial, measure, diverged, state, data, keeper)
                    yield kind, fields
                    if ended:
                        return {**facts(state, keeper), **ended}
                    again = True
                    break
                keeper.note(state)
                if watch is not None and (found := watch.look(state, keeper.losses)):
                    yield found.kind, {"trial": trial.id, **found.fields}
                    if found.ends:
                        return {**facts(state, keeper), found.ends: found.fields}
                if due:  # after the look: a resumed segment does not look again
                    keeper.snapshot(state)
                if time.monotonic() - last_said > 1.0:
                    last_said = time.monotonic()
                    yield "Measured", measured(trial, measure, state, keeper.losses[-50:])
                if signal := int(processes.most(device, stop())[0]):
                    raise Interrupted(signal)
    except Interrupted:  # here, or thrown in where a record is given out
        keeper.save()
        raise
    return facts(state, keeper)


def _updates(state: TrainState, data: TrainData, keeper: Keeper) -> Iterator[Measure]:
    """`train`, gone on with from the last snapshot when memory runs out in the middle of a step."""
    while True:
        assert state.strategy is not None
        try:
            yield from train(state, data, bf16=state.strategy.bf16)
            return
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        release()
        keeper.undo(state)
        micro = at_once(state, state.strategy.batch_size)
        state.halve_micro_batch(micro)
        c = state.counters
        yield Measure(c.update, c.tokens, c.examples, float("nan"), 0.0, float("nan"), "out of memory", (), micro)


def _roll_back(trial: Trial, measure: Measure, state: TrainState, keeper: Keeper) -> dict[str, Any]:
    """Go back to the last snapshot, halve the learning rate and leave the batch out; the record of it. The place in the data and what the
    segment has spent stay."""
    counters, segment = state.counters, state.segment
    lr_scale = counters.lr_scale / 2
    keeper.rollbacks += 1
    keeper.good_since = 0 if keeper.rollbacks == 1 else keeper.good_since
    keeper.roll_back(state)
    state.counters.position, state.counters.examples = counters.position, counters.examples
    state.counters.lr_scale, state.segment = lr_scale, segment
    if keeper.rollbacks <= MAX_ROLLBACKS:  # else what follows is decided at once: a resumed run meets this batch again
        keeper.snapshot(state)
    done = "rolled back, learning rate halved, batch left out"
    if keeper.rollbacks > MAX_ROLLBACKS:
        done = "rolled back: too many, too close" if keeper.came_close(state) else "stopped: too many bad batches"
    return {
        "trial": trial.id, "event": measure.event, "update": measure.update, "loss_nats": measure.loss_nats,
        "grad_norm": measure.grad_norm, "rows": keeper.named(measure.rows), "back_to": state.counters.update,
        "lr_scale": lr_scale, "action": done,
    }  # fmt: skip


def _begin_again(
    trial: Trial, measure: Measure, found: dict[str, Any], state: TrainState, data: TrainData, keeper: Keeper
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Back to the beginning of the segment: the record of it, and what ends the segment ({}: it begins again with a tenth of the
    learning rate, for what is left of it). Neither a probe, which has said what its rate does, nor a repetition is tried again."""
    assert state.strategy is not None
    strategy, course, lr_scale = state.strategy, keeper.course, state.counters.lr_scale
    order = data.order(strategy.batch_size, state.counters.seed + strategy.reshuffle)
    rows = keeper.named(measure.rows if measure.event else order.at(course.worst_at))
    numbers = {**found, "lr": strategy.optimizer.lr * lr_scale, "lr_scale": lr_scale}
    if measure.event:
        numbers |= {"seen": measure.event, "loss_nats": measure.loss_nats, "grad_norm": measure.grad_norm}
    probe = not trial.commit and not trial.watch_gap
    if probe or keeper.restarts >= MAX_RESTARTS:
        keeper.to_beginning(state)
        why = "a probe or a repetition is not tried again" if probe else f"begun again {MAX_RESTARTS} times"
        action = f"back to where it began, training ends ({why}): a lower learning rate, or a look at the rows that are named"
        words = f"at learning rate {numbers['lr']:.2g} {found['rule']}"
        fields = {"name": "divergence", "numbers": {**numbers, "rows": rows}, "words": words, "action": action}
        ends = {"diagnosis": fields, "best_progress": 0.0, "best_lr": numbers["lr"]}
        return "Diagnosed", {"trial": trial.id, **fields}, ends
    keeper.begin_again(state)
    action = f"back to where the training began, learning rate times {RESTART_LR:g}, for what is left of its time"
    return "Event", {
        "trial": trial.id, "event": "divergence", "update": measure.update, "numbers": numbers, "rows": rows,
        "back_to": state.counters.update, "lr_scale": state.counters.lr_scale, "action": action,
    }, {}  # fmt: skip


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


# ---------------------------------------------------------------------------------------------- on disk


class Keeper:
    """The last good snapshot, in memory, and on disk as often as that costs little; the beginning of the segment; and what the trial has
    spent and seen so far.

    `spent`, `losses`, `course` and the watch's memory travel with the snapshot, so that a resumed trial decides as the straight one.
    """

    def __init__(self, folder: Path, trial: str, clock: Clock, watch: Watch | None, numbers: Sequence[int] = ()):
        self.folder, self.trial, self.clock, self.watch, self.numbers = folder, trial, clock, watch, numbers
        self.spent = {"updates": 0, "tokens": 0}
        self.losses: list[float] = []  # of the last updates, in nats
        self.course = Course()
        self.curve: list[dict[str, float]] = []  # progress, updates, train_loss: the mean of the last updates
        self.rollbacks = self.restarts = 0
        self.good_since = 0  # updates since the first roll back
        self._tokens = 0
        self._beginning: dict[str, Any] | None = None
        self._unseen = self._looked()  # what the watch remembers when a segment begins
        self._last: dict[str, Any] = {}
        self._saved_at = time.monotonic()
        self._cost_s = 0.1

    def load(self, state: TrainState) -> bool:
        """Go on from the newest snapshot on disk, if there is one. `state` stands where the segment begins."""
        self._beginning, device = state.snapshot(), state.trained[0][1].device
        found = self._newest(device)
        if found is not None:
            self.recall(state, *read_folder(found))
        if state.segment.total.unit == "seconds":  # what was lost took time, and the end of the run stays where it is
            mine = max(1e-3, min(state.segment.left(), self.clock.remaining())) if team.leads() else 0.0
            stretch(state, processes.most(device, mine)[0])
        self._take(state)
        return found is not None

    def end(self, state: TrainState, facts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The end of the segment with all that `recall` needs, to be kept on disk."""
        state.settle(training=False)
        self._take(state)
        return {**self._last["meta"], "ended": json.loads(json.dumps(facts, default=float))}, self._last["tensors"]

    def recall(self, state: TrainState, meta: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
        """Take over what another process of this run has kept; where it is the end, the facts of how it went."""
        state.restore({"meta": meta, "tensors": tensors})
        self._recall(meta["memory"], tensors)
        return meta.get("ended", {})

    def _recall(self, memory: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Take over what was remembered with a snapshot."""
        memory = copy.deepcopy(memory)
        self.clock.spend(**{k: n - self.spent[k] for k, n in memory["spent"].items()})
        self.spent, self.losses = memory["spent"], memory["losses"]
        self.rollbacks, self.restarts = memory["rollbacks"], memory.get("restarts", 0)
        self.good_since = memory.get("good_since", 0)
        self.course = Course(**memory.get("course", {}))
        self.curve = memory["curve"]
        if self.watch is not None:
            looked = {k.removeprefix(_LOOKED): v for k, v in tensors.items() if k.startswith(_LOOKED)}
            self.watch.remember(memory["watch"], looked)

    def _looked(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.watch.memory() if self.watch is not None else ({}, {})

    def named(self, rows: Iterable[int]) -> list[int]:
        """Rows by their numbers in the user's file, where it has some; else by their places in train."""
        return [self.numbers[r] if self.numbers else int(r) for r in rows]

    def spend(self, measure: Measure) -> None:
        """Pay for one update: on the run's clock and in the trial's own account."""
        updates, tokens = (0 if measure.event else 1), max(0, measure.tokens - self._tokens)
        self._tokens = measure.tokens
        self.spent = {"updates": self.spent["updates"] + updates, "tokens": self.spent["tokens"] + tokens}
        self.clock.spend(updates, tokens)

    def took(self, measure: Measure, state: TrainState) -> dict[str, Any] | None:
        """Remember a good update; the numbers of a divergence, if it shows one."""
        self.losses.append(measure.loss_nats)
        self.good_since += 1
        self.course.see(measure.loss_nats, measure.lr, state.counters.position - 1)
        return self.course.diverges()

    def note(self, state: TrainState) -> None:
        """A point of the curve, where enough has happened since the last one."""
        progress, update = state.segment.progress(), state.counters.update
        first = {"progress": 0.0, "updates": update - self.course.seen}
        last = self.curve[-1] if self.curve else first
        if progress - last["progress"] >= CURVE_PROGRESS and update - last["updates"] >= CURVE_UPDATES:
            self.curve.append({"progress": progress, "updates": update, "train_loss": mean_recent(self.losses)})

    def snapshot(self, state: TrainState) -> None:
        if state.segment.progress() > RESTART_UNTIL:
            self._beginning = None
        self._take(state)
        due = time.monotonic() - self._saved_at > self._cost_s / _SAVE_SHARE
        if any(processes.most(state.trained[0][1].device, due)):
            self.save()

    def _take(self, state: TrainState) -> None:
        self._last = state.snapshot(into=self._last.get("tensors"))
        self._tokens = state.counters.tokens
        del self.losses[:-50]
        memory, looked = self._looked()
        self._last["meta"]["memory"] = {
            "spent": self.spent, "losses": list(self.losses), "rollbacks": self.rollbacks, "restarts": self.restarts,
            "good_since": self.good_since, "course": asdict(self.course), "curve": list(self.curve), "watch": memory,
        }  # fmt: skip
        self._last["tensors"] |= {f"{_LOOKED}{k}": v for k, v in looked.items()}

    def save(self) -> None:
        """Write the last snapshot; the one before it is deleted after. Of several processes another may not have written this one when it
        is killed: there the last two stay."""
        started = time.monotonic()
        old = self._on_disk()
        number = self.restarts * _A_RESTART + self._last["meta"]["counters"]["position"]
        new = self.folder / f"{self.trial}.live.{number}"
        if not new.exists():
            write_folder(new, self._last["meta"], self._last["tensors"])
            for path in old[:-1] if processes.count() > 1 else old:
                remove_folder(path)
        self._saved_at = time.monotonic()
        self._cost_s = max(0.05, self._saved_at - started)

    def roll_back(self, state: TrainState) -> None:
        """Back to the last snapshot, all but the micro-batch that fits into memory."""
        micro_batch = state.counters.micro_batch
        state.restore(self._last)
        state.counters.micro_batch = micro_batch
        self._tokens = state.counters.tokens

    def undo(self, state: TrainState) -> None:
        """Back to the last snapshot as if nothing had been done since, but for the time that it took."""
        wall_s = state.segment.wall_s
        self.roll_back(state)
        state.segment.wall_s = wall_s
        self._recall(self._last["meta"]["memory"], self._last["tensors"])

    def can_restart(self, state: TrainState) -> bool:
        return self._beginning is not None and state.segment.progress() <= RESTART_UNTIL

    def came_close(self, state: TrainState) -> bool:
        """Whether bad batches came so close together that another learning rate has to be tried, and can be."""
        return self.good_since <= CLOSE_UPDATES and self.can_restart(state)

    def to_beginning(self, state: TrainState) -> None:
        """Back to the beginning of the segment, all but the micro-batch that fits into memory."""
        assert self._beginning is not None
        micro_batch = state.counters.micro_batch
        state.restore(self._beginning)
        state.counters.micro_batch = micro_batch
        self._tokens = state.counters.tokens

    def begin_again(self, state: TrainState) -> None:
        """Back to the beginning of the segment, which takes what is left of it, with a tenth of the learning rate for every time. What
        the failed one was seen to do is forgotten."""
        left = state.segment.left()
        self.to_beginning(state)
        stretch(state, left)
        self.restarts += 1
        state.counters.lr_scale *= RESTART_LR**self.restarts
        self.losses.clear()
        self.curve, self.course, self.rollbacks = [], Course(), 0
        if self.watch is not None:
            self.watch.remember(*self._unseen)
        self.snapshot(state)

    def clear(self) -> None:
        for path in self._on_disk():
            remove_folder(path)

    def _on_disk(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.trial}.live.*"), key=_number)

    def _newest(self, device: Any) -> Path | None:
        """The newest snapshot on disk that every process has; None where there is none. Newer ones, which are to be made again, go."""
        found = {_number(path): path for path in self._on_disk()}
        newest = -int(processes.most(device, -max(found, default=-1))[0])
        lacking = any(processes.most(device, newest not in found))
        for number, path in found.items():
            if lacking or number > newest:
                remove_folder(path)
        return None if lacking else found[newest]


def _number(path: Path) -> int:
    return int(path.name.rsplit(".", 1)[1])
