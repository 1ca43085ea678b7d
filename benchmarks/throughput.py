"""Fine-tuning throughput in non-padding tokens per second: same encoder, same data (banking77 train), systems in turn.

Each round measures every system for some seconds, so a change of the machine's mood meets them all; the first updates
of a measurement are not counted. `bare_loop` is the reference for the cost of a loop itself: nothing but PyTorch on
batches that are already tensors.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import ours
import peer_trainer
from _common import Results, Row, load, load_average, markdown, mean_sd, parser, select, values

BENCH = "throughput"
WARM_UPDATES = 3

Batch = tuple[Tensor, Tensor, Tensor]  # ids_BT, mask_BT (1 = a token, 0 = padding), label_B
# texts, labels, seconds -> non-padding tokens per second of each system
Measure = Callable[[list[str], list[str], float], tuple[float, ...]]


class Counting:
    """A collator that remembers how many tokens each batch has that are not padding."""

    def __init__(self, inner: DataCollatorWithPadding):
        self._inner = inner
        self.tokens: list[int] = []

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        batch = self._inner(features)
        self.tokens.append(int(batch["attention_mask"].sum()))
        return batch


class StopAfter(TrainerCallback):
    """Starts a watch after the warm updates and stops the training when the seconds are over."""

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._start = 0.0
        self.wall_s = 0.0
        self.updates = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        if state.global_step == WARM_UPDATES:
            self._start = now
        elif state.global_step > WARM_UPDATES:
            self.wall_s, self.updates = now - self._start, state.global_step
            control.should_training_stop = self.wall_s >= self._limit_s


def trainer_tokens_per_s(mode: str, texts: list[str], labels: list[str], limit_s: float) -> float:
    """The Trainer of peer_trainer.py in the given mode, stopped after `limit_s`."""
    counting = Counting(DataCollatorWithPadding(AutoTokenizer.from_pretrained(peer_trainer.encoder_folder())))
    watch = StopAfter(limit_s)
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
        made = peer_trainer.trainer(mode, texts, labels, 0, folder, collator=counting, callbacks=[watch])
        made.train()
    # The loader runs a batch ahead of the updates, in order: count those that were trained on, after the warm ones.
    return sum(counting.tokens[WARM_UPDATES : watch.updates]) / watch.wall_s


def trainer_defaults(texts: list[str], labels: list[str], limit_s: float) -> tuple[float]:
    return (trainer_tokens_per_s("defaults", texts, labels, limit_s),)


def trainer_bf16(texts: list[str], labels: list[str], limit_s: float) -> tuple[float]:
    return (trainer_tokens_per_s("competent", texts, labels, limit_s),)


def trainer_fp32(texts: list[str], labels: list[str], limit_s: float) -> tuple[float]:
    return (trainer_tokens_per_s("competent-fp32", texts, labels, limit_s),)


class Classifier(nn.Module):
    """A transformers classifier as a function of (ids_BT, mask_BT) -> logits_BK."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.inner(input_ids=ids_BT, attention_mask=mask_BT).logits


def bare_loop(
    model: Callable[[Tensor, Tensor], Tensor],
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    limit_s: float,
    lr: float = 2e-4,
    clip: float = 1.0,
    bf16: bool = True,
) -> float:
    """The least a fine-tuning loop can do: forward, backward, clip, fused AdamW, over and over the given batches.

    `model` maps (ids_BT, mask_BT) to logits_BK. Returns non-padding tokens per second after the warm updates.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    counts = [int(mask_BT.sum()) for _, mask_BT, _ in batches]
    tokens, update, start = 0, 0, time.monotonic()
    while update <= WARM_UPDATES or time.monotonic() - start < limit_s:
        ids_BT, mask_BT, label_B = batches[update % len(batches)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(model(ids_BT, mask_BT), label_B)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update += 1
        if update > WARM_UPDATES:
            tokens += counts[(update - 1) % len(batches)]
        elif update == WARM_UPDATES:
            start = time.monotonic()
    return tokens / (time.monotonic() - start)


def padded_batches(texts: list[str], labels: list[str], size: int, seed: int = 0) -> list[Batch]:
    """Shuffled batches of `size` texts, each padded to its longest: what a plain PyTorch user builds."""
    tokenizer = AutoTokenizer.from_pretrained(peer_trainer.encoder_folder())
    names = sorted(set(labels))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    batches: list[Batch] = []
    for first in range(0, len(order) - size + 1, size):
        rows = order[first : first + size]
        encoded = tokenizer([texts[r] for r in rows], truncation=True, padding=True, return_tensors="pt")
        label_B = torch.tensor([names.index(labels[r]) for r in rows])
        batches.append((encoded["input_ids"], encoded["attention_mask"], label_B))
    return batches


def bare(texts: list[str], labels: list[str], limit_s: float, bf16: bool) -> float:
    """The bare loop with batches like the competent Trainer's: the difference is what the Trainer itself costs."""
    torch.manual_seed(0)
    n_labels = len(set(labels))
    inner = AutoModelForSequenceClassification.from_pretrained(peer_trainer.encoder_folder(), num_labels=n_labels)
    model = Classifier(inner).train()
    return bare_loop(model, list(model.parameters()), padded_batches(texts, labels, 32), limit_s, bf16=bf16)


def bare_bf16(texts: list[str], labels: list[str], limit_s: float) -> tuple[float]:
    return (bare(texts, labels, limit_s, bf16=True),)


def bare_fp32(texts: list[str], labels: list[str], limit_s: float) -> tuple[float]:
    return (bare(texts, labels, limit_s, bf16=False),)


# Measured in this order, round after round. Ours and the bare loop on our batches take turns within one measurement.
MEASURES: dict[tuple[str, ...], Measure] = {
    ("trainer-defaults",): trainer_defaults,
    ("trainer-bf16-32",): trainer_bf16,
    ("trainer-fp32-32",): trainer_fp32,
    ("bare-bf16-32",): bare_bf16,
    ("bare-fp32-32",): bare_fp32,
    ("ours", "bare-on-our-batches"): ours.all_layers,
    ("ours-last-3-layers", "bare-on-our-batches-last-3"): ours.half,
}
SYSTEMS = [system for systems in MEASURES for system in systems]


def table(rows: list[Row]) -> str:
    measured = {row["system"] for row in rows}
    base = {s: statistics.fmean(values(select(rows, system=s), "tokens_per_s")) for s in measured}
    peers = [s for s in SYSTEMS if s.startswith("trainer-") and s in base]
    head = ["system", "rounds", "non-padding tokens/s", *(f"times {peer}" for peer in peers)]
    body = []
    for system in [s for s in SYSTEMS if s in base]:
        rates = values(select(rows, system=system), "tokens_per_s")
        body.append([system, len(rates), mean_sd(rates, 0), *(f"{base[system] / base[peer]:.2f}" for peer in peers)])
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__)
    options.description = f"{options.description} A seed is a round here."
    options.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    texts, labels = load(peer_trainer.DATASET, "train")
    budget = f"{given.seconds:g}s"
    for round_ in given.seeds:
        for systems, measure in MEASURES.items():
            if all(results.has(peer_trainer.DATASET, budget, system, round_) for system in systems):
                continue
            before = load_average()
            for system, rate in zip(systems, measure(texts, labels, given.seconds), strict=True):
                measured: Row = {"ok": True, "tokens_per_s": round(rate, 1)}
                results.add(peer_trainer.DATASET, budget, system, round_, measured, before)


if __name__ == "__main__":
    main()
