"""Pretrained models by the name of a folder or of a hub repository, in float32, from safetensors alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from multistep.types import UserError


def load_pretrained(auto: Any, name: str, what: str) -> Any:
    """`auto`: an AutoModel class of transformers. Raises UserError with one line when there is no such model."""
    with loading(name, what):
        return auto.from_pretrained(name, dtype=torch.float32, use_safetensors=True)


@contextmanager
def loading(name: str, what: str) -> Iterator[None]:
    """What goes wrong inside is a UserError of one line; transformers keeps quiet."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(
            f"model: {name!r} cannot be loaded as {what} ({reason}). "
            "Give a folder with config.json and model.safetensors, a hub name (org/name), or 'auto'."
        ) from None
