"""Warm-up, stable, decay: up, along, and down to zero within the last share of the segment.

    sqrt    1 - sqrt(v)        linear    1 - v        v: share of the decay

Sources: Hu et al. 2024 (MiniCPM), arXiv 2404.06395; Haegele et al. 2024, arXiv 2405.18392 (the shape 1 - sqrt, and its lengths).
Differs from the source: nothing known.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from multistep.types import Spec


class WSD(Spec):
    good_for: ClassVar[str] = (
        "pretraining from scratch: the stable part can be forked, prolonged and cooled at any time"
    )

    kind: Literal["wsd"] = "wsd"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02  # share of the segment
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2  # share of the segment
    shape: Literal["sqrt", "linear"] = "sqrt"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup + self.decay > 1.0 + 1e-9:
            raise ValueError(
                f"warmup {self.warmup:g} and decay {self.decay:g} are more than the whole: lower one of them"
            )
        return self

    def __call__(self, progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return progress / self.warmup
        left = min(1.0, (1.0 - progress) / self.decay)  # of the decay
        return left if self.shape == "linear" else 1.0 - math.sqrt(1.0 - left)
