"""A constant learning rate that is cut by `factor` whenever validation stands still: reduce on plateau.

The schedule itself is the warm-up; what reacts to evidence is the watch of the segment (`tune/watch.py`). After `patience` looks in a
row without a paired gain it multiplies the state's `lr_scale` by `factor`, down to `floor`, and the journal gets the numbers.
Source: the rule by which He et al. 2016 (residual networks), arXiv 1512.03385, divide the rate by 10 "when the error plateaus".
Differs from the source: a stated patience, and a gain is one beyond noise over the examples.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from multistep.types import Spec


class Plateau(Spec):
    good_for: ClassVar[str] = (
        "runs whose length nobody knows beforehand; where the end is known a smooth decay is better"
    )

    kind: Literal["plateau"] = "plateau"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06  # share of the segment
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.3
    patience: Annotated[int, Field(ge=1, le=1000)] = 2  # looks at validation in a row without a gain
    floor: Annotated[float, Field(ge=0, le=1)] = 0.01  # it is not cut below this multiple

    def __call__(self, progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        return progress / self.warmup if progress < self.warmup else 1.0
