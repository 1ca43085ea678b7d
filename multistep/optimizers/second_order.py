"""Second-order optimizers for any module: they look at one batch several times, and their steps need no learning rate.

    newton_cg   (B + damping) d = -g by conjugate gradients, B the Gauss-Newton matrix or the Hessian, only products with B
    newton      the same with B as a matrix, for few parameters
    lbfgs       d from the last steps and their changes of gradient

`lr` multiplies the step: 1 is the method's own, the line search may shorten it. Weight decay is part of the objective here
(L2: wd/2 |w|^2 over the groups that decay), not a shrinkage beside it: a line search must see what it minimizes. `lr_scale` of
the groups has no meaning and is not applied: the solution of a linear system does not depend on the units of its parts.
What an optimizer did last is in `facts`. The work is done in newton_module.py and lbfgs_module.py.
Sources: Martens 2010, "Deep learning via Hessian-free optimization"; Nocedal and Wright 2006, chapters 3, 4, 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from multistep.optimizers.base import REGIMES, GradientOptimizer, Rate, parameter_groups
from multistep.types import Tunable, UserError

if TYPE_CHECKING:
    from torch import nn

    from multistep.optimizers.lbfgs_module import LBFGSOptimizer
    from multistep.optimizers.newton_module import DenseNewtonOptimizer, NewtonCGOptimizer

StepLength = Annotated[float, Field(gt=0, le=1000), Tunable(0.05, 2.0, log=True, live=True)]
_UNIT = Rate(1.0, 0.1, 2.0, "the unit step of Newton's method: Nocedal and Wright 2006, section 3.3")
_UNITS = dict.fromkeys(REGIMES, _UNIT)  # a solved step has its own length, whatever the weights start from


class ModuleNewtonCG(GradientOptimizer):
    """Newton's method, damped, with the step found by conjugate gradients: `max_cg` products with the curvature at most."""

    rates: ClassVar = _UNITS
    good_for = (
        "convex heads, small models in full batches, and ill-conditioned problems where first-order methods creep"
    )
    wrong_for = "large models in small batches: a step costs tens of gradients and trusts one batch's curvature"
    bytes_a_parameter = 8.0
    cost = 12.0
    gradients = 2.2
    products = 4.4
    closure = True

    kind: Literal["newton_cg"] = "newton_cg"
    lr: StepLength = 1.0
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    globalization: Literal["line_search", "trust_region"] = "line_search"
    damping: Annotated[float, Field(gt=0, le=1e6)] = 0.1  # line_search: the first; on changing batches also the least
    radius: Annotated[float, Field(gt=0, le=1e6)] = 1.0  # trust_region: the first; on changing batches also the largest
    max_cg: Annotated[int, Field(ge=1)] = 100
    preconditioner: Literal["diagonal", "none"] = "diagonal"
    warm_start: Annotated[float, Field(ge=0, lt=1)] = 0.95  # share of the last step to begin from (line_search)

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> NewtonCGOptimizer:
        from multistep.optimizers.newton_module import NewtonCGOptimizer

        return NewtonCGOptimizer(parameter_groups(parameters, self.weight_decay, head_lr), self)


class DampedNewton(GradientOptimizer):
    """Newton's method with the curvature written out: as many products as there are parameters, then a Cholesky solve."""

    rates: ClassVar = _UNITS
    good_for = "problems of up to a few thousand parameters that should be solved to the last digit in a few updates"
    wrong_for = "anything larger: a step costs one product a parameter, and memory their square"
    bytes_a_parameter = 0.0
    cost = 660.0
    gradients = 2.0
    products = 940.0
    closure = True

    kind: Literal["newton"] = "newton"
    lr: StepLength = 1.0
    curvature: Literal["gauss_newton", "hessian"] = "hessian"
    damping: Annotated[float, Field(gt=0, le=1e6)] = 1e-8  # the first; raised where the matrix is not positive definite
    max_parameters: Annotated[int, Field(ge=1)] = 5000

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> DenseNewtonOptimizer:
        from multistep.optimizers.newton_module import DenseNewtonOptimizer

        size = sum(p.numel() for _, p in parameters)
        if size > self.max_parameters:
            raise UserError(
                f"newton writes out a matrix of {size} x {size} for {size} parameters, and max_parameters is "
                f"{self.max_parameters}. Take 'newton_cg', train fewer parameters, or raise max_parameters."
            )
        return DenseNewtonOptimizer(parameter_groups(parameters, self.weight_decay, head_lr), self)


class ModuleLBFGS(GradientOptimizer):
    """L-BFGS with a strong-Wolfe line search: `max_iterations` iterations on every batch it is given."""

    rates: ClassVar = _UNITS
    good_for = "smooth problems in full batches: no curvature products, and far fewer passes than gradient descent"
    wrong_for = "mini-batches and dropout: what it remembers of one batch does not hold on the next, so it forgets"
    bytes_a_parameter = 88.0
    cost = 21.0
    gradients = 22.4
    products = 0.0
    closure = True

    kind: Literal["lbfgs"] = "lbfgs"
    lr: StepLength = 1.0
    memory: Annotated[int, Field(ge=1, le=1000)] = 10
    max_iterations: Annotated[int, Field(ge=1)] = 20

    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> LBFGSOptimizer:
        from multistep.optimizers.lbfgs_module import LBFGSOptimizer

        return LBFGSOptimizer(parameter_groups(parameters, self.weight_decay, head_lr), self)
