"""A run of several processes: the first one's, in whose training by gradients the others take part.

All of them ask the same controller and are told the first one's outcomes, as a resumed run is told its journal's. So there is one clock,
one journal and one judge, and what trains together (processes.py) has begun with the same state. The others read the run's folder, which
all must see, and write into folders of their own inside of it. What one tells the others is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from multistep.journal import finite
from multistep.types import UserError

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process
_MEETING = timedelta(minutes=5)
_PATIENCE = timedelta(days=7)  # the others wait for the first one's work; one that dies is noticed by its connection


class Assisted(Exception):
    """What this process was needed for is done; the rest of the trial is the first one's."""


class _Now:
    """Whether there is a team, and whether all of it is at the same training."""

    gathered = joint = False


_now = _Now()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def trains_together() -> bool:
    """Whether what is trained now is trained by all processes: that of a team outside of `joint` is the first one's alone."""
    return not _now.gathered or _now.joint


@contextmanager
def gathered() -> Iterator[None]:
    """The processes that torchrun started, or that torch.distributed knows already, as one team; nothing in one process.

    Raises UserError where they cannot meet, or where one of them is gone."""
    launched = all(os.environ.get(name) for name in _LAUNCHED) and os.environ["WORLD_SIZE"] != "1"
    if _now.gathered or not (launched or size() > 1):
        yield
        return
    joined = size() == 1
    if joined:
        _meet()
    elif dist.get_backend() == "nccl":
        raise UserError("torch.distributed: a team speaks over the CPU too. Initialise it with 'cpu:gloo,cuda:nccl'.")
    _now.gathered = True
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise UserError(f"process {dist.get_rank()}: another process is gone; what it says is the reason.") from None
    finally:
        _now.gathered = False
        if joined:
            dist.destroy_process_group()


def _meet() -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        store, rank, world = next(rendezvous("env://", timeout=_MEETING))
        store.set_timeout(_PATIENCE)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"several processes: they cannot meet ({reason}). Start them with torchrun.") from None


def _is_lost(error: BaseException) -> bool:
    said = str(error).lower()
    return "connection" in said and ("closed" in said or "reset" in said or "refused" in said)


def leads() -> bool:
    """Whether the run is this process's: it decides, measures and writes."""
    return not _now.gathered or dist.get_rank() == 0


def first(value: Any) -> Any:
    """What the first process of a team has, as JSON; all of them come here. Outside of a team the value itself."""
    if not _now.gathered:
        return value
    told = bytearray(json.dumps(finite(value)).encode()) if leads() else bytearray()
    length = torch.tensor([len(told)])
    dist.broadcast(length, 0)
    text = torch.frombuffer(told, dtype=torch.uint8) if leads() else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(text, 0)
    return value if leads() else json.loads(text.numpy().tobytes())


def wait() -> None:
    """Until all of a team are here."""
    if _now.gathered:
        dist.all_reduce(torch.zeros(1))


def own(folder: Path) -> Path:
    """Where this process keeps what the others must not see: the folder itself, or one inside of it."""
    return folder if leads() else folder / f"process-{dist.get_rank()}"


def sweep(states: Path) -> None:
    """Delete what the others of a larger team had kept, of whom a run that goes on has no use any more."""
    for folder in states.glob("process-*"):
        if not folder.name.removeprefix("process-").isdigit() or int(folder.name.removeprefix("process-")) >= size():
            shutil.rmtree(folder, ignore_errors=True)


def speed(device: str) -> int:
    """How many times as much a team trains in the same time: GPUs add up, processes on the cores of one machine do not."""
    return size() if _now.gathered and device == "cuda" else 1


@contextmanager
def joint() -> Iterator[None]:
    """What is trained inside, all processes of a team train together."""
    before, _now.joint = _now.joint, True
    try:
        yield
    finally:
        _now.joint = before
