"""Span extraction: where in the text the answer starts and where it ends (both inclusive), in nats, the mean of the two.

"No answer" is a place of its own, `no_answer` (0: the classifier token). A target outside of the text, such as -1 or a place that
was cut off, is taken to mean it. Padding is the model's business: its logits there should be very low.
Source: Devlin et al. 2019 (BERT), arXiv 1810.04805, sections 4.2 and 4.3.
Differs from the source: nothing known.
Shapes: B examples, T positions; the last dimension is (start, end).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from multistep.objectives.base import BaseObjective
from multistep.types import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Span(BaseObjective):
    good_for: ClassVar[str] = "questions whose answer is a stretch of the text"

    kind: Literal["span"] = "span"
    no_answer: Annotated[int, Field(ge=0)] = 0

    def loss(self, logits_BT2: Tensor, places_B2: Tensor) -> Tensor:
        """Mean over the batch, the start and the end."""
        return self.each(logits_BT2, places_B2).mean()

    def each(self, logits_BT2: Tensor, places_B2: Tensor) -> Tensor:
        """The mean of start and end of every example [B]."""
        import torch.nn.functional as F

        if logits_BT2.ndim != 3 or logits_BT2.shape[2] != 2 or places_B2.shape != (len(logits_BT2), 2):
            raise UserError(
                f"outputs {list(logits_BT2.shape)} do not fit targets {list(places_B2.shape)}: "
                "give outputs [examples, positions, 2] and targets [examples, 2]."
            )
        n_positions = logits_BT2.shape[1]
        if self.no_answer >= n_positions:
            raise UserError(
                f"no_answer is {self.no_answer}, the outputs have {n_positions} positions: give one of them."
            )
        places_B2 = places_B2.long()
        outside_B1 = ((places_B2 < 0) | (places_B2 >= n_positions)).any(1, keepdim=True)
        places_B2 = places_B2.masked_fill(outside_B1, self.no_answer)
        return F.cross_entropy(logits_BT2.float(), places_B2, reduction="none").mean(1)
