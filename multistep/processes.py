"""One training in several processes: each takes its part of every batch, all make the same update.

Loss, gradients and whether memory ran out are added up before anything is decided, so that all processes see the same numbers and
decide alike. Nothing here does anything in one process. The caller initialises torch.distributed (gloo or nccl), and gives every
process the same model, strategy, data and seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from multistep.state import now_s


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def part(rows: np.ndarray) -> np.ndarray:
    """The rows of a batch that this process takes; none where there are more processes than rows."""
    return rows if count() == 1 else np.array_split(rows, count())[dist.get_rank()]


def shared_now_s(device: torch.device) -> float:
    """The clock of the first process, so that all are equally far in a segment that is measured in seconds."""
    if count() == 1:
        return now_s()
    now = torch.tensor([now_s()], dtype=torch.float64, device=device)
    dist.broadcast(now, 0)
    return float(now)


def add_up(parameters: Sequence[nn.Parameter], loss: float, weight: float, failed: bool) -> tuple[float, bool]:
    """Make the gradients those of all processes together; the loss of all, and whether any of them failed.

    `loss` and the gradients are means over rows that weigh `weight`. Every process is left with the same bits. A parameter that no
    process has a gradient of keeps none.
    """
    sizes, n = [p.numel() for p in parameters], sum(p.numel() for p in parameters)
    flat = torch.zeros(n + len(parameters) + 3, device=parameters[0].device)
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
    for has, gradient, parameter in zip(any_has, gradients.split(sizes), parameters, strict=True):
        parameter.grad = (gradient / whole).view_as(parameter).to(parameter.dtype) if has else None
    return total / whole, failures > 0


def generators(rng: Tensor, cuda: bool) -> tuple[Tensor, Tensor]:
    """(this process's state of the random generator for a batch, the state after it, which is the same in all)."""
    set_rng(rng, cuda)
    seed = int(torch.randint(2**31, (1,), device="cuda" if cuda else "cpu"))
    after = get_rng(cuda)
    own = torch.Generator("cuda" if cuda else "cpu").manual_seed(seed + dist.get_rank())
    return own.get_state(), after


def get_rng(cuda: bool) -> Tensor:
    """The state of the device's random generator."""
    return torch.cuda.get_rng_state() if cuda else torch.get_rng_state()


def set_rng(rng: Tensor, cuda: bool) -> None:
    if cuda:
        torch.cuda.set_rng_state(rng)
    else:
        torch.set_rng_state(rng)
