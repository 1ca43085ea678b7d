"""One model's outputs as they are."""

from __future__ import annotations

from typing import Literal

import numpy as np

from multistep.metrics import TaskLike
from multistep.predictors.base import Logits
from multistep.types import Spec


class Single(Spec):
    kind: Literal["single"] = "single"
    model: str

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def combine(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return np.asarray(logits[self.model], dtype=np.float64)

    def decide(self, task: TaskLike, logits: Logits) -> tuple[np.ndarray, np.ndarray]:
        combined_NK = self.combine(task, logits)
        return combined_NK, task.decide(combined_NK)

    def stages(self, task: TaskLike, logits: Logits) -> np.ndarray:
        return np.full(len(logits[self.model]), self.model, dtype=object)
