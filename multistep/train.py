"""The loop: a generator of measurements. Break to stop; nothing is lost, the state goes on from where it is.

A loss that is not finite or that spikes is seen before the update is made: the update is left out, the measurement carries the
event and the batch's rows, and the caller decides what to do (go on, or roll back and halve the learning rate).
Shapes: B examples, K outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from multistep.data.batches import Batches
from multistep.state import TrainState, now_s
from multistep.types import Measure


class TrainData(Protocol):
    """Rows on the device's doorstep. `cut`: the layer after which the inputs were cached, 0 for token ids."""

    lengths_N: np.ndarray
    cut: int

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, mask [B,T] and targets of these rows, on the model's device."""
        ...


def train(state: TrainState, data: TrainData, bf16: bool = False) -> Iterator[Measure]:
    """Run the state's segment to its end. Yields after every batch; the state is consistent at every yield."""
    optimizer = state.optimizer
    assert state.strategy is not None and optimizer is not None, "begin() comes first"
    batches = Batches(data.lengths_N, state.strategy.batch_size, state.counters.seed)
    parameters = [p for _, p in state.trained]
    dropouts = [m for m in state.model.modules() if isinstance(m, nn.Dropout)]
    cuda = parameters[0].device.type == "cuda"
    started = now_s()
    while state.segment.progress() < 1.0:
        counters, strategy = state.counters, state.strategy  # between yields the caller may restore or adjust the state
        assert strategy is not None
        for dropout in dropouts:
            dropout.p = strategy.dropout
        if not state.model.training:  # ... or have encoded with it
            state.model.train()
        rows = batches.at(counters.position)
        _set_rng(state.rng, cuda)
        with torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=bf16):
            loss_nats, tokens = _backward(state, data, rows)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        event = state.detector.see(loss_nats, norm_value := float(norm))
        if strategy.clip and norm_value > strategy.clip:  # else the pass over all gradients would multiply them by 1
            torch.nn.utils.clip_grads_with_norm_(parameters, strategy.clip, norm)
        lr = strategy.optimizer.lr * strategy.schedule(state.segment.progress()) * counters.lr_scale
        if not event:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            optimizer.step()
            counters.update += 1
            state.average()
        optimizer.zero_grad(set_to_none=True)
        state.rng = torch.cuda.get_rng_state() if cuda else torch.get_rng_state()
        counters.position += 1
        counters.tokens += tokens
        counters.examples += len(rows)
        state.segment.updates += 1  # a batch that was left out counts too: the segment must end
        state.segment.tokens += tokens
        state.segment.wall_s += (now := now_s()) - started
        started = now
        named = tuple(int(r) for r in rows) if event else ()
        yield Measure(counters.update, counters.tokens, counters.examples, loss_nats, lr, norm_value, event, named)


def _backward(state: TrainState, data: TrainData, rows: np.ndarray) -> tuple[float, int]:
    """Gradients of the mean loss over `rows`, in micro-batches that add up to the whole; the loss and the tokens."""
    strategy = state.strategy
    assert strategy is not None
    micro = strategy.micro_batch or len(rows)
    loss_nats, tokens = 0.0, 0
    for start in range(0, len(rows), micro):
        part = rows[start : start + micro]
        x, mask_BT, targets = data.batch(part)
        loss = strategy.objective.loss(state.model(x, mask_BT, data.cut), targets) * (len(part) / len(rows))
        loss.backward()
        loss_nats += float(loss.detach())
        tokens += int(data.lengths_N[part].sum())
    return loss_nats, tokens


def _set_rng(rng: Tensor, cuda: bool) -> None:
    if cuda:
        torch.cuda.set_rng_state(rng)
    else:
        torch.set_rng_state(rng)
