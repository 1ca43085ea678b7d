"""The trial that fine-tunes the encoder: forks a state, trains a segment of it, watches the gap, judges its end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from multistep.budget import Budget
from multistep.evaluate import Rows, keep_hidden
from multistep.models.encoder import Encoder
from multistep.state import TrainState, read_folder, write_folder
from multistep.strategy import FineTune, Trial
from multistep.train import TrainData
from multistep.tune.actions import Bench, Run, decided
from multistep.tune.segment import Keeper, mean_recent, run_segment, stretch

GAP_CHECKS = (0.3, 0.45, 0.6, 0.75)  # progress at which train and validation loss are compared
GAP_ROWS = 400  # of the control split, for these checks


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
        stretch(state, trial.share)
    else:
        state.begin(action, _length(bench, trial, data, started))
    watch = _GapWatch(bench, action, data) if trial.watch_gap else None
    keeper = Keeper(work.out / "states", trial.id, bench.clock, watch)
    if keeper.load(state):
        if bench.timed():  # loading and encoding took time again, and the end of the run stays where it is
            left = (1 - state.segment.progress()) * state.segment.total.amount
            stretch(state, max(0.5, min(left, bench.clock.remaining())))
        yield "Event", {"trial": trial.id, "event": "resumed", "update": state.counters.update}
    facts = yield from run_segment(trial, state, data, keeper, watch, bench.stop)
    state.settle(training=False)
    _save_whole(state, work.state_folder(trial.id), trial.start, action)
    keeper.clear()
    _keep_control_logits(bench, trial.id, state.model)
    spent = keeper.spent
    facts |= {"epochs": state.counters.examples / len(data.lengths_N), "examples": state.counters.examples}
    facts["tokens_s"] = spent["tokens"] / max(1e-9, time.monotonic() - started)
    if "diagnosis" in facts:  # stopped before its learning rate has decayed: not to be judged against what has
        trial = trial.with_(commit=False)
    return decided(bench, trial, "encoder", trial.id, started, facts=facts, **spent)


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


def _keep_control_logits(bench: Bench, state: str, model: Encoder) -> None:
    work = bench.work
    rows = work.rows("control", work.max_length)
    work.keep_logits(state, "control", work.encoder_logits(model, rows, bench.bf16))


# ---------------------------------------------------------------------------------------------- whole states


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

    def remember(self, seen: list[dict[str, float]]) -> None:
        self.seen = seen
        del self.checks[: len(seen)]

    def look(self, state: TrainState, losses: list[float]) -> dict[str, Any] | None:
        progress = state.segment.progress()
        if not self.checks or progress < self.checks[0]:
            return None
        while self.checks and progress >= self.checks[0]:
            self.checks.pop(0)
        work = self.bench.work
        state.settle(training=False)
        logits_NK = work.encoder_logits(state.model, self.control, self.action.bf16)
        targets = work.targets["control"][self.rows]
        validation = float(np.mean(work.task.nll_N(logits_NK, targets)))
        self.seen.append({"progress": progress, "train_loss": mean_recent(losses), "validation_loss": validation})
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
