"""What every gradient optimizer is: frozen settings, calibrated learning rates, and how to build the thing that updates.

`build` gives a torch optimizer whose groups carry `decays` and `lr_scale`: the loop sets `lr` and `weight_decay` of the groups
while it runs, so both stay live. All that moves must be in `state_dict()`: forks, roll backs and resumes copy that and no more.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import Field

from multistep.types import Spec, Tunable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Regime = Literal[
    "scratch", "fine_tune", "adapter"
]  # random weights; pretrained weights; small new weights beside frozen ones
REGIMES: tuple[Regime, ...] = ("scratch", "fine_tune", "adapter")


class Rate(NamedTuple):
    """A calibrated learning rate, the range worth searching, and where both come from."""

    prior: float
    low: float
    high: float
    source: str


class StepPart(Protocol):
    """A batch, or one of its micro-batches."""

    def outputs(self) -> Tensor:
        """The model's outputs, with their graph."""
        ...

    def loss_of(self, outputs: Tensor) -> Tensor:
        """What such outputs add to the batch's mean loss, with its graph: convex in them for the usual objectives."""
        ...


class StepProblem(Protocol):
    """What an optimizer with `closure` may ask of the batch at hand, as often as it likes."""

    def __call__(self) -> Tensor:
        """The loss (a scalar); the parameters' gradients are made anew."""
        ...

    def parts(self) -> Sequence[StepPart]:
        """The micro-batches, whose losses add up to the whole. To be read once each, in their order."""
        ...

    def ridge(self, parameter: Tensor) -> float:
        """The curvature that the objective has in this parameter beside that of the outputs: so many times the identity."""
        ...


class GradientOptimizer(Spec):
    """Base of the optimizers for any module. Members are `kind`, their settings, and the facts that `list` prints."""

    rates: ClassVar[Mapping[Regime, Rate]]
    good_for: ClassVar[str]  # "Use it for ...": half a sentence
    wrong_for: ClassVar[str]  # "Not for ...": half a sentence
    bytes_a_parameter: ClassVar[float]  # of optimizer state beside a float32 parameter, on a large matrix
    cost: ClassVar[
        float
    ]  # time of a step, AdamW's = 1; with a closure: of a whole update. Measured: benchmarks/optimizers.py
    gradients: ClassVar[float] = (
        1.0  # evaluations of loss and gradient an update; with a closure: measured there, on average
    )
    products: ClassVar[float] = 0.0  # products with the curvature an update, likewise
    closure: ClassVar[bool] = False  # whether step() takes a StepProblem and looks at the loss several times

    lr: Annotated[float, Field(gt=0, le=1000), Tunable(1e-6, 1e1, log=True, live=True)]
    weight_decay: Annotated[float, Field(ge=0, le=10), Tunable(1e-4, 1.0, log=True, live=True)] = 0.0

    @abstractmethod
    def build(self, parameters: Sequence[tuple[str, nn.Parameter]], head_lr: float = 1.0) -> torch.optim.Optimizer:
        """An optimizer over named parameters; the head's learning rate is `lr` times `head_lr`."""

    def settle(self, optimizer: torch.optim.Optimizer, training: bool) -> None:
        """Put the parameters that are to be trained (True) or to be judged and shipped (False) into the model. For most the same."""


def parameter_groups(
    parameters: Sequence[tuple[str, nn.Parameter]],
    weight_decay: float,
    head_lr: float = 1.0,
    split: Callable[[str, nn.Parameter], Mapping[str, Any]] = lambda name, parameter: {},
) -> list[dict[str, Any]]:
    """Every parameter in exactly one group. Matrices decay, vectors and embeddings do not. `split` may add settings by parameter."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in parameters:
        more = dict(split(name, parameter))
        scale = (head_lr if name.startswith("head.") else 1.0) * more.pop("lr_scale", 1.0)
        decayed = decays(name, parameter.ndim)
        key = (decayed, scale, *sorted(more.items()))
        group = groups.setdefault(
            key,
            {
                "params": [],
                "decays": decayed,
                "lr_scale": scale,
                "weight_decay": weight_decay if decayed else 0.0,
                **more,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay applies: matrices only, and not the embedding tables."""
    return ndim >= 2 and "embeddings" not in name
