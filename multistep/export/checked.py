"""What an export is measured by: the same texts through the model and through what was exported."""

from __future__ import annotations

import numpy as np

from multistep.types import Spec, UserError

TEXTS = (
    "A short one.",
    "no",
    "The quick brown fox jumps over the lazy dog, and nobody in the whole town could say why it did so.",
    "Ein Satz mit Umlauten: über, schön, größer.",
    "你好，世界。这是一个测试。",
    "Numbers 1, 22, 333 and 4,444; a price of $5.99 (or more?) and an e-mail to someone@example.org!",
    " ".join(["This sentence is said again, so that the text is longer than most models read."] * 40),
    "It was neither good nor bad.",
)
CLOSE = 1e-3  # of the largest logit, at least of 1


class Exported(Spec):
    """`agreement`: what was measured, in words."""

    to: str
    out: str
    agreement: str
    files: tuple[str, ...]


def check_logits(found_NK: np.ndarray, expected_NK: np.ndarray, what: str) -> str:
    """The measured difference in words. Raises UserError where it is too large."""
    apart = float(np.abs(found_NK - expected_NK).max())
    if not apart <= CLOSE * max(1.0, float(np.abs(expected_NK).max())):
        raise UserError(
            f"{what}: its logits are {apart:.2g} from the model's, too far; nothing was written. Report it."
        )
    return f"logits of {len(expected_NK)} texts apart by {apart:.1g} at most"


def check_texts(found: list[list[int]], expected: list[list[int]], what: str) -> str:
    """The measured agreement in words. Raises UserError where more than one text in four differs."""
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    if same < 0.75 * len(expected):
        raise UserError(
            f"{what}: only {same} of {len(expected)} texts are the model's; nothing was written. Report it."
        )
    return f"{same} of {len(expected)} texts the same, token for token"
