"""A text source as an arena: data, tokens and the encoder are made once, as `fit` makes them; each run starts from that encoder, or
for random weights from those of its seed, with its head at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from multistep import data, metrics
from multistep.budget import Budget, Clock
from multistep.comparison.arena import KeptOrders, sample
from multistep.comparison.entrants import Entrant
from multistep.config import KINDS, OptimizerConfig, resolve
from multistep.controllers.plan import Plan
from multistep.controllers.script import Problem
from multistep.labels import task_for
from multistep.metrics import Scored, check_metric
from multistep.objectives.fits import check_objective
from multistep.optimizers.base import Regime
from multistep.schedules import Schedule
from multistep.strategy import FineTune, Profile, Training, Trial
from multistep.train import TrainData
from multistep.tune.actions import Bench
from multistep.tune.fine_tune import training_rows
from multistep.tune.profile import run_profile
from multistep.tune.workbench import Workbench
from multistep.types import UserError


class TextArena:
    """`base`: the strategy of `fit` for this encoder, whose optimizer and schedule the comparison replaces."""

    def __init__(self, bench: Bench, base: FineTune, regime: Regime, scale: Mapping[str, float], curve_rows: int):
        self.train: TrainData = KeptOrders(training_rows(bench, base, bench.work.encoder()))
        self.regime: Regime = regime
        self.metric, self.bf16, self.scale = bench.metric, base.bf16, scale
        self.batch_size, self.schedule = base.batch_size, base.schedule
        self._work, self._base = bench.work, base
        whole = bench.work.rows("control", base.max_length)
        few = sample(len(whole.ids), curve_rows)
        self._splits = {"validation": (whole, bench.work.targets["control"])}
        self._splits["curve"] = (whole.subset(few), bench.work.targets["control"][few])
        self.rows = {"train": len(bench.work.texts["train"]), "validation": len(whole.ids), "curve": len(few)}

    def module(self, seed: int) -> nn.Module:
        return self._work.reseeded(seed).encoder()

    def strategy(self, entrant: Entrant, value: float, schedule: Schedule) -> Training:
        return self._base.with_(
            optimizer=entrant.at(value), schedule=entrant.schedule(schedule), batch_size=entrant.batch_size
        )

    def judge(self, module: Any, split: str) -> dict[str, float]:
        rows, targets = self._splits[split]
        logits_NK = self._work.encoder_logits(module, rows, self.bf16)
        if not np.isfinite(logits_NK).all():
            return {}
        task = self._work.task
        loss = "mse" if task.kind == "regress" else "log_loss"
        names = tuple(dict.fromkeys((self.metric, loss)))
        found = metrics.measure(names, task, Scored(targets, logits_NK, task.decide(logits_NK)))
        return {name: value.value for name, value in found.items()}


def text_arena(
    source: str, metric: str | None, overrides: Sequence[str], curve_rows: int, folder: Path
) -> tuple[TextArena, dict[str, Any]]:
    """The arena, and what of its settings makes rows comparable. `folder` keeps the tokenizer. Raises UserError on bad input."""
    config = resolve(source, {"metric": metric, "out": str(folder)}, overrides)
    dataset = data.load(config.data, task=config.task, text=config.text, label=config.label, seed=config.seed)
    task = task_for(dataset)
    name = check_metric(config.metric or task.default_metric, task.kind)
    check_objective(config.objective, task.kind, task.n_outputs)
    (folder / "states").mkdir(parents=True, exist_ok=True)
    # Under a budget in updates nothing is chosen by the clock: the same lengths and layers on every machine.
    bench = Bench(Workbench(config, dataset, task, folder), Clock(Budget(amount=1.0, unit="updates")), lambda: 0, name)
    work = bench.work
    facts = _facts(bench)
    if facts["encoder"] == "none":
        raise UserError(
            "model: none leaves nothing that these optimizers could train. Take auto, lstm, a folder or a hub name."
        )
    problem = Problem(
        task=task.kind, n_outputs=task.n_outputs, metric=name, rows={k: len(v) for k, v in work.texts.items()},
        characters={}, budget=1.0, unit="updates", config=config, linear=(),
    )  # fmt: skip
    plan = Plan(problem)
    plan.facts = facts
    plan.max_length, _ = plan.choose_length()
    base = plan.fine_tune().with_(head_lr=1.0)  # the head starts at zero and has to move
    regime: Regime = "scratch" if work.scratch else "fine_tune"
    arena = TextArena(bench, base, regime, _scales(plan, regime, base.layers), curve_rows)
    kept = base.model_dump(mode="json", exclude={"optimizer", "schedule", "batch_size"})
    size = sum(p.numel() for _, p in base.trained(work.encoder()))
    return arena, {
        "data": Path(config.data).name, "fingerprint": dataset.fingerprint, "regime": regime,
        "model": work.scratch or work.base_model, "parameters": size, "strategy": kept,
    }  # fmt: skip


def _facts(bench: Bench) -> dict[str, Any]:
    """The profile of `fit`, without its records."""
    steps = run_profile(bench, Trial(id="profile", stage="profile", action=Profile()), Profile())
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value.facts


def _scales(plan: Plan, regime: Regime, layers: int) -> dict[str, float]:
    """How far `fit`'s calibrated rates for this encoder are from the members' own. A multiplier and a solved step are what they are."""
    scales = {}
    for kind, member in KINDS.items():
        if not member.closure and kind != "prodigy":
            plan.facts["optimizer"] = {"settings": OptimizerConfig(kind=kind).model_dump(exclude_none=True)}
            scales[kind] = plan.prior_lr(layers) / member.rates[regime].prior
    return scales
