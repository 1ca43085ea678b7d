"""The loop: a generator of measurements. Break to stop; nothing is lost, the state goes on from where it is.

A loss that is not finite or that spikes is seen before the update is made: the update is left out, the measurement carries the
event and the batch's rows, and the caller decides what to do (go on, or roll back and halve the learning rate).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from multistep.state import TrainState, now_s
from multistep.types import Measure


class TrainData(Protocol):
    """Examples and the order they come in."""

    def order(self, batch_size: int, seed: int) -> Order:
        """Batches by position, the same for the same arguments."""
        ...

    def load(self, rows: np.ndarray) -> tuple[Any, Any]:
        """Inputs and targets of these rows, on the model's device."""
        ...

    def outputs(self, model: Any, inputs: Any) -> Tensor:
        """The model's outputs for what `load` gave."""
        ...

    def tokens(self, rows: np.ndarray) -> int:
        """How many tokens (not padding) these rows have."""
        ...


class Order(Protocol):
    def at(self, position: int) -> np.ndarray:
        """The rows of batch `position`, counted from the start of training."""
        ...


def train(state: TrainState, data: TrainData, bf16: bool = False) -> Iterator[Measure]:
    """Run the state's segment to its end. Yields after every batch; the state is consistent at every yield."""
    optimizer = state.optimizer
    assert state.strategy is not None and optimizer is not None, "begin() comes first"
    order = data.order(state.strategy.batch_size, state.counters.seed)
    dropouts = [m for m in state.model.modules() if isinstance(m, nn.Dropout)]
    cuda = state.trained[0][1].device.type == "cuda"
    started = now_s()
    while state.segment.progress() < 1.0:
        counters, strategy = state.counters, state.strategy  # between yields the caller may restore or adjust the state
        assert strategy is not None
        if strategy.dropout is not None:
            for dropout in dropouts:
                dropout.p = strategy.dropout
        strategy.optimizer.settle(optimizer, training=True)
        if not state.model.training:  # ... or have encoded with it
            state.model.train()
        rows = order.at(counters.position)
        batch = Batch(state, data, rows, bf16, cuda)
        loss_nats, norm = batch.gradients()
        event = state.detector.see(loss_nats, norm)
        lr = strategy.optimizer.lr * strategy.schedule(state.segment.progress()) * counters.lr_scale
        if not event:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            if strategy.optimizer.closure:
                optimizer.step(batch)  # pyright: ignore[reportCallIssue, reportArgumentType]
            else:
                optimizer.step()
            counters.update += 1
            state.average()
        optimizer.zero_grad(set_to_none=True)
        state.rng = torch.cuda.get_rng_state() if cuda else torch.get_rng_state()
        counters.position += 1
        counters.tokens += batch.tokens
        counters.examples += len(rows)
        state.segment.updates += 1  # a batch that was left out counts too: the segment must end
        state.segment.tokens += batch.tokens
        state.segment.wall_s += (now := now_s()) - started
        started = now
        named = tuple(int(r) for r in rows) if event else ()
        yield Measure(counters.update, counters.tokens, counters.examples, loss_nats, lr, norm, event, named)


class Batch:
    """The loss on one batch and its gradients, as often as they are asked for: what optimizers with a closure step on.

    Every evaluation starts from the same random state, so that dropout is the same function of the parameters each time.
    """

    def __init__(self, state: TrainState, data: TrainData, rows: np.ndarray, bf16: bool, cuda: bool):
        assert state.strategy is not None
        self.state, self.strategy, self.data, self.rows = state, state.strategy, data, rows
        self.bf16, self.cuda = bf16, cuda
        self.parameters = [p for _, p in state.trained]
        self.tokens = data.tokens(rows)
        self._whole: tuple[Any, Any] | None = None

    def gradients(self) -> tuple[float, float]:
        """The mean loss and the norm of its gradients, which are clipped to the strategy's norm."""
        loss_nats = float(self())
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm_value, clip = float(norm), self.strategy.clip
        if clip and norm_value > clip:  # else the pass over all gradients would multiply them by 1
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip, norm)
        return loss_nats, norm_value

    def __call__(self) -> Tensor:
        """The mean loss; the gradients are made anew, in micro-batches that add up to the whole."""
        for parameter in self.parameters:
            parameter.grad = None
        micro = self.strategy.micro_batch or len(self.rows)
        parts = [self.rows[start : start + micro] for start in range(0, len(self.rows), micro)]
        _set_rng(self.state.rng, self.cuda)
        if len(parts) == 1:
            loss = self._loss(*self._load())
            loss.backward()
            return loss.detach()
        loaded = [self.data.load(part) for part in parts]
        counts = [self.strategy.objective.count(targets) for _, targets in loaded]
        whole, total = max(sum(counts), 1e-12), 0.0  # a batch whose every token is masked counts nothing
        for (inputs, targets), count in zip(loaded, counts, strict=True):
            loss = self._loss(inputs, targets) * (count / whole)
            loss.backward()
            total = total + loss.detach()
        return torch.as_tensor(total)

    def outputs(self) -> Tensor:
        """The outputs of the whole batch, with their graph."""
        _set_rng(self.state.rng, self.cuda)
        with self._autocast():
            return self.data.outputs(self.state.model, self._load()[0])

    def loss_of(self, outputs: Tensor) -> Tensor:
        """The mean loss of such outputs."""
        return self.strategy.objective.loss(outputs, self._load()[1])

    def _load(self) -> tuple[Any, Any]:
        if self._whole is None:
            self._whole = self.data.load(self.rows)
        return self._whole

    def _loss(self, inputs: Any, targets: Any) -> Tensor:
        model = self.state.model
        with self._autocast():
            return self.strategy.objective.of(lambda: self.data.outputs(model, inputs), targets, model)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cuda" if self.cuda else "cpu", torch.bfloat16, enabled=self.bf16)


def _set_rng(rng: Tensor, cuda: bool) -> None:
    if cuda:
        torch.cuda.set_rng_state(rng)
    else:
        torch.set_rng_state(rng)
