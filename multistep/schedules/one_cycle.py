"""One cycle: a long rise from `start` to 1, then half a cosine wave down to `floor`.

Source: Smith and Topin 2018 (super-convergence), arXiv 1708.07120.
Differs from the source: the way down is a cosine in place of two lines, and momentum is not cycled.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from multistep.types import Spec


class OneCycle(Spec):
    good_for: ClassVar[str] = "short runs at a learning rate near the largest that holds, with sgd or adamw"

    kind: Literal["one_cycle"] = "one_cycle"
    warmup: Annotated[float, Field(gt=0, lt=1)] = 0.3  # share of the segment in which it rises
    start: Annotated[float, Field(ge=0, le=1)] = 0.04  # the multiplier at the beginning
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0  # the multiplier at the end

    def __call__(self, progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return self.start + (1.0 - self.start) * progress / self.warmup
        u = (progress - self.warmup) / (1.0 - self.warmup)
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * u))
