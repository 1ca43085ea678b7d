"""Prompt lookup: greedy writing that guesses the next tokens from the text so far and checks all guesses in one pass.

    where the last tokens have stood before, in the prompt or in what was written, those that followed them there are proposed
    one pass takes the last token and the proposals; proposals that greedy writing would have chosen too are kept, the rest forgotten

What is written is what greedy writing writes, up to the rounding of sums over other shapes. It pays where texts repeat themselves or
their source: summaries, answers from a passage, code. One prompt after the other: rows would keep different numbers of tokens.
Source: Saxena 2023, "Prompt lookup decoding"; the check: Leviathan et al. 2023, arXiv 2211.17192.
Differs from the sources: the latest place is taken, of the longest n-gram that has one. Shapes: N positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multistep.generate import Decode, Written, likeliest, shape, stopped
from multistep.models.step import ReadsSeveral
from multistep.predictors.decoding import Greedy

_ORDERS = (3, 2)  # lengths of the n-grams that are looked up, the longest first


class Places:
    """Where every n-gram of a growing row of tokens stood last."""

    def __init__(self, ids: Sequence[int]):
        self.ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        for n in _ORDERS:  # an n-gram is known from when something follows it
            if len(self.ids) >= n:
                self._after[tuple(self.ids[-n:])] = len(self.ids)
        self.ids.append(token)

    def guess(self, most: int) -> list[int]:
        """What followed the last tokens when they stood there before; nothing where they are new."""
        for n in _ORDERS:
            at = self._after.get(tuple(self.ids[-n:])) if len(self.ids) >= n else None
            if at is not None:
                return self.ids[at : at + most]
        return []


def look_up(
    stepper: Any,
    prompt: np.ndarray,
    decoding: Greedy,
    end_ids: Sequence[int],
    guesses: int,
    decode: Decode | None = None,
) -> tuple[Written, int]:
    """The text for one prompt, and the passes through the model that it took after the prompt. `stepper`: of `stepper_of`, one that
    has `several`; `guesses`: tokens proposed at once at most. Raises ValueError on an empty prompt."""
    if len(prompt) == 0:
        raise ValueError("look_up: the prompt has no token; give at least the begin token")
    reader: ReadsSeveral = stepper
    places, written, ends, passes = Places([int(t) for t in prompt]), Written(), set(end_ids), 0
    logits_NV, proposed = reader.start([prompt]), []
    while True:
        kept = 0
        for kept in range(len(proposed) + 1):
            token, going = _choose(logits_NV[kept], written, decoding, ends, decode)
            if not going:
                break
            places.append(token)
            if kept == len(proposed) or token != proposed[kept]:
                break
        if not going or len(written.ids) == decoding.max_new_tokens:
            break
        if kept < len(proposed):
            reader.back(len(proposed) - kept)
        proposed = places.guess(min(guesses, decoding.max_new_tokens - len(written.ids) - 1))
        last = torch.tensor([token, *proposed], device=logits_NV.device)
        logits_NV = reader.several(last) if proposed else reader.step(last)
        passes += 1
    written.score /= max(1, len(written.ids) + written.ended)
    return written, passes


def _choose(
    logits_V: Tensor, written: Written, decoding: Greedy, ends: set[int], decode: Decode | None
) -> tuple[int, bool]:
    """Write the likeliest token: it, and whether the text goes on."""
    logits_1V = shape(logits_V[None].float(), [written.ids], decoding, ends, len(written.ids))
    token = int(likeliest(logits_1V)[0])
    written.score += float(logits_1V.log_softmax(-1)[0, token])
    if token in ends:
        written.ended = True
        return token, False
    written.ids.append(token)
    return token, not stopped(written, decoding, decode)
