"""Try a change of a training in memory, judge it, and keep it or take it back bit for bit.

    change = Transaction(state)
    change.attempt(strategy.with_(batch_size=64), Budget(amount=100, unit="updates"))
    for measure in train(state, data): ...
    change.commit() if better else change.restore()

Any strategy will do: a live change, another batch size, objective or order of the data, other frozen layers, another optimizer, a
cool-down. What `TrainState.begin` keeps, the attempt keeps. After `restore` the future is that of a state with which nothing was tried.
A loop over `train` that was begun before an attempt or its end has to be begun anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multistep.budget import Budget
from multistep.state import TrainState
from multistep.strategy import Training
from multistep.types import UserError


@dataclass
class _Before:
    """The parts of a state, and copies of what an attempt may change in them."""

    strategy: Training
    optimizer: torch.optim.Optimizer
    trained: list[tuple[str, nn.Parameter]]
    averages: tuple[list[Tensor], list[Tensor]]
    snapshot: dict[str, Any]
    requires_grad: list[bool]
    dropout: dict[nn.Dropout, float]
    training: list[bool]
    others: list[tuple[nn.Parameter, Tensor]]  # that the attempt trains and the state did not


class Transaction:
    """One change at a time of a state that has begun a segment. Costs the memory of a snapshot while an attempt is open."""

    def __init__(self, state: TrainState):
        self.state = state
        self._before: _Before | None = None

    @property
    def is_open(self) -> bool:
        """Whether an attempt waits for `commit` or `restore`."""
        return self._before is not None

    def attempt(self, strategy: Training, budget: Budget | None = None) -> None:
        """Go on with another strategy: for a segment of its own, or inside of the current one (None), where only live fields may change.

        Raises UserError when an attempt is open, when the state has not begun, or when more than live fields would change inside of a
        segment. Nothing has changed where anything is raised.
        """
        state = self.state
        if self._before is not None:
            raise UserError("transaction: an attempt is open. Commit or restore it first.")
        if state.strategy is None or state.optimizer is None:
            raise UserError("transaction: the state has not begun. Call its begin(strategy, budget) first.")
        if budget is None and not strategy.same_but_live(state.strategy):
            raise UserError(
                "transaction: inside of a segment only live fields may change. Give a budget for a segment of its own."
            )
        model = state.model
        before = _Before(
            state.strategy, state.optimizer, state.trained, (state.ema, state.tail), state.snapshot(),
            [p.requires_grad for p in model.parameters()], {m: m.p for m in model.modules() if isinstance(m, nn.Dropout)},
            [m.training for m in model.modules()], [],
        )  # fmt: skip
        self._before = before
        try:
            if budget is None:
                state.adjust(strategy)
            else:
                state.begin(strategy, budget)
            known = {id(p) for _, p in before.trained}
            before.others = [(p, p.detach().clone()) for _, p in state.trained if id(p) not in known]
        except Exception:  # memory that runs out is one
            self.restore()
            raise

    def commit(self) -> None:
        """Keep what was tried. Raises UserError when nothing was."""
        self._close()

    def restore(self) -> None:
        """Put everything back to how it was before the attempt. Raises UserError when there was none."""
        before, state = self._close(), self.state
        state.strategy, state.optimizer, state.trained = before.strategy, before.optimizer, before.trained
        state.ema, state.tail = before.averages
        with torch.no_grad():
            for parameter, value in before.others:
                parameter.copy_(value)
        for parameter, flag in zip(state.model.parameters(), before.requires_grad, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, p in before.dropout.items():
            module.p = p
        for module, mode in zip(state.model.modules(), before.training, strict=True):
            module.training = mode
        state.restore(before.snapshot)

    def _close(self) -> _Before:
        if self._before is None:
            raise UserError("transaction: nothing was tried. Call attempt(strategy, budget) first.")
        before, self._before = self._before, None
        return before
