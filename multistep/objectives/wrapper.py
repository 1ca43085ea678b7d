"""What the wrappers share: an objective inside, which they train with more than one look at it.

A wrapper changes `of`, what an update follows. What outputs are worth (`loss`, `each`, `count`) is the inner objective's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from multistep.objectives.base import BaseObjective
from multistep.objectives.cross_entropy import CrossEntropy

if TYPE_CHECKING:
    from torch import Tensor

    from multistep.objectives import Objective


class Wrapper(BaseObjective):
    inner: Objective = CrossEntropy()

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """The inner loss of outputs that are there already."""
        return self.inner.loss(outputs, targets)

    def each(self, outputs: Tensor, targets: Any) -> Tensor:
        """The inner loss of every example [B]."""
        return self.inner.each(outputs, targets)

    def count(self, targets: Any) -> float:
        """The inner count."""
        return self.inner.count(targets)

    def ridge(self, parameter: Tensor) -> float:
        """Of the inner objective."""
        return self.inner.ridge(parameter)

    def reads_tables(self) -> bool:
        """Whether the inner objective does."""
        return self.inner.reads_tables()

    def labels(self, targets: Any) -> Tensor:
        """Those of the inner objective."""
        return self.inner.labels(targets)

    def core(self) -> BaseObjective:
        """The objective inside of all wrappers."""
        return self.inner.core()
