"""Pretrained models by the name of a folder or of a hub repository, in float32, from safetensors alone."""

from __future__ import annotations

from typing import Any

import torch

from multistep.types import UserError


def load_pretrained(auto: Any, name: str, what: str) -> Any:
    """`auto`: an AutoModel class of transformers. Raises UserError with one line when there is no such model."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        return auto.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(
            f"model: {name!r} cannot be loaded as {what} ({reason}). "
            "Give a folder with config.json and model.safetensors, a hub name (org/name), or 'auto'."
        ) from None
