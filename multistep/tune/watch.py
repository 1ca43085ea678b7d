"""Looks at validation while a segment runs: keeps the best state, and acts on what it sees, with the numbers for the journal.

    overfitting      three looks in a row worse than the best, the last beyond two standard errors, while training loss falls: back
                     to the best state, the segment ends
    plateau          `schedule.patience` looks in a row without a gain: the learning rate is cut, the segment goes on
    no improvement   `patience` looks in a row without a gain (early stopping): back to the best state, the segment ends

A gain is measured over the examples, paired with the last look that was one (t-test, p <= 0.1), so that neither noise nor many small
steps are mistaken for the other; where the rows are too few to tell them apart, looks decide nothing (`acts_of`). All that is remembered
travels with the segment's snapshots: a resumed run decides as the straight one.
Sources: Prechelt 1998, "Early stopping - but when?"; the plateau: see schedules/plateau.py. Shapes: N validation examples.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from multistep import team
from multistep.diagnosis.looks import may_cut, rises
from multistep.diagnosis.training import Look, rise
from multistep.metrics import judge_losses
from multistep.metrics.measure import stderr_of
from multistep.metrics.power import FEWEST_ROWS
from multistep.schedules import Plateau
from multistep.state import TrainState, read_folder, remove_folder, write_folder
from multistep.types import Verdict

CHECKS = 19  # looks at most: every twentieth of the segment
CHECK_SHARE = 0.1  # of a segment's time at most goes into looking, but for four looks
LEAST_CHECKS = 4


class Found(NamedTuple):
    """What a look found: a journal record, and under which name it ends the segment's facts ("": the segment goes on)."""

    kind: str
    fields: dict[str, Any]
    ends: str


class Watch(Protocol):
    """Looks at a training from outside, now and then. What it remembers (JSON and tensors) is kept with the snapshots."""

    def look(self, state: TrainState, losses: list[float]) -> Found | None:
        """Called after every update with the last training losses."""
        ...

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]: ...

    def remember(self, memory: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take over what `memory` gave, a moment ago or in another process: what was seen since is forgotten."""
        ...

    def looks(self) -> list[dict[str, Any]]:
        """What was seen: progress, updates, train_loss, validation_loss and the stderr of its change since the look before."""
        ...


def look_of(
    state: TrainState, losses: list[float], now_N: np.ndarray, before_N: np.ndarray | None, progress: float
) -> dict[str, Any]:
    """A look, for the facts of a trial. `losses`: of the last training batches; `now_N`, `before_N`: of the same validation examples."""
    change_N = np.zeros(0) if before_N is None else np.asarray(now_N, np.float64) - before_N
    return {
        "progress": progress, "updates": state.counters.update,
        "train_loss": float(np.mean(losses[-50:])) if losses else float("nan"),
        "validation_loss": float(np.mean(now_N)),
        "change_stderr": float(change_N.std(ddof=1) / len(change_N) ** 0.5) if len(change_N) > 1 else 0.0,
    }  # fmt: skip


def rate_carried(state: TrainState) -> float:
    """The learning rate that a training stands at, with the cuts and halvings that it has had: whatever goes on from there is given it,
    so they are not carried on."""
    assert state.strategy is not None
    scale, state.counters.lr_scale = state.counters.lr_scale, 1.0
    return state.strategy.optimizer.lr * state.strategy.schedule(state.segment.progress()) * scale


def checks(share: float = 0.0, look_s: float = 0.0) -> list[float]:
    """The progress at each look; fewer where `look_s` seconds each would be more than a tenth of the `share` seconds."""
    count = min(CHECKS, max(LEAST_CHECKS, int(CHECK_SHARE * share / max(1e-9, look_s)))) if look_s else CHECKS
    return [(n + 1) / (count + 1) for n in range(count)]


class Acts(NamedTuple):
    """What looks may do to a training: end it where it overfits, or after so many without a gain; cut its rate on a plateau."""

    overfitting: bool
    patience: int
    plateau: Plateau | None


def acts_of(rows: int, asked: Acts, least: int = FEWEST_ROWS) -> tuple[Acts, dict[str, Any]]:
    """What looks at so many rows may do of what was asked for; where they are too few also the facts: the rule, and what is silent."""
    if rows >= least or not any(asked):
        return asked, {}
    words = ("overfitting is not looked for", f"patience={asked.patience} stops nothing", "the plateau cuts no rate")
    said = ", ".join(word for act, word in zip(asked, words, strict=True) if act)
    silent = [name for name, act in asked._asdict().items() if act]
    rule = f"{rows} validation rows (< {least}) cannot tell a gain from chance: {said}"
    return Acts(False, 0, None), {"rule": rule, "silent": silent}


class Looks:
    """`validate` gives the loss of every validation example [N] under a state; the best state is kept in `folder`. `every`: batches
    of an epoch, for a look after each in place of those at the progress `at`."""

    def __init__(
        self, folder: Path, validate: Callable[[TrainState], np.ndarray], at: list[float], *, overfitting: bool = False,
        patience: int = 0, plateau: Plateau | None = None, every: int = 0,
    ):  # fmt: skip
        self._folder, self._validate = team.own(folder.parent) / folder.name, validate
        self._checks, self._at = tuple(at), list(at)  # all, and those to come
        self._overfitting, self._patience, self._plateau, self._every = overfitting, patience, plateau, every
        self._seen: list[dict[str, Any]] = []
        self._without_gain, self._since_cut, self._cuts = 0, 0, 0  # looks, looks, times
        self._epoch = 0  # the last that was seen to end
        self._losses: dict[str, np.ndarray] = {}

    def meet(self) -> None:
        """All processes of a team look when the first one does, whatever a look takes them."""
        self._checks = tuple(team.first(self._checks))
        self._at = list(self._checks)

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        counts = {"without_gain": self._without_gain, "since_cut": self._since_cut, "cuts": self._cuts}
        return {"seen": list(self._seen), "epoch": self._epoch, **counts}, {
            k: torch.tensor(v) for k, v in self._losses.items()
        }

    def remember(self, memory: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._seen = list(memory["seen"])
        self._without_gain, self._since_cut, self._cuts = (memory[k] for k in ("without_gain", "since_cut", "cuts"))
        self._epoch = memory["epoch"]
        self._losses = {k: v.numpy() for k, v in tensors.items()}
        self._at = [p for p in self._checks if not self._seen or p > self._seen[-1]["progress"]]

    def looks(self) -> list[dict[str, Any]]:
        return list(self._seen)

    def look(self, state: TrainState, losses: list[float]) -> Found | None:
        progress = state.segment.progress()
        if not self._is_time(state, progress):
            return None
        state.settle(training=False)
        now_N = team.first_numbers(self._validate(state))
        state.settle(training=True)
        loss = float(now_N.mean())
        self._seen.append(look_of(state, losses, now_N, self._losses.get("last"), progress))
        self._losses["last"] = now_N
        verdict = judge_losses(now_N, self._losses["reference"]) if "reference" in self._losses else None
        gain = verdict is None or verdict.accept
        compared = verdict.evidence[0] if verdict is not None and verdict.evidence else None
        self._seen[-1] |= {
            "rows": len(now_N), "gain": compared and compared.difference, "gain_stderr": compared and compared.stderr,
        }  # fmt: skip
        if gain:
            self._losses["reference"] = now_N
        self._without_gain = 0 if gain else self._without_gain + 1
        self._since_cut = 0 if gain else self._since_cut + 1
        best = float(self._losses["best"].mean()) if "best" in self._losses else float("nan")
        if loss < best or not np.isfinite(best):
            self._losses["best"] = now_N
            if self._overfitting or self._patience:
                snapshot = state.snapshot()
                write_folder(self._folder, snapshot["meta"], snapshot["tensors"])
        self._seen[-1]["rise_stderr"] = stderr_of(now_N - self._losses["best"])
        if self._overfitting and rises([Look(**look) for look in self._seen]):
            action = "back to the best state; its learning rate decays to zero and training ends"
            said = {"name": "overfitting", "numbers": self._numbers(), "words": rise(self._seen), "action": action}
            return Found("Diagnosed", said, "diagnosis")
        if verdict is None or gain:
            return self._looked(state)
        if self._patience and self._without_gain >= self._patience:
            best = self._numbers()["best"]
            action = (
                f"stopped: {self._without_gain} looks in a row without a gain ({verdict.rule}); back to the best state, "
                f"validation loss {best['validation_loss']:.4f} at {best['progress']:.0%}"
            )
            return Found("Event", self._event("no improvement", state, verdict, action), "stopped")
        return self._cut(state, verdict) or self._looked(state)

    def _is_time(self, state: TrainState, progress: float) -> bool:
        if self._every:
            before, self._epoch = self._epoch, state.counters.position // self._every
            return self._epoch > before
        due = bool(self._at) and progress >= self._at[0]
        while self._at and progress >= self._at[0]:
            self._at.pop(0)
        return due

    def _looked(self, state: TrainState) -> Found | None:
        """An epoch's look is a line of the journal whatever it found."""
        if not self._every:
            return None
        return Found("Noted", {"what": "looked", "facts": {"epoch": self._epoch, **self._seen[-1]}}, "")

    def _cut(self, state: TrainState, verdict: Verdict) -> Found | None:
        """Reduce on plateau."""
        p = self._plateau
        if p is None or not may_cut(p, self._since_cut, self._cuts):
            return None
        action = f"learning rate times {p.factor:g}: {self._since_cut} looks in a row without a gain ({verdict.rule})"
        self._since_cut, self._cuts = 0, self._cuts + 1
        state.counters.lr_scale *= p.factor
        return Found("Event", self._event("plateau", state, verdict, action), "")

    def _event(self, event: str, state: TrainState, verdict: Verdict, action: str) -> dict[str, Any]:
        return {
            "event": event, "update": state.counters.update, "numbers": self._numbers(), "rule": verdict.rule,
            "evidence": [c.model_dump() for c in verdict.evidence], "by": verdict.by and verdict.by.model_dump(),
            "lr_scale": state.counters.lr_scale, "action": action,
        }  # fmt: skip

    def _numbers(self) -> dict[str, Any]:
        best = min(self._seen, key=lambda s: s["validation_loss"])
        return {"best": best, "now": self._seen[-1], "checks": len(self._seen)}

    def back_to_best(self, state: TrainState) -> dict[str, Any]:
        """Restore the best state; where it was and the learning rate it had, which holds the cuts: they are not carried on."""
        meta, tensors = read_folder(self._folder)
        state.restore({"meta": meta, "tensors": tensors})
        return {"best_progress": state.segment.progress(), "best_lr": rate_carried(state)}

    def clear(self) -> None:
        """Delete the best state, which nobody goes back to once the trial has ended."""
        if self._folder.exists():
            remove_folder(self._folder)
