"""Gradient descent and its family: the whole batch, a part of it, with momentum, with Nesterov's look ahead.

    g <- g + wd w;  m <- b m + g (the first time m <- g);  w <- w - lr m          momentum
                                                           w <- w - lr (g + b m)  nesterov
                                                           w <- w - lr g          gradient_descent, sgd

Sources: Cauchy 1847 (gradient descent); Robbins and Monro 1951 (sgd); Polyak 1964 (momentum); Nesterov 1983, in the form of
Sutskever et al. 2013; torch.optim.SGD does the work.
Differs from the sources: the learning rate multiplies the momentum where it is read, not where it is gathered (as torch does),
so a live change of it acts at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from multistep.optimizers.base import GradientOptimizer, Rate, Regime, parameter_groups
from multistep.types import Tunable

if TYPE_CHECKING:
    import torch
    from torch import nn

_PLAIN: Mapping[Regime, Rate] = {
    "scratch": Rate(
        0.1, 0.01, 1.0, "the field's habit, see Bottou 2012, 'Stochastic gradient descent tricks'; not measured here"
    ),
    "fine_tune": Rate(1e-2, 1e-3, 0.3, "prior: a tenth of scratch, not measured here"),
    "adapter": Rate(0.1, 0.01, 1.0, "prior: ten times fine_tune as for AdamW, not measured here"),
}
_WITH_MOMENTUM: Mapping[Regime, Rate] = {
    "scratch": Rate(
        0.03, 1e-3, 0.3, "prior: He et al. 2016 take 0.1 for images with batch norm; lower without, not measured here"
    ),
    "fine_tune": Rate(1e-3, 1e-4, 3e-2, "prior: sgd's times (1 - momentum), not measured here"),
    "adapter": Rate(1e-2, 1e-3, 0.1, "prior: sgd's times (1 - momentum), not measured here"),
}


class GradientDescent(GradientOptimizer):
    """The same rule as `sgd`. What makes it gradient descent is the batch: give it all rows at once."""

    rates = _PLAIN
    good_for = "small data in full batches, where every update should lower the loss; a baseline. Same rule as sgd"
    wrong_for = "anything large: it pays a pass over all data for one update"
    bytes_a_parameter = 0.0
    cost = 0.54

    kind: Literal["gradient_descent"] = "gradient_descent"
    lr: Annotated[float, Field(gt=0, le=1000), Tunable(1e-4, 1e1, log=True, live=True)] = 0.1

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        return _sgd(self, parameters, head_lr)


class SGD(GradientOptimizer):
    rates = _PLAIN
    good_for = "linear and other well-scaled models, and where optimizer state must cost no memory"
    wrong_for = "transformers and embeddings: gradients of very different sizes share one learning rate"
    bytes_a_parameter = 0.0
    cost = 0.53

    kind: Literal["sgd"] = "sgd"
    lr: Annotated[float, Field(gt=0, le=1000), Tunable(1e-4, 1e1, log=True, live=True)] = 0.1

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        return _sgd(self, parameters, head_lr)


class Momentum(GradientOptimizer):
    rates = _WITH_MOMENTUM
    good_for = "convolutional networks with batch norm, trained long"
    wrong_for = "transformers from random weights"
    bytes_a_parameter = 4.0
    cost = 0.79

    kind: Literal["momentum"] = "momentum"
    lr: Annotated[float, Field(gt=0, le=1000), Tunable(1e-4, 1e1, log=True, live=True)] = 0.03
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        return _sgd(self, parameters, head_lr, self.momentum)


class Nesterov(GradientOptimizer):
    rates = _WITH_MOMENTUM
    good_for = "what momentum is good for, a little steadier at high momentum"
    wrong_for = "transformers from random weights"
    bytes_a_parameter = 4.0
    cost = 0.59

    kind: Literal["nesterov"] = "nesterov"
    lr: Annotated[float, Field(gt=0, le=1000), Tunable(1e-4, 1e1, log=True, live=True)] = 0.03
    momentum: Annotated[float, Field(gt=0, lt=1)] = 0.9

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        return _sgd(self, parameters, head_lr, self.momentum, nesterov=True)


def _sgd(
    spec: GradientOptimizer,
    parameters: Sequence[tuple[str, nn.Parameter]],
    head_lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    import torch

    groups = parameter_groups(parameters, spec.weight_decay, head_lr)
    optimizer = torch.optim.SGD(groups, lr=spec.lr, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum:  # torch's fused kernel is wrong for a parameter whose first gradient comes later than the others'
        for _, parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
