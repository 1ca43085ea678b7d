"""Problems for the laws of the optimizers that look at a batch several times, and the members that are put to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multistep.optimizers.base import GradientOptimizer
from multistep.optimizers.second_order import DampedNewton, ModuleLBFGS, ModuleNewtonCG

TRUST = ModuleNewtonCG(globalization="trust_region")
HESSIAN = ModuleNewtonCG(curvature="hessian")
MEMBERS = [ModuleNewtonCG(), TRUST, HESSIAN, DampedNewton(), ModuleLBFGS()]


class Problem:
    """A module, a batch and a loss of outputs, as the loop poses it."""

    def __init__(self, module: nn.Module, x: Any, y: Any, loss: Callable[[Tensor, Any], Tensor]):
        self.module, self.x, self.y, self.loss = module, x, y, loss
        self.calls = 0

    def outputs(self) -> Tensor:
        return self.module(self.x)

    def loss_of(self, outputs: Tensor) -> Tensor:
        return self.loss(outputs, self.y)

    def parts(self) -> list[Problem]:
        return [self]

    def ridge(self, parameter: Tensor) -> float:
        return 0.0

    def __call__(self) -> Tensor:
        self.calls += 1
        self.module.zero_grad(set_to_none=True)
        loss = self.loss_of(self.outputs())
        loss.backward()
        return loss.detach()


def half_squares(outputs: Tensor, targets: Any) -> Tensor:
    return 0.5 * outputs.square().sum()


def build(spec: GradientOptimizer, module: nn.Module) -> Any:
    return spec.build(list(module.named_parameters()))


def logistic(seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """120 rows of 6 features whose scales lie between 0.1 and 10, three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(120, 6, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 6, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator).double() / 5 + torch.randn(120, 3, generator=generator)).argmax(1)
    return Problem(nn.Linear(6, 3).to(dtype), x.to(dtype), y, F.cross_entropy)


def mlp(width: int = 8, dtype: torch.dtype = torch.float64, rows: int = 60) -> Problem:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    y = ((x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()).clamp_max(2)
    module = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)
    return Problem(module, x.to(dtype), y, F.cross_entropy)
