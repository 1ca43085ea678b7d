"""One training of a comparison: from a seed's fresh module to its judgement, with looks at validation while the clock is stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from multistep.budget import Budget
from multistep.comparison.arena import Arena
from multistep.comparison.book import Row
from multistep.comparison.entrants import Entrant
from multistep.schedules import Schedule
from multistep.state import TrainState
from multistep.train import train
from multistep.types import Interrupted

GIVE_UP = 20  # batches in a row whose loss is not finite or far above all before: the run has diverged
WARM_UPDATES = 2

Told = Callable[[float, str], None]


def run_once(
    arena: Arena, entrant: Entrant, value: float, schedule: Schedule, budget: Budget, seed: int, points: int,
    stop: Callable[[], int] = lambda: 0, tell: Told = lambda done, text: None,
) -> Row:  # fmt: skip
    """Train for `budget`, then judge. The row: score, metrics, seconds of training, updates, the curve [progress, seconds, updates,
    score], bytes of optimizer state, and in "diverged" why there is no score ("" where there is). Raises Interrupted."""
    started = time.monotonic()
    state, judge_s, bad, diverged = _begun(arena, entrant, value, schedule, budget, seed), 0.0, 0, ""
    curve: list[list[float | None]] = []
    for mark in [(n + 1) / points for n in range(points)] or [1.0]:
        try:
            for measure in train(state, arena.train, bf16=arena.bf16):
                bad = bad + 1 if measure.event else 0
                if bad >= GIVE_UP:
                    diverged = f"no sound loss from batch {state.counters.position - bad} on ({measure.event})"
                if number := stop():
                    raise Interrupted(number)
                tell(state.segment.progress(), f"update {measure.update}, loss {measure.loss_nats:.3f}")
                if diverged or state.segment.progress() >= mark:
                    break  # a new `train` goes on later: what is done until then is not on the segment's clock
        except (torch.linalg.LinAlgError, FloatingPointError) as error:  # pyright: ignore[reportPrivateImportUsage]
            diverged = " ".join(str(error).split())[:160]
        if diverged:
            break
        if points and (not curve or curve[-1][2] != state.counters.update):
            begun = time.monotonic()
            curve.append(_point(arena, state))
            judge_s += time.monotonic() - begun
    state.settle(training=False)
    found = {} if diverged else arena.judge(state.model, "validation")
    if not found and not diverged:
        diverged = "its outputs on validation are not finite"
    return {
        "score": found.get(arena.metric), "metrics": found, "diverged": diverged, "seconds": round(state.segment.wall_s, 4),
        "updates": state.counters.update, "batches": state.segment.updates, "tokens": state.counters.tokens,
        "examples": state.counters.examples, "wall_s": round(time.monotonic() - started, 3),
        "judge_s": round(judge_s, 3), "state_bytes": state_bytes(state), "parameters": sum(p.numel() for _, p in state.trained),
        "curve": curve,
    }  # fmt: skip


def cost(arena: Arena, entrant: Entrant, schedule: Schedule, seed: int) -> float:
    """Seconds of an update, once it is warm: on a module that is thrown away."""
    state = _begun(arena, entrant, entrant.prior, schedule, Budget(amount=WARM_UPDATES, unit="updates"), seed)
    times = [time.monotonic()]
    times += [time.monotonic() for _ in train(state, arena.train, bf16=arena.bf16)]
    return times[-1] - times[-2]


def _begun(arena: Arena, entrant: Entrant, value: float, schedule: Schedule, budget: Budget, seed: int) -> TrainState:
    state = TrainState(arena.module(seed))
    state.counters.seed = seed
    strategy = arena.strategy(entrant, value, schedule)
    arena.train.order(strategy.batch_size, seed).at(0)  # drawn before the clock starts
    state.begin(strategy, budget)
    return state


def _point(arena: Arena, state: TrainState) -> list[float | None]:
    state.settle(training=False)
    score = arena.judge(state.model, "curve").get(arena.metric)
    state.settle(training=True)
    finite = score is not None and math.isfinite(score)
    return [
        round(state.segment.progress(), 4),
        round(state.segment.wall_s, 4),
        state.counters.update,
        score if finite else None,
    ]


def state_bytes(state: TrainState) -> int:
    """Of the tensors that the optimizer keeps beside the parameters."""
    assert state.optimizer is not None
    return sum(t.numel() * t.element_size() for t in _tensors(state.optimizer.state_dict()["state"]))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for part in inner for t in _tensors(part)]
