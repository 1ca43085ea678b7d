"""Optimizers: how parameters are updated. Gradient methods `build` a torch optimizer; convex solvers `minimize` a convex problem.

To add one: copy the nearest file, add it to its list and union, a line to PAPERS.md, run the laws. A rule that torch lacks is a
function in its member's file; `rule.py` makes a torch optimizer of it."""

from typing import Annotated

from pydantic import Field

from multistep.optimizers.adafactor import Adafactor
from multistep.optimizers.adagrad import Adagrad
from multistep.optimizers.adam import Adam
from multistep.optimizers.adamw import AdamW
from multistep.optimizers.ademamix import AdEMAMix
from multistep.optimizers.base import REGIMES, GradientOptimizer, Rate, Regime, StepProblem
from multistep.optimizers.lbfgs import LBFGS
from multistep.optimizers.lion import Lion
from multistep.optimizers.muon import Muon
from multistep.optimizers.nadam import NAdam
from multistep.optimizers.newton_cg import NewtonCG
from multistep.optimizers.path import ConvexSolver
from multistep.optimizers.prodigy import Prodigy
from multistep.optimizers.radam import RAdam
from multistep.optimizers.rmsprop import RMSprop
from multistep.optimizers.schedule_free import ScheduleFree
from multistep.optimizers.second_order import DampedNewton, ModuleLBFGS, ModuleNewtonCG
from multistep.optimizers.sgd import SGD, GradientDescent, Momentum, Nesterov
from multistep.optimizers.soap import SOAP

GRADIENT_OPTIMIZERS = (
    GradientDescent, SGD, Momentum, Nesterov, Adagrad, RMSprop, Adam, AdamW, NAdam, RAdam,
    Adafactor, Lion, Muon, SOAP, ScheduleFree, AdEMAMix, Prodigy,
)  # fmt: skip
SECOND_ORDER = (ModuleNewtonCG, DampedNewton, ModuleLBFGS)  # they step on a closure: several looks at one batch
Optimizer = Annotated[
    GradientDescent | SGD | Momentum | Nesterov | Adagrad | RMSprop | Adam | AdamW | NAdam | RAdam
    | Adafactor | Lion | Muon | SOAP | ScheduleFree | AdEMAMix | Prodigy | ModuleNewtonCG | DampedNewton | ModuleLBFGS,
    Field(discriminator="kind"),
]  # fmt: skip
CONVEX_SOLVERS = (NewtonCG, LBFGS)

__all__ = [
    "CONVEX_SOLVERS", "GRADIENT_OPTIMIZERS", "LBFGS", "REGIMES", "SECOND_ORDER", "SGD", "SOAP", "AdEMAMix", "Adafactor",
    "Adagrad", "Adam", "AdamW", "ConvexSolver", "DampedNewton", "GradientDescent", "GradientOptimizer", "Lion",
    "ModuleLBFGS", "ModuleNewtonCG", "Momentum", "Muon", "NAdam", "Nesterov", "NewtonCG", "Optimizer", "Prodigy",
    "RAdam", "RMSprop", "Rate", "Regime", "ScheduleFree", "StepProblem",
]  # fmt: skip
