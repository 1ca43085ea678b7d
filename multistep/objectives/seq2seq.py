"""Cross-entropy of a decoder that writes an output for an input, in nats per output token that counts (see `tokens.py`).

Targets are aligned already: the decoder's inputs are the outputs shifted right by one, and padding is -100.
Shapes: B rows, T positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from multistep.objectives.base import BaseObjective
from multistep.objectives.tokens import n_tokens, row_loss, token_loss
from multistep.types import Tunable

if TYPE_CHECKING:
    from torch import Tensor

    from multistep.objectives.shapes import Hidden


class Seq2Seq(BaseObjective):
    good_for: ClassVar[str] = "an output sequence for an input sequence: summaries, translations, answers"

    kind: Literal["seq2seq"] = "seq2seq"
    label_smoothing: Annotated[float, Field(ge=0, lt=1), Tunable(0.0, 0.2, live=True)] = 0.0
    z_loss: Annotated[float, Field(ge=0, le=1), Tunable(1e-5, 1e-2, log=True)] = 0.0  # PaLM: 1e-4

    def loss(self, outputs: Tensor | Hidden, ids_BT: Tensor) -> Tensor:
        """Mean over the tokens that count; 0 when there are none. Outputs: logits [B,T,V], or what they are made of."""
        return token_loss(outputs, ids_BT, self.label_smoothing, self.z_loss)

    def each(self, logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
        """Mean nats per token that counts of every row [B]."""
        return row_loss(logits_BTV, ids_BT)

    def count(self, ids_BT: Tensor) -> float:
        """How many tokens count."""
        return n_tokens(ids_BT)
