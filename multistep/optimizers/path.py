"""A path of l2 strengths, strong to weak, each solved from the solution before it; validation loss chooses.

Source: Friedman, Hastie, Tibshirani 2010, "Regularization paths for generalized linear models via coordinate descent"
(warm starts). A strong penalty gives an easy problem whose solution is a good start for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from multistep.optimizers.lbfgs import LBFGS
from multistep.optimizers.newton_cg import NewtonCG

if TYPE_CHECKING:
    from torch import Tensor

    from multistep.objectives.convex import ConvexProblem

ConvexSolver = NewtonCG | LBFGS


def solve_path(
    problem: ConvexProblem,
    l2s: Sequence[float],
    solver: ConvexSolver,
    score: Callable[[Tensor], float],
    deadline: Callable[[], bool] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The weights (bias last) with the lowest `score` on the path, and what was seen on the way.

    `score` reads weights as the problem holds them; lower is better. The path ends when the score has been worse than the
    best twice, or at the `deadline`; at least one strength is always begun.
    """
    best: Tensor | None = None
    best_l2, best_score, worse = 0.0, float("inf"), 0
    start: Tensor | None = None
    steps: list[dict[str, Any]] = []
    for l2 in sorted(l2s, reverse=True):
        if steps and ((deadline is not None and deadline()) or worse >= 2):
            break
        found = solver.minimize(problem.with_l2(l2), start, deadline)
        start = found.weights
        at_score = score(start)
        steps.append(
            {
                "l2": l2,
                "score": at_score,
                "relative_gradient": found.relative_gradient,
                "iterations": found.iterations,
                "hvps": found.hvps,
                "converged": found.converged,
            }
        )
        if best is None or at_score < best_score:
            best, best_l2, best_score = start, l2, at_score
        else:
            worse += 1
    if best is None:
        raise ValueError("solve_path needs at least one l2")
    return best, {"l2": best_l2, "score": best_score, "path": steps}
