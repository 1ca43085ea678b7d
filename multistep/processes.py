"""One training in several processes: each takes its part of every batch, all make the same update.

Loss, gradients and whether memory ran out are added up before anything is decided, so that all processes see the same numbers and
decide alike; what one of them alone meets later in an update (memory that runs out, a signal) they tell each other at its end.
Nothing here does anything in one process. The caller initialises torch.distributed (gloo or nccl), and gives every process the same
model, strategy, data and seed; of a whole run, team.py does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from multistep import team
from multistep.allocation import out_of_memory
from multistep.state import now_s, seeded_rng


def count() -> int:
    """How many processes train together."""
    return team.size() if team.trains_together() else 1


def part(rows: np.ndarray) -> np.ndarray:
    """The rows of a batch that this process takes; none where there are more processes than rows."""
    return rows if count() == 1 else np.array_split(rows, count())[dist.get_rank()]


def most(device: torch.device, *numbers: float) -> list[float]:
    """The largest of each number over all processes."""
    if count() == 1:
        return list(numbers)
    largest = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def agreed(device: torch.device, failed: bool = False) -> tuple[float, bool]:
    """(the clock of the first process, so that all are equally far in a segment that is measured in seconds; whether any failed)."""
    mine = now_s() if count() == 1 or dist.get_rank() == 0 else 0.0
    now, failures = most(device, mine, failed)
    return now, failures > 0


def fell_short(error: Exception) -> bool:
    """True where memory ran out in this one of several processes, which has to tell the others; any other error is raised."""
    if count() == 1 or not out_of_memory(error):
        raise error
    return True


def room(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """What `add_up` adds up in: taken once, before any process waits for another. None in one process."""
    if count() == 1:
        return None
    return torch.empty(sum(p.numel() for p in parameters) + len(parameters) + 3, device=parameters[0].device)


def add_up(
    parameters: Sequence[nn.Parameter], flat: Tensor, loss: float, weight: float, failed: bool
) -> tuple[float, bool]:
    """Make the gradients those of all processes together; the loss of all, and whether any of them failed.

    `loss` and the gradients are means over rows that weigh `weight`; `flat` is the `room` for them. Every process is left with the
    same bits. A parameter that no process has a gradient of keeps none.
    """
    sizes, n = [p.numel() for p in parameters], sum(p.numel() for p in parameters)
    flat.zero_()
    gradients, found, numbers = flat[:n], flat[n:-3], flat[-3:]
    if weight > 0 and not failed:
        for i, (own, parameter) in enumerate(zip(gradients.split(sizes), parameters, strict=True)):
            if parameter.grad is not None:
                own.add_(parameter.grad.reshape(-1), alpha=weight)
                found[i] = 1.0
        numbers[0] = loss * weight
    numbers[1], numbers[2] = weight, float(failed)
    dist.all_reduce(flat)
    *any_has, total, whole, failures = flat[n:].tolist()
    whole = max(whole, 1e-12)  # a batch whose every token is masked counts nothing
    if failures > 0:
        return total / whole, True
    for has, gradient, parameter in zip(any_has, gradients.split(sizes), parameters, strict=True):
        parameter.grad = (gradient / whole).view_as(parameter).to(parameter.dtype) if has else None
    return total / whole, False


def share(buffers: Sequence[Tensor]) -> None:
    """Give every process the first one's buffers: running statistics are of its rows."""
    if count() == 1:
        return
    for dtype in dict.fromkeys(b.dtype for b in buffers):
        some = [b for b in buffers if b.dtype == dtype]
        flat = torch.cat([b.reshape(-1) for b in some])
        dist.broadcast(flat, 0)
        for buffer, value in zip(some, flat.split([b.numel() for b in some]), strict=True):
            buffer.copy_(value.view_as(buffer))


def generators(rng: Tensor, cuda: bool) -> tuple[Tensor, Tensor]:
    """(this process's state of the random generators for a batch, the state after it, which is the same in all)."""
    set_rng(rng, cuda)
    seed = int(torch.randint(2**31, (1,), device="cuda" if cuda else "cpu"))
    after = get_rng(cuda)
    return seeded_rng(seed + dist.get_rank(), "cuda" if cuda else "cpu"), after


def get_rng(cuda: bool) -> Tensor:
    """The state of the CPU's random generator, after that of the GPU where there is one: loaders draw from it whatever the device."""
    return torch.cat([torch.cuda.get_rng_state(), torch.get_rng_state()]) if cuda else torch.get_rng_state()


def set_rng(rng: Tensor, cuda: bool) -> None:
    """Go on with what `get_rng` gave."""
    if cuda:
        size = len(torch.cuda.get_rng_state())
        torch.cuda.set_rng_state(rng[:size])
        rng = rng[size:].clone()  # torch reads from where the memory begins
    if len(rng):  # what an earlier version kept has the GPU's alone
        torch.set_rng_state(rng)
