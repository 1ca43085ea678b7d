"""The encoder (all-MiniLM-L6-v2) in the hands of course.py's peers: texts to token ids, a Trainer that has so many seconds, and labels.

What a user who has learnt to watch the time does: texts cut at a length that keeps 95 of 100 whole (128 tokens at most), no more of
them tokenized than the time could read, bf16 if an update is faster with it, batches grouped by length, fused AdamW, warm-up over a
tenth and linear decay that reaches zero when the time is up. The schedule goes by the clock, so the last update always ends it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed
from transformers.utils import logging

from _peers import Given
from peer_trainer import encoder_folder

LONGEST, WHOLE = 128, 0.95  # tokens; the share of texts that stay whole
READ_TOKENS_S = 10_000  # more tokens a second than these are not trained on here: what is beyond need not be tokenized
WARMUP = 0.1  # of the seconds
_SAMPLE, _TIMED_ROWS, _AT_ONCE = 500, 8, 64
_ENDLESS = 1_000_000  # updates; the clock ends a training

logging.set_verbosity_error()
logging.disable_progress_bar()


class Settings(NamedTuple):
    """`epochs`: how often each row is passed in the time there is, which says how many rows are used; None: all rows, as often as it goes."""

    lr: float = 2e-4
    batch: int = 32
    weight_decay: float = 0.01
    epochs: float | None = None


class Encoded(torch.utils.data.Dataset[dict[str, Any]]):
    """Token ids, not padded, and label numbers (none: texts to predict)."""

    def __init__(self, ids: Sequence[list[int]], label_ids: Sequence[int]):
        self.ids, self.label_ids = list(ids), list(label_ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"input_ids": self.ids[row], "labels": self.label_ids[row]}

    def first(self, rows: int) -> Encoded:
        return Encoded(self.ids[:rows], self.label_ids[:rows])


@dataclass(frozen=True)
class Kit:
    """Train and validation rows in random order, and what was measured. `rows_s`: of training, rows a second."""

    tokenizer: Any
    names: list[str]
    length: int
    bf16: bool
    rows: Encoded
    rows_v: Encoded
    rows_s: float

    def facts(self) -> dict[str, Any]:
        return {"length": self.length, "bf16": self.bf16, "tokenized": len(self.rows), "rows_s": round(self.rows_s, 1)}


def prepare(given: Given) -> Kit:
    """Tokenize what the time allows to read, and measure in which precision an update is faster."""
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    rng = np.random.default_rng(given.seed)
    order, order_v = (rng.permutation(len(labels)) for labels in (given.labels, given.labels_v))
    sizes = [len(ids) for ids in tokenizer([given.texts[i] for i in order[:_SAMPLE]])["input_ids"]]
    length = int(min(LONGEST, 8 * np.ceil(np.quantile(sizes, WHOLE) / 8)))
    count = max(_TIMED_ROWS, int(READ_TOKENS_S * given.clock.limit_s / np.minimum(sizes, length).mean()))
    names, number = given.names, {name: i for i, name in enumerate(given.names)}

    def encoded(texts: list[str], labels: list[str], take: np.ndarray) -> Encoded:
        ids = tokenizer([texts[i] for i in take], truncation=True, max_length=length)["input_ids"]
        return Encoded(ids, [number.get(labels[i], 0) for i in take])

    rows = encoded(given.texts, given.labels, order[:count])
    rows_v = encoded(given.texts_v, given.labels_v, order_v[: max(_TIMED_ROWS, count // 4)])
    some = DataCollatorWithPadding(tokenizer)([rows[i] for i in range(_TIMED_ROWS)])
    model = new_model(len(names), given.seed).train()
    spent = {bf16: _update_s(model, some, bf16) for bf16 in (False, True)}
    faster = spent[True] < spent[False]
    return Kit(tokenizer, names, length, faster, rows, rows_v, _TIMED_ROWS / spent[faster])


def new_model(classes: int, seed: int) -> Any:
    set_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(encoder_folder(), num_labels=classes)


def _update_s(model: Any, batch: Any, bf16: bool) -> float:
    """Seconds of a forward and a backward pass, after one to warm up."""
    start = 0.0
    for _ in range(2):
        start = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
    model.zero_grad()
    return time.monotonic() - start


# ---------------------------------------------------------------------------------------------- training


class ByTheClock(TrainerCallback):
    """Ends a training before its seconds are over. `looks`: shares of them at which `look` is called; it answers whether to go on."""

    def __init__(self, seconds: float, looks: Sequence[float] = (), look: Callable[[], bool] | None = None):
        self.seconds, self.looks, self.look = seconds, list(looks), look
        self._start = self._before = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        step_s, self._before = now - self._before, now
        if self.looks and self.look is not None and now - self._start >= self.looks[0] * self.seconds:
            self.looks.pop(0)
            if not self.look():
                control.should_training_stop = True
            self._before = time.monotonic()
        if self._before - self._start + step_s > self.seconds:
            control.should_training_stop = True


def decaying(optimizer: torch.optim.Optimizer, seconds: float) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up from a tenth of the rate over a tenth of the seconds, then linear decay to zero, from now on, by the clock."""
    start = time.monotonic()

    def share(_: int) -> float:
        done = (time.monotonic() - start) / seconds
        return max(0.0, min(max(0.1, done / WARMUP), (1 - done) / (1 - WARMUP)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def fine_tune(
    kit: Kit, settings: Settings, seconds: float, seed: int, looks: Sequence[float] = (),
    look: Callable[[Any, int], bool] | None = None,
) -> tuple[Any, int]:  # fmt: skip
    """A model trained for so long, and its updates. `look(model, which)` answers whether to go on; its time is in the seconds."""
    begun = time.monotonic()
    model = new_model(len(kit.names), seed)
    used = len(kit.rows)
    if settings.epochs is not None:
        used = int(np.clip(kit.rows_s * seconds / settings.epochs, 4 * settings.batch, len(kit.rows)))
    numbers = iter(range(len(looks)))
    looked = None if look is None else partial(_look, look, model, numbers)
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        arguments = TrainingArguments(
            output_dir=folder, seed=seed, max_steps=_ENDLESS, use_cpu=True, save_strategy="no", report_to="none",
            logging_strategy="no", disable_tqdm=True, per_device_train_batch_size=settings.batch, bf16=kit.bf16,
            train_sampling_strategy="group_by_length",
        )  # fmt: skip
        left_s = seconds - (time.monotonic() - begun)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        clock = ByTheClock(left_s, looks, looked)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=kit.rows.first(used), processing_class=kit.tokenizer,
            data_collator=DataCollatorWithPadding(kit.tokenizer), callbacks=[clock],
            optimizers=(optimizer, decaying(optimizer, left_s)),
        )  # fmt: skip
        trainer.train()
    return model, trainer.state.global_step


def _look(look: Callable[[Any, int], bool], model: Any, numbers: Iterator[int]) -> bool:
    return look(model, next(numbers))


# ---------------------------------------------------------------------------------------------- predicting


@torch.no_grad()
def label_numbers(model: Any, tokenizer: Any, rows: Encoded, bf16: bool) -> np.ndarray:
    """The likeliest class of each row [N]."""
    model.eval()
    order = np.argsort([len(ids) for ids in rows.ids], kind="stable")
    found_N = np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(order), _AT_ONCE):
        take = order[start : start + _AT_ONCE]
        batch = tokenizer.pad({"input_ids": [rows.ids[i] for i in take]}, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found_N[take] = model(**batch).logits.float().argmax(-1).numpy()
    return found_N


def accuracy(model: Any, kit: Kit, rows: Encoded) -> float:
    return float((label_numbers(model, kit.tokenizer, rows, kit.bf16) == np.array(rows.label_ids)).mean())


def predictor(model: Any, kit: Kit) -> Callable[[list[str]], list[str]]:
    def predict(texts: list[str]) -> list[str]:
        ids = kit.tokenizer(texts, truncation=True, max_length=kit.length)["input_ids"]
        found_N = label_numbers(model, kit.tokenizer, Encoded(ids, [0] * len(ids)), kit.bf16)
        return [kit.names[i] for i in found_N]

    return predict
