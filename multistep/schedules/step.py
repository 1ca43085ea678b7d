"""Linear warm-up, then a staircase: `drops` times down by `factor`, at equal parts of the rest.

    factor^floor((drops + 1) u)        u: share of the segment after the warm-up

Source: He et al. 2016 (residual networks), arXiv 1512.03385, section 3.4: a tenth, twice or three times.
Differs from the source: at equal parts, where the source waits for a plateau.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from multistep.types import Spec


class Step(Spec):
    good_for: ClassVar[str] = (
        "published settings of image models that drop the rate a few times; otherwise a smooth decay is better"
    )

    kind: Literal["step"] = "step"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06  # share of the segment
    drops: Annotated[int, Field(ge=1, le=100)] = 2
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1

    def __call__(self, progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return progress / self.warmup
        u = (progress - self.warmup) / (1.0 - self.warmup)
        return self.factor ** min(self.drops, math.floor((self.drops + 1) * u))
