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
        done = {"seconds": self.wall_s, "updates": self.updates, "tokens": self.tokens}[self.total.unit]
        return min(1.0, done / self.total.amount)


@dataclass
class Detector:
    """Sees a loss that is not finite, or one far above all that was seen: before the update is made.

    A spike is above mean + 6 sigma of the recent losses and above twice the worst of the first 20: small losses near the end of
    fine-tuning have heavy tails that are no spikes. Thresholds: PaLM-style z-scores, see PAPERS.md.
    """

    mean: float = 0.0
    variance: float = 0.0
    worst_at_start: float = 0.0
    seen: int = 0

    def see(self, loss_nats: float, grad_norm: float) -> str:
        """'' when all is well (and the loss is remembered), else 'nonfinite' or 'spike' (and it is not)."""
        if not (abs(loss_nats) < float("inf") and abs(grad_norm) < float("inf")):  # NaN compares false
            return "nonfinite"
        limit = max(self.mean + 6 * self.variance**0.5, 2 * self.worst_at_start)
        if self.seen >= 20 and loss_nats > limit:
            return "spike"
        if self.seen < 20:
            self.worst_at_start = max(self.worst_at_start, loss_nats)
        weight = max(0.02, 1 / (self.seen + 1))
        delta = loss_nats - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta**2)
        self.seen += 1
        return ""


@dataclass
class Norms:
    """Running mean and variance of the gradients' norms, by which `clip_z` tells the one that stands out.

        z = (norm - mean) / deviation;  norm <- mean + (limit^2 / z) deviation  where z > limit

    Source: Kumar et al. 2025 (ZClip), arXiv 2504.02507: decay 0.97, 25 updates before the first is clipped; the further out, the
    shorter. Differs from the source: the first norms are averaged evenly. Clipped norms are remembered as what they became.
    """

    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0

    def limit(self, norm: float, z: float) -> float:
        """What a gradient's norm becomes; the same norm when it does not stand out, or when z is 0."""
        deviation = self.variance**0.5
        if not z or self.seen < 25 or not self.mean + z * deviation < norm < float("inf"):
            return norm
        return self.mean + (z * deviation) ** 2 / (norm - self.mean)

    def see(self, norm: float) -> None:
        weight = max(0.03, 1 / (self.seen + 1))
        delta = norm - self.mean
        self.mean += weight * delta
        self.variance = (1 - weight) * (self.variance + weight * delta**2)
        self.seen += 1


@dataclass
class Counters:
    position: int = 0  # batches drawn since the start of training
    update: int = 0
    tokens: int = 0
    examples: int = 0
    lr_scale: float = 1.0  # halved by every roll back
    tail_count: int = 0
    seed: int = 0


@dataclass
class TrainState:
    """The model under training. `begin` starts a segment; `train.train` moves it; `fork` copies it."""

    model: Any  # an nn.Module that the strategy knows
    counters: Counters = field(default_factory=Counters)
    segment: Segment = field(default_factory=Segment)
    detector: Detector = field(default_factory=Detector)
    norms: Norms = field(default_factory=Norms)
    strategy: Training | None = None
    trained: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    ema: list[Tensor] = field(default_factory=list)
    tail: list[Tensor] = field(default_factory=list)
    rng: Tensor = field(default_factory=lambda: torch.Generator().manual_seed(0).get_state())

    def begin(self, strategy: Training, budget: Budget) -> None:
        """Start a segment. Optimizer state is kept when only live fields changed, else made anew."""
        keep = self.strategy is not None and self.optimizer is not None and strategy.same_but_live(self.strategy)
        self.strategy = strategy
        self.segment = Segment(total=budget)
        if keep:
            assert self.optimizer is not None
            self.counters.tail_count = 0  # the tail is this segment's
            for group in self.optimizer.param_groups:
                group["weight_decay"] = strategy.optimizer.weight_decay if group["decays"] else 0.0
            return
        self._take_parameters(strategy)
        self.counters = Counters(seed=self.counters.seed)
        self.detector, self.norms = Detector(), Norms()
        device = self.trained[0][1].device.type
        self.rng = torch.Generator(device).manual_seed(self.counters.seed).get_state()

    def _take_parameters(self, strategy: Training) -> None:
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

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters; tables of embeddings bear that word in their names, by which optimizers know them."""
        tables = {id(p) for m in self.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return [(f"embeddings.{n}" if id(p) in tables and "embeddings" not in n else n, p) for n, p in self.trained]

    def adjust(self, strategy: Training) -> None:
        """Change live fields inside the segment: learning rate, weight decay, dropout, smoothing, clip."""
        assert self.strategy is not None and strategy.same_but_live(self.strategy), "only live fields may change"
        segment, tail_count = self.segment, self.counters.tail_count
        self.begin(strategy, segment.total)
        self.segment, self.counters.tail_count = segment, tail_count

    def fork(self) -> TrainState:
        """A copy with the same future; nothing is shared."""
        twin = TrainState(copy.deepcopy(self.model), strategy=self.strategy)
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

    def shipped(self, which: str = "raw") -> dict[str, Tensor]:
        """The weights that would ship, by name: 'raw', 'ema' or 'tail' (copies)."""
        values = {"raw": [p.detach() for _, p in self.trained], "ema": self.ema, "tail": self.tail}[which]
        return {n: v.clone() for (n, _), v in zip(self.trained, values, strict=True)}

    # ------------------------------------------------------------------ value in memory

    def snapshot(self, into: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """A copy of all that moves, as `{"meta": JSON, "tensors": {...}}`. The tensors of an earlier snapshot that nobody needs any
        more, `into`, are written over: there is never memory for two."""
        moving = {"rng": self.rng, **{f"buffer.{name}": buffer for name, buffer in self._buffers()}}
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
            "segment": {**asdict(self.segment), "total": self.segment.total.model_dump()},
        }
        return {"meta": meta, "tensors": tensors}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go back to a snapshot of a state with the same strategy; the snapshot stays usable."""
        meta, tensors = snapshot["meta"], snapshot["tensors"]
        self.counters = Counters(**meta["counters"])
        self.detector, self.norms = Detector(**meta["detector"]), Norms(**meta.get("norms", {}))
        self.segment = Segment(**{**meta["segment"], "total": Budget(**meta["segment"]["total"])})
        self.rng = tensors["rng"].clone()
        with torch.no_grad():
            for name, buffer in self._buffers():
                buffer.copy_(tensors[f"buffer.{name}"])
            for i, (name, parameter) in enumerate(self.trained):
                parameter.copy_(tensors[f"model.{name}"])
                self.ema[i].copy_(tensors[f"ema.{name}"])
                if self.counters.tail_count:
                    self.tail[i].copy_(tensors[f"tail.{name}"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(_unpack(meta["optimizer"], tensors, self.trained[0][1].device))

    def _buffers(self) -> list[tuple[str, Tensor]]:
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
        (temporary / "state.json").write_text(json.dumps(meta))
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
        return json.loads((folder / "state.json").read_text()), load_file(folder / "tensors.safetensors")
    except FileNotFoundError:
        raise UserError(f"state {folder.name!r} is missing from {folder.parent}. Start the run again.") from None


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
