"""Our side of the throughput benchmark: the loop as `fit` runs it, and a bare PyTorch loop on the very same batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

import peer_trainer
from multistep.budget import Budget
from multistep.data.batches import Batches
from multistep.evaluate import Rows, encode, keep_hidden
from multistep.models.encoder import Encoder, load_backbone
from multistep.optimizers import AdamW
from multistep.schedules import Constant
from multistep.state import TrainState
from multistep.strategy import FineTune
from multistep.subwords import encode_ids, load_tokenizer
from multistep.train import train

TURN_UPDATES = 20
BATCH = 32
LENGTH = 64  # tokens; what `fit` chooses on banking77


def state_and_rows(texts: list[str], labels: list[str], layers: int) -> tuple[TrainState, Rows, bool]:
    """A training of the last `layers` layers, begun; the rows as `fit` gives them: cached below the trained layers; bf16 or not."""
    folder = peer_trainer.encoder_folder()
    names = sorted(set(labels))
    torch.manual_seed(0)
    model = Encoder(load_backbone(folder), len(names))
    ids, _ = encode_ids(load_tokenizer(folder), texts, LENGTH)
    rows = Rows(ids, 0, "cpu", torch.tensor([names.index(label) for label in labels]))
    bf16 = bf16_is_faster(model, ids)
    if layers < model.n_layers:
        keep_hidden(model, rows, model.n_layers - layers, bf16=bf16)
    state = TrainState(model)
    # A warm-up of this endless segment would never end: gradients of a head at zero are subnormal numbers, slow to multiply.
    strategy = FineTune(layers=layers, optimizer=AdamW(lr=2e-4), schedule=Constant(warmup=0.0), batch_size=BATCH)
    state.begin(strategy, Budget(amount=1e9, unit="updates"))
    return state, rows, bf16


def bf16_is_faster(model: Encoder, ids: list[np.ndarray]) -> bool:
    """As the profile of `fit` decides: by the time of the forward pass."""
    some, seconds = Rows(ids[:256], 0, "cpu"), {}
    for bf16 in (False, True):
        encode(model, some, bf16=bf16)
        start = time.monotonic()
        encode(model, some, bf16=bf16)
        seconds[bf16] = time.monotonic() - start
    return seconds[True] < seconds[False]


def our_updates(state: TrainState, rows: Rows, bf16: bool) -> Iterator[int]:
    """Our loop: the tokens of every update."""
    before = 0
    for measure in train(state, rows, bf16=bf16):
        yield measure.tokens - before
        before = measure.tokens


def bare_updates(state: TrainState, rows: Rows, bf16: bool) -> Iterator[int]:
    """The same batches, already tensors; forward pass, clip and fused AdamW by hand: nothing else is done between updates."""
    model, parameters = state.model.train(), [p for _, p in state.trained]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    order = Batches(rows.lengths_N, BATCH, seed=0)
    ready = [(*rows.load(take), rows.tokens(take)) for take in map(order.at, range(min(order.per_epoch, 100)))]
    while True:
        for inputs, targets, count in ready:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = torch.nn.functional.cross_entropy(model(*inputs, rows.cut), targets)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield count


def in_turns(texts: list[str], labels: list[str], limit_s: float, layers: int) -> tuple[float, float]:
    """Non-padding tokens a second of our loop and of the bare one, which take turns every few updates for `limit_s` each.

    The ratio of two loops that run minutes apart tells of the machine's mood; of turns of a second, of the loops.
    """
    loops: list[Iterator[int]] = []
    for make in (our_updates, bare_updates):
        loops.append(make(*state_and_rows(texts, labels, layers)))
    spent, tokens, turn = [0.0, 0.0], [0, 0], 0
    while min(spent) < limit_s:
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.monotonic()
            count = sum(islice(loops[which], TURN_UPDATES))
            if turn:  # the first turn warms up
                spent[which] += time.monotonic() - start
                tokens[which] += count
        turn += 1
    return tokens[0] / spent[0], tokens[1] / spent[1]


def all_layers(texts: list[str], labels: list[str], limit_s: float) -> tuple[float, float]:
    return in_turns(texts, labels, limit_s, 6)


def half(texts: list[str], labels: list[str], limit_s: float) -> tuple[float, float]:
    return in_turns(texts, labels, limit_s, 3)
