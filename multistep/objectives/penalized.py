"""An inner objective plus a penalty on the model's trainable matrices.

    loss = L + l1 sum |w| + l2/2 sum w^2        over parameters with a gradient and two dimensions or more

The penalty is added to the mean loss, once an update: a micro-batch adds all of it and weighs count(part) / count(whole), so that
parts add up to the whole. Unlike decoupled weight decay it goes through the optimizer's scaling, and it has gradients at zero data.
Newton's methods take l2 into the curvature; l1 has none (but at zero, where it has no derivative): they meet it in the gradient and in
the line search, which shortens a step that crosses zero.
Sources: Tibshirani 1996 (l1); Hoerl and Kennard 1970 (l2).
Differs from the source: vectors (biases, norms) are not penalized; the convention of l2 is that of `convex.py`. A step seldom lands on
zero, so l1 makes weights small rather than absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from multistep.objectives.wrapper import Wrapper
from multistep.types import Tunable

if TYPE_CHECKING:
    from torch import Tensor, nn


class Penalized(Wrapper):
    good_for: ClassVar[str] = (
        "small or convex models under an optimizer without weight decay of its own; l1 for few weights"
    )

    kind: Literal["penalized"] = "penalized"
    l1: Annotated[float, Field(ge=0, allow_inf_nan=False), Tunable(1e-7, 1e-2, log=True)] = 0.0
    l2: Annotated[float, Field(ge=0, allow_inf_nan=False), Tunable(1e-6, 1e-1, log=True)] = 1e-4

    def of(self, forward: Callable[[], Tensor], targets: Any, model: nn.Module) -> Tensor:
        """The inner loss and the penalty."""
        return self.inner.of(forward, targets, model) + self.penalty(model)

    def ridge(self, parameter: Tensor) -> float:
        """l2 on a matrix, and what the inner objective has."""
        return (self.l2 if parameter.ndim >= 2 else 0.0) + self.inner.ridge(parameter)

    def penalty(self, model: nn.Module) -> Tensor | float:
        """What the model's matrices cost, with its graph."""
        total: Tensor | float = 0.0
        for w in model.parameters():
            if w.requires_grad and w.ndim >= 2:
                w = w.float()
                if self.l1:
                    total = total + self.l1 * w.abs().sum()
                if self.l2:
                    total = total + self.l2 / 2 * w.square().sum()
        return total
