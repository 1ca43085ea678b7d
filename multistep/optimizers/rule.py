"""Our own update rules as torch optimizers: a rule is a plain function of parameters, gradients and what it remembers of them.

On a GPU a rule gets a whole group at once (few kernel launches), on a CPU one large parameter at a time (it stays in the cache) and
small ones together (Python is what they cost).
What a rule remembers is in `state_dict()`: tensors of the parameter's dtype, as torch keeps them, and plain numbers.
"""
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from inspect import unwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

SMALL = 2**13  # elements: with fewer, parameters are updated together on a CPU


class Part(NamedTuple):
    """Parameters that are updated together."""

    group: dict[str, Any]  # the settings: lr, weight_decay and the rule's own
    parameters: list[Tensor]
    gradients: list[Tensor]
    states: list[dict[str, Any]]


Rule = Callable[[list[Part]], None]


class RuleOptimizer(Optimizer):
    """Calls `rule` with all parameters that have a gradient. `settings` (lr among them) go into every group; those named in `shared`
    are numbers that the rule moves in the first part's group, and that are then the same in all."""

    # torch's wrappers around these keep its compiler away from them, for which they load it: more than a second of every process
    add_param_group, zero_grad = unwrap(Optimizer.add_param_group), unwrap(Optimizer.zero_grad)
    state_dict, load_state_dict = unwrap(Optimizer.state_dict), unwrap(Optimizer.load_state_dict)

    def __init__(
        self, groups: Iterable[dict[str, Any]], rule: Rule, settings: Mapping[str, Any], shared: tuple[str, ...] = ()
    ):
        self.rule, self.shared = rule, shared
        super().__init__(groups, dict(settings))

    def __getstate__(self) -> dict[str, Any]:
        """For copies: torch's own takes its own attributes only."""
        return {**super().__getstate__(), "rule": self.rule, "shared": self.shared}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = []
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            if not found:
                continue
            for parameters in [found] if found[0].is_cuda else _together(found):
                gradients = [p.grad for p in parameters if p.grad is not None]  # all of them
                parts.append(Part(group, parameters, gradients, [self.state[p] for p in parameters]))
        if parts:
            self.rule(parts)
            moved = {key: parts[0].group[key] for key in self.shared}
            for group in self.param_groups:
                group.update(moved)
        return loss


def _together(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Small ones in one list, every other one in its own."""
    small = [p for p in parameters if p.numel() < SMALL]
    large = [[p] for p in parameters if p.numel() >= SMALL]
    return [*large, small] if small else large


def memory(part: Part, key: str) -> list[Tensor]:
    """What is remembered of each parameter under `key`: tensors of its shape, zero at first."""
    for parameter, state in zip(part.parameters, part.states, strict=True):
        if key not in state:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return [state[key] for state in part.states]


def advance(part: Part) -> list[int]:
    """Count this update; the number of each parameter's updates, this one included."""
    for state in part.states:
        state["step"] = state.get("step", 0) + 1
    return [state["step"] for state in part.states]


def decay(part: Part, lr: float) -> None:
    """Decoupled weight decay: w <- (1 - lr wd) w."""
    if part.group["weight_decay"]:
        torch._foreach_mul_(part.parameters, 1 - lr * part.group["weight_decay"])


def root_mean_square(part: Part, beta2: float, eps: float, steps: list[int]) -> list[Tensor]:
    """Take the gradients' squares into `v`; sqrt(v / (1-b2^t)) + eps."""
    v = memory(part, "v")
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, part.gradients, part.gradients, 1 - beta2)
    root = torch._foreach_sqrt(v)
    torch._foreach_div_(root, [math.sqrt(1 - beta2**t) for t in steps])
    torch._foreach_add_(root, eps)
    return list(root)


def adamw(part: Part) -> None:
    """AdamW for the parameters that a matrix rule leaves aside. The group has lr, weight_decay, beta1, beta2, eps."""
    group, steps = part.group, advance(part)
    m = memory(part, "m")
    torch._foreach_lerp_(m, part.gradients, 1 - group["beta1"])
    root = root_mean_square(part, group["beta2"], group["eps"], steps)
    decay(part, group["lr"])
    torch._foreach_addcdiv_(part.parameters, m, root, [-group["lr"] / (1 - group["beta1"] ** t) for t in steps])
