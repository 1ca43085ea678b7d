"""Muon: momentum whose update of a matrix is replaced by its nearest semi-orthogonal matrix. AdamW for all that is no hidden matrix.

    m <- b m + (1-b) g;  u <- NS5((1-b) g + b m);  w <- (1 - lr wd) w - lr 0.2 sqrt(max(R, C)) u

Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (momentum, Newton-Schulz); Amsel et al. 2025,
"The Polar Express" (the coefficients of each step: `polar.py`); Liu et al. 2025, "Muon is scalable for LLM training" (weight decay,
and the scale that gives the update the root mean square of AdamW's, so that one learning rate serves both rules).
Differs from the sources: momentum 0.9, not 0.95, for runs of minutes (LOG.md, 2026-11-25); on a CPU the iteration runs in float32,
for bfloat16 is slow on most, and of wide matrices on their Gram matrices; on a GPU in bfloat16. Matrices of one shape are
iterated together.
Shapes: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from multistep.optimizers.base import GradientOptimizer, Rate, parameter_groups
from multistep.types import Tunable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from multistep.optimizers.polar import Quintic
    from multistep.optimizers.rule import Part

_TABLES = ("embed", "wte", "wpe")  # anywhere in a name
_OUTPUTS = ("head", "lm_head", "classifier")  # a whole word of a dotted name
_TOGETHER = 2**22  # elements of matrices of one shape that are iterated together


class Muon(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(
            2e-2, 2e-3, 6e-2, "measured, LOG.md of 2026-11-25: a GPT of width 128 on characters, 400 updates"
        ),
        "fine_tune": Rate(
            4e-5, 1e-5, 3e-4, "prior: AdamW's, not measured here; Qu et al. 2026 find it harmful after Adam"
        ),
        "adapter": Rate(4e-4, 1e-4, 3e-3, "prior: AdamW's, not measured here"),
    }
    good_for = "hidden matrices from random weights, on a GPU or with 50 tokens of batch for each unit of width; LoRA"
    wrong_for = "full fine-tuning of weights that Adam pretrained, and small batches on a CPU (up to +45 % a step)"
    bytes_a_parameter = 4.0  # of a hidden matrix; 8 for the rest
    cost = 65.0

    kind: Literal["muon"] = "muon"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-6, 1e-1, log=True, live=True)] = 1.5e-3
    weight_decay: Annotated[float, Field(ge=0, le=10), Tunable(1e-4, 1.0, log=True, live=True)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # 0.95 in runs of many thousand updates
    steps: Annotated[int, Field(ge=1, le=20)] = 5  # of the Newton-Schulz iteration
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of AdamW
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        from multistep.optimizers.rule import RuleOptimizer

        hidden = hidden_matrices([(name, parameter.ndim) for name, parameter in parameters])

        def split(name: str, parameter: nn.Parameter) -> dict[str, Any]:
            return {"rule": "muon" if name in hidden else "adamw"}

        settings = {"lr": self.lr, "momentum": self.momentum, "steps": self.steps}
        settings |= {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        return RuleOptimizer(parameter_groups(parameters, self.weight_decay, head_lr, split), _rule, settings)


def hidden_matrices(named: Sequence[tuple[str, int]]) -> set[str]:
    """The names (given with their number of dimensions) that get Muon's rule: matrices that are neither tables of embeddings nor the
    output layer. A table has "embed", "wte" or "wpe" in its name; the output layer is what has "head", "lm_head" or "classifier"
    among the words of its name or, when nothing has, the last matrix."""
    matrices = [name for name, ndim in named if ndim == 2]
    outputs = {name for name in matrices if not set(_OUTPUTS).isdisjoint(name.split("."))} or set(matrices[-1:])
    return {n for n in matrices if n not in outputs and not any(table in n.lower() for table in _TABLES)}


def _rule(parts: list[Part]) -> None:
    import torch

    from multistep.optimizers.polar import quintics
    from multistep.optimizers.rule import adamw, decay, memory

    wide: dict[tuple[Any, ...], list[tuple[Tensor, Tensor, float]]] = {}  # parameter, direction and step by shape
    for part in parts:
        group = part.group
        if group["rule"] == "adamw":
            adamw(part)
            continue
        decay(part, group["lr"])
        for w_RC, g_RC, m_RC in zip(part.parameters, part.gradients, memory(part, "m"), strict=True):
            m_RC.lerp_(g_RC, 1 - group["momentum"])
            d_RC, step = g_RC.lerp(m_RC, group["momentum"]), group["lr"] * 0.2 * max(w_RC.shape) ** 0.5
            if d_RC.shape[0] > d_RC.shape[1]:
                w_RC, d_RC = w_RC.T, d_RC.T
            wide.setdefault((*d_RC.shape, group["steps"], d_RC.dtype, d_RC.device), []).append((w_RC, d_RC, step))
    for (rows, columns, steps, *_), found in wide.items():
        many = max(1, _TOGETHER // (rows * columns))
        for first in range(0, len(found), many):
            some = found[first : first + many]
            u_NRC = newton_schulz(torch.stack([d for _, d, _ in some]), quintics(steps))
            for (w_RC, _, step), u_RC in zip(some, u_NRC, strict=True):
                w_RC.add_(u_RC.to(w_RC.dtype), alpha=-step)


def newton_schulz(g_RC: Tensor, steps: Sequence[Quintic]) -> Tensor:
    """About U V^T of g = U S V^T, of a matrix or of every one in a stack [N,R,C]; each step is an odd polynomial of the singular values.
    On a CPU the powers of a matrix twice as wide as high are taken of its Gram matrix [R,R]: the same polynomial of the same
    values, in half the products."""
    import torch

    if g_RC.ndim < 2:
        raise ValueError(f"newton_schulz needs a matrix, got shape {tuple(g_RC.shape)}")
    x = g_RC.bfloat16() if g_RC.is_cuda else g_RC if g_RC.element_size() >= 4 else g_RC.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    if x.is_cuda or x.shape[-1] < 2 * x.shape[-2]:  # the Gram matrix squares the condition: not in bfloat16
        for a, b, c in steps:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    else:
        gram, whole = x @ x.mT, None
        for number, (a, b, c) in enumerate(steps, 1):
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            p.diagonal(dim1=-2, dim2=-1).add_(a)
            whole = p if whole is None else p @ whole
            if number < len(steps):
                gram = p @ gram @ p
        x = x if whole is None else whole @ x
    x = x.reshape(shape)
    return x.mT if tall else x
