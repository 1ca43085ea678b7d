"""Damped Newton steps on a batch, for any module: by conjugate gradients, or with the curvature as a matrix.

    f(w) = loss + wd/2 |w|^2;   m(s) = g.s + s.B s / 2;   rho = (f(w + s) - f(w)) / m(s)          B without the damping

    line search    (B + damping I) d = -g;  s = t d, t from lr down until f falls by at least 1e-4 of t g.d (Armijo);
                   damping * 4 where rho < 0, * 2 where rho < 1/4 or curvature was negative, / 2 where rho > 3/4, / 4 where > 0.9
    trust region   CG stops at |d| = radius;  s = lr d is taken where rho > 1e-4;  radius to |d|/4 where rho < 1/4,
                   * 2 where rho > 3/4 and the step ended there

CG stops at |residual| <= forcing |g| (Eisenstat and Walker, as in newton_cg.py), or where it meets negative curvature: then
what it has so far is the direction, or the way to the boundary. It begins from a share of the last step (line search).
Preconditioner: (running mean of guesses of the Gauss-Newton matrix's diagonal + damping + wd)^0.75.
Sources: Martens 2010, sections 4.1-4.7; Steihaug 1983; Chapelle and Erhan 2011 (the diagonal); Nocedal and Wright 2006,
algorithms 4.1, 7.1, 7.2 and section 3.5 (interpolation).
Differs from the sources: rho on one batch says nothing about the next, so on a new batch damping is not below its first value, nor
the radius above; the preconditioner is a mean over steps, Martens' sums squared gradients of examples; the last step is scaled
down further where the model says so; the radius is in the plain norm, not the preconditioner's.
Gradient and values come from the whole objective, wrappers included; B from the plain loss of the outputs, and from the penalties
that have a constant curvature (`ridge`: the l2 of `penalized`, not its l1).
Shapes: D parameters in all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from multistep.optimizers.newton_cg import next_forcing
from multistep.optimizers.products import Curvature, Flat, Products

if TYPE_CHECKING:
    from multistep.optimizers.base import StepProblem
    from multistep.optimizers.second_order import DampedNewton, ModuleNewtonCG

_DAMPING = (1e-10, 1e10)
_KEEP = 0.9  # of the preconditioner's mean at every step
_TRIES = 20  # of a line search
SAME_BATCH = 1e-5  # relative difference of two values on one batch: rows in another order add up to another rounding
_DRAWS = 4  # for the preconditioner, at every step
_POWER = 0.75


class Here(NamedTuple):
    """The objective at the parameters before the step. `product` is B without damping, with weight decay and penalties."""

    w_D: Tensor
    value: float
    noise: float  # differences of values below this are rounding
    gradient_D: Tensor
    norm: float
    product: Callable[[Tensor], Tensor]
    raw: Products
    ridge_D: Tensor | None  # the constant part of B's diagonal: weight decay and penalties; None when there is none


class Direction(NamedTuple):
    """A direction, its curvature d.Bd, and how it was found."""

    d_D: Tensor
    curvature: float
    iterations: int
    negative: bool = False  # negative curvature was met
    boundary: bool = False  # it ends at the trust region's radius


class NewtonOptimizer(torch.optim.Optimizer, ABC):
    """What both have: evaluation, line search, damping. State of the whole lies with the first parameter."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, curvature: Curvature, damping: float) -> None:
        super().__init__(groups, {"lr": lr})
        self.flat = Flat([p for group in self.param_groups for p in group["params"]])
        self._curvature: Curvature = curvature
        self._first_damping = damping
        self._plain = False  # fused kernels turned out to lack a second derivative; found anew after a resume

    @abstractmethod
    def move(self, here: Here, lr: float) -> dict[str, Any]:
        """Change the parameters, and the state; the facts of the step."""

    @property
    def own(self) -> dict[str, Any]:
        """The state that is not of one parameter."""
        return self.state[self.flat.parameters[0]]

    @property
    def facts(self) -> dict[str, Any]:
        """What the last step did: numbers only. Empty before the first."""
        return self.own.get("facts", {})

    @torch.no_grad()
    def step(self, closure: StepProblem) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the loss before the step, without the L2 term. A loss or gradient that is not finite moves nothing."""
        lr = step_length(self.param_groups)
        loss = _loss(closure)
        decay_D = self._decays()
        w_D, gradient_D = self.flat.values(), self.flat.gradient()
        if decay_D is not None:
            gradient_D += decay_D * w_D
        value = float(loss) + float(decay_penalty(self.param_groups))
        norm = float(gradient_D.norm())
        facts: dict[str, Any] = {"gradient_norm": norm, "length": 0.0, "evaluations": 1}
        if math.isfinite(value) and math.isfinite(norm) and norm > 0 and lr > 0:
            raw, ridge_D = Products(closure, self.flat, self._curvature, self._plain), self._ridge(closure, decay_D)

            def product(v_D: Tensor) -> Tensor:
                return raw(v_D) if ridge_D is None else raw(v_D).addcmul_(ridge_D, v_D)

            noise = 8 * torch.finfo(loss.dtype).eps * abs(value)
            facts |= self.move(Here(w_D, value, noise, gradient_D, norm, product, raw, ridge_D), lr)
            facts["products"] = raw.count
            self._plain = raw.plain
        elif not (math.isfinite(value) and math.isfinite(norm)):
            facts["gradient_norm"] = -1.0  # JSON has no NaN
        self.own["facts"] = facts
        return loss

    def objective(self, problem: StepProblem, w_D: Tensor) -> float:
        """The value at `w_D`, where the parameters are left; infinity where it is not a number."""
        self.flat.set(w_D)
        value = float(_loss(problem)) + float(decay_penalty(self.param_groups))
        return value if math.isfinite(value) else math.inf

    def search(self, here: Here, direction: Direction, lr: float) -> dict[str, Any]:
        """Armijo's rule along the direction; `rho` is that of the first length tried."""
        slope = float(here.gradient_D @ direction.d_D)
        length, rho = lr, 0.0
        for tried in range(1, _TRIES + 1):
            value = self.objective(here.raw.problem, here.w_D + length * direction.d_D)
            if tried == 1:
                rho = _ratio(here, value, length * slope + 0.5 * length**2 * direction.curvature)
            if value <= here.value + 1e-4 * length * slope + here.noise:
                return {"length": length, "rho": rho, "evaluations": tried + 1, "value": value}
            bend = 2 * (value - here.value - length * slope)  # of the parabola through both values and the slope
            best = -slope * length**2 / bend if math.isfinite(bend) else 0.0
            length = min(max(best, 0.1 * length), 0.5 * length)
        self.flat.set(here.w_D)
        return {"length": 0.0, "rho": -1.0, "evaluations": _TRIES + 1, "value": here.value}

    def damping(self) -> float:
        return self.own.get("damping", self._first_damping)

    def adapt(self, damping: float, rho: float, negative: bool) -> None:
        """Levenberg and Marquardt: less damping where the model foretold the fall, more where it did not."""
        if rho < 0.25 or negative:
            damping *= 4 if rho < 0 else 2
        elif rho > 0.75:
            damping /= 4 if rho > 0.9 else 2
        self.own["damping"] = min(max(damping, _DAMPING[0]), _DAMPING[1])

    def _decays(self) -> Tensor | None:
        """Weight decay of every parameter [D]; None when there is none."""
        if not any(group["weight_decay"] for group in self.param_groups):
            return None
        pairs = [(p, group["weight_decay"]) for group in self.param_groups for p in group["params"]]
        return self.flat.join([torch.full_like(p, decay, dtype=self.flat.dtype) for p, decay in pairs])

    def _ridge(self, problem: StepProblem, decay_D: Tensor | None) -> Tensor | None:
        """Weight decay and the curvature of penalties [D]; None when there is neither."""
        sizes = [problem.ridge(p) for p in self.flat.parameters]
        if not any(sizes):
            return decay_D
        pairs = zip(self.flat.parameters, sizes, strict=True)
        ridge_D = self.flat.join([torch.full_like(p, size, dtype=self.flat.dtype) for p, size in pairs])
        return ridge_D if decay_D is None else ridge_D + decay_D


class NewtonCGOptimizer(NewtonOptimizer):
    """State: damping or radius, forcing, last norm and value; for every parameter its last step and the preconditioner's mean."""

    def __init__(self, groups: list[dict[str, Any]], spec: ModuleNewtonCG) -> None:
        super().__init__(groups, spec.lr, spec.curvature, spec.damping)
        self._spec = spec

    def move(self, here: Here, lr: float) -> dict[str, Any]:
        own, trust = self.own, self._spec.globalization == "trust_region"
        own["forcing"] = next_forcing(own["forcing"], here.norm / own["norm"]) if "norm" in own else 0.5
        own["norm"] = here.norm
        new_batch = "value" in own and not math.isclose(own["value"], here.value, rel_tol=SAME_BATCH)
        damping, radius = self.damping(), own.get("radius", self._spec.radius)
        if new_batch:
            damping, radius = max(damping, self._spec.damping), min(radius, self._spec.radius)
        if trust:
            facts = self._in_region(here, lr, radius)
        else:
            facts = self._along_line(here, lr, damping)
        own["value"] = facts["value"]
        return facts

    def _along_line(self, here: Here, lr: float, damping: float) -> dict[str, Any]:
        inverse_D, start_D = self._inverse(here, damping), self._start(here, damping)
        forcing, limit = self.own["forcing"], self._spec.max_cg
        found = conjugate_gradients(here.product, here.gradient_D, damping, inverse_D, start_D, forcing, limit)
        facts = self.search(here, found, lr)
        self.adapt(damping, facts["rho"], found.negative)
        if self._spec.warm_start:
            self._keep("direction", found.d_D)
        return {**facts, "cg_iterations": found.iterations, "negative_curvature": found.negative, "damping": damping}

    def _in_region(self, here: Here, lr: float, radius: float) -> dict[str, Any]:
        """Take the step or leave it, and move the radius."""
        inverse_D, forcing, limit = self._inverse(here, 0.0), self.own["forcing"], self._spec.max_cg
        found = conjugate_gradients(here.product, here.gradient_D, 0.0, inverse_D, None, forcing, limit, radius)
        slope = float(here.gradient_D @ found.d_D)
        value = self.objective(here.raw.problem, here.w_D + lr * found.d_D)
        rho = _ratio(here, value, lr * slope + 0.5 * lr**2 * found.curvature)
        if not (taken := rho > 1e-4):
            self.flat.set(here.w_D)
        if rho < 0.25:
            self.own["radius"] = 0.25 * float(found.d_D.norm())
        else:
            self.own["radius"] = 2 * radius if rho > 0.75 and found.boundary else radius
        facts = {"length": lr if taken else 0.0, "rho": rho, "evaluations": 2, "value": value if taken else here.value}
        return {**facts, "cg_iterations": found.iterations, "negative_curvature": found.negative, "radius": radius}

    def _start(self, here: Here, damping: float) -> Tensor | None:
        """The last step times `warm_start`, or less where the damped model has its minimum before that; None where it rises."""
        if not self._spec.warm_start or "direction" not in self.own:
            return None
        last_D = self._kept("direction")
        slope = float(here.gradient_D @ last_D)
        if slope >= 0:
            return None
        curvature = float(last_D @ here.product(last_D)) + damping * float(last_D @ last_D)
        return None if curvature <= 0 else min(self._spec.warm_start, -slope / curvature) * last_D

    def _inverse(self, here: Here, damping: float) -> Tensor | None:
        """The preconditioner's inverse diagonal [D]."""
        if self._spec.preconditioner == "none":
            return None
        steps = self.own.get("diagonals", 0)
        squares_D = here.raw.diagonal(_DRAWS, steps).mul_(1 - _KEEP)
        if not bool(squares_D.isfinite().all()):
            return None
        if steps:
            squares_D += self._kept("curvature").mul_(_KEEP)
        self.own["diagonals"] = steps + 1
        self._keep("curvature", squares_D)
        diagonal_D = squares_D / (1 - _KEEP ** (steps + 1))
        if here.ridge_D is not None:
            diagonal_D += here.ridge_D
        diagonal_D += max(damping, 1e-3 * float(diagonal_D.mean()), torch.finfo(self.flat.dtype).tiny ** 0.5)
        return diagonal_D.pow_(-_POWER)

    def _keep(self, name: str, v_D: Tensor) -> None:
        for parameter, part in zip(self.flat.parameters, self.flat.split(v_D), strict=True):
            self.state[parameter][name] = part.clone()

    def _kept(self, name: str) -> Tensor:
        return self.flat.join([self.state[p][name] for p in self.flat.parameters])


class DenseNewtonOptimizer(NewtonOptimizer):
    """State: the damping."""

    def __init__(self, groups: list[dict[str, Any]], spec: DampedNewton) -> None:
        super().__init__(groups, spec.lr, spec.curvature, spec.damping)

    def move(self, here: Here, lr: float) -> dict[str, Any]:
        unit_D = torch.zeros_like(here.w_D)
        rows = []
        for i in range(self.flat.size):
            unit_D[i] = 1.0
            rows.append(here.product(unit_D))
            unit_D[i] = 0.0
        matrix_DD = torch.stack(rows).double()
        matrix_DD = 0.5 * (matrix_DD + matrix_DD.T)
        if not bool(matrix_DD.isfinite().all()):  # no curvature here, as of |w|^1.5 at 0: downhill
            return self.search(here, Direction(-here.gradient_D, 0.0, 0), lr)
        damping, factor_DD = self._factor(matrix_DD)
        d_D = -torch.cholesky_solve(here.gradient_D.double()[:, None], factor_DD)[:, 0]
        found = Direction(d_D.to(here.w_D.dtype), float(d_D @ matrix_DD @ d_D), 0)
        facts = self.search(here, found, lr)
        self.adapt(damping, facts["rho"], False)
        return {**facts, "damping": damping}

    def _factor(self, matrix_DD: Tensor) -> tuple[float, Tensor]:
        """The damping that makes the matrix positive definite, from the last one up, and the Cholesky factor."""
        damping, diagonal_D = self.damping(), matrix_DD.diagonal()
        while True:
            damped_DD = matrix_DD.clone()
            damped_DD.diagonal().add_(damping)
            factor_DD, failed = torch.linalg.cholesky_ex(damped_DD)
            if not int(failed):
                return damping, factor_DD
            damping = max(4 * damping, 1e-3 * float(diagonal_D.abs().mean()))


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    gradient_D: Tensor,
    damping: float,
    inverse_D: Tensor | None,
    start_D: Tensor | None,
    forcing: float,
    limit: int,
    radius: float = math.inf,
) -> Direction:
    """An approximate solution d of (B + damping I) d = -g, of length `radius` at most. A descent direction."""

    def result(iterations: int, negative: bool = False, boundary: bool = False) -> Direction:
        bent = float(-(gradient_D + residual_D) @ d_D - damping * (d_D @ d_D))  # d.Bd, from what CG knows
        return Direction(d_D, bent if math.isfinite(bent) else 0.0, iterations, negative, boundary)

    def damped(v_D: Tensor) -> Tensor:
        return product(v_D).add_(v_D, alpha=damping)

    goal = forcing * float(gradient_D.norm())
    if start_D is None:
        d_D, residual_D = torch.zeros_like(gradient_D), -gradient_D
    else:
        d_D, residual_D = start_D, -gradient_D - damped(start_D)
    aimed_D = residual_D if inverse_D is None else inverse_D * residual_D
    way_D = aimed_D.clone()
    fall = float(residual_D @ aimed_D)
    moved = start_D is not None
    for iteration in range(1, limit + 1):
        if float(residual_D.norm()) <= goal:
            return result(iteration - 1)
        curved_D = damped(way_D)
        bend = float(way_D @ curved_D)
        negative = not bend > 0  # or no number
        if negative and math.isinf(radius):
            if moved:
                return result(iteration, negative=True)
            length = 1.0  # nothing so far: downhill, and the line search says how far
        else:
            length = math.inf if negative else fall / bend
        if math.isfinite(radius) and (negative or float((d_D + length * way_D).norm()) >= radius):
            length = _to_boundary(d_D, way_D, radius)
            d_D, residual_D = d_D + length * way_D, residual_D - length * curved_D
            return result(iteration, negative, boundary=True)
        d_D = d_D + length * way_D
        residual_D = residual_D - length * curved_D
        if negative:
            return result(iteration, negative=True)
        moved = True
        aimed_D = residual_D if inverse_D is None else inverse_D * residual_D
        fall, before = float(residual_D @ aimed_D), fall
        way_D = aimed_D + (fall / before) * way_D
    return result(limit)


def _to_boundary(d_D: Tensor, way_D: Tensor, radius: float) -> float:
    """The t >= 0 with |d + t way| = radius."""
    a, b, c = float(way_D @ way_D), float(d_D @ way_D), float(d_D @ d_D) - radius**2
    return (-b + math.sqrt(max(b * b - a * c, 0.0))) / a


def _ratio(here: Here, value: float, foretold: float) -> float:
    """rho. 1 where both differences are rounding; -1 where there is no number, or the model foretold no fall."""
    fall = value - here.value
    if abs(fall) <= here.noise and abs(foretold) <= here.noise:
        return 1.0
    return min(max(fall / foretold, -1e6), 1e6) if math.isfinite(value) and foretold < 0 else -1.0


def _loss(problem: StepProblem) -> Tensor:
    with torch.enable_grad():
        return problem().detach()


def step_length(groups: Sequence[dict[str, Any]]) -> float:
    """What multiplies the step: the first group's rate, without its scale."""
    return groups[0]["lr"] / (groups[0]["lr_scale"] or 1.0)


def decay_penalty(groups: Sequence[dict[str, Any]]) -> Tensor:
    """wd/2 |w|^2 over the groups, a scalar."""
    total = torch.zeros((), dtype=torch.float64, device=groups[0]["params"][0].device)
    for group in groups:
        for parameter in group["params"] if group["weight_decay"] else ():
            total = total + 0.5 * group["weight_decay"] * parameter.detach().double().square().sum()
    return total
