"""Newton-CG: Newton's method whose step solves H d = -g by preconditioned conjugate gradients, only as well as it pays.

    stop CG when |H d + g| <= forcing |g|,  forcing = 0.9 (|g| / |g before|)^2 in [1e-4, 0.5]   loose far away, tight near
    w <- w + t d,  t halved until the value falls by at least 1e-4 t g.d              Armijo

Sources: Dembo, Eisenstat, Steihaug 1982 (inexact Newton); Eisenstat & Walker 1996 (choice 2 of the forcing term);
Nocedal & Wright 2006, algorithm 7.1.
Differs from the sources: Hessian products are float32 while value and gradient are float64. The preconditioner is the
Hessian's diagonal; `models.head` first turns dense features to their principal axes, where the Hessian is nearly diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from multistep.types import Spec

if TYPE_CHECKING:
    from torch import Tensor

    from multistep.objectives.convex import ConvexProblem, Point


class Solution(NamedTuple):
    """Where a solver stopped. `relative_gradient` = |gradient| / |gradient at zero weights|."""

    weights: Tensor
    value: float
    relative_gradient: float
    iterations: int
    hvps: int
    converged: bool


class NewtonCG(Spec):
    """Second order: some tens of products with the features, whatever the scale of the problem."""

    kind: Literal["newton_cg"] = "newton_cg"
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    max_iterations: Annotated[int, Field(ge=1)] = 100
    max_cg: Annotated[int, Field(ge=1)] = 200

    def minimize(
        self, problem: ConvexProblem, start: Tensor | None = None, deadline: Callable[[], bool] | None = None
    ) -> Solution:
        """From `start` (zeros when None) until |g| <= tolerance |g(0)|. Past `deadline` the best so far is returned."""
        point = problem.at(problem.zeros())
        unit = float(point.gradient.norm()) or 1.0
        if start is not None:
            point = problem.at(start)
        hvps, iterations, forcing, norm = 0, 0, 0.5, float(point.gradient.norm())
        while norm > self.tolerance * unit and iterations < self.max_iterations:
            if deadline is not None and deadline():
                break
            goal = 0.5 * self.tolerance * unit / norm  # more exact than this is wasted on the last step
            step, products = conjugate_gradients(problem, point, max(forcing, goal), self.max_cg, deadline)
            moved = backtrack(problem, point, step)
            hvps, iterations = hvps + products, iterations + 1
            if moved is None:
                break  # no descent left in float64
            point, before = moved, norm
            norm = float(point.gradient.norm())
            forcing = next_forcing(forcing, norm / before)
        relative = norm / unit
        return Solution(point.w, point.value, relative, iterations, hvps, relative <= self.tolerance)


def next_forcing(forcing: float, ratio: float) -> float:
    """Eisenstat-Walker choice 2 (gamma 0.9, exponent 2) with its safeguard against tightening too early."""
    wanted = 0.9 * ratio**2
    if 0.9 * forcing**2 > 0.1:
        wanted = max(wanted, 0.9 * forcing**2)
    return min(max(wanted, 1e-4), 0.5)


def conjugate_gradients(
    problem: ConvexProblem, point: Point, forcing: float, max_products: int, deadline: Callable[[], bool] | None = None
) -> tuple[Tensor, int]:
    """An approximate solution d of H d = -g and the number of Hessian products it took. Always a descent direction."""
    inverse = 1.0 / problem.hessian_diagonal(point)
    residual = -point.gradient.float()
    goal = forcing * float(residual.norm())
    step = residual * 0
    aimed = inverse * residual
    direction = aimed.clone()
    rz = float((residual * aimed).sum())
    for product in range(1, max_products + 1):
        curved = problem.hvp(point, direction)
        curvature = float((direction * curved).sum())
        if curvature <= 0:  # only by rounding: the problem is convex
            return (step if product > 1 else direction), product
        length = rz / curvature
        step.add_(direction, alpha=length)
        residual.sub_(curved, alpha=length)
        if float(residual.norm()) <= goal or (deadline is not None and deadline()):
            return step, product
        aimed = inverse * residual
        rz, before = float((residual * aimed).sum()), rz
        direction.mul_(rz / before).add_(aimed)
    return step, max_products


def backtrack(problem: ConvexProblem, point: Point, step: Tensor) -> Point | None:
    """The first of w + d, w + d/2, ... that falls enough; None when none of 30 does."""
    step = step.double()
    slope = float((step * point.gradient).sum())
    along_NK = problem.logits(step)
    noise = 1e-14 * abs(point.value)  # near the optimum true decreases drown in rounding
    length = 1.0
    for _ in range(30):
        w = point.w + length * step
        logits_NK = point.logits_NK + length * along_NK
        if problem.value(w, logits_NK) <= point.value + 1e-4 * length * slope + noise:
            return problem.at(w, logits_NK)
        length *= 0.5
    return None
