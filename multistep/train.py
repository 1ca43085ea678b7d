"""The loop: a generator of measurements. Break to stop; nothing is lost, the state goes on from where it is.

A loss that is not finite or that spikes is seen before the update is made: the update is left out, the measurement carries the
event and the batch's rows, and the caller decides what to do (go on, or roll back and halve the learning rate).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from multistep.precision import training_in
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

    def outputs(self, model: Any, inputs: Any) -> Any:
        """The model's outputs for what `load` gave: a tensor, or `Hidden` where the objective reads that."""
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
        progress = state.segment.progress()
        pieces = [order.at(counters.position + n) for n in range(strategy.batches(progress))]
        rows = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        batch = Batch(state, data, rows, bf16, cuda, pieces)
        loss_nats, norm = batch.gradients()
        event = state.detector.see(loss_nats, norm)
        lr = strategy.optimizer.lr * strategy.schedule(progress) * counters.lr_scale
        if not event:
            state.norms.see(state.norms.limit(norm, strategy.clip_z))
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            if strategy.optimizer.closure:
                optimizer.step(batch)  # pyright: ignore[reportCallIssue, reportArgumentType]
            else:
                optimizer.step()
            counters.update += 1
            state.average()
        optimizer.zero_grad(set_to_none=True)
        state.rng = _get_rng(cuda)
        counters.position += len(pieces)
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

    Every evaluation starts from the same random state, so that dropout is the same function of the parameters each time. A batch that
    has grown is made of `pieces`, which are loaded one by one: it takes no more memory than one of them.
    """

    def __init__(
        self, state: TrainState, data: TrainData, rows: np.ndarray, bf16: bool, cuda: bool,
        pieces: Sequence[np.ndarray] = (),
    ):  # fmt: skip
        assert state.strategy is not None
        self.state, self.strategy, self.data, self.rows = state, state.strategy, data, rows
        self.pieces = pieces or (rows,)
        self.bf16, self.cuda = bf16, cuda
        self.parameters = [p for _, p in state.trained]
        self.tokens = data.tokens(rows)
        self._loaded: list[tuple[Any, Any]] = []
        self._rng = state.rng
        self._known: Tensor | None = None  # the loss, while the parameters and their gradients are those of `gradients`

    def gradients(self) -> tuple[float, float]:
        """The mean loss and the norm of its gradients, which are clipped to the strategy's norm. An optimizer with a closure gets
        them as they are: it begins with this evaluation."""
        loss = self()
        loss_nats = float(loss)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm_value, clip = float(norm), self.strategy.clip
        limit = self.state.norms.limit(norm_value, self.strategy.clip_z)
        limit = min(limit, clip) if clip else limit
        if self.strategy.optimizer.closure:
            self._known = loss
        elif norm_value > limit:  # else the pass over all gradients would multiply them by 1
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return loss_nats, norm_value

    def __call__(self) -> Tensor:
        """The mean loss; the gradients are made anew, in micro-batches that add up to the whole."""
        if self._known is not None:
            known, self._known = self._known, None
            return known
        for parameter in self.parameters:
            parameter.grad = None
        total = 0.0
        for part in self.parts():
            loss = part.loss()
            loss.backward()
            total = total + loss.detach()
        return torch.as_tensor(total)

    def parts(self) -> list[Part]:
        """The micro-batches, whose losses add up to the whole. To be read once each, in their order."""
        _set_rng(self._rng, self.cuda)
        if not self._loaded:  # which may draw random numbers: every evaluation begins after that
            micro = self.strategy.micro_batch or max(map(len, self.pieces))
            parts = [piece[start : start + micro] for piece in self.pieces for start in range(0, len(piece), micro)]
            self._loaded = [self.data.load(part) for part in parts]
            self._rng = _get_rng(self.cuda)
        if len(self._loaded) == 1:
            return [Part(self, *self._loaded[0], 1.0)]
        counts = [self.strategy.objective.count(targets) for _, targets in self._loaded]
        whole = max(sum(counts), 1e-12)  # a batch whose every token is masked counts nothing
        return [Part(self, *loaded, count / whole) for loaded, count in zip(self._loaded, counts, strict=True)]

    def ridge(self, parameter: Tensor) -> float:
        """The curvature of the objective's penalties in this parameter: so many times the identity."""
        return self.strategy.objective.ridge(parameter)


class Part(NamedTuple):
    """A micro-batch, and how much of its batch it is."""

    batch: Batch
    inputs: Any
    targets: Any
    weight: float

    def outputs(self) -> Tensor:
        """The outputs, with their graph."""
        with self._precision():
            return self.batch.data.outputs(self.batch.state.model, self.inputs)

    def loss_of(self, outputs: Tensor) -> Tensor:
        """What such outputs add to the batch's mean loss."""
        return self._weighed(self.batch.strategy.objective.loss(outputs, self.targets))

    def loss(self) -> Tensor:
        """What this part adds to the batch's loss, wrappers included, with its graph."""
        batch, model = self.batch, self.batch.state.model
        with self._precision():
            return self._weighed(
                batch.strategy.objective.of(lambda: batch.data.outputs(model, self.inputs), self.targets, model)
            )

    def _weighed(self, loss: Tensor) -> Tensor:
        return loss if self.weight == 1.0 else loss * self.weight

    def _precision(self) -> AbstractContextManager[None]:
        return training_in(self.batch.bf16, "cuda" if self.batch.cuda else "cpu")


def _get_rng(cuda: bool) -> Tensor:
    return torch.cuda.get_rng_state() if cuda else torch.get_rng_state()


def _set_rng(rng: Tensor, cuda: bool) -> None:
    if cuda:
        torch.cuda.set_rng_state(rng)
    else:
        torch.set_rng_state(rng)
