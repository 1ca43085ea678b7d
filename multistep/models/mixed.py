"""A neural and an n-gram language model as one: p = share x neural + (1 - share) x n-gram, where every token is one character.

Source: Jelinek and Mercer 1980, "Interpolated estimation of Markov source parameters from sparse data" (linear interpolation).
Shapes: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multistep.models.ngram import NGram

_LOOK = 16  # bytes of the text so far that the n-gram model may ask for


@dataclass
class Mixture:
    """`tokenizer`: a tokenizer of transformers whose tokens are characters."""

    model: Any
    ngram: NGram
    tokenizer: Any
    share: float

    def tokens(self) -> list[bytes]:
        """The bytes of every token; b"" for special ones."""
        special = set(self.tokenizer.all_special_ids)
        words = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        return [b"" if i in special else str(w).encode() for i, w in enumerate(words)]


class MixedSteps:
    """A stepper of `generate`: the logits it gives are log-probabilities. End and other special tokens are the neural model's alone."""

    def __init__(self, mixture: Mixture, inner: Any):
        self.inner, self.mixture, self.bytes_V = inner, mixture, mixture.tokens()
        self.texts: list[bytes] = []

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        self.texts = [b"".join(self.bytes_V[t] for t in p.tolist())[-_LOOK:] for p in prompts]
        return self._mixed(self.inner.start(prompts))

    def step(self, tokens_B: Tensor) -> Tensor:
        self.texts = [(t + self.bytes_V[i])[-_LOOK:] for t, i in zip(self.texts, tokens_B.tolist(), strict=True)]
        return self._mixed(self.inner.step(tokens_B))

    def keep(self, rows: Tensor) -> None:
        self.inner.keep(rows)
        self.texts = [self.texts[i] for i in rows.tolist()]

    def _mixed(self, logits_BV: Tensor) -> Tensor:
        neural_BV, share = logits_BV.float().log_softmax(-1), self.mixture.share
        if share >= 1.0:
            return neural_BV
        counted_BV = torch.from_numpy(np.stack([self._counted(t) for t in self.texts])).to(neural_BV)
        mixed_BV = torch.logaddexp(neural_BV + math.log(share), counted_BV + math.log1p(-share))
        special = torch.tensor([not b for b in self.bytes_V], device=neural_BV.device)
        return torch.where(special, neural_BV, mixed_BV)

    def _counted(self, text: bytes) -> np.ndarray:
        """Log-probabilities [V] of the characters after `text`."""
        first_S = np.log(self.mixture.ngram.next_byte(text))
        after: dict[bytes, np.ndarray] = {b"": first_S}
        found = np.full(len(self.bytes_V), -np.inf, dtype=np.float32)
        for token, symbol in enumerate(self.bytes_V):
            if symbol:
                found[token] = sum(self._after(after, text, symbol[:n])[symbol[n]] for n in range(len(symbol)))
        return found

    def _after(self, after: dict[bytes, np.ndarray], text: bytes, begun: bytes) -> np.ndarray:
        if begun not in after:
            after[begun] = np.log(self.mixture.ngram.next_byte(text + begun))
        return after[begun]
