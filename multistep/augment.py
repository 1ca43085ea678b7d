"""Changes to the words of a text, made anew every epoch: words are left out, and swapped. No torch.

The change is a function of (seed, epoch, row), so a run that is stopped anywhere and resumed sees the same texts. What stands between
the words stays. In a script without spaces every character is a word.
Sources: Iyyer et al. 2015 (deep averaging networks), section 5 (word dropout); Wei and Zou 2019 (EDA), arXiv 1901.11196 (swaps).
Differs from the sources: fresh texts every epoch, in place of copies that are added once; no synonyms and no insertions.
"""

from __future__ import annotations

import re
from typing import Annotated

import numpy as np
from pydantic import Field

from multistep.types import Spec

_ALONE = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"  # kana, ideographs, syllables: no spaces needed
_WORD = re.compile(rf"(\s*)([{_ALONE}]|[^\s{_ALONE}]+)")


class Augment(Spec):
    """Off by default. `word_dropout`: the chance of each word to be left out; `swap`: pairs of words that change places, a word."""

    word_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    swap: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def on(self) -> bool:
        return bool(self.word_dropout or self.swap)

    def text(self, text: str, seed: int, epoch: int, row: int) -> str:
        """The text of this row as it is in this epoch; one word at least is left of it."""
        parts = _WORD.findall(text)
        if not self.on or len(parts) < 2:
            return text
        rng = np.random.default_rng([seed, epoch, row])
        words = [word for _, word in parts]
        for _ in range(int(self.swap * len(words) + rng.random())):  # on average swap * len(words)
            a, b = rng.integers(len(words), size=2)
            words[a], words[b] = words[b], words[a]
        stays = rng.random(len(words)) >= self.word_dropout
        if not stays.any():
            stays[rng.integers(len(words))] = True
        kept = [space + word for (space, _), word, stay in zip(parts, words, stays, strict=True) if stay]
        return "".join(kept).strip()
