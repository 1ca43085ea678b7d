"""Memory that does not suffice: how that is seen, work on fewer rows at once where each row is computed for itself, and room elsewhere."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from multistep.types import UserError

_WORDS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")


class OutOfMemory(MemoryError):
    """Memory ran out in a batch of which nothing was applied yet; in several processes all of them raise it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of the machine, or of the GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def shortage(error: BaseException) -> UserError:
    """What to say where memory ran out in something that cannot be cut smaller."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:160].rstrip(".")
    return UserError(f"out of memory ({said}). Lower max_length, take a smaller model, or use device=cpu.")


def release() -> None:
    """Give back what a batch that failed left in the GPU's cache: the smaller ones want other pieces."""
    if torch.cuda.is_initialized():
        gc.collect()  # what a traceback held in a circle
        torch.cuda.empty_cache()


def room(shape: tuple[int, ...], device: str) -> Tensor:
    """Memory for float32 numbers, not set: on the device, or in the machine's memory where a GPU has too little."""
    try:
        return torch.empty(shape, device=device)
    except (MemoryError, RuntimeError) as error:
        if device == "cpu" or not out_of_memory(error):
            raise
    release()
    return torch.empty(shape)


def if_it_fits(work: Callable[[], float]) -> float:
    """What `work` gives; 0 where memory runs out for it, and what it held is given back."""
    try:
        return work()
    except (MemoryError, RuntimeError, UserError) as error:  # the last: one example does not fit
        if not (out_of_memory(error) or (isinstance(error, UserError) and _WORDS[-1] in str(error))):
            raise
    release()
    return 0.0


def in_halves(rows_N: np.ndarray, work: Callable[[np.ndarray], None]) -> None:
    """`work` on these rows; where memory runs out, on halves of them, down to one. Raises UserError where one does not fit."""
    try:
        work(rows_N)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if len(rows_N) == 1:
            raise UserError(
                "out of memory with one example at once. Lower max_length or take a smaller model."
            ) from None
    else:
        return
    release()
    for half_N in np.array_split(rows_N, 2):
        in_halves(half_N, work)
