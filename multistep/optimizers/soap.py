"""SOAP: Adam in the basis of the eigenvectors of Shampoo's preconditioner.

    g' = P^T g Q;  m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g'^2
    w <- (1 - lr wd) w - lr P ((P^T m Q / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)) Q^T
    A <- b2 A + (1-b2) g g^T;  B <- b2 B + (1-b2) g^T g;  every f updates P, Q <- the orthogonal factors of A P, B Q

Source: Vyas et al. 2024, "SOAP: improving and stabilizing Shampoo using Adam". As in the authors' code, a matrix's first gradient
gives the first bases and moves nothing, and the bases are put in the order of their eigenvalues before they are renewed.
Differs from the source: tensors of more dimensions are taken as matrices (first dimension by the rest), and a side longer than
`max_side` (2048, not 10000) keeps its own basis. Vectors get AdamW. Shapes: R rows, C columns.
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

    from multistep.optimizers.rule import Part


class SOAP(GradientOptimizer):
    rates: ClassVar = {
        "scratch": Rate(3e-3, 3e-4, 1e-2, "the paper's for language models of 360 and 660 million parameters"),
        "fine_tune": Rate(4e-5, 1e-5, 3e-4, "prior: AdamW's, not measured here"),
        "adapter": Rate(4e-4, 1e-4, 3e-3, "prior: AdamW's, not measured here"),
    }
    good_for = "fewest updates to a loss from random weights, with large batches on a GPU"
    wrong_for = "small batches on a CPU, wide layers (decompositions) and little memory"
    bytes_a_parameter = 24.0  # of a square matrix: m, v, A, B, P, Q
    cost = 170.0

    kind: Literal["soap"] = "soap"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-6, 1e-1, log=True, live=True)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0, le=10), Tunable(1e-4, 1.0, log=True, live=True)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.95
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    every: Annotated[int, Field(ge=1)] = 10  # updates between renewals of the bases
    max_side: Annotated[int, Field(ge=1)] = 2048

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        from multistep.optimizers.rule import RuleOptimizer

        settings = {"lr": self.lr, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        settings |= {"every": self.every, "max_side": self.max_side}
        return RuleOptimizer(parameter_groups(parameters, self.weight_decay, head_lr), _rule, settings)


def _rule(parts: list[Part]) -> None:
    from multistep.optimizers.rule import Part, adamw

    for part in parts:
        for w, g, state in zip(part.parameters, part.gradients, part.states, strict=True):
            if w.ndim < 2:
                adamw(Part(part.group, [w], [g], [state]))
            else:
                _matrix(part.group, w, g.reshape(len(g), -1), state)


def _matrix(group: dict[str, Any], w: Tensor, g_RC: Tensor, state: dict[str, Any]) -> None:
    beta1, beta2 = group["beta1"], group["beta2"]
    if not state:
        state |= {"step": 0, "m": g_RC.new_zeros(g_RC.shape), "v": g_RC.new_zeros(g_RC.shape)}
        state["sides"] = [side for side in (0, 1) if g_RC.shape[side] <= group["max_side"]]
        for side in state["sides"]:
            state[f"curvature{side}"] = _outer(g_RC, side) * (1 - beta2)
            state[f"basis{side}"] = _eigenvectors(state[f"curvature{side}"])
        return
    state["step"] += 1
    m_RC, v_RC, step = state["m"], state["v"], state["step"]
    m_RC.lerp_(g_RC, 1 - beta1)
    turned = _turn(g_RC, state, back=False)
    v_RC.mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
    root = (v_RC / (1 - beta2**step)).sqrt_().add_(group["eps"])
    u_RC = _turn(_turn(m_RC, state, back=False) / root, state, back=True)
    w.mul_(1 - group["lr"] * group["weight_decay"])
    w.add_(u_RC.reshape(w.shape), alpha=-group["lr"] / (1 - beta1**step))
    for side in state["sides"]:
        state[f"curvature{side}"].lerp_(_outer(g_RC, side), 1 - beta2)
        if step % group["every"] == 0:
            _renew(state, side)


def _outer(g_RC: Tensor, side: int) -> Tensor:
    return g_RC @ g_RC.T if side == 0 else g_RC.T @ g_RC


def _turn(x_RC: Tensor, state: dict[str, Any], back: bool) -> Tensor:
    """Into the bases (P^T x Q), or back from them."""
    if 0 in state["sides"]:
        x_RC = (state["basis0"] if back else state["basis0"].T) @ x_RC
    if 1 in state["sides"]:
        x_RC = x_RC @ (state["basis1"].T if back else state["basis1"])
    return x_RC


def _eigenvectors(curvature: Tensor) -> Tensor:
    """Largest first."""
    import torch

    # The first gradients of a large table are tiny and of low rank: in float32 the decomposition may give NaN.
    exact = curvature.double() / curvature.abs().max().double().clamp_min(1e-300)
    return torch.linalg.eigh(exact).eigenvectors.flip(1).contiguous().to(curvature.dtype)


def _renew(state: dict[str, Any], side: int) -> None:
    """One step of orthogonal iteration from the basis at hand; `v` follows the new order of its directions."""
    import torch

    curvature, basis = state[f"curvature{side}"], state[f"basis{side}"]
    seen = curvature @ basis
    order = (basis * seen).sum(0).argsort(descending=True, stable=True)
    state["v"].copy_(state["v"].index_select(side, order))
    seen = seen[:, order]
    exact = seen.double() / seen.abs().max().double().clamp_min(1e-300)
    state[f"basis{side}"] = torch.linalg.qr(exact).Q.contiguous().to(basis.dtype)
