"""What a trial can run: the strategies (how to train) and the other actions of a run. Frozen data; no torch.

A strategy's fields marked live may change inside a run without losing optimizer state; any other change starts a new segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from multistep.objectives import CrossEntropy, Objective
from multistep.optimizers import AdamW, ConvexSolver, NewtonCG, Optimizer
from multistep.predictors import Predictor
from multistep.schedules import Linear, Schedule
from multistep.text import NgramFeatures
from multistep.types import Spec, Tunable

if TYPE_CHECKING:
    from torch import nn

    from multistep.models.encoder import Encoder

_LIVE = ("optimizer.lr", "optimizer.weight_decay", "dropout", "clip", "objective.label_smoothing", "schedule")


class FitLinear(Spec):
    """A linear model on n-gram counts, along a warm-started path of L2 strengths, chosen on the control split."""

    kind: Literal["fit_linear"] = "fit_linear"
    features: NgramFeatures
    solver: ConvexSolver = NewtonCG(tolerance=3e-3)  # validation loss has long settled by then
    l2s: tuple[float, ...] | None = None  # None: the path of `models.linear.relative_path`
    max_rows: int | None = None  # train on a subsample of this size


class FitHead(Spec):
    """A linear head on the frozen encoder's features, along a path of L2 strengths, chosen on the control split."""

    kind: Literal["fit_head"] = "fit_head"
    solver: ConvexSolver = NewtonCG(tolerance=1e-3)
    l2s: tuple[float, ...] = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
    max_length: int = 256
    max_rows: int | None = None
    bf16: bool = False
    cut: int = 0  # keep the hidden states after this layer, for fine-tuning the layers above it


class Training(Spec):
    """What every training by gradients is told: what to minimise, how to update, how much at once."""

    optimizer: Optimizer = AdamW()
    head_lr: Annotated[float, Field(gt=0)] = 1.0  # the head's learning rate, as a multiple of the optimizer's
    objective: Objective = CrossEntropy()
    schedule: Schedule = Linear()
    batch_size: Annotated[int, Field(ge=1)] = 32  # examples
    micro_batch: Annotated[int, Field(ge=0)] = 0  # examples at once; 0: the whole batch
    clip: Annotated[float, Field(ge=0), Tunable(0.1, 10.0, log=True, live=True)] = 1.0  # gradient norm; 0: off
    dropout: Annotated[float, Field(ge=0, lt=1), Tunable(0.0, 0.5, live=True)] | None = None  # None: the model's own
    bf16: bool = False

    def trained(self, model: Any) -> list[tuple[str, nn.Parameter]]:
        """The parameters that this strategy trains, by name; every other one stays frozen."""
        return [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def same_but_live(self, other: Training) -> bool:
        """Whether going from `other` to this strategy keeps the optimizer's state."""
        return type(self) is type(other) and _without_live(self) == _without_live(other)


class FineTune(Training):
    """Gradient training of the encoder's last layers and head."""

    kind: Literal["fine_tune"] = "fine_tune"
    trains: Literal["top", "all"] = "top"  # "top": the last `layers` layers and the head; "all": embeddings too
    layers: Annotated[int, Field(ge=0)] = 3
    dropout: Annotated[float, Field(ge=0, lt=1), Tunable(0.0, 0.5, live=True)] | None = 0.0
    max_length: int = 256

    def trained(self, model: Encoder) -> list[tuple[str, nn.Parameter]]:
        """The parameters that this strategy trains, by name; every other one stays frozen."""
        head = [(f"head.{n}", p) for n, p in model.head.named_parameters()]
        if self.trains == "all" or not model.n_layers:
            body = [(f"backbone.{n}", p) for n, p in model.backbone.named_parameters() if not n.startswith("pooler.")]
            return body + head
        last = list(model.layers())[max(0, model.n_layers - self.layers) :]
        wanted = {id(p) for layer in last for p in layer.parameters()}
        return [(n, p) for n, p in model.named_parameters() if id(p) in wanted] + head


def _without_live(strategy: Training) -> dict[str, object]:
    data = strategy.model_dump()
    for path in _LIVE:
        owner, _, key = path.rpartition(".")
        (data[owner] if owner else data).pop(key, None)
    return data


class TrainModule(Training):
    """Gradient training of any module: every parameter of it that requires a gradient."""

    kind: Literal["train_module"] = "train_module"


class AsGiven(Spec):
    """Judge a module as it was given, before anything is trained."""

    kind: Literal["as_given"] = "as_given"


class Profile(Spec):
    """Measure lengths and throughput on this machine."""

    kind: Literal["profile"] = "profile"


class Average(Spec):
    """Compare the raw weights at the end of training with their averages."""

    kind: Literal["average"] = "average"
    which: Literal["ema", "tail"]


class Predict(Spec):
    """Fit one thing about prediction on the calibration split, around the predictor `base`."""

    kind: Literal["predict"] = "predict"
    what: Literal["calibrate", "thresholds", "blend"]
    base: Predictor


class ReadTest(Spec):
    """Evaluate the incumbent on the test split: once, at the end."""

    kind: Literal["read_test"] = "read_test"


Action = Annotated[
    FitLinear | FitHead | FineTune | TrainModule | AsGiven | Profile | Average | Predict | ReadTest,
    Field(discriminator="kind"),
]


class Trial(Spec):
    """One action, run from a fork of the state `start` for `share` of the budget (in its unit)."""

    id: str
    stage: str
    action: Action
    start: str | None = None  # None: from the pretrained model or from nothing
    share: float = 0.0  # 0: whatever it takes (its cost does not depend on the share)
    why: str = ""
    against: str | None = None  # the state to compare with; None: the best of the same family
    commit: bool = True  # False: a probe, whose end is compared but never becomes the incumbent
    watch_gap: bool = False  # stop in the middle when validation loss rises while train loss falls
