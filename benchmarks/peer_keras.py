"""A peer of course.py: the LSTM of Keras's guides, both ways, with ReduceLROnPlateau and EarlyStopping, on Keras's torch backend.

The 20,000 most frequent words (characters, where there are hardly any spaces), embeddings of 64, an LSTM of 64 each way, dropout, Adam at
2e-3, batches of 64 padded on the left to their longest text. What Keras calls an epoch is a pass over train or a tenth of the minutes,
whichever is shorter, so that the two callbacks have something to go by; validation rows as many as a fortieth of the minutes can read.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np

from _peers import Clock, Fitted, Given

WORDS, WIDTH, LSTM, DROPOUT, LR, BATCH = 20_000, 64, 64, 0.3, 2e-3, 64
LONGEST, WHOLE = 200, 0.95  # words; the share of texts that stay whole
EPOCH, JUDGING = 1 / 10, 1 / 40  # shares of the minutes
PATIENCE, PLATEAU, FACTOR = 4, 1, 0.3
_END_S, _TIMED = 1.0, 3
_PAD, _OTHER = 0, 1
_WORD = re.compile(r"[a-z0-9']+|[^\w\s]")


def words_of(text: str, spaced: bool) -> list[str]:
    return _WORD.findall(text.lower()) if spaced else [c for c in text if not c.isspace()]


def padded(rows: list[list[int]]) -> np.ndarray:
    """[N,T] on the left, as pad_sequences does; one place at least."""
    longest = max(1, *map(len, rows))
    found = np.full((len(rows), longest), _PAD, np.int32)
    for n, row in enumerate(rows):
        found[n, longest - len(row) :] = row
    return found


class Batches(keras.utils.PyDataset):
    """`steps` batches an epoch, going on in a random order that begins anew when all rows were seen."""

    def __init__(self, rows: list[list[int]], targets: np.ndarray, steps: int, seed: int):
        super().__init__()
        self.rows, self.targets, self.steps = rows, targets, steps
        self._rng, self._order = np.random.default_rng(seed), np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if len(self._order) < min(BATCH, len(self.rows)):
            self._order = self._rng.permutation(len(self.rows))
        take, self._order = self._order[:BATCH], self._order[BATCH:]
        return padded([self.rows[i] for i in take]), self.targets[take]


class Judged(keras.utils.PyDataset):
    """Rows in order, in batches."""

    def __init__(self, rows: list[list[int]], targets: np.ndarray):
        super().__init__()
        self.rows, self.targets = rows, targets

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / BATCH)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(index * BATCH, (index + 1) * BATCH)
        return padded(self.rows[part]), self.targets[part]


class Stop(keras.callbacks.Callback):
    """Ends training while there is time for a last look at validation."""

    def __init__(self, clock: Clock, reserve_s: float):
        super().__init__()
        self.clock, self.reserve_s, self.updates = clock, reserve_s, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.updates += 1
        if self.clock.left_s < self.reserve_s and self.model is not None:
            self.model.stop_training = True


def build(classes: int, seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential([
        layers.Embedding(WORDS, WIDTH), layers.Bidirectional(layers.LSTM(LSTM)), layers.Dropout(DROPOUT),
        layers.Dense(classes, activation="softmax"),
    ])  # fmt: skip
    model.compile(keras.optimizers.Adam(LR), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def fit(given: Given) -> Fitted:
    clock, names = given.clock, given.names
    spaced = 20 * sum(text.count(" ") for text in given.texts) > sum(map(len, given.texts))
    split = [words_of(text, spaced) for text in given.texts]
    longest = int(min(LONGEST, max(1, np.quantile([len(row) for row in split], WHOLE))))
    counts = Counter(word for row in split for word in row)
    known = {word: n + 2 for n, (word, _) in enumerate(counts.most_common(WORDS - 2))}

    def ids(rows: list[list[str]]) -> list[list[int]]:
        return [[known.get(word, _OTHER) for word in row[-longest:]] for row in rows]

    rows, y_N = ids(split), np.array([names.index(label) for label in given.labels])
    model = build(len(names), given.seed)
    some = Batches(rows, y_N, 1, given.seed)[0]
    model.train_on_batch(*some)
    begun = time.monotonic()
    for _ in range(_TIMED):
        model.train_on_batch(*some)
    update_s = (time.monotonic() - begun) / _TIMED
    model.predict_on_batch(some[0])
    begun = time.monotonic()
    model.predict_on_batch(some[0])
    judge_s = time.monotonic() - begun
    model = build(len(names), given.seed)

    rng = np.random.default_rng(given.seed)
    count = BATCH * max(1, int(JUDGING * clock.limit_s / judge_s))
    take_v = rng.permutation(len(given.texts_v))[:count]
    rows_v = ids([words_of(given.texts_v[i], spaced) for i in take_v])
    y_M = np.array([names.index(given.labels_v[i]) if given.labels_v[i] in names else -1 for i in take_v])
    rows_v = [row for row, y in zip(rows_v, y_M, strict=True) if y >= 0]
    judged = Judged(rows_v, y_M[y_M >= 0])
    steps = max(1, min(math.ceil(len(rows) / BATCH), int(EPOCH * clock.limit_s / update_s)))
    stop = Stop(clock, 1.5 * judge_s * len(judged) + 2 * update_s + _END_S)
    history = model.fit(
        Batches(rows, y_N, steps, given.seed), validation_data=judged, epochs=1_000_000, verbose=0,
        callbacks=[
            stop,
            keras.callbacks.ReduceLROnPlateau("val_loss", factor=FACTOR, patience=PLATEAU),
            keras.callbacks.EarlyStopping("val_loss", patience=PATIENCE, restore_best_weights=True),
        ],
    )  # fmt: skip

    def predict(texts: list[str]) -> list[str]:
        found = ids([words_of(text, spaced) for text in texts])
        chosen = [model.predict_on_batch(padded(found[i : i + BATCH])).argmax(-1) for i in range(0, len(found), BATCH)]
        return [names[i] for i in np.concatenate(chosen)]

    facts = {"longest": longest, "updates": stop.updates, "steps_an_epoch": steps, "judged_on": len(rows_v)}
    found = history.history
    facts |= {"epochs": len(found["loss"]), "update_ms": round(1e3 * update_s, 1)}
    return Fitted(predict, {**facts, "found": round(float(max(found["val_accuracy"])), 4)})
