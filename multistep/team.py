"""A run of several processes: the first one's, in whose training by gradients the others take part.

All of them ask the same controller and are told the first one's outcomes, as a resumed run is told its journal's. So there is one clock,
one journal and one judge, and what trains together (processes.py) has begun with the same state. The others read the run's folder, which
all must see, and write into folders of their own inside of it. What one tells the others is JSON or tensors.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from multistep.journal import finite
from multistep.launch import beside, launched
from multistep.state import sweep as sweep_folder
from multistep.types import UserError

_MEETING = timedelta(minutes=5)
_PATIENCE = timedelta(days=7)  # the others wait for the first one's work; one that dies is noticed by its connection
_LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "remote process exit")


class Assisted(Exception):
    """What this process was needed for is done; the rest of the trial is the first one's."""


class _Now:
    """Whether there is a team, and what it does: one works while the others wait, all train, or the first trains alone; and how often
    this process has met others."""

    mode: Literal["none", "one works", "all train", "alone"] = "none"
    meetings = 0


_now = _Now()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def trains_together() -> bool:
    """Whether what is trained now is trained by all processes: that of a team outside of `joint` is the first one's alone."""
    return _now.mode in ("none", "all train")


def _together() -> bool:
    return _now.mode in ("one works", "all train")


# ---------------------------------------------------------------------------------------------- meeting


@contextmanager
def gathered() -> Iterator[None]:
    """The processes that torchrun started, or that torch.distributed knows already, as one team; nothing in one process.

    Raises UserError where they cannot meet, or where one of them is gone."""
    if _now.mode != "none" or not (launched() or size() > 1):
        yield
        return
    joined = size() == 1
    if joined:
        _meet()
    elif dist.get_backend() == "nccl":
        raise UserError("torch.distributed: a team speaks over the CPU too. Initialise it with 'cpu:gloo,cuda:nccl'.")
    _now.mode = "one works"
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise UserError(f"process {dist.get_rank()}: another process is gone; what it says is the reason.") from None
    finally:
        _now.mode = "none"
        if joined:
            dist.destroy_process_group()
            gc.collect()  # gloo's threads end with the last reference to the group: alive at the interpreter's end they abort it


def _meet() -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        if not dist.is_available():
            raise RuntimeError("this torch is built without torch.distributed")
        from torch.distributed.rendezvous import rendezvous

        store, rank, world = next(rendezvous("env://", timeout=_MEETING))
        store.set_timeout(_PATIENCE)
        # torchrun's store outlives a meeting
        store = dist.PrefixStore(f"multistep-{_now.meetings}", store)  # pyright: ignore[reportPrivateImportUsage]
        _now.meetings += 1
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"several processes: they cannot meet ({reason}). Start them with torchrun.") from None


def _is_lost(error: BaseException) -> bool:
    said = str(error).lower()
    return isinstance(error, getattr(dist, "DistError", ())) or any(words in said for words in _LOST)


def check_gpus() -> None:
    """Raises UserError where processes of a team would share a GPU, which NCCL refuses."""
    if _together() and beside() > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(
            f"device: {beside()} processes and {found} GPUs here. Start {found} at most, or use device=cpu."
        )


# ---------------------------------------------------------------------------------------------- what one tells the others


def leads() -> bool:
    """Whether the run is this process's: it decides, measures and writes."""
    return not _together() or dist.get_rank() == 0


def first(value: Any) -> Any:
    """What the first process of a team has, as JSON; all of them come here. Outside of a team the value itself."""
    if not _together():
        return value
    told = bytearray(json.dumps(finite(value)).encode()) if leads() else bytearray()
    length = torch.tensor([len(told)])
    dist.broadcast(length, 0)
    text = torch.frombuffer(told, dtype=torch.uint8) if leads() else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(text, 0)
    return value if leads() else json.loads(text.numpy().tobytes())


def first_numbers(values_N: np.ndarray) -> np.ndarray:
    """The first process's numbers, of which all have so many: what is decided by them is decided alike on unlike machines."""
    if not _together():
        return values_N
    told = torch.from_numpy(np.ascontiguousarray(values_N, np.float64))
    dist.broadcast(told, 0)
    return told.numpy()


def first_tensors(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values."""
    if _together():
        for tensor in tensors:
            told = tensor.detach().contiguous()
            dist.broadcast(told, 0)
            tensor.detach().copy_(told)


def same(value: Any, what: str) -> None:
    """Raises UserError, before any goes on, where a process has another value than the first, and in the others."""
    if not _together():
        return
    mine = json.loads(json.dumps(finite(value)))
    other = float(mine != first(mine))
    others = torch.tensor(other)
    dist.all_reduce(others, dist.ReduceOp.MAX)
    if others > 0:
        which = "this one was" if other else "another one was"
        raise UserError(
            f"several processes: {which} given other {what} than the first. Give all of them the same; for a run each, start "
            "them without torchrun's RANK and WORLD_SIZE."
        )


def wait() -> float:
    """Until all of a team are here; the seconds that it took."""
    begun = time.monotonic()
    if _together():
        dist.all_reduce(torch.zeros(1))
    return time.monotonic() - begun


# ---------------------------------------------------------------------------------------------- training and folders


@contextmanager
def joint(wanted: bool = True) -> Iterator[None]:
    """What is trained inside, all processes of a team train together; where that is not wanted, the first one alone, as if there were
    no others."""
    before = _now.mode
    if before != "none":
        _now.mode = "all train" if wanted else "alone"
    try:
        yield
    finally:
        _now.mode = before


def speed() -> int:
    """How many times as much a team trains in the same time as one of its processes, which have a GPU or cores each."""
    return size() if _together() else 1


def own(folder: Path) -> Path:
    """Where this process keeps what the others must not see: the folder itself, or one inside of it."""
    return folder if leads() else folder / f"process-{dist.get_rank()}"


def sweep(states: Path) -> None:
    """Delete what the others had half written when they were killed, and all that those of a larger team had kept."""
    for folder in states.glob("process-*"):
        number = folder.name.removeprefix("process-")
        if number.isdigit() and int(number) < size():
            sweep_folder(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
