"""A linear head on fixed dense features (a frozen encoder's), solved to its optimum over a path of l2 strengths.

The features are standardised and turned to their principal axes first. Turning changes neither the penalty nor the
optimum, but there the Hessian is nearly diagonal, so that Newton-CG's diagonal preconditioner does most of the work
(banking77 with MiniLM features: a third of the Hessian products). Both are folded back into the weights.
Shapes: N rows, D features, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from multistep.objectives.convex import ConvexProblem, Dense, Loss
from multistep.optimizers.newton_cg import NewtonCG
from multistep.optimizers.path import ConvexSolver, solve_path
from multistep.types import TaskKind

HEAD_L2S = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)


class Question(NamedTuple):
    """A task as a convex problem: two classes are one sigmoid; a regression's targets are standardised."""

    loss: Loss
    targets: np.ndarray
    columns: int
    l2_share: float  # softmax over two classes with weights (-w/2, w/2) is penalized half as much as one sigmoid with w
    mean: float
    scale: float


def pose(task_kind: TaskKind, n_outputs: int, targets: np.ndarray) -> Question:
    """The smallest convex problem with the same solution."""
    if task_kind == "regress":
        mean, scale = float(np.mean(targets)), float(np.std(targets)) or 1.0
        return Question("squared", (np.asarray(targets, np.float64) - mean) / scale, 1, 1.0, mean, scale)
    if task_kind == "classify" and n_outputs == 2:
        return Question("sigmoid", np.asarray(targets) == 1, 1, 0.5, 0.0, 1.0)
    loss: Loss = "sigmoid" if task_kind == "multilabel" else "softmax"
    return Question(loss, np.asarray(targets), n_outputs, 1.0, 0.0, 1.0)


def unpose(question: Question, task_kind: TaskKind, w_DK: np.ndarray, b_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias for the task's own outputs: two columns for two classes, label units for a regression."""
    if task_kind == "regress":
        return w_DK * question.scale, b_K * question.scale + question.mean
    if task_kind == "classify" and question.loss == "sigmoid":
        return np.concatenate([-w_DK, w_DK], 1) / 2, np.concatenate([-b_K, b_K]) / 2
    return w_DK, b_K


def mean_loss(task_kind: TaskKind, logits_NK: np.ndarray, targets: np.ndarray) -> float:
    """Nats an example (label units squared for a regression): what the path of strengths is chosen by."""
    z = torch.as_tensor(logits_NK).double()
    y = torch.as_tensor(np.asarray(targets))
    if task_kind == "classify":
        return float(torch.nn.functional.cross_entropy(z, y.long()))
    if task_kind == "multilabel":
        return float(torch.nn.functional.binary_cross_entropy_with_logits(z, y.double()))
    return float(((z[:, 0] - y.double()) ** 2).mean())


class Axes(NamedTuple):
    """x -> (x - mean) / scale @ turn: standardised features on their principal axes."""

    mean_D: Tensor
    scale_D: Tensor
    turn_DD: Tensor

    def apply(self, x_ND: Tensor) -> Tensor:
        return ((x_ND - self.mean_D) / self.scale_D) @ self.turn_DD

    def fold(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and bias for features as they came, from a solution (bias last) on the axes."""
        w_DK = (self.turn_DD.double() @ w[:-1]) / self.scale_D.double()[:, None]
        return w_DK, w[-1] - self.mean_D.double() @ w_DK


def principal_axes(x_ND: Tensor, standardise: bool = True) -> Axes:
    """The axes of these features. Constant features are left at zero. Without `standardise`, centred and turned only."""
    mean = x_ND.mean(0)
    scale = x_ND.std(0, correction=0)
    if standardise:
        # Rounding gives a constant feature a tiny spread; dividing by it would blow noise up.
        scale = torch.where(scale > 1e-6 * (mean.abs() + scale.max()), scale, torch.ones_like(scale))
    else:
        scale = torch.ones_like(scale)
    x = (x_ND - mean) / scale
    turn = torch.linalg.eigh((x.T @ x).double())[1]
    return Axes(mean, scale, turn.to(x_ND.dtype))


def solve_head(
    features_ND: np.ndarray,
    targets: np.ndarray,
    task_kind: TaskKind,
    n_outputs: int,
    valid_features: np.ndarray,
    valid_targets: np.ndarray,
    l2s: Sequence[float] = HEAD_L2S,
    solver: ConvexSolver | None = None,
    deadline: Callable[[], bool] | None = None,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(weights_DK, bias_K, facts), float32, for the features as given: logits = features @ weights + bias.

    The strength is chosen by validation log-loss (mean squared error for a regression). `l2s` are per standardised feature.
    Returns the best so far once `deadline()` is true.
    """
    x = torch.as_tensor(features_ND, dtype=torch.float32, device=device)
    valid_ND = np.asarray(valid_features, np.float64)
    axes = principal_axes(x)
    question = pose(task_kind, n_outputs, targets)
    problem = ConvexProblem(Dense(axes.apply(x)), question.targets, question.loss, question.columns, l2=1.0)

    def folded(w: Tensor) -> tuple[np.ndarray, np.ndarray]:
        w_DK, b_K = axes.fold(w)
        return unpose(question, task_kind, w_DK.cpu().numpy(), b_K.cpu().numpy())

    def score(w: Tensor) -> float:
        weights, bias = folded(w)
        return mean_loss(task_kind, valid_ND @ weights + bias, valid_targets)

    steps = [l2 * question.l2_share for l2 in l2s]
    best, facts = solve_path(problem, steps, solver or NewtonCG(tolerance=1e-3), score, deadline)
    weights, bias = folded(best)
    return weights.astype(np.float32), bias.astype(np.float32), facts
