"""Optimizers: how parameters are updated. Gradient methods `build` a torch optimizer; convex solvers `minimize` a convex problem.

To add one: copy the nearest file, add it to its list and union, a line to PAPERS.md, run the laws."""

from multistep.optimizers.adamw import AdamW
from multistep.optimizers.lbfgs import LBFGS
from multistep.optimizers.newton_cg import NewtonCG
from multistep.optimizers.path import ConvexSolver

GRADIENT_OPTIMIZERS = (AdamW,)
CONVEX_SOLVERS = (NewtonCG, LBFGS)

__all__ = ["CONVEX_SOLVERS", "GRADIENT_OPTIMIZERS", "LBFGS", "AdamW", "ConvexSolver", "NewtonCG"]
