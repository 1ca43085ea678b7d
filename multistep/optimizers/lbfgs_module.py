"""L-BFGS over the parameters of a module. torch.optim.LBFGS does the work; this gives it groups, L2 and a memory for one batch.

Source: Liu and Nocedal 1989; strong Wolfe conditions by Nocedal and Wright 2006, algorithms 3.5 and 3.6.
Differs from the source: when the loss at the start of a step is not the one at the end of the last, the batch is another and
the memory is dropped: a change of gradient between two batches is not curvature. A step that ends higher is taken back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multistep.optimizers.newton_module import SAME_BATCH, decay_penalty, step_length

if TYPE_CHECKING:
    from multistep.optimizers.base import StepProblem
    from multistep.optimizers.second_order import ModuleLBFGS


class LBFGSOptimizer(torch.optim.Optimizer):
    """`step(problem)` runs the iterations of one batch. The memory is in the state of the first parameter, as torch has it."""

    def __init__(self, groups: list[dict[str, Any]], spec: ModuleLBFGS) -> None:
        super().__init__(groups, {"lr": spec.lr})
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self._inner = torch.optim.LBFGS(
            self._parameters,
            lr=spec.lr,
            max_iter=spec.max_iterations,
            max_eval=2 * spec.max_iterations + 5,  # a line search takes one or two
            tolerance_grad=1e-12,  # the caller says when to stop
            tolerance_change=1e-14,
            history_size=spec.memory,
            line_search_fn="strong_wolfe",
        )
        self._inner.state = self.state

    @property
    def facts(self) -> dict[str, Any]:
        """What the last step did: numbers only. Empty before the first."""
        return self.state[self._parameters[0]].get("facts", {})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(deepcopy(dict(state_dict)))  # torch's LBFGS changes its tensors in place
        self._inner.state = self.state

    def step(self, closure: StepProblem) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the loss before the step, without the L2 term."""
        lr = step_length(self.param_groups)
        first = self._evaluate(closure)
        before = first + decay_penalty(self.param_groups)
        own = self.state[self._parameters[0]]
        if not (math.isfinite(float(before)) and lr > 0):
            self._forget({"iterations": 0, "evaluations": 1, "length": 0.0})
            return first
        if not math.isclose(own.get("loss_after", math.inf), float(before), rel_tol=SAME_BATCH):
            own.clear()
        self._inner.param_groups[0]["lr"] = lr
        start = [p.detach().clone() for p in self._parameters]
        iterations, evaluations = own.get("n_iter", 0), own.get("func_evals", 0)
        known = [before]  # torch's step begins with the evaluation that is already made

        def objective() -> Tensor:
            return known.pop() if known else self._evaluate(closure) + decay_penalty(self.param_groups)

        self._inner.step(objective)  # pyright: ignore[reportArgumentType]
        own.pop("al", None)  # scratch
        after = float(self._evaluate(closure) + decay_penalty(self.param_groups))
        facts = {
            "iterations": own["n_iter"] - iterations,
            "evaluations": own["func_evals"] - evaluations + 1,
            "length": float(own.get("t", 0.0)),
            "loss_after": after,
        }
        if not after <= float(before):  # also NaN
            with torch.no_grad():
                for parameter, value in zip(self._parameters, start, strict=True):
                    parameter.copy_(value)
            self._forget({**facts, "length": 0.0, "loss_after": float(before)})
            return first
        own["loss_after"], own["facts"] = after, facts
        return first

    def _evaluate(self, problem: StepProblem) -> Tensor:
        """The loss, with the gradients of loss and L2 in `.grad`."""
        with torch.enable_grad():
            loss = problem().detach()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"] if group["weight_decay"] else ():
                    pull = group["weight_decay"] * parameter
                    parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)
        return loss

    def _forget(self, facts: dict[str, Any]) -> None:
        own = self.state[self._parameters[0]]
        own.clear()
        own["facts"] = facts
