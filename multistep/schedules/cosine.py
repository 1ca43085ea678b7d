"""Linear warm-up, then half a cosine wave down to `floor`.

    floor + (1 - floor) (1 + cos(pi u)) / 2        u: share of the segment after the warm-up

Source: Loshchilov and Hutter 2017 (SGDR), arXiv 1608.03983. Differs from the source: no restarts, a warm-up before it.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from multistep.types import Spec


class Cosine(Spec):
    good_for: ClassVar[str] = (
        "runs whose end is known, where published settings ask for it; linear does as well or better"
    )

    kind: Literal["cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06  # share of the segment
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0  # the multiplier at the end

    def __call__(self, progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return progress / self.warmup
        u = (progress - self.warmup) / (1.0 - self.warmup)
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * u))
