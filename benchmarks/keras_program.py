"""The program of Keras's tutorials (embedding, LSTM, sigmoid) in one of three loops: tf-graph, tf-eager, multistep.

Prints one JSON object. Runs under any interpreter with Keras, without the rest of this folder; keras_reference.py calls it. An epoch
is a pass over train in shuffled batches and the validation loss after it, in every loop.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

TF = ("tf-graph", "tf-eager")
WORDS, WIDTH = 10_000, 64


def build(seed: int) -> Any:
    import keras

    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential(
        [layers.Embedding(WORDS, WIDTH), layers.LSTM(WIDTH), layers.Dense(1, activation="sigmoid")]
    )
    model.compile(keras.optimizers.Adam(0.001), "binary_crossentropy", metrics=["accuracy"])
    return model


def tensorflow(data: Any, epochs: int, batch: int, seed: int, graph: bool, updates: int) -> dict[str, Any]:
    """The loop that TensorFlow's guides write by hand, traced into a graph or not. `updates`: of an eager epoch, the rest is reckoned."""
    import keras
    import numpy as np
    import tensorflow as tf

    model = build(seed)
    loss_of: Any = keras.losses.BinaryCrossentropy().__call__
    optimizer = keras.optimizers.Adam(0.001)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    def judge(x: Any, y: Any) -> tuple[Any, Any]:
        p = model(x, training=False)
        right = tf.cast((p > 0.5) == (y > 0.5), tf.float32)
        return loss_of(y, p) * tf.cast(tf.shape(y)[0], tf.float32), tf.reduce_sum(right)

    if graph:
        step, judge = tf.function(step, reduce_retracing=True), tf.function(judge, reduce_retracing=True)
    x, y, u, v = (data[k] for k in ("x", "y", "u", "v"))
    y, v = y[:, None], v[:, None]
    rng = np.random.default_rng(seed)
    if not graph:
        step(x[:batch], y[:batch])
        begun = time.perf_counter()
        for n in range(updates):
            step(x[n * batch : (n + 1) * batch], y[n * batch : (n + 1) * batch])
        update_s = (time.perf_counter() - begun) / updates
        return {"extrapolated_from_updates": updates, "update_s": update_s, "epoch_s": update_s * len(x) / batch}
    seen, begun = [], time.perf_counter()
    for epoch in range(epochs):
        started, losses = time.perf_counter(), []
        for rows in np.array_split(rng.permutation(len(x)), round(len(x) / batch)):
            losses.append(step(tf.constant(x[rows]), tf.constant(y[rows])))
        trained = time.perf_counter()
        found = [judge(tf.constant(u[n : n + 256]), tf.constant(v[n : n + 256])) for n in range(0, len(u), 256)]
        loss, right = (sum(float(f[k]) for f in found) / len(u) for k in (0, 1))
        now = time.perf_counter()
        seen.append({
            "epoch": epoch + 1, "train_s": trained - started, "epoch_s": now - started, "wall_s": now - begun,
            "train_loss": float(np.mean([float(k) for k in losses[-50:]])), "val_loss": loss, "val_accuracy": right,
        })  # fmt: skip
        print(json.dumps(seen[-1]), flush=True)
    return {"epochs": seen}


def ours(data: Any, epochs: int, batch: int, seed: int) -> dict[str, Any]:
    """multistep.keras.optimize on the same model; the times are its journal's, from the call on."""
    import numpy as np

    import multistep

    model, begun = build(seed), time.perf_counter()
    validation = (data["u"], data["v"])
    result = multistep.keras.optimize(
        model, data["x"], data["y"], validation_data=validation, budget=f"{epochs} epochs", batch_size=batch, seed=seed
    )
    whole_s = time.perf_counter() - begun
    seen: list[dict[str, Any]] = []
    started = 0.0
    for record in result.records():
        wall_s = record["clock"]["wall_s"] if "clock" in record else 0.0
        if record["kind"] == "Asked" and record["trial"]["stage"] == "trunk":
            started = wall_s
        if record["kind"] == "Noted" and record["what"] == "looked":
            facts = record["facts"]
            seen.append({
                "epoch": facts["epoch"], "epoch_s": wall_s - started, "wall_s": wall_s,
                "train_loss": facts["train_loss"], "val_loss": facts["validation_loss"],
            })  # fmt: skip
            started = wall_s
    right = result.validation["accuracy"].value
    diagnosed = [r["name"] for r in result.records() if r["kind"] == "Diagnosed" and r.get("at") != "end"]
    return {
        "epochs": seen, "whole_s": whole_s, "val_loss": result.best.value, "val_accuracy": right, "diagnosed": diagnosed,
        "weights_sum": float(sum(np.abs(w).sum() for w in model.get_weights())),
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("loop", choices=[*TF, "multistep"])
    options.add_argument("arrays", help=".npz with x, y (train) and u, v (validation)")
    options.add_argument("--epochs", type=int, default=6)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--updates", type=int, default=20, help="of the eager loop; its epoch is reckoned from them")
    given = options.parse_args()
    os.environ["KERAS_BACKEND"] = "tensorflow" if given.loop in TF else "torch"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import numpy as np

    with np.load(given.arrays) as arrays:
        data = {k: arrays[k] for k in arrays.files}
    if given.loop == "multistep":
        found = ours(data, given.epochs, given.batch, given.seed)
    else:
        found = tensorflow(data, given.epochs, given.batch, given.seed, given.loop == "tf-graph", given.updates)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
