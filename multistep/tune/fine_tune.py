"""The trial that trains by gradients: forks a state, runs the loop, recovers from bad batches, watches the gap, keeps itself on disk.

On disk there are only snapshots taken every few updates (`states/<trial>.live.<position>`): a killed run goes on from the last
one, and so does a roll back, which makes both the same under budgets in updates or tokens, bit for bit.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from multistep.budget import Budget
from multistep.evaluate import Rows, keep_hidden
from multistep.models.encoder import Encoder
from multistep.state import TrainState, read_folder, write_folder
from multistep.strategy import FineTune, Trial
from multistep.train import TrainData, train
from multistep.tune.actions import Bench, Record, Run, decided
from multistep.types import Interrupted, Measure

SNAPSHOT_UPDATES = 25
MAX_ROLLBACKS = 3
GAP_CHECKS = (0.3, 0.45, 0.6, 0.75)  # progress at which train and validation loss are compared
GAP_ROWS = 400  # of the control split, for these checks
_SAVE_SHARE = 0.03  # at most this share of the time goes into writing snapshots to disk


def run_fine_tune(bench: Bench, trial: Trial, action: FineTune) -> Run:
    started = time.monotonic()
    work = bench.work
    data = training_rows(bench, action)
    state = TrainState(work.encoder(trial.start))
    state.counters.seed = work.config.seed
    paused = trial.start is not None and _paused(work.state_folder(trial.start), action)
    if paused:
        assert trial.start is not None
        _go_on(state, work.state_folder(trial.start), action)
        state.adjust(action)
        _stretch(state, trial.share)
    else:
        state.begin(action, _length(bench, trial, data, started))
    watch = _GapWatch(bench, action, data) if trial.watch_gap else None
    keeper = _Keeper(bench, trial.id, watch)
    if keeper.load(state):
        if bench.timed():  # loading and encoding took time again, and the end of the run stays where it is
            left = (1 - state.segment.progress()) * state.segment.total.amount
            _stretch(state, max(0.5, min(left, bench.clock.remaining())))
        yield "Event", {"trial": trial.id, "event": "resumed", "update": state.counters.update}
    facts = yield from _loop(bench, trial, state, data, keeper, watch)
    _save_whole(state, work.state_folder(trial.id), trial.start, action)
    keeper.clear()
    _keep_control_logits(bench, trial.id, state.model)
    spent = keeper.spent
    facts |= {"epochs": state.counters.examples / len(data.lengths_N), "examples": state.counters.examples}
    facts["tokens_s"] = spent["tokens"] / max(1e-9, time.monotonic() - started)
    if "diagnosis" in facts:  # stopped before its learning rate has decayed: not to be judged against what has
        trial = trial.with_(commit=False)
    return decided(bench, trial, "encoder", trial.id, started, facts=facts, **spent)


def _loop(
    bench: Bench, trial: Trial, state: TrainState, data: TrainData, keeper: _Keeper, watch: _GapWatch | None
) -> Generator[Record, None, dict[str, Any]]:
    """Train to the end of the segment; the facts of how it went. Rolls back and halves after a bad batch, three times at most."""
    action = state.strategy
    assert action is not None
    seen, last_said = keeper.losses, time.monotonic()
    for measure in train(state, data, bf16=action.bf16):
        keeper.spend(measure)
        if measure.event:
            yield "Event", _roll_back(trial, measure, state, keeper)
            if keeper.rollbacks > MAX_ROLLBACKS:
                break
            continue
        seen.append(measure.loss_nats)
        if measure.update % SNAPSHOT_UPDATES == 0:
            keeper.snapshot(state)
        if time.monotonic() - last_said > 1.0:
            last_said = time.monotonic()
            yield "Measured", _measured(trial, measure, state, seen[-50:])
        if signal := bench.stop():
            keeper.save()
            raise Interrupted(signal)
        if watch is not None and (diagnosis := watch.look(state, seen)):
            yield "Diagnosed", {"trial": trial.id, **diagnosis}
            return {**_facts(state, keeper), "diagnosis": diagnosis}
    return _facts(state, keeper)


def _facts(state: TrainState, keeper: _Keeper) -> dict[str, Any]:
    return {
        "train_loss": _mean(keeper.losses),
        "rollbacks": keeper.rollbacks,
        "progress": state.segment.progress(),
        "update": state.counters.update,
    }


def _roll_back(trial: Trial, measure: Measure, state: TrainState, keeper: _Keeper) -> dict[str, Any]:
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
        "trial": trial.id, "update": measure.update, "tokens": measure.tokens, "loss_nats": _mean(recent),
        "lr": measure.lr, "grad_norm": measure.grad_norm, "progress": state.segment.progress(),
    }  # fmt: skip


def _mean(values: list[float]) -> float:
    return float(np.mean(values[-50:])) if values else float("nan")


# ---------------------------------------------------------------------------------------------- data and length


def training_rows(bench: Bench, action: FineTune) -> Rows:
    """Train's rows: cached hidden states below the trained layers where they fit in memory, else token ids."""
    work = bench.work
    rows = work.rows("train", action.max_length)
    model = work.encoder()
    cut = model.n_layers - action.layers if action.trains == "top" and model.n_layers else 0
    for split in ("train", "control"):
        part = work.rows(split, action.max_length)
        if part.cut > cut:  # cached above what is trained now
            part.hidden_SD, part.cut = None, 0
    if cut > 0 and rows.cut == 0 and work.fits_hidden(rows):
        keep_hidden(model, rows, cut, bf16=action.bf16, watch=work.watch)
    return rows


def _length(bench: Bench, trial: Trial, data: Rows, started: float) -> Budget:
    """The segment: the trial's share, less the time to judge its end."""
    if not bench.timed():
        return Budget(amount=trial.share, unit=bench.clock.budget.unit)
    return Budget(amount=max(0.5, trial.share - (time.monotonic() - started)))


def _stretch(state: TrainState, share: float) -> None:
    """A paused segment goes on so that what is left of it takes `share`."""
    done = state.segment.progress()
    old = state.segment.total
    total = share / max(1e-6, 1 - done)
    factor = total / old.amount
    state.segment.total = Budget(amount=total, unit=old.unit)
    state.segment.wall_s *= factor
    state.segment.updates = round(state.segment.updates * factor)
    state.segment.tokens = round(state.segment.tokens * factor)


def _keep_control_logits(bench: Bench, state: str, model: Encoder) -> None:
    work = bench.work
    rows = work.rows("control", work.max_length)
    work.keep_logits(state, "control", work.encoder_logits(model, rows, bench.bf16))


# ---------------------------------------------------------------------------------------------- on disk


class _Keeper:
    """The last good snapshot, in memory, and on disk as often as that costs little; and what the trial has spent so far.

    `spent`, `losses` and the gap watch's memory travel with the snapshot, so that a resumed trial decides as the straight one.
    """

    def __init__(self, bench: Bench, trial: str, watch: _GapWatch | None):
        self.folder, self.trial, self.clock, self.watch = bench.work.out / "states", trial, bench.clock, watch
        self.spent = {"updates": 0, "tokens": 0}
        self.losses: list[float] = []  # of the last updates, in nats
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
            self.clock.spend(**self.spent)
            if self.watch is not None:
                self.watch.seen = memory["watch"]
                del self.watch.checks[: len(self.watch.seen)]
        self._take(state)
        return bool(found)

    def spend(self, measure: Measure) -> None:
        """Pay for one update: on the run's clock and in the trial's own account."""
        updates, tokens = (0 if measure.event else 1), measure.tokens - self._tokens
        self._tokens = measure.tokens
        self.rollbacks += 1 if measure.event else 0
        self.spent = {"updates": self.spent["updates"] + updates, "tokens": self.spent["tokens"] + tokens}
        self.clock.spend(updates, tokens)

    def snapshot(self, state: TrainState) -> None:
        self._take(state)
        if time.monotonic() - self._saved_at > self._cost_s / _SAVE_SHARE:
            self.save()

    def _take(self, state: TrainState) -> None:
        self._last = state.snapshot()
        self._tokens = state.counters.tokens
        del self.losses[:-50]
        self._last["meta"]["memory"] = {
            "spent": self.spent, "losses": list(self.losses), "rollbacks": self.rollbacks,
            "watch": list(self.watch.seen) if self.watch is not None else [],
        }  # fmt: skip

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


def _save_whole(state: TrainState, folder: Path, start: str | None, action: FineTune) -> None:
    snapshot = state.snapshot()
    meta = {**snapshot["meta"], "family": "encoder", "start": start, "strategy": action.model_dump()}
    write_folder(folder, meta, snapshot["tensors"])


def _paused(folder: Path, action: FineTune) -> bool:
    """Whether the state there is a training that was stopped in the middle and that this strategy can go on with."""
    meta, _ = read_folder(folder)
    if "segment" not in meta:
        return False
    total, unit = meta["segment"]["total"]["amount"], meta["segment"]["total"]["unit"]
    done = meta["segment"]["wall_s" if unit == "seconds" else unit]
    return done < total and action.same_but_live(FineTune(**meta["strategy"]))


def _go_on(state: TrainState, folder: Path, action: FineTune) -> None:
    meta, tensors = read_folder(folder)
    state.begin(FineTune(**meta["strategy"]), Budget(**meta["segment"]["total"]))
    state.restore({"meta": meta, "tensors": tensors})


# ---------------------------------------------------------------------------------------------- the gap


class _GapWatch:
    """Compares train and validation loss at a few points; two rises in a row of the validation loss are a named diagnosis."""

    def __init__(self, bench: Bench, action: FineTune, data: TrainData):
        self.bench, self.action = bench, action
        rows = bench.work.rows("control", action.max_length)
        self.rows = np.arange(min(len(rows.ids), GAP_ROWS))
        self.control = rows.subset(self.rows)
        self.checks = list(GAP_CHECKS)
        self.seen: list[dict[str, float]] = []

    def look(self, state: TrainState, losses: list[float]) -> dict[str, Any] | None:
        progress = state.segment.progress()
        if not self.checks or progress < self.checks[0]:
            return None
        while self.checks and progress >= self.checks[0]:
            self.checks.pop(0)
        work = self.bench.work
        logits_NK = work.encoder_logits(state.model, self.control, self.action.bf16)
        state.model.train()
        targets = work.targets["control"][self.rows]
        validation = float(np.mean(work.task.nll_N(logits_NK, targets)))
        self.seen.append({"progress": progress, "train_loss": _mean(losses), "validation_loss": validation})
        if len(self.seen) < 3:
            return None
        first, second, third = (s["validation_loss"] for s in self.seen[-3:])
        if (
            third > second > first
            and third > 1.05 * first
            and self.seen[-1]["train_loss"] < self.seen[-3]["train_loss"]
        ):
            return {
                "name": "overfitting",
                "numbers": {"checks": self.seen},
                "action": "stronger regularization on a fork, against going on as before",
            }
        return None
