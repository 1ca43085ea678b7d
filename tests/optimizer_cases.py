"""Parameters, gradients and updates for the tests of the gradient optimizers."""

from __future__ import annotations

import torch
from torch import nn

SHAPES = {
    "embeddings.weight": (7, 4),
    "first.weight": (6, 4),
    "first.bias": (6,),
    "norm.weight": (6,),
    "second.weight": (5, 6),
    "convolution.weight": (3, 2, 3),
    "head.weight": (3, 5),
    "head.bias": (3,),
}
Named = list[tuple[str, nn.Parameter]]


def named(dtype: torch.dtype = torch.float32, seed: int = 0) -> Named:
    generator = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()}
    return [(n, nn.Parameter((0.5 * v).to(dtype))) for n, v in made.items()]


def give_gradients(parameters: Named, update: int) -> None:
    """Gradients of one update; the embeddings have none every third time, as when a batch does not reach a layer."""
    generator = torch.Generator().manual_seed(1000 + update)
    for name, parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = None if name.startswith("embeddings") and update % 3 == 0 else gradient


def run(optimizer: torch.optim.Optimizer, parameters: Named, start: int, end: int, lr: float = 1e-2) -> None:
    """Updates `start` to `end` as the loop makes them: the learning rate is set from outside at each."""
    for update in range(start, end):
        give_gradients(parameters, update)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - update / 100) * group["lr_scale"]
        optimizer.step()
