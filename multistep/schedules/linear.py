"""Linear warm-up, then linear decay to zero.

Source: Bergsma et al. 2025, "Straight to Zero" (arXiv 2502.15938): decay to zero beats cosine to 10 %.
Differs from the source: nothing known.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from multistep.types import Spec


class Linear(Spec):
    good_for: ClassVar[str] = "runs whose end is known: the default, and hard to beat"

    kind: Literal["linear"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06  # share of the segment

    def __call__(self, progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return progress / self.warmup
        return (1.0 - progress) / (1.0 - self.warmup)
