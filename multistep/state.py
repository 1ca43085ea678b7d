"""State: everything that training needs to go on bit for bit, and how it is kept on disk.

A state is trained parameters, optimizer, averages, random generator, data position and the schedule's own clock. On disk it is
one folder of JSON and safetensors, written under a temporary name, synced and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multistep.budget import Budget
from multistep.detect import Detector, Norms
from multistep.types import UserError

if TYPE_CHECKING:
    from multistep.strategy import Training

_EMA_EVERY = 8  # updates; averaging costs memory traffic, and neighbours hardly differ
_EMA_DECAY = 0.94  # for each averaging: a window of about 130 updates
_TAIL_FROM = 0.75  # progress from which the tail average counts
_TAIL_EVERY = 4  # updates; a short run's last quarter has few


@dataclass
class Segment:
    """The stretch of training that one strategy runs: its length and what is done of it."""

    total: Budget = field(default_factory=lambda: Budget(amount=1.0))
    wall_s: float = 0.0
    updates: int = 0
    tokens: int = 0

    def progress(self) -> float:
        return min(1.0, self._done() / self.total.amount)

    def left(self) -> float:
        """In the budget's unit."""
        return max(0.0, self.total.amount - self._done())

    def _done(self) -> float:
        return {"seconds": self.wall_s, "updates": self.updates, "tokens": self.tokens}[self.total.unit]


@dataclass
class Counters:
    position: int = 0  # batches drawn since the start of training
    update: int = 0
    tokens: int = 0
    examples: int = 0
    lr_scale: float = 1.0  # halved by every roll back
    tail_count: int = 0
    seed: int = 0
    micro_batch: int = 0  # examples at once that fitted into memory, where the strategy's did not; 0: no limit was met


@dataclass(frozen=True)
class Given:
    """What the model had of its own before any strategy touched it."""

    requires_grad: Mapping[str, bool]  # by parameter
    dropout: Mapping[str, float]  # by module


@dataclass
class TrainState:
    """The model under training. `begin` starts a segment; `train.train` moves it; `fork` copies it."""

    model: Any  # an nn.Module that the strategy knows
    counters: Counters = field(default_factory=Counters)
    segment: Segment = field(default_factory=Segment)
    detector: Detector = field(default_factory=Detector)
    norms: Norms = field(default_factory=Norms)
    steps: Norms = field(default_factory=Norms)  # of the updates by their learning rates
    strategy: Training | None = None
    trained: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    ema: list[Tensor] = field(default_factory=list)
    tail: list[Tensor] = field(default_factory=list)
    rng: Tensor = field(default_factory=lambda: torch.Generator().manual_seed(0).get_state())
    given: Given | None = None

    def begin(self, strategy: Training, budget: Budget) -> None:
        """Start a segment. The first one makes everything. A later one goes on in the data (by examples seen, where the batch size
        changes); its averages begin anew. The optimizer's state is kept where the same parameters are trained with the same settings
        but for live ones; what detectors remember and the cuts of the learning rate, where only live fields changed."""
        before = self.strategy if self.optimizer is not None else None
        self.strategy, self.segment = strategy, Segment(total=budget)
        counters = self.counters
        if before is None:
            self._take_parameters(strategy)
            self.counters = Counters(seed=counters.seed, micro_batch=counters.micro_batch)
            self.rng = seeded_rng(counters.seed, self.trained[0][1].device.type)
        elif strategy.keeps_moments(before):
            self._set_weight_decay(strategy)
            self._restart_averages()
        else:
            self._take_parameters(strategy)
        if before is not None and strategy.batch_size != before.batch_size:
            counters.position = round(counters.examples / strategy.batch_size)
        self.counters.tail_count = 0  # the tail is this segment's
        if before is None or not strategy.same_but_live(before):
            self.detector, self.norms, self.steps = Detector(), Norms(), Norms()
            self.counters.lr_scale = 1.0

    def _take_parameters(self, strategy: Training) -> None:
        if self.given is None:
            flags = {n: p.requires_grad for n, p in self.model.named_parameters()}
            self.given = Given(flags, {n: m.p for n, m in self.model.named_modules() if isinstance(m, nn.Dropout)})
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.given.requires_grad[name])
        self.trained = strategy.trained(self.model)
        names = {n for n, _ in self.trained}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)
        self.optimizer = strategy.optimizer.build(self._named(), strategy.head_lr)
        if strategy.layer_decay != 1.0 and not strategy.optimizer.closure:  # a solved step has no rates
            scales = [strategy.layer_decay**depth for depth in strategy.depths(self.model)]
            scale_groups(self.optimizer, {id(p): s for (_, p), s in zip(self.trained, scales, strict=True)})
        self.ema = [p.detach().clone() for _, p in self.trained]
        self.tail = [torch.zeros_like(p) for _, p in self.trained]

    def _set_weight_decay(self, strategy: Training) -> None:
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["weight_decay"] = strategy.optimizer.weight_decay if group["decays"] else 0.0

    def _restart_averages(self) -> None:
        with torch.no_grad():
            for average, tail, (_, parameter) in zip(self.ema, self.tail, self.trained, strict=True):
                average.copy_(parameter)
                tail.zero_()

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters; tables of embeddings bear that word in their names, by which optimizers know them."""
        tables = {id(p) for m in self.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return [(f"embeddings.{n}" if id(p) in tables and "embeddings" not in n else n, p) for n, p in self.trained]

    def adjust(self, strategy: Training) -> None:
        """Change live fields inside the segment: learning rate, weight decay, dropout, smoothing, clip."""
        assert self.strategy is not None and strategy.same_but_live(self.strategy), "only live fields may change"
        self.strategy = strategy
        self._set_weight_decay(strategy)

    def drop_out(self) -> None:
        """Set the model's dropout to the strategy's; to its own where the strategy has none."""
        if self.strategy is None or self.given is None:
            return
        modules = dict(self.model.named_modules())
        for name, own in self.given.dropout.items():
            modules[name].p = own if self.strategy.dropout is None else self.strategy.dropout

    def halve_micro_batch(self, rows: int) -> None:
        """Memory ran out with `rows` examples at once: half as many from now on. Raises UserError where one is too many."""
        if rows <= 1:
            raise UserError(
                "out of memory with one example at once. Lower the length of the texts (max_length) or the layers that are trained, "
                "or take a smaller model."
            )
        self.counters.micro_batch = (rows + 1) // 2

    def fork(self) -> TrainState:
        """A copy with the same future; nothing is shared."""
        twin = TrainState(copy.deepcopy(self.model), strategy=self.strategy, given=self.given)
        if self.strategy is not None:
            twin._take_parameters(self.strategy)
        twin.restore(self.snapshot())
        return twin

    def average(self) -> None:
        """Take the current parameters into the running averages. Called after every update."""
        update = self.counters.update
        tail = update % _TAIL_EVERY == 0 and self.segment.progress() >= _TAIL_FROM
        if update % _EMA_EVERY and not tail:
            return
        now = [p.detach() for _, p in self.trained]
        if update % _EMA_EVERY == 0:
            torch._foreach_lerp_(self.ema, now, 1 - _EMA_DECAY)  # pyright: ignore[reportPrivateImportUsage]
        if tail:
            self.counters.tail_count += 1
            torch._foreach_lerp_(self.tail, now, 1 / self.counters.tail_count)  # pyright: ignore[reportPrivateImportUsage]

    def settle(self, training: bool) -> None:
        """Put the weights to be judged (False) into the model, or those to be trained (True): most optimizers have one set."""
        if self.strategy is not None and self.optimizer is not None:
            self.strategy.optimizer.settle(self.optimizer, training)

    # ------------------------------------------------------------------ value in memory

    def snapshot(self, into: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """A copy of all that moves, as `{"meta": JSON, "tensors": {...}}`. The tensors of an earlier snapshot that nobody needs any
        more, `into`, are written over: there is never memory for two."""
        moving = {"rng": self.rng, **{f"buffer.{name}": buffer for name, buffer in self.buffers()}}
        for i, (name, parameter) in enumerate(self.trained):
            moving |= {f"model.{name}": parameter, f"ema.{name}": self.ema[i]}
            if self.counters.tail_count:  # before that it holds nothing: the first that is taken in is written over it
                moving[f"tail.{name}"] = self.tail[i]
        old = into or {}
        tensors = {path: _copy(value, old.get(path)) for path, value in moving.items()}
        inner = None if self.optimizer is None else self.optimizer.state_dict()
        meta = {
            "optimizer": _pack(inner, "optimizer", tensors, old),
            "counters": asdict(self.counters),
            "detector": asdict(self.detector),
            "norms": asdict(self.norms),
            "steps": asdict(self.steps),
            "segment": {**asdict(self.segment), "total": self.segment.total.model_dump()},
        }
        return {"meta": meta, "tensors": tensors}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go back to a snapshot of a state with the same strategy; the snapshot stays usable."""
        meta, tensors = snapshot["meta"], snapshot["tensors"]
        self.counters = Counters(**meta["counters"])
        self.detector = Detector(**meta["detector"])
        self.norms, self.steps = Norms(**meta.get("norms", {})), Norms(**meta.get("steps", {}))
        self.segment = Segment(**{**meta["segment"], "total": Budget(**meta["segment"]["total"])})
        self.rng = tensors["rng"].clone()
        with torch.no_grad():
            for name, buffer in self.buffers():
                buffer.copy_(tensors[f"buffer.{name}"])
            for i, (name, parameter) in enumerate(self.trained):
                parameter.copy_(tensors[f"model.{name}"])
                self.ema[i].copy_(tensors[f"ema.{name}"])
                if self.counters.tail_count:
                    self.tail[i].copy_(tensors[f"tail.{name}"])
                else:
                    self.tail[i].zero_()
        if self.optimizer is not None:
            self.optimizer.load_state_dict(_unpack(meta["optimizer"], tensors, self.trained[0][1].device))

    def buffers(self) -> list[tuple[str, Tensor]]:
        """Running statistics and their like: what moves beside the parameters."""
        kept = self.model.state_dict().keys()
        return [(n, b) for n, b in self.model.named_buffers() if n in kept]

    def save(self, folder: Path) -> None:
        snapshot = self.snapshot()
        write_folder(folder, snapshot["meta"], snapshot["tensors"])

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; `begin` with the same strategy comes first."""
        meta, tensors = read_folder(folder)
        self.restore({"meta": meta, "tensors": tensors})


# ---------------------------------------------------------------------------------------------- an optimizer's state


def scale_groups(optimizer: torch.optim.Optimizer, scales: Mapping[int, float]) -> None:
    """Split the groups of a new optimizer so that each has one more factor of its learning rate, given by the parameters' ids."""
    split: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for scale in dict.fromkeys(scales[id(p)] for p in group["params"]):
            some = [p for p in group["params"] if scales[id(p)] == scale]
            split.append({**group, "params": some, "lr_scale": group["lr_scale"] * scale})
    optimizer.param_groups[:] = split


def _copy(value: Tensor, old: Tensor | None) -> Tensor:
    """A copy, in the memory of `old` where that fits."""
    if old is None or (old.shape, old.dtype, old.device) != (value.shape, value.dtype, value.device):
        return value.detach().clone()
    return old.copy_(value.detach())


def _pack(value: Any, path: str, tensors: dict[str, Tensor], old: Mapping[str, Tensor]) -> Any:
    """What an optimizer's `state_dict` holds as JSON; its tensors are copied into `tensors` under their path."""
    if isinstance(value, Tensor):
        tensors[path] = _copy(value, old.get(path))
        return {"tensor": path}
    if isinstance(value, dict):  # keys may be numbers, which JSON would make text
        return {"dict": [[k, _pack(v, f"{path}.{k}", tensors, old)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(v, f"{path}.{n}", tensors, old) for n, v in enumerate(value)]}
    return value


def _unpack(packed: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """What `_pack` packed. Counters of steps stay where torch keeps them: beside the parameters only when those need it."""
    if not isinstance(packed, dict):
        return packed
    ((kind, inner),) = packed.items()
    match kind:
        case "tensor":
            found = tensors[inner]
            return found.clone() if found.ndim == 0 else found.to(device, copy=True)
        case "dict":
            return {k: _unpack(v, tensors, device) for k, v in inner}
        case "list":
            return [_unpack(v, tensors, device) for v in inner]
        case _:
            return tuple(_unpack(v, tensors, device) for v in inner)


# ---------------------------------------------------------------------------------------------- on disk


def write_folder(folder: Path, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """JSON and tensors as one folder, whole or not at all. Raises OSError (disk full) with the old folder in place."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # a killed process of the same number may have left it
        temporary.mkdir(parents=True)
        (temporary / "state.json").write_text(json.dumps(meta), encoding="utf-8")
        unshared = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        try:
            save_file(unshared, temporary / "tensors.safetensors")
        except Exception as error:  # safetensors wraps the system's error; the caller wants an OSError
            raise OSError(str(error)) from error
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_folder` wrote. Raises UserError when it is not there."""
    try:
        return json.loads((folder / "state.json").read_bytes()), load_file(folder / "tensors.safetensors")
    except FileNotFoundError:
        raise UserError(f"state {folder.name!r} is missing from {folder.parent}. Start the run again.") from None


def remove_folder(folder: Path) -> None:
    """Delete a folder that is there. It is renamed first: a kill leaves no half of it under its name, and `sweep` finds the rest."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Delete what killed processes had half written in `folder`."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Sync `new` and put it in the place of `target` in one step; what stood there is deleted."""
    for path in [*new.rglob("*"), new]:
        _sync(path)
    if not target.exists():
        os.rename(new, target)
    elif _exchange(new, target):
        shutil.rmtree(new)
    else:  # not on this file system: a moment without the folder; its old content stays beside it until the end
        aside = target.with_name(f".{target.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
        os.rename(new, target)
        shutil.rmtree(aside)
    _sync(target.parent)


def replace_file(new: Path, target: Path) -> None:
    """Sync `new` and put it in the place of `target` in one step."""
    _sync(new)
    os.replace(new, target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    """renameat2(RENAME_EXCHANGE): Linux swaps two paths atomically."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def now_s() -> float:
    """The segment's clock: monotonic seconds."""
    return time.monotonic()


def seeded_rng(seed: int, device: str) -> Tensor:
    """The state of the device's random generator for a seed; after a GPU's that of the CPU, from which loaders draw."""
    kinds = ("cuda", "cpu") if device == "cuda" else (device,)
    return torch.cat([torch.Generator(kind).manual_seed(seed).get_state() for kind in kinds])
