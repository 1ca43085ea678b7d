"""The loop: a generator of measurements. Break to stop; nothing is lost, the state goes on from where it is.

A loss or gradient that is not finite, that spikes or explodes is seen before the update is made: the update is left out, the
measurement carries the event and the batch's rows, and the caller decides what to do (go on, or roll back and halve the learning rate).
An update that explodes or is not finite is seen after it was made and before the next batch: the caller has to restore the state of
before. Where memory runs out for a batch nothing of it is applied, and it comes again in micro-batches of half the size; where it runs
out in the middle of the step, the error is raised: the caller has to restore the state, and to halve them.

When torch.distributed is initialised, every process takes its part of each batch and all make the same updates (`processes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from multistep import processes
from multistep.allocation import OutOfMemory, out_of_memory, release
from multistep.detect import MOVED
from multistep.precision import training_in
from multistep.processes import get_rng, set_rng
from multistep.state import TrainState
from multistep.types import Measure, UserError

_SAMPLED = 512  # entries of each trained tensor, by which the norm of an update is measured
_IN_A_STEP = "out of memory in the middle of a step, in one of the processes"


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
    """Run the state's segment to its end. Yields after every batch; the state is consistent at every yield but that of an update that
    explodes or is not finite. Raises UserError when memory runs out with one example at once; an error for which
    `allocation.out_of_memory` holds, in all processes, when it does in the middle of a step."""
    optimizer, before = state.optimizer, state.strategy
    assert before is not None and optimizer is not None, "begin() comes first"
    if before.optimizer.products and processes.count() > 1:
        raise UserError(
            f"optimizer: {before.optimizer.kind} works in one process. Choose another one, or train in one process."
        )
    order = data.order(before.batch_size, state.counters.seed + before.reshuffle)
    parameters, buffers = [p for _, p in state.trained], [b for _, b in state.buffers()]
    sample, moving = Sample(parameters), Moving(buffers)
    device = parameters[0].device
    cuda, applied = device.type == "cuda", None
    started, flat = _meet(parameters, buffers)
    while state.segment.progress() < 1.0:
        counters, strategy = state.counters, state.strategy  # between yields the caller may restore or adjust the state
        assert strategy is not None
        if strategy is not applied:
            state.drop_out()
            applied = strategy
        strategy.optimizer.settle(optimizer, training=True)
        if not state.model.training:  # ... or have encoded with it
            state.model.train()
        progress = state.segment.progress()
        pieces = [order.at(counters.position + n) for n in range(strategy.batches(progress))]
        rows = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        batch = Batch(state, data, rows, bf16, cuda, pieces, flat)
        lr = strategy.optimizer.lr * strategy.schedule(progress) * counters.lr_scale
        moving.keep()
        loss_nats, norm, event, short = float("nan"), float("nan"), "", False
        try:
            loss_nats, norm = batch.gradients()
            event = state.detector.see(loss_nats, norm, state.norms.explodes(norm))
        except OutOfMemory:
            event = "out of memory"
        except (MemoryError, RuntimeError) as error:
            short = processes.fell_short(error)
        if event == "out of memory":
            moving.restore()
            optimizer.zero_grad(set_to_none=True)
            release()
            state.halve_micro_batch(batch.micro)
            state.segment.wall_s += (now := processes.agreed(device)[0]) - started
            started, named = now, tuple(int(r) for r in rows)
            done = counters.update, counters.tokens, counters.examples
            yield Measure(*done, loss_nats, lr, norm, event, named, batch.micro)
            continue
        if event:
            moving.restore()
        elif not short:
            try:
                event = _step(state, sample, batch, lr, norm)
            except OutOfMemory:  # while the loss was looked at again: all processes know
                raise
            except (MemoryError, RuntimeError) as error:
                short = processes.fell_short(error)
        now = _agree(batch, flat, short)
        processes.share(buffers)
        optimizer.zero_grad(set_to_none=True)
        state.rng = batch.rng_after()
        counters.position += len(pieces)
        counters.tokens += batch.tokens
        counters.examples += len(rows)
        state.segment.updates += 1  # a batch that was left out counts too: the segment must end
        state.segment.tokens += batch.tokens
        state.segment.wall_s += now - started
        started = now
        named = tuple(int(r) for r in rows) if event else ()
        yield Measure(counters.update, counters.tokens, counters.examples, loss_nats, lr, norm, event, named)


def _meet(parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor]) -> tuple[float, Tensor | None]:
    """The clock, and what several processes add up in; their running statistics are made the same. Raises UserError in all of them where
    one has no memory for that."""
    flat, short = None, False
    try:
        flat = processes.room(parameters)
    except (MemoryError, RuntimeError) as error:
        short = processes.fell_short(error)
    started, short = processes.agreed(parameters[0].device, short)
    if short:
        raise UserError(
            "out of memory: several processes need room for the gradients once more. Train fewer layers or take a smaller model."
        )
    processes.share(buffers)
    return started, flat


def _step(state: TrainState, sample: Sample, batch: Batch, lr: float, norm: float) -> str:
    """Make the update; '' when it was like those before it (and it is counted), else what it was."""
    strategy, optimizer = batch.strategy, state.optimizer
    assert optimizer is not None
    state.norms.see(state.norms.limit(norm, strategy.clip_z))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    sample.keep()
    if strategy.optimizer.closure:
        optimizer.step(batch)  # pyright: ignore[reportCallIssue, reportArgumentType]
    else:
        optimizer.step()
    event = sample.event(state, lr)
    if not event:
        state.counters.update += 1
        state.average()
    return event


def _agree(batch: Batch, flat: Tensor | None, short: bool) -> float:
    """The clock, after the processes have told each other who fell short. Raises OutOfMemory in all of them where one did."""
    if flat is not None and batch.strategy.optimizer.closure:
        # who falls short meets those that look at the loss again, and they raise the same there
        _, short = processes.add_up(batch.parameters, flat, 0.0, 0.0, short)
        if short:
            raise OutOfMemory(_IN_A_STEP)
    now, short = processes.agreed(batch.parameters[0].device, short)
    if short:
        raise OutOfMemory(_IN_A_STEP)
    return now


def at_once(state: TrainState, rows: int) -> int:
    """How many examples of a batch of so many rows go through the model at once, in this process."""
    assert state.strategy is not None
    limits = (state.strategy.micro_batch, state.counters.micro_batch, -(-rows // processes.count()))
    return min(limit for limit in limits if limit)


def is_finite(state: TrainState) -> bool:
    """Whether all that is trained is finite: a pass over it, for once in a while (every update is looked at in samples)."""
    return bool(torch.nn.utils.get_total_norm([p.detach() for _, p in state.trained]) < float("inf"))


class Sample:
    """Some hundred entries of every trained tensor, copied before and after a step: how far it went, for next to nothing."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._views = [_some(p.detach()) for p in parameters]
        self._before, self._after = (torch.cat(self._views).float() for _ in range(2))

    def keep(self) -> None:
        """Remember the parameters as they are before a step."""
        torch.cat(self._views, out=self._before)

    def event(self, state: TrainState, lr: float) -> str:
        """'' when the step was like those before it (and it is remembered), else what it was."""
        torch.cat(self._views, out=self._after)
        moved = float(torch.linalg.vector_norm(self._after.sub_(self._before)))
        if not moved < float("inf"):
            return "nonfinite"
        if lr <= 0:
            return ""
        if state.steps.explodes(moved / lr) and moved > MOVED * float(torch.linalg.vector_norm(self._before)):
            return "exploding update"
        state.steps.see(moved / lr)
        return ""


def _some(tensor: Tensor) -> Tensor:
    """A view of up to so many entries, from the middle: the first rows of a table of embeddings are special."""
    if not tensor.is_contiguous():
        return tensor[(0,) * (tensor.ndim - 1)]
    count = min(_SAMPLED, tensor.numel())
    return tensor.view(-1).narrow(0, (tensor.numel() - count) // 2, count)


class Moving:
    """The buffers that a forward pass may change (running statistics), so that a batch that is left out leaves no trace in them.

    All of them: neither torch's counts of what is written into a tensor (batch norm's statistics are not counted) nor the batches so
    far say which ones will move.
    """

    def __init__(self, buffers: Sequence[Tensor]):
        self._buffers, self._values = list(buffers), [b.clone() for b in buffers]

    def keep(self) -> None:
        """Remember them as they are before a batch."""
        if self._buffers:
            torch._foreach_copy_(self._values, self._buffers)  # pyright: ignore[reportPrivateImportUsage]

    def restore(self) -> None:
        """Put them back to how they were before the batch."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._values)  # pyright: ignore[reportPrivateImportUsage]


class Batch:
    """The loss on one batch and its gradients, as often as they are asked for: what optimizers with a closure step on.

    Every evaluation starts from the same random state, so that dropout is the same function of the parameters each time. A batch that
    has grown is made of `pieces`, which are loaded one by one: it takes no more memory than one of them.
    """

    def __init__(
        self, state: TrainState, data: TrainData, rows: np.ndarray, bf16: bool, cuda: bool,
        pieces: Sequence[np.ndarray] = (), flat: Tensor | None = None,
    ):  # fmt: skip
        assert state.strategy is not None
        self.state, self.strategy, self.data, self.rows = state, state.strategy, data, rows
        self.pieces = [mine for piece in (pieces or (rows,)) if len(mine := processes.part(piece))]
        self.bf16, self.cuda = bf16, cuda
        self.parameters = [p for _, p in state.trained]
        self.tokens = data.tokens(rows)
        self.micro = at_once(state, max(len(piece) for piece in (pieces or (rows,))))
        self._flat = flat  # where several processes add up
        self._loaded: list[tuple[Any, Any]] = []
        self._weight = 1.0  # what this process's rows count
        self._rng, self._rng_after = state.rng, None
        if processes.count() > 1:
            self._rng, self._rng_after = processes.generators(state.rng, cuda)
        self._known: Tensor | None = None  # the loss, while the parameters and their gradients are those of `gradients`

    def rng_after(self) -> Tensor:
        """The state of the random generator that the next batch begins with."""
        return get_rng(self.cuda) if self._rng_after is None else self._rng_after

    def gradients(self) -> tuple[float, float]:
        """The mean loss and the norm of its gradients, which are clipped to the strategy's norm. An optimizer with a closure gets
        them as they are: it begins with this evaluation. Raises OutOfMemory."""
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
        """The mean loss; the gradients are made anew, in micro-batches that add up to the whole. Raises OutOfMemory."""
        if self._known is not None:
            known, self._known = self._known, None
            return known
        for parameter in self.parameters:
            parameter.grad = None
        total, short = torch.zeros(()), False
        try:
            total = self._backward()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            short = True
        if self._flat is not None:
            found, short = processes.add_up(self.parameters, self._flat, float(total), self._weight, short)
            total = torch.tensor(found)
        if short:
            raise OutOfMemory(f"out of memory with {self.micro} examples at once")
        return total

    def _backward(self) -> Tensor:
        total = 0.0
        for part in self.parts():
            loss = part.loss()
            loss.backward()
            total = total + loss.detach()
        return torch.as_tensor(total)

    def parts(self) -> list[Part]:
        """The micro-batches, whose losses add up to the whole. To be read once each, in their order."""
        set_rng(self._rng, self.cuda)
        if not self._loaded:  # which may draw random numbers: every evaluation begins after that
            starts = [(piece, start) for piece in self.pieces for start in range(0, len(piece), self.micro)]
            self._loaded = [self.data.load(piece[start : start + self.micro]) for piece, start in starts]
            self._rng = get_rng(self.cuda)
        alone = processes.count() == 1
        if len(self._loaded) == 1 and alone:
            return [Part(self, *self._loaded[0], 1.0)]
        counts = [self.strategy.objective.count(targets) for _, targets in self._loaded]
        self._weight = float(sum(counts))
        whole = max(self._weight, 1e-12)  # a batch whose every token is masked counts nothing
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
