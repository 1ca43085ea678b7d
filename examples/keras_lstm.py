"""The program of Keras's tutorials, one call changed: embedding, LSTM, sigmoid; the validation loss of every epoch; the reasons."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def rows(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Twelve words of a vocabulary of 50 a row, and whether word 7 or 9 is among them."""
    x = np.random.default_rng(seed).integers(1, 50, (n, 12))
    return x, np.isin(x, (7, 9)).any(1).astype("float32")


def main() -> None:
    if importlib.util.find_spec("keras") is None:
        print('keras is not installed: pip install "multistep[keras]"')
        return
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    import multistep.keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([layers.Embedding(50, 16), layers.LSTM(16), layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy"])
    result = multistep.keras.optimize(model, *rows(1000, 0), validation_data=rows(400, 1), budget="5 epochs")
    print(result.explain())
    print(f"validation loss {result.best.value:.4f}, accuracy {result.validation['accuracy'].value:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        result.save(path)
        again: Any = keras.saving.load_model(path)
        print("the file predicts", again.predict(rows(3, 2)[0], verbose=0)[:, 0].round(3))


if __name__ == "__main__":
    main()
