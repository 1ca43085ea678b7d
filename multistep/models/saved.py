"""Encoders on disk: config.json, whose `model_type` says which kind it is, model.safetensors and head.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from multistep.files import reading
from multistep.models.base import TextEncoder
from multistep.models.encoder import Encoder, load_encoder, save_encoder
from multistep.models.lstm import LSTM, Lstm, load_lstm, save_lstm


def save_model(model: TextEncoder, folder: Path) -> None:
    match model:
        case Lstm():
            save_lstm(model, folder)
        case Encoder():
            save_encoder(model, folder)
        case _:
            raise TypeError(f"{type(model).__name__} has no form on disk")


def load_model(folder: Path) -> TextEncoder:
    """What `save_model` wrote, ready to predict."""
    with reading(folder / "config.json"):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    return load_lstm(folder) if kind == LSTM else load_encoder(folder)
