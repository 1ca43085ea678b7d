"""Memory that does not suffice: how that is seen, and work on fewer rows at once where each row is computed for itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from multistep.types import UserError

_WORDS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")


class OutOfMemory(MemoryError):
    """Memory ran out in a batch of which nothing was applied yet; in several processes all of them raise it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of the machine, or of the GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def release() -> None:
    """Give back what a batch that failed left in the GPU's cache: the smaller ones want other pieces."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def in_halves(rows_N: np.ndarray, work: Callable[[np.ndarray], None]) -> None:
    """`work` on these rows; where memory runs out, on halves of them, down to one. Raises UserError where one does not fit."""
    try:
        work(rows_N)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if len(rows_N) == 1:
            raise UserError("out of memory with one text at once. Lower max_length or take a smaller model.") from None
    else:
        return
    release()
    for half_N in np.array_split(rows_N, 2):
        in_halves(half_N, work)
