"""L-BFGS on a convex problem: first order with a memory of the last steps' curvature. scipy does the work.

Source: Liu and Nocedal 1989; scipy.optimize L-BFGS-B. Cheaper a step than Newton-CG, many more steps on ill-conditioned
features; the better choice for loose tolerances on sparse features with many outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from multistep.optimizers.newton_cg import Solution
from multistep.types import Spec

if TYPE_CHECKING:
    from torch import Tensor

    from multistep.objectives.convex import ConvexProblem


class _Enough(Exception):
    """Ends scipy's loop from inside."""


class LBFGS(Spec):
    kind: Literal["lbfgs"] = "lbfgs"
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    max_iterations: Annotated[int, Field(ge=1)] = 2000
    memory: Annotated[int, Field(ge=1)] = 10

    def minimize(
        self, problem: ConvexProblem, start: Tensor | None = None, deadline: Callable[[], bool] | None = None
    ) -> Solution:
        """From `start` (zeros when None) until |g| <= tolerance |g(0)|. Past `deadline` the best so far is returned."""
        from scipy import optimize

        zeros = problem.zeros()
        unit = float(problem.at(zeros).gradient.norm()) or 1.0
        first = problem.at(zeros if start is None else start)
        best, best_norm, calls = first, float(first.gradient.norm()), 0

        def value_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal best, best_norm, calls
            point = problem.at(zeros.new_tensor(flat).reshape(zeros.shape))
            calls += 1
            norm = float(point.gradient.norm())
            if point.value <= best.value or norm <= self.tolerance * unit:
                best, best_norm = point, norm
            if best_norm <= self.tolerance * unit or (deadline is not None and deadline()):
                raise _Enough
            return point.value, point.gradient.reshape(-1).cpu().numpy()

        if best_norm > self.tolerance * unit:
            with suppress(_Enough):
                optimize.minimize(
                    value_gradient,
                    first.w.reshape(-1).cpu().numpy(),
                    jac=True,
                    method="L-BFGS-B",
                    options={
                        "maxiter": self.max_iterations,
                        "maxfun": 2 * self.max_iterations,
                        "maxcor": self.memory,
                        "ftol": 0.0,
                        "gtol": 0.0,
                    },
                )
        relative = best_norm / unit
        return Solution(best.w, best.value, relative, calls, 0, relative <= self.tolerance)
