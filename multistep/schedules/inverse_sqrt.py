"""Linear warm-up, then one over the square root of the time, counted so that the two meet at 1.

    sqrt(warmup / progress)

Source: Vaswani et al. 2017, arXiv 1706.03762, section 5.3.
Differs from the source: the peak is the optimizer's `lr`, not a function of the width; it ends at sqrt(warmup), not at zero.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from multistep.types import Spec


class InverseSqrt(Spec):
    good_for: ClassVar[str] = "long runs that may be cut short anywhere, as in translation from scratch"

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup: Annotated[float, Field(gt=0, lt=1)] = 0.06  # share of the segment; 0 has no square root to start from

    def __call__(self, progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return progress / self.warmup
        return math.sqrt(self.warmup / progress)
