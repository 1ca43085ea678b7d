"""What optimizers are compared on: a module for every seed, rows to train on, and a judgement on validation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from multistep import metrics
from multistep.comparison.entrants import Entrant
from multistep.loader import ModuleRows
from multistep.objectives import Objective
from multistep.schedules import Schedule
from multistep.strategy import Training, TrainModule
from multistep.tasks import Task
from multistep.train import Order, TrainData
from multistep.tune.module import judge_rows

Make = Callable[[int], nn.Module]


class Arena(Protocol):
    metric: str
    train: TrainData
    bf16: bool
    rows: dict[str, int]  # by split: "train", "validation", "curve"

    def module(self, seed: int) -> nn.Module:
        """A fresh module: the same for the same seed."""
        ...

    def strategy(self, entrant: Entrant, value: float, schedule: Schedule) -> Training:
        """How it is trained with the entrant's optimizer, its knob at `value`."""
        ...

    def judge(self, module: nn.Module, split: str) -> dict[str, float]:
        """The metric that decides, and "loss", on "validation" or on the sample of it that curves use. Empty when outputs are not finite."""
        ...


class KeptOrders:
    """Rows whose orders are drawn once: drawing an epoch anew after every look at validation would be paid by training's clock."""

    def __init__(self, rows: TrainData):
        self._rows, self._drawn = rows, cache(rows.order)

    def order(self, batch_size: int, seed: int) -> Order:
        return self._drawn(batch_size, seed)

    def load(self, rows: np.ndarray) -> tuple[Any, Any]:
        return self._rows.load(rows)

    def outputs(self, model: Any, inputs: Any) -> Tensor:
        return self._rows.outputs(model, inputs)

    def tokens(self, rows: np.ndarray) -> int:
        return self._rows.tokens(rows)


class ModuleArena:
    """Any module. `make` is called with the seed, after torch was seeded with it."""

    def __init__(
        self, make: Make, train: ModuleRows, validation: ModuleRows, objective: Objective, metric: str,
        task: Task | None, *, clip: float, dropout: float | None, bf16: bool, curve_rows: int,
    ):  # fmt: skip
        self.metric, self.bf16 = metric, bf16
        self.train: TrainData = KeptOrders(train)
        curve = validation.subset(sample(len(validation), curve_rows).tolist())
        self._splits = {"validation": validation, "curve": curve}
        self.rows = {"train": len(train), **{k: len(v) for k, v in self._splits.items()}}
        self._make, self._objective, self._task = make, objective, task
        self._clip, self._dropout = clip, dropout

    def module(self, seed: int) -> nn.Module:
        return made(self._make, seed)

    def strategy(self, entrant: Entrant, value: float, schedule: Schedule) -> Training:
        return TrainModule(
            optimizer=entrant.at(value), objective=self._objective, schedule=entrant.schedule(schedule),
            batch_size=entrant.batch_size, clip=self._clip, dropout=self._dropout, bf16=self.bf16,
        )  # fmt: skip

    def judge(self, module: nn.Module, split: str) -> dict[str, float]:
        answers = judge_rows(module, self._splits[split], self._objective, self._task, self.bf16)
        found = {"loss": float(answers.losses_N.mean())}
        if not np.isfinite(answers.losses_N).all():
            return {}
        if self.metric != "loss":
            assert self._task is not None and answers.scored is not None
            found[self.metric] = metrics.measure((self.metric,), self._task, answers.scored)[self.metric].value
        return found


def made(make: Make, seed: int) -> nn.Module:
    """The module of a seed; torch's random state outside is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(seed)


def sample(rows: int, most: int) -> np.ndarray:
    """At most so many row numbers, drawn once and the same every time, in order."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
