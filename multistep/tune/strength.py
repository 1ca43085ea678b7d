"""The strength of L2 where the control rows are too few to choose it: a fifth of train chooses, and train is solved whole at that strength.

Ten rows would choose by chance, and their own loss would then look better than it is. Shapes: N rows, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from multistep.metrics.power import FEWEST_ROWS
from multistep.models.head import solve_head
from multistep.models.linear import fit_linear
from multistep.strategy import FitHead, FitLinear
from multistep.tasks import Task

HELD = 5  # one row of so many


def too_few(control: Sequence[str], train: int) -> bool:
    """Whether the control rows choose worse than a fifth of train would."""
    return len(control) < FEWEST_ROWS and train // HELD > len(control)


def of_linear(
    action: FitLinear, texts: list[str], targets: np.ndarray, task: Task, seed: int
) -> tuple[float, ...]:  # fmt: skip
    """One strength, for `l2s`."""
    held, kept = _divide(len(texts), seed)
    _, facts = fit_linear(
        [texts[i] for i in kept.tolist()], targets[kept], task.kind, task.n_outputs, features=action.features, l2s=action.l2s,
        solver=action.solver, valid=([texts[i] for i in held.tolist()], targets[held]),
    )  # fmt: skip
    return (facts["strength"] / len(texts),)


def of_head(action: FitHead, features_ND: np.ndarray, targets: np.ndarray, task: Task, seed: int) -> tuple[float, ...]:
    """One strength, for `l2s`."""
    held, kept = _divide(len(features_ND), seed)
    _, _, facts = solve_head(
        features_ND[kept], targets[kept], task.kind, task.n_outputs, features_ND[held], targets[held], l2s=action.l2s,
        solver=action.solver,
    )  # fmt: skip
    steps = sorted((step["l2"] for step in facts["path"]), reverse=True)
    return (sorted(action.l2s, reverse=True)[steps.index(facts["l2"])],)


def _divide(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // HELD]), np.sort(order[n // HELD :])
