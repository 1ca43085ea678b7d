"""Every objective with a batch for it, its value from the definition in float64, and a small model, for the laws of the objectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.special import log_expit, log_softmax, logsumexp, softmax
from torch import Tensor, nn

from multistep.objectives import (
    FGM,
    BinaryCrossEntropy,
    CrossEntropy,
    Distill,
    Huber,
    MeanAbsoluteError,
    MeanSquaredError,
    NextToken,
    Penalized,
    RDrop,
    Seq2Seq,
    Span,
)  # fmt: skip

B, K, T, WORDS, WIDTH = 6, 4, 5, 11, 3  # examples, outputs, positions, input words, width
SMOOTHINGS = (0.0, 0.1, 0.3)
WEIGHTS = (0.5, 1.0, 2.0, 4.0)
NUMBERS = (MeanSquaredError, MeanAbsoluteError, Huber)
TOKENS = (NextToken, Seq2Seq)

PLAIN: list[Any] = [
    *(CrossEntropy(label_smoothing=e) for e in SMOOTHINGS),
    CrossEntropy(class_weights=WEIGHTS), CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.2), CrossEntropy(focal_gamma=2),
    CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.1, focal_gamma=0.5),
    *(BinaryCrossEntropy(label_smoothing=e) for e in SMOOTHINGS),
    BinaryCrossEntropy(positive_weights=WEIGHTS, label_smoothing=0.1),
    MeanSquaredError(), MeanAbsoluteError(), Huber(), Huber(delta=0.3),
    NextToken(), NextToken(label_smoothing=0.1, z_loss=0.01), Seq2Seq(), Seq2Seq(label_smoothing=0.3, z_loss=0.1),
    Span(), Distill(), Distill(alpha=0.0), Distill(alpha=0.9, temperature=4.0),
]  # fmt: skip
R_DROPS = [
    RDrop(inner=inner, alpha=alpha)
    for inner in (PLAIN[0], PLAIN[3], BinaryCrossEntropy(), NextToken(label_smoothing=0.1), Seq2Seq(), Distill())
    for alpha in (0.0, 3.0)
]
WRAPPED: list[Any] = [
    *R_DROPS, *(FGM(inner=inner, epsilon=0.3) for inner in (*PLAIN[::3], NextToken())),
    *(Penalized(inner=inner, l1=0.01, l2=0.1) for inner in PLAIN[::4]),
    Penalized(inner=FGM(inner=RDrop(inner=CrossEntropy(class_weights=WEIGHTS))), l1=0.01), RDrop(inner=FGM(inner=NextToken())),
]  # fmt: skip


def case(objective: Any) -> tuple[Tensor, Any]:
    """Outputs (float64) and targets of one batch; of tokens a third is masked, and so is all of row 2."""
    core, g = objective.core(), torch.Generator().manual_seed(4)
    flat = 2 * torch.randn(B, K, generator=g).double()
    classes_B = torch.randint(0, K, (B,), generator=g)
    if isinstance(core, BinaryCrossEntropy):
        return flat, torch.rand(B, K, generator=g) > 0.5
    if isinstance(core, NUMBERS):
        return flat, torch.randn(B, K, generator=g)
    if isinstance(core, Distill):
        return flat, (classes_B, 2 * torch.randn(B, K, generator=g))
    if isinstance(core, CrossEntropy):
        return flat, classes_B
    outputs = 2 * torch.randn(B, T, 2 if isinstance(core, Span) else K, generator=g).double()
    if isinstance(core, Span):
        return outputs, torch.randint(0, T, (B, 2), generator=g)
    ids_BT = torch.randint(0, K, (B, T), generator=g)
    ids_BT[torch.rand(B, T, generator=g) < 0.3] = -100
    ids_BT[2] = -100
    return outputs, ids_BT


def as_numpy(targets: Any) -> Any:
    return tuple(t.numpy() for t in targets) if isinstance(targets, tuple) else targets.numpy()


def by_hand(o: Any, z: np.ndarray, targets: Any) -> float:
    """The loss in float64, from its definition."""
    if isinstance(o, NUMBERS):
        r = np.abs(z - targets)
        if isinstance(o, Huber):
            r = np.where(r < o.delta, r**2 / 2, o.delta * (r - o.delta / 2))
        return float(np.mean(r**2 if isinstance(o, MeanSquaredError) else r))
    if isinstance(o, BinaryCrossEntropy):
        wanted = (1 - o.label_smoothing) * targets + o.label_smoothing / 2
        weights = 1.0 if o.positive_weights is None else np.array(o.positive_weights)
        return float(-(weights * wanted * log_expit(z) + (1 - wanted) * log_expit(-z)).mean())
    if isinstance(o, Span):
        log_p = log_softmax(z, axis=1)
        return float(np.mean([-log_p[b, targets[b, i], i] for b in range(len(z)) for i in (0, 1)]))
    if isinstance(o, Distill):
        classes, teacher = targets
        log_p, log_q = log_softmax(teacher / o.temperature, axis=1), log_softmax(z / o.temperature, axis=1)
        soft = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
        return float((1 - o.alpha) * by_hand(CrossEntropy(), z, classes) + o.alpha * o.temperature**2 * soft)
    e = o.label_smoothing
    if isinstance(o, TOKENS):
        z, ids = z[targets != -100], targets[targets != -100]
        wanted = (1 - e) * np.eye(K)[ids] + e / K
        return float((-(wanted * log_softmax(z, axis=1)).sum(1) + o.z_loss * logsumexp(z, axis=1) ** 2).mean())
    wanted = (1 - e) * np.eye(K)[targets] + e / K
    weights = np.ones(K) if o.class_weights is None else np.array(o.class_weights)
    loss_B = -(weights * wanted * log_softmax(z, axis=1)).sum(1)
    loss_B *= (1 - softmax(z, axis=1)[np.arange(len(z)), targets]) ** o.focal_gamma
    return float(loss_B.sum() / weights[targets].sum())


def slopes(function: Callable[[np.ndarray], float], at: np.ndarray, h: float = 1e-5) -> np.ndarray:
    found = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[index] += h
        down[index] -= h
        found[index] = (function(up) - function(down)) / (2 * h)
    return found


class Tiny(nn.Module):
    """Words -> outputs. Every other pass uses another mask, as dropout would, so that two passes differ and yet repeat."""

    def __init__(self, objective: Any):
        super().__init__()
        self.core = objective.core()
        n_outputs = 2 if isinstance(self.core, Span) else K
        g = torch.Generator().manual_seed(7)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(40 * WORDS, WIDTH)  # larger, but not of the batch
        self.head = nn.Linear(WIDTH, n_outputs)
        self.masks = (torch.tensor([1.5, 0.5, 1.0]), torch.tensor([0.5, 1.0, 1.5]))
        self.passes = 0
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g))

    def forward(self, ids_BT: Tensor) -> Tensor:
        self.passes += 1
        x_BTD = (self.words(ids_BT) + self.places(torch.arange(ids_BT.shape[1]))) * self.masks[self.passes % 2]
        per_position = isinstance(self.core, (*TOKENS, Span))
        return self.head(x_BTD.tanh() if per_position else x_BTD.mean(1).tanh())


def words() -> Tensor:
    return torch.randint(0, WORDS, (B, T), generator=torch.Generator().manual_seed(5))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found
