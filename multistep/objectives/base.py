"""What every objective is: a mean loss of outputs and targets, and how it weighs a batch.

`loss` is the mean over what it counts (examples, or tokens that are not masked); `count` says how many those are, so that
micro-batches add up to the whole. `of` computes the loss from a forward pass still to be made: wrappers make more than one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from multistep.types import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn


class BaseObjective(Spec):
    """Base of the objectives. Outputs and targets have the batch as their first dimension."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """The mean loss, a float32 scalar with its graph."""

    @abstractmethod
    def each(self, outputs: Tensor, targets: Any) -> Tensor:
        """The loss of every example [B], without smoothing and weights: what validation compares."""

    def count(self, targets: Any) -> float:
        """How much the batch weighs: `loss` is a sum divided by this."""
        return float(len(targets))

    def ridge(self, parameter: Tensor) -> float:
        """The curvature of penalties in this parameter: so many times the identity. Beside it there is that of the outputs."""
        return 0.0

    def reads_tables(self) -> bool:
        """Whether it looks into the model's tables of embeddings, and so wants token ids and no cached states above them."""
        return False

    def labels(self, targets: Any) -> Tensor:
        """What metrics compare answers with."""
        return targets

    def core(self) -> BaseObjective:
        """The objective inside of all wrappers."""
        return self

    def of(self, forward: Callable[[], Tensor], targets: Any, model: nn.Module) -> Tensor:
        """The loss of a forward pass that is still to be made."""
        return self.loss(forward(), targets)
