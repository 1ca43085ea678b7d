"""Linear warm-up, then the same factor off every update: a straight line on a logarithmic scale, down to `floor` at the end.

    floor^u        u: share of the segment after the warm-up

Source: none to name; gamma of the usual exponential decay is floor^(1 / updates).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from multistep.types import Spec


class Exponential(Spec):
    good_for: ClassVar[str] = "a search over learning rates of several sizes within one run"

    kind: Literal["exponential"] = "exponential"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06  # share of the segment
    floor: Annotated[float, Field(gt=0, le=1)] = 0.01  # the multiplier at the end

    def __call__(self, progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return progress / self.warmup
        return self.floor ** ((progress - self.warmup) / (1.0 - self.warmup))
