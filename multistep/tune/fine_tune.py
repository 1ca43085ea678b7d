"""The trial that fine-tunes the encoder: forks a state, trains a segment of it, watches the gap, judges its end."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multistep import team
from multistep.diagnosis.looks import gap_rises
from multistep.diagnosis.training import Look, rise
from multistep.evaluate import Rows, keep_hidden
from multistep.models.base import TextEncoder
from multistep.schedules import Plateau
from multistep.state import TrainState
from multistep.strategy import FineTune, Trial
from multistep.tune.actions import Bench, Run, decided
from multistep.tune.augmented import AugmentedRows
from multistep.tune.training import run_training
from multistep.tune.watch import Acts, Found, Looks, acts_of, checks, look_of

GAP_CHECKS = (0.3, 0.45, 0.6, 0.75)  # progress at which train and validation loss are compared
GAP_ROWS = 400  # of the control split, for these checks
FORKS = ("regularize", "go on")  # stages that go on with a trunk where it was paused
LOOK_ROWS = 1000  # of the control split, for early stopping and the plateau


def run_fine_tune(bench: Bench, trial: Trial, action: FineTune) -> Run:
    started = time.monotonic()
    work = bench.work
    model = work.encoder(trial.start)
    data = training_rows(bench, action, model, trial.start)
    state = TrainState(model)
    state.counters.seed = work.config.seed
    plateau = action.schedule if isinstance(action.schedule, Plateau) else None
    acts, said = acts_of(len(work.texts["control"]), Acts(trial.watch_gap, trial.patience, plateau))
    if said:
        yield "Noted", {"trial": trial.id, "what": "looks", "facts": said}
    watch = _looks(bench, trial, action, acts) or (_GapWatch(bench, action) if acts.overfitting else None)
    if action.objective.reads_tables() and action.trains == "top" and action.layers < state.model.n_layers:
        rule = f"{action.objective.kind} moves the outputs of the embeddings: every pass starts from token ids, none from cached states"
        yield "Noted", {"trial": trial.id, "what": "input", "facts": {"rule": rule}}
    share = max(0.5, trial.share - (time.monotonic() - started)) if bench.timed() else trial.share
    facts, spent = yield from run_training(
        trial, action, state, data, watch, work.out / "states", bench.clock, bench.stop, {"family": "encoder"},
        share=share, rest=trial.stage in FORKS, micro_batch=bench.micro_batch, numbers=work.dataset.train_rows,
    )  # fmt: skip
    _keep_control_logits(bench, trial.id, state.model)
    if isinstance(watch, _GapWatch) and "diagnosis" not in facts:
        watch.end(state, [facts["train_loss"]], trial.id)
    if watch is not None:
        facts["looks"] = watch.looks()
    facts |= {"epochs": state.counters.examples / len(data.lengths_N), "examples": state.counters.examples}
    facts["tokens_s"] = spent["tokens"] / max(1e-9, time.monotonic() - started)
    if "diagnosis" in facts:  # stopped before its learning rate has decayed: not to be judged against what has
        trial = trial.with_(commit=False)
    return decided(bench, trial, "encoder", trial.id, started, facts=facts, **spent)


# ---------------------------------------------------------------------------------------------- data


def training_rows(bench: Bench, action: FineTune, model: TextEncoder, start: str | None = None) -> Rows | AugmentedRows:
    """Train's rows for `model`, which is at the state `start`: cached hidden states below the layers that are trained where they fit in
    memory, else token ids; those of texts that change every epoch where that was asked for."""
    work = bench.work
    rows = work.rows("train", action.max_length)
    cut = _cut(model, action)
    below = start if start and cut and _changed_below(work.base(), model, cut) else None
    for split in ("train", "control"):
        part = work.rows(split, action.max_length)
        if part.cut > cut or (part.cut and part.below != below):  # kept above what is trained now, or of other weights
            part.hidden_SD, part.cut = None, 0
        part.below = below
    if action.augment.on:
        return AugmentedRows(rows, work.texts["train"], action.augment, work.tokenize)
    if rows.cut < cut and work.fits_hidden(rows):  # from layers that stand still dropout must keep away
        keep_hidden(model, rows, cut, bf16=action.bf16, watch=work.watch)
    return rows


def _changed_below(first: TextEncoder, model: TextEncoder, cut: int) -> bool:
    """Whether anything below the layers that are trained is not as it was: a run that is given more time may train fewer of them."""
    above = {id(p) for part in (*model.layers()[cut:], model.head) for p in part.parameters()}
    pairs = zip(first.parameters(), model.parameters(), strict=True)
    return any(id(b) not in above and not torch.equal(a.to(b.device), b) for a, b in pairs)


def _cut(model: TextEncoder, action: FineTune) -> int:
    """The layers below what is trained, whose states may be cached."""
    if action.trains == "all" or not model.n_layers or action.objective.reads_tables():
        return 0
    return model.n_layers - action.layers


def _keep_control_logits(bench: Bench, state: str, model: TextEncoder) -> None:
    work = bench.work
    rows = work.rows("control", work.max_length)
    work.keep_logits(state, "control", work.encoder_logits(model, rows, bench.bf16))


# ---------------------------------------------------------------------------------------------- the gap


def _looks(bench: Bench, trial: Trial, action: FineTune, acts: Acts) -> Looks | None:
    """Early stopping and the plateau, where they were asked for: in place of the watch over the gap."""
    if not (acts.patience or acts.plateau):
        return None
    rows = bench.work.rows("control", action.max_length)
    few = np.arange(min(len(rows.ids), LOOK_ROWS))
    control = rows.subset(few)

    def validate(state: TrainState) -> np.ndarray:
        logits_NK = bench.work.encoder_logits(state.model, control, action.bf16)
        return np.asarray(bench.work.task.nll_N(logits_NK, bench.work.targets["control"][few]), np.float64)

    look_s = 0.0
    if bench.timed():
        begun = time.monotonic()
        bench.work.encoder_logits(bench.work.encoder(), control, action.bf16)
        look_s = time.monotonic() - begun
    folder = bench.work.out / "states" / f"{trial.id}.best"
    return Looks(folder, validate, checks(trial.share, look_s), patience=acts.patience, plateau=acts.plateau)


class _GapWatch:
    """Compares train and validation loss at a few points; two rises in a row of the validation loss are a named diagnosis."""

    def __init__(self, bench: Bench, action: FineTune):
        self.bench, self.action = bench, action
        rows = bench.work.rows("control", action.max_length)
        self.rows = np.arange(min(len(rows.ids), GAP_ROWS))
        self.control = rows.beginning(len(self.rows))  # a third of the time where the layers below stand still
        self.checks = list(GAP_CHECKS)
        self.seen: list[dict[str, Any]] = []
        self._last_N: np.ndarray | None = None  # losses at the last look

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"seen": list(self.seen)}, {} if self._last_N is None else {"last": torch.tensor(self._last_N)}

    def remember(self, memory: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.seen = list(memory["seen"])
        self._last_N = tensors["last"].numpy() if "last" in tensors else None
        self.checks = [p for p in GAP_CHECKS if not self.seen or p > self.seen[-1]["progress"]]

    def looks(self) -> list[dict[str, Any]]:
        return list(self.seen)

    def end(self, state: TrainState, losses: list[float], trial: str) -> None:
        """The last look costs nothing: the end is judged anyway."""
        self._see(state, losses, self._losses(self.bench.work.logits("encoder", trial, "control")[self.rows]))

    def _losses(self, logits_NK: np.ndarray) -> np.ndarray:
        work = self.bench.work
        return np.asarray(work.task.nll_N(logits_NK, work.targets["control"][self.rows]), np.float64)

    def _see(self, state: TrainState, losses: list[float], now_N: np.ndarray) -> None:
        self.seen.append(look_of(state, losses, now_N, self._last_N, state.segment.progress()))
        self._last_N = now_N

    def look(self, state: TrainState, losses: list[float]) -> Found | None:
        progress = state.segment.progress()
        if not self.checks or progress < self.checks[0]:
            return None
        while self.checks and progress >= self.checks[0]:
            self.checks.pop(0)
        state.settle(training=False)
        logits_NK = self.bench.work.encoder_logits(state.model, self.control, self.action.bf16)
        self._see(state, losses, team.first_numbers(self._losses(logits_NK)))
        if gap_rises([Look(**look) for look in self.seen]):
            action = "stronger regularization on a fork, against going on as before"
            said = {"name": "overfitting", "numbers": {"checks": self.seen}, "words": rise(self.seen), "action": action}
            return Found("Diagnosed", said, "diagnosis")
        return None
