"""A constant learning rate after an optional warm-up: for runs whose end is not known."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from multistep.types import Spec


class Constant(Spec):
    good_for: ClassVar[str] = "runs whose end is not known, and averages of weights in place of a decay"

    kind: Literal["constant"] = "constant"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06  # share of the segment

    def __call__(self, progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        return progress / self.warmup if progress < self.warmup else 1.0
