"""Distillation: learn from the targets and from a teacher's whole distribution, softened by a temperature T.

    loss = (1 - alpha) CE(y, z) + alpha T^2 KL(softmax(teacher / T) || softmax(z / T))        z: the student's logits

T^2 keeps the two gradients' proportion when T changes.
Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531. Differs from the source: nothing known.
Targets are (targets [B], teacher's logits [B,K]). Validation compares the cross-entropy alone, which needs no teacher: there the
targets alone will do. Shapes: B examples, K classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from multistep.objectives.base import BaseObjective
from multistep.objectives.cross_entropy import CrossEntropy
from multistep.objectives.shapes import class_ids
from multistep.types import Tunable, UserError

if TYPE_CHECKING:
    from torch import Tensor


class Distill(BaseObjective):
    good_for: ClassVar[str] = (
        "a small model that learns from a larger one's (or an ensemble's) logits beside the labels"
    )

    kind: Literal["distill"] = "distill"
    alpha: Annotated[float, Field(ge=0, le=1), Tunable(0.0, 1.0)] = 0.5
    temperature: Annotated[float, Field(gt=0, le=100), Tunable(1.0, 20.0, log=True)] = 2.0

    def loss(self, logits_BK: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        """Mean over the batch."""
        import torch.nn.functional as F

        if not isinstance(targets, tuple | list) or len(targets) != 2 or targets[1].shape != logits_BK.shape:
            raise UserError(f"distill: give targets as (classes [B], teacher's logits {list(logits_BK.shape)}).")
        z_BK, teacher_BK = logits_BK.float(), targets[1].float()
        hard = F.cross_entropy(z_BK, class_ids(targets[0]))
        t = self.temperature
        log_p_BK, log_q_BK = (teacher_BK / t).log_softmax(1), (z_BK / t).log_softmax(1)
        soft = F.kl_div(log_q_BK, log_p_BK, reduction="batchmean", log_target=True)
        return (1 - self.alpha) * hard + self.alpha * t * t * soft

    def each(self, logits_BK: Tensor, targets: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """Nats of every example's target [B], without the teacher."""
        return CrossEntropy().each(logits_BK, _hard(targets))

    def labels(self, targets: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """The classes [B], without the teacher."""
        return _hard(targets)

    def count(self, targets: tuple[Tensor, Tensor] | Tensor) -> float:
        """The number of examples."""
        return float(len(_hard(targets)))


def _hard(targets: tuple[Tensor, Tensor] | Tensor) -> Tensor:
    return targets[0] if isinstance(targets, tuple | list) else targets
