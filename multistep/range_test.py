"""The learning-rate range test: a short training whose rate rises by the same factor every update, and what its loss did meanwhile.

    found = multistep.lr_range_test(module, objective="cross_entropy", train=loader)
    print(found)

It is weak evidence, and nothing in this package decides by it: a rate is judged here by the loss on training batches after a few updates
each, at weights that all smaller rates have made, before anything has decayed. It says where training falls apart, which bounds a search; the
race of `optimize` says which rate is good.
Source: Smith 2017, "Cyclical learning rates for training neural networks", arXiv 1506.01186, section 3.3. Differs from the source: the
rate rises exponentially, and losses are smoothed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from multistep.budget import Budget
from multistep.loader import Split, rows_of
from multistep.modules import device_of, first_outputs, optimizer_of, spec_of
from multistep.objectives import OBJECTIVES
from multistep.optimizers.base import REGIMES, Regime
from multistep.schedules import Constant
from multistep.state import TrainState
from multistep.strategy import TrainModule
from multistep.train import train as updates_of
from multistep.types import Spec, UserError, nearest

WEAK = "weak evidence: training loss after a few updates at each rate, none of them decayed; nothing here decides by it"
_SMOOTH = 0.8  # of the last smoothed loss in the next
_SETTLED = 5  # updates before a slope is believed
_FAR = 2.0  # times the lowest smoothed loss: it has fallen apart


@dataclass(frozen=True)
class RangeTest:
    """Rates and smoothed training losses (nats, or the objective's unit), one an update, up to where it fell apart. `steepest`: where
    the loss fell fastest per factor of the rate; `diverged`: where it fell apart; None where that was not seen."""

    optimizer: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    steepest: float | None
    diverged: float | None
    note: str = WEAK

    def __str__(self) -> str:
        def said(rate: float | None) -> str:
            return "not seen" if rate is None else f"{rate:.2g}"

        shown = range(0, len(self.rates), max(1, len(self.rates) // 12))
        lines = [f"{self.rates[n]:>10.2g}  {self.losses[n]:.4f}" for n in shown]
        head = f"{self.optimizer}: loss falls fastest at {said(self.steepest)}, falls apart at {said(self.diverged)}"
        return "\n".join([head, f"({self.note})", "      rate  loss", *lines])


def lr_range_test(
    module: nn.Module,
    *,
    objective: str | Mapping[str, Any] | Spec,
    train: Any,
    optimizer: str | Mapping[str, Any] | Spec = "adamw",
    regime: str = "scratch",
    low: float | None = None,
    high: float | None = None,
    updates: int = 100,
    batch_size: int = 32,
    clip: float = 0.0,
    split: Split | None = None,
    seed: int = 0,
) -> RangeTest:
    """Raise the rate from `low` to `high` over `updates` updates of a copy of the module, which itself does not change. None: a
    thousandth and a thousand times the optimizer's calibrated rate. Data and objective as in `optimize`. Raises UserError on bad input."""
    device, goal = device_of(module), spec_of(objective, OBJECTIVES, "objective")
    rows = rows_of(train, "train", device, split)
    first_outputs(module, rows)  # which says so where they do not fit each other
    config = optimizer_of(optimizer)
    chosen: Regime | None = next((r for r in REGIMES if r == regime), None)
    if chosen is None:
        raise UserError(f"regime: {regime!r} is not known.{nearest(regime, REGIMES)}")
    if config.member.closure:
        raise UserError(f"optimizer: {config.kind} solves for its step, so there is no rate to test. Choose another.")
    prior = config.member.rates[chosen].prior
    low, high = low or prior / 1e3, high or min(prior * 1e3, _most(config.member))
    if not 0 < low < high or updates < 2 * _SETTLED:
        raise UserError(
            f"low {low:g}, high {high:g}, updates {updates}: give 0 < low < high and {2 * _SETTLED} updates or more."
        )

    def at(update: int) -> float:
        return low * (high / low) ** (update / (updates - 1))

    strategy = TrainModule.parse({
        "optimizer": config.at(at(0)), "objective": goal, "schedule": Constant(warmup=0.0), "clip": clip,
        "batch_size": rows.batch_size or min(batch_size, len(rows)),
    })  # fmt: skip
    state = TrainState(copy.deepcopy(module))
    state.counters.seed = seed
    state.begin(strategy, Budget(amount=updates, unit="updates"))
    rates: list[float] = []
    losses: list[float] = []
    smoothed, diverged = 0.0, None
    for measure in updates_of(state, rows):
        if measure.event == "out of memory":  # the batch comes again, in smaller parts
            continue
        n = len(rates)
        smoothed = _SMOOTH * smoothed + (1 - _SMOOTH) * measure.loss_nats
        loss = smoothed / (1 - _SMOOTH ** (n + 1))
        lowest = min(losses, default=math.inf)
        if measure.event or not math.isfinite(loss) or loss - lowest > (_FAR - 1) * abs(lowest):
            diverged = measure.lr  # of the update before which this loss was seen, or of this one's refusal
            break
        rates.append(measure.lr)
        losses.append(loss)
        if n + 1 < updates:
            state.adjust(strategy.with_(optimizer=config.at(at(n + 1))))
    return RangeTest(config.kind, tuple(rates), tuple(losses), _steepest(rates, losses), diverged)


def _most(member: Any) -> float:
    """The largest rate that the optimizer takes."""
    limits = [m.le for m in member.model_fields["lr"].metadata if type(m).__name__ == "Le"]
    return float(min(limits, default=math.inf))


def _steepest(rates: list[float], losses: list[float]) -> float | None:
    """The rate at which the smoothed loss falls fastest in the logarithm of the rate; None where it never falls."""
    if len(rates) < 2 * _SETTLED:
        return None
    slopes = np.gradient(np.array(losses), np.log(rates))[_SETTLED:]
    place = int(slopes.argmin())
    return rates[_SETTLED + place] if slopes[place] < 0 else None
