"""Which optimizer `auto` is: stated rules, in their order; the first that holds decides, and its words go into the journal.

    given         a learning rate or other settings without a kind: they are AdamW's
    convex        one linear layer under a convex, smooth loss, all rows in one batch           -> newton_cg
    small         a regression with few parameters and few rows: all of train in one batch      -> newton_cg
    memory        what AdamW needs beside the activations is more than the machine has          -> adafactor
    fine_tune     pretrained weights, and adapters beside them                                  -> adamw
    scratch       random weights, half a million or more in hidden matrices and these most of all  -> muon
    else                                                                                        -> adamw

Never schedule_free: a run here knows where it ends, and a schedule that decays to zero is better then. The rules read exact counts
and no measured speed, so that a run under a budget in updates or tokens chooses the same every time on one machine.
Evidence: convex, LOG.md of 2026-11-23, "the convex head" (2.2 and 6.7 times sooner than scikit-learn's solvers); small, LOG.md of
2026-11-24, "small problems in full batches" (lbfgs, and any solver on classes, lost there); memory, the optimizers' measured
`bytes_a_parameter`; fine_tune, the calibrated rates are AdamW's, and Qu et al. 2026 (arXiv 2605.10468) find another rule than that of
pretraining harmful; scratch, docs/which-optimizer.md (one GPT of 0.8 million parameters: a narrow base, so smaller networks are left out).
"""

from __future__ import annotations

from multistep.config import KINDS, OptimizerConfig
from multistep.objectives import BinaryCrossEntropy, CrossEntropy, Distill, Huber, MeanSquaredError, Penalized
from multistep.objectives.base import BaseObjective
from multistep.optimizers.base import Regime
from multistep.types import Spec

HIDDEN_SHARE, LEAST_HIDDEN = 0.5, 500_000  # of weights that are hidden matrices: the smallest that was measured
CONVEX_ELEMENTS = 2e7  # inputs of all rows, as one batch
SMALL_PARAMETERS, SMALL_ELEMENTS = 5_000, 1e6  # the same for a network
LEAST_UPDATES = 10  # of the whole of train: with fewer, small batches get further
BESIDE_BYTES = (
    28.0  # a parameter: weights and gradients, two averages (16); the last good snapshot of weights and averages (12)
)
MEMORY_SHARE = 0.7  # the rest is for activations and data


class Facts(Spec):
    """What the rules read."""

    regime: Regime
    parameters: int  # that are trained
    hidden: int = 0  # of them in hidden matrices
    linear: bool = False  # one linear layer and nothing else
    convex: bool = False  # the loss, in the outputs; and smooth
    regression: bool = False  # squared or Huber's loss
    smooth: bool = False  # no dropout and no statistics of the batch: the loss is a function of the parameters
    gradual: bool = False  # layer_decay, clip_z or batch_growth was asked for: a solved step has no use for them
    whole: bool = False  # all rows of train can be one batch (no DataLoader says otherwise)
    rows: int = 0
    width: int = 0  # the largest number of inputs of a layer
    updates: float | None = None  # on all rows at once, that the budget buys; None: known only when it was measured
    memory_bytes: float = float("inf")

    @property
    def elements(self) -> int:
        return self.rows * self.width


def choose(given: OptimizerConfig, facts: Facts) -> tuple[OptimizerConfig, str]:
    """The optimizer's settings, and the rule that chose it, with the numbers it read."""
    if given.kind != "auto":
        return given, f"{given.kind} was given"
    settings = sorted(k for k, v in given.model_dump(exclude={"kind"}).items() if v is not None)
    if settings:
        return _as(given, "adamw"), f"auto: adamw, whose {' and '.join(settings)} {_was(settings)} given"
    kind, why = _rule(facts)
    return _as(given, kind), f"auto: {kind}, {why}"


def _rule(f: Facts) -> tuple[str, str]:
    solvable = f.whole and f.smooth and not f.gradual and (f.updates is None or f.updates >= LEAST_UPDATES)
    if f.linear and f.convex and solvable and f.elements <= CONVEX_ELEMENTS:
        return "newton_cg", f"for one linear layer is a convex problem, and its {f.elements:,} inputs fit in one batch"
    small = f.parameters <= SMALL_PARAMETERS and f.elements <= SMALL_ELEMENTS
    if f.regime == "scratch" and f.regression and solvable and small:
        return "newton_cg", f"for {f.parameters:,} parameters and {f.rows:,} rows in one batch are a small regression"
    needed = f.parameters * (BESIDE_BYTES + 2 * KINDS["adamw"].bytes_a_parameter)
    if needed > MEMORY_SHARE * f.memory_bytes:
        share = f"{MEMORY_SHARE:.0%} of {_size(f.memory_bytes)}"
        return "adafactor", f"for adamw would need {_size(needed)} for {f.parameters:,} parameters (> {share})"
    if f.regime != "scratch":
        return "adamw", f"whose rates are calibrated for {f.regime.replace('_', '-')}"
    if f.hidden >= max(HIDDEN_SHARE * f.parameters, LEAST_HIDDEN):
        share = f"{f.hidden / max(1, f.parameters):.0%} of {f.parameters:,} parameters"
        return "muon", f"for from random weights it gets further with hidden matrices, which are {share}"
    return "adamw", "the calibrated default for any network"


def is_regression(objective: BaseObjective) -> bool:
    """Whether numbers are learned, by a smooth loss."""
    return isinstance(objective, MeanSquaredError | Huber)


def is_convex(objective: BaseObjective) -> bool:
    """Whether the loss is convex and smooth in the outputs."""
    match objective:
        case CrossEntropy():
            return not objective.focal_gamma
        case Penalized():
            return not objective.l1 and is_convex(objective.inner)
        case _:
            return isinstance(objective, BinaryCrossEntropy | MeanSquaredError | Huber | Distill)


def _as(given: OptimizerConfig, kind: str) -> OptimizerConfig:
    return OptimizerConfig.model_validate({**given.model_dump(), "kind": kind})


def _was(names: list[str]) -> str:
    return "was" if len(names) == 1 else "were"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
