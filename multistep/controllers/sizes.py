"""How large a model of texts from random weights is, how much its batches hold, and how much of it is dropped out: rules that read
the budget in tokens and the data, and nothing else.

Sources: Hoffmann et al. 2022, arXiv 2203.15556 (weights and tokens grow together; it has 20 tokens a weight where ours has 1 at least:
minutes of two cores are too few for more); Muennighoff et al. 2023, arXiv 2305.16264 (what repeated data is worth).
"""

from __future__ import annotations

from collections.abc import Sequence

TOKENS_A_WEIGHT = 1.0  # the largest model whose tokens in this budget are so many for each hidden weight ...
WEIGHTS_A_TOKEN = 4.0  # ... and that has no more hidden weights than so many for each different token of train
UPDATES = 2000  # that a training is meant to have: the batch is cut to that
BATCH_TOKENS = (1024, 16384)  # at least, at most
SPANS_BATCH = 4096  # at least, of an encoder that finds answers: 16 windows or more
RUNGS: Sequence[tuple[int, int]] = (  # width, layers: from the smallest to the largest
    (64, 2), (96, 3), (128, 4), (192, 4), (256, 6), (384, 6), (512, 8), (768, 12), (1024, 16),
)  # fmt: skip


def weights_fit(weights: int, tokens: float, different: int) -> bool:
    """Whether a model is not too large: `weights` outside of its tables, `tokens` that it will see in all, and different ones in
    train."""
    return tokens >= TOKENS_A_WEIGHT * weights and weights <= WEIGHTS_A_TOKEN * different


def dropout_for(epochs: float) -> float:
    """Of a model that sees its data so many times."""
    return 0.0 if epochs < 5 else 0.1 if epochs < 15 else 0.2
