"""The front door for any module: bring an nn.Module and data, get it back trained, with the reasons.

result = multistep.optimize(module, objective="cross_entropy", train=loader, validation=loader2, metric="accuracy", budget="5m")
result.model; result.best; print(result.explain())
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from multistep import journal, report, team
from multistep.budget import Budget, Clock, parse_budget
from multistep.config import OptimizerConfig
from multistep.controllers.choose import Facts, choose, is_convex, is_regression
from multistep.controllers.module import MODULE_CONTROLLERS
from multistep.controllers.module_plan import ModuleProblem
from multistep.controllers.script import Target
from multistep.explained import write_page
from multistep.files import working_in
from multistep.journal import Journal, Unwritten
from multistep.loader import ModuleRows, Split, rows_of
from multistep.metrics import METRICS, check_metric
from multistep.module_run import first_budget, given_more, open_run
from multistep.objectives import OBJECTIVES, Objective
from multistep.optimizers.base import REGIMES, Regime
from multistep.optimizers.muon import hidden_matrices
from multistep.replay import Replayed, replay_run
from multistep.report.progress import Progress
from multistep.schedules import SCHEDULES
from multistep.session import controller_of, show, signals
from multistep.strategy import frozen_ids
from multistep.target import read_target
from multistep.tasks import Task
from multistep.tune import tune
from multistep.tune.memory import device_memory
from multistep.tune.module import ModuleWorks, task_of
from multistep.types import MetricValue, Spec, UserError, nearest

VALIDATION_SHARE = 0.1  # of train, held out where no validation data is given
MOST_DROPOUT = 0.5  # of what is searched (strategy.Training.dropout)


@dataclass
class Optimized:
    """What `optimize` gives back. `best` and `validation` are of the weights that `model` holds, on the validation data."""

    model: nn.Module
    metric: str
    best: MetricValue
    validation: dict[str, MetricValue]
    test: dict[str, MetricValue] | None
    out: Path
    _folder: Any = field(default=None, repr=False)  # keeps a temporary folder alive

    def records(self) -> list[dict[str, Any]]:
        """The journal."""
        return journal.read(self.out / "journal.jsonl")

    def explain(self) -> str:
        """What was tried, what was decided and why, in words and a table."""
        return report.explain(self.records())

    def explain_page(self, path: str | Path) -> Path:
        """The same as one HTML file that needs no other. Raises OSError."""
        return write_page(self.out, Path(path))

    def replay(self) -> tuple[Replayed, ...]:
        """Every decision derived again from the journal alone; `findings` are those that do not follow from their evidence."""
        return replay_run(self.out)


def optimize(
    module: nn.Module,
    *,
    objective: str | Mapping[str, Any] | Spec,
    train: Any,
    validation: Any = None,
    test: Any = None,
    metric: str | None = None,
    budget: str | float = "5m",
    optimizer: str | Mapping[str, Any] | Spec = "auto",
    schedule: str | Mapping[str, Any] | Spec | None = None,
    controller: str = "staged",
    until: str | None = None,
    regime: str = "scratch",
    batch_size: int = 32,
    micro_batch: int = 0,
    clip: float = 1.0,
    dropout: float | None = None,
    clip_z: float = 0.0,
    layer_decay: float = 1.0,
    freeze: str | Sequence[str] = (),
    batch_growth: Sequence[float] = (),
    soup: bool = False,
    patience: int = 0,
    looks: str = "auto",
    bf16: bool = False,
    split: Split | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    quiet: bool = True,
) -> Optimized:
    """Train any module within a budget; the module given is filled with the best weights and comes back as `.model`.

    `train`, `validation`, `test`: a DataLoader, a map-style Dataset, or (inputs ..., targets) as tensors or arrays. Without
    validation data a tenth of train is held out. `objective`, `optimizer`, `schedule`: a name (see `multistep list`), a
    dictionary with a `kind`, or the specification itself. `metric`: "loss" or one that fits the objective. `regime`: "scratch",
    "fine_tune" or "adapter" chooses the prior learning rate. `split`: a function from a batch to (inputs, targets).
    `clip_z`: gradients whose norm stands out from the past ones by so many deviations are clipped. `layer_decay`: the learning rate's
    factor, a block of the module further from its outputs. `freeze`: names of parameters or modules that stay as they are.
    `batch_growth`: shares of a training at which the batch doubles. `soup`: also try the mean of the probes and the trunk.
    `patience`: looks at validation in a row without a gain that end the training (0: off).
    `controller`: see `multistep list controllers`; `until`: a score at which training ends, "accuracy=0.93", reached with its error.
    `out`: a folder for journal, states and weights; a run that was stopped there goes on, and so does a finished one that is called with a
    larger budget, from its best state. In several processes (torchrun) all call this with the same data and settings, the module of each on
    its own device; they train together, and the first one decides and writes: without `out` its journal lasts as long as its result.
    Raises UserError on bad input.
    """
    started = time.monotonic()
    device = device_of(module)
    goal = spec_of(objective, OBJECTIVES, "objective")
    rows = rows_by_split(train, validation, test, device, split, seed)
    if batch_size < 1 or batch_size > 10**9:
        raise UserError(f"batch_size: {batch_size} is not a number of examples. Give 1 or more.")
    problem_batch = rows["train"].batch_size or min(batch_size, len(rows["train"]))
    if regime not in REGIMES:
        raise UserError(f"regime: {regime!r} is not known.{nearest(regime, REGIMES)}")
    chosen: Regime = next(r for r in REGIMES if r == regime)
    total = parse_budget(budget)
    first = first_budget(out, total)
    frozen = _frozen(module, freeze)
    outputs = first_outputs(module, rows["validation"])
    facts = _facts(module, goal, rows["train"], chosen, first, device, frozen)
    facts = facts.with_(gradual=layer_decay != 1.0 or bool(clip_z) or bool(batch_growth))
    config, choice = choose(optimizer_of(optimizer), facts)
    if config.member.closure and not rows["train"].drawn and choice.startswith("auto"):
        problem_batch = len(rows["train"])
    task = task_of(goal, outputs)
    metric = metric_of(metric, task)
    if controller not in MODULE_CONTROLLERS:
        raise UserError(f"controller: {controller!r} is not known.{nearest(controller, list(MODULE_CONTROLLERS))}")
    higher = metric != "loss" and METRICS[metric].higher_is_better
    problem = ModuleProblem.parse({
        "seed": seed, "own_batches": rows["train"].drawn, "higher_is_better": higher,
        "target": _target(until, metric, task),
        "objective": goal, "objective_given": not isinstance(objective, str), "metric": metric, "optimizer": config, "regime": chosen,
        "schedule": None if schedule is None else spec_of(schedule, SCHEDULES, "schedule"),
        "batch_size": problem_batch, "micro_batch": micro_batch, "clip": clip, "dropout": dropout, "bf16": bf16,
        "own_dropout": _own_dropout(module),
        "patience": patience, "looks": looks, "clip_z": clip_z, "layer_decay": layer_decay, "freeze": frozen,
        "soup": soup, "batch_growth": batch_growth,
        "rows": {k: v.count if k == "train" else len(v) for k, v in rows.items()},
        "budget": first.amount, "unit": first.unit, "choice": choice,
    })  # fmt: skip
    with team.gathered(), Progress(quiet=quiet or not team.leads()) as progress, signals() as stop, ExitStack() as held:
        temporary = tempfile.TemporaryDirectory(prefix="multistep-") if out is None and team.leads() else None
        folder = Path(team.first(Path(temporary.name if temporary is not None else str(out)).resolve()))
        if team.leads():
            held.enter_context(working_in(folder, make=True))
        clock = Clock(total, started=started)
        asked = {"problem": problem, "controller": controller, "seed": seed, "model": type(module).__name__}
        found_here = _fingerprint(module, rows)
        team.same(
            [asked, total, found_here, rows["train"].order(problem_batch, seed).at(0).tolist()], "settings or data"
        )
        book: Journal = Unwritten()
        past: list[dict[str, Any]] = []
        if team.leads():
            book, past = open_run(folder, asked, found_here, metric, clock, total, device)
        while True:  # once; where the run has more budget now, it first comes to its end with what it had
            past = team.first(past)
            works = ModuleWorks(module, rows, problem, clock, stop, folder, task, seed)
            works.adopt_given()
            steps = controller_of(problem, controller, book, clock, past)
            for record in tune(works, steps, book, past):
                show(progress, record, clock, metric)
            if past[-1]["kind"] != "Finished":
                book.append("Finished", clock=clock.save(), wall_s=clock.wall_s)
            if not team.first(clock.budget != total):
                break
            past = given_more(folder, book, clock, total) if team.leads() else []
        book.close()
        assert works.incumbent is not None
        module.load_state_dict(works.module(works.incumbent).state_dict())
        module.eval()
        found = works.measured(works.answers(works.incumbent))
        test_read = [r["metrics"] for r in journal.read(folder / "journal.jsonl") if r["kind"] == "TestRead"]
        team.wait()  # the folder may be a temporary one of the first process
    tested = {k: MetricValue(*v) for k, v in test_read[-1].items()} if test_read else None
    return Optimized(module, metric, found[metric], found, tested, folder, temporary)


def _target(until: str | None, metric: str, task: Task | None) -> Target | None:
    measured = tuple(dict.fromkeys([metric, *(() if task is None else task.metrics), "loss"]))

    def check(name: str) -> str:
        return name if name == "loss" or task is None else check_metric(name, task.kind)

    return read_target(until, metric, measured, check, lambda name: name != "loss" and METRICS[name].higher_is_better)


def _fingerprint(module: nn.Module, rows: Mapping[str, ModuleRows]) -> str:
    """Of the data and of the module's shapes: a run goes on with the same."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(getattr(value, 'shape', ()))}\n".encode())
    for split, part in rows.items():
        digest.update(split.encode())
        for piece in part.content():
            digest.update(piece)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- choices


def optimizer_of(optimizer: Any) -> OptimizerConfig:
    """What was asked for. Raises UserError on an unknown kind or setting."""
    data = optimizer.model_dump() if isinstance(optimizer, Spec) else optimizer
    data = {"kind": data} if isinstance(data, str) else dict(data)
    try:
        return OptimizerConfig.model_validate(data)
    except ValueError as error:
        cause = error.errors()[0].get("ctx", {}).get("error") if hasattr(error, "errors") else None  # pyright: ignore
        raise UserError(f"optimizer: {cause or error}") from None


def _facts(
    module: nn.Module, objective: Objective, rows: ModuleRows, regime: Regime, budget: Budget, device: str,
    frozen: tuple[str, ...],
) -> Facts:  # fmt: skip
    """What the rules of `auto` read."""
    still = frozen_ids(module, frozen)
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad and id(p) not in still]
    hidden = hidden_matrices([(n, p.ndim) for n, p in named])
    layers = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
    whole = not rows.drawn
    inputs = rows.load(np.arange(1))[0] if whole else ()
    given = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    widths = [t.numel() for t in given if isinstance(t, torch.Tensor)] + [p.shape[-1] for _, p in named if p.ndim]
    tokens = rows.tokens(np.arange(len(rows)))
    updates = {"seconds": None, "updates": budget.amount, "tokens": budget.amount / max(1, tokens)}[budget.unit]
    return Facts(
        regime=regime, parameters=sum(p.numel() for _, p in named), rows=len(rows), updates=updates,
        hidden=sum(p.numel() for n, p in named if n in hidden), convex=is_convex(objective), regression=is_regression(objective),
        linear=len(layers) == 1 and isinstance(layers[0], nn.Linear), whole=whole, width=max(widths, default=1),
        smooth=not any(map(_random, module.modules())), memory_bytes=device_memory(device),
    )  # fmt: skip


def _frozen(module: nn.Module, freeze: str | Sequence[str]) -> tuple[str, ...]:
    """What is to stay as it is. Raises UserError on a name that the module has not, and when nothing would be left to train."""
    above = (freeze,) if isinstance(freeze, str) else tuple(freeze)
    known = [n for n, _ in (*module.named_modules(), *module.named_parameters()) if n]
    for name in above:
        if name not in known:
            raise UserError(f"freeze: the module has no {name!r}.{nearest(name, known)}")
    still = frozen_ids(module, above)
    if all(id(p) in still for p in module.parameters() if p.requires_grad):
        raise UserError(f"freeze: nothing is left to train without {', '.join(above)}. Name fewer.")
    return above


def _random(layer: nn.Module) -> bool:
    """Whether what it does to a row depends on chance, or on the other rows of the batch."""
    if isinstance(layer, _DropoutNd):
        return layer.p > 0
    return isinstance(layer, _BatchNorm) or (isinstance(layer, nn.RNNBase) and layer.dropout > 0)


def _own_dropout(module: nn.Module) -> float | None:
    """The one probability of all its dropout layers, from which a search may move it; None where there is none, where they differ, since one
    number for all would undo that, and where it is more than is searched."""
    found = {layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)}
    return found.pop() if len(found) == 1 and max(found) <= MOST_DROPOUT else None


def spec_of(given: Any, members: Any, where: str) -> Any:
    """A specification from itself, its name, or a dictionary with its kind."""
    if isinstance(given, Spec) and type(given) in members:
        return given
    data = {"kind": given} if isinstance(given, str) else given
    by_kind = {m.model_fields["kind"].default: m for m in members}
    if not isinstance(data, Mapping) or data.get("kind") not in by_kind:
        kind = data.get("kind") if isinstance(data, Mapping) else data
        raise UserError(f"{where}: {kind!r} is not known.{nearest(str(kind), list(by_kind))}")
    return by_kind[data["kind"]].parse(data, where)


def metric_of(metric: str | None, task: Task | None) -> str:
    """The metric's own name, or the default of the task. Raises UserError where it does not fit."""
    if metric in (None, "loss"):
        return metric or (task.default_metric if task is not None else "loss")
    assert metric is not None
    if task is None:
        raise UserError(f"metric: {metric!r} does not fit these outputs and this objective. Use 'loss'.")
    return check_metric(metric, task.kind)


def rows_by_split(
    train: Any, validation: Any, test: Any, device: str, split: Split | None, seed: int
) -> dict[str, ModuleRows]:
    """The splits that are there; without validation a tenth of train is held out."""
    rows = {"train": rows_of(train, "train", device, split)}
    if validation is not None:
        rows["validation"] = rows_of(validation, "validation", device, split).judged()
    elif rows["train"].drawn:
        raise UserError(
            "validation: a DataLoader for train cannot be cut. Give validation data too, or give a Dataset."
        )
    else:
        n = len(rows["train"])
        if n < 20:
            raise UserError(
                f"train: {n} rows are too few to hold a tenth out. Give validation data, or 20 rows or more."
            )
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        held = max(2, round(n * VALIDATION_SHARE))
        whole = rows["train"]
        rows = {"train": whole.subset(sorted(order[held:])), "validation": whole.subset(sorted(order[:held]))}
    if test is not None:
        rows["test"] = rows_of(test, "test", device, split).judged()
    return rows


def device_of(module: nn.Module) -> str:
    """Where the trained parameters are. Raises UserError when there are none."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise UserError("module: it has no parameter that requires a gradient. Give a module with something to train.")
    return str(parameters[0].device)


@torch.no_grad()
def first_outputs(module: nn.Module, rows: ModuleRows) -> torch.Tensor:
    """What the module says to two rows: tells the task, and that module and data fit each other."""
    training = module.training
    module.eval()
    try:
        inputs, _ = rows.load(next(rows.parts(2)))
        return rows.outputs(module, inputs)
    except (RuntimeError, TypeError, IndexError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"module: it cannot read this data ({reason}). Give inputs that it takes, or split=.") from None
    finally:
        module.train(training)
