"""What training, encoding and bundles need of a model that reads token ids: features of a row, and a linear head on them.

Forward only; knows no loss. Shapes: B examples, T tokens, D width of the features, K outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

# Times the tokens of a batch on a CPU: 2 to 8 times as fast there, and more are no faster (LOG.md, 2026-11-27).
_ON_A_GPU = 16


class TextEncoder(nn.Module, ABC):
    """Features of rows of token ids, then `head`, which starts at zero. What fills a row up behind its last token changes nothing."""

    encode_tokens: ClassVar[
        int
    ]  # padded tokens in a batch of encoding: enough for the cores, few enough for their caches
    in_bf16: ClassVar[bool] = True  # whether autocast changes what it computes
    head: nn.Linear

    def tokens_at_once(self) -> int:
        """Padded tokens in a batch of encoding, on the device where it is."""
        return self.encode_tokens * (_ON_A_GPU if self.head.weight.is_cuda else 1)

    @property
    def width(self) -> int:
        """D"""
        return self.head.in_features

    @property
    @abstractmethod
    def pad_id(self) -> int:
        """The token that fills rows up."""

    @abstractmethod
    def features(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Features [B,D] from token ids [B,T] and the mask of the real ones, which come first in every row."""

    @property
    def positions(self) -> int | None:
        """How many tokens of a row it can read; None where nothing bounds it."""
        return None

    def layers(self) -> Sequence[nn.Module]:
        """The layers that the forward pass can be cut between, in their order; none where it cannot be cut."""
        return []

    @property
    def n_layers(self) -> int:
        """How many layers the forward pass can be cut at; 0 when it cannot be cut."""
        return len(self.layers())

    def lower(self, x: Tensor, mask_BT: Tensor, n_layers: int, after: int = 0) -> Tensor:
        """Hidden states [B,T,D] after the first `n_layers` layers, from token ids [B,T] or, with `after` > 0, from those after so many."""
        raise ValueError(f"{type(self).__name__} cannot be cut")

    def upper(self, hidden_BTD: Tensor, mask_BT: Tensor, n_layers: int) -> Tensor:
        """Features [B,D] from the hidden states after the first `n_layers` layers."""
        raise ValueError(f"{type(self).__name__} cannot be cut")

    def forward(self, x: Tensor, mask_BT: Tensor, cut: int = 0) -> Tensor:
        """Outputs [B,K] from token ids [B,T] or, with `cut` > 0, from the hidden states [B,T,D] after `cut` layers."""
        return self.head(self.upper(x, mask_BT, cut) if cut else self.features(x, mask_BT))


def zero_head(width: int, n_outputs: int) -> nn.Linear:
    """A linear layer from D features to K outputs whose weights and biases are zero."""
    head = nn.Linear(width, n_outputs)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
