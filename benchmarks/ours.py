"""Our side of the throughput benchmark: the loop as `fit` runs it, and a bare PyTorch loop on the very same batches."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

import peer_trainer
from multistep.budget import Budget
from multistep.data.batches import Batches
from multistep.evaluate import Rows, keep_hidden
from multistep.models.encoder import Encoder, load_backbone
from multistep.optimizers import AdamW
from multistep.state import TrainState
from multistep.strategy import FineTune
from multistep.subwords import encode_ids, load_tokenizer
from multistep.train import train

WARM_UPDATES = 3
BATCH = 32
LENGTH = 64  # tokens; what `fit` chooses on banking77


def state_and_rows(texts: list[str], labels: list[str], layers: int) -> tuple[TrainState, Rows]:
    """A training of the last `layers` layers, begun; the rows as `fit` gives them: cached below the trained layers."""
    folder = peer_trainer.encoder_folder()
    names = sorted(set(labels))
    torch.manual_seed(0)
    model = Encoder(load_backbone(folder), len(names))
    ids, _ = encode_ids(load_tokenizer(folder), texts, LENGTH)
    rows = Rows(ids, 0, "cpu", torch.tensor([names.index(label) for label in labels]))
    if layers < model.n_layers:
        keep_hidden(model, rows, model.n_layers - layers)
    state = TrainState(model)
    state.begin(FineTune(layers=layers, optimizer=AdamW(lr=2e-4), batch_size=BATCH), Budget(amount=1e9, unit="updates"))
    return state, rows


def tokens_per_s(texts: list[str], labels: list[str], limit_s: float, layers: int) -> float:
    """Non-padding tokens a second of our loop."""
    state, rows = state_and_rows(texts, labels, layers)
    start, tokens = 0.0, 0
    for measure in train(state, rows):
        if measure.update == WARM_UPDATES:
            start, tokens = time.monotonic(), measure.tokens
        elif measure.update > WARM_UPDATES and time.monotonic() - start >= limit_s:
            return (measure.tokens - tokens) / (time.monotonic() - start)
    raise AssertionError("the segment has no end")


def bare_tokens_per_s(texts: list[str], labels: list[str], limit_s: float, layers: int) -> float:
    """The same batches, forward pass, clip and fused AdamW in a hand-written loop: nothing else is done between updates."""
    state, rows = state_and_rows(texts, labels, layers)
    model, parameters = state.model.train(), [p for _, p in state.trained]
    order = Batches(rows.lengths_N, BATCH, seed=0)
    ready: list[tuple[Tensor, Tensor, Tensor, int]] = []
    for position in range(order.per_epoch):
        take: np.ndarray = order.at(position)
        ready.append((*rows.batch(take), int(rows.lengths_N[take].sum())))
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    start, tokens, update = 0.0, 0, 0
    while update <= WARM_UPDATES or time.monotonic() - start < limit_s:
        x, mask_BT, targets, count = ready[update % len(ready)]
        loss = torch.nn.functional.cross_entropy(model(x, mask_BT, rows.cut), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update += 1
        if update == WARM_UPDATES:
            start = time.monotonic()
        elif update > WARM_UPDATES:
            tokens += count
    return tokens / (time.monotonic() - start)


def all_layers(texts: list[str], labels: list[str], limit_s: float) -> float:
    return tokens_per_s(texts, labels, limit_s, 6)


def half(texts: list[str], labels: list[str], limit_s: float) -> float:
    return tokens_per_s(texts, labels, limit_s, 3)


def bare_all_layers(texts: list[str], labels: list[str], limit_s: float) -> float:
    return bare_tokens_per_s(texts, labels, limit_s, 6)


def bare_half(texts: list[str], labels: list[str], limit_s: float) -> float:
    return bare_tokens_per_s(texts, labels, limit_s, 3)
