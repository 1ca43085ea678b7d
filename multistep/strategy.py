"""What a trial can run: the strategies (how to train) and the other actions of a run. Frozen data; no torch.

A strategy's fields marked live may change inside a run without losing optimizer state; any other change starts a new segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from multistep.augment import Augment
from multistep.models.adapter import Lora
from multistep.objectives import CrossEntropy, Objective
from multistep.optimizers import AdamW, ConvexSolver, NewtonCG, Optimizer
from multistep.predictors import Predictor
from multistep.predictors.decoding import Decoding
from multistep.predictors.recipe import Recipe
from multistep.predictors.ways import Way
from multistep.schedules import Linear, Schedule
from multistep.text import NgramFeatures
from multistep.types import Spec, Tunable

if TYPE_CHECKING:
    from torch import nn

    from multistep.models.base import TextEncoder

_LIVE = ("optimizer.lr", "optimizer.weight_decay", "dropout", "clip", "clip_z", "objective.label_smoothing", "schedule")
_OF_MOMENTS = (
    "optimizer",
    "head_lr",
    "layer_decay",
    "trains",
    "layers",
    "freeze",
    "shape",
)  # what an optimizer is built from


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


def _rising(shares: tuple[float, ...]) -> tuple[float, ...]:
    if any(a >= b for a, b in pairwise((0.0, *shares, 1.0))):
        raise ValueError("must be shares of the training between 0 and 1, each above the last, such as (0.5, 0.75)")
    return shares


LayerDecay = Annotated[float, Field(gt=0, le=1), Tunable(0.5, 1.0)]
BatchGrowth = Annotated[tuple[float, ...], AfterValidator(_rising)]


class Training(Spec):
    """What every training by gradients is told: what to minimise, how to update, how much at once."""

    optimizer: Optimizer = AdamW()
    head_lr: Annotated[float, Field(gt=0)] = 1.0  # the head's learning rate, as a multiple of the optimizer's
    objective: Objective = CrossEntropy()
    schedule: Schedule = Linear()
    batch_size: Annotated[int, Field(ge=1)] = 32  # examples
    micro_batch: Annotated[int, Field(ge=0)] = 0  # examples at once; 0: the whole batch
    clip: Annotated[float, Field(ge=0), Tunable(0.1, 10.0, log=True, live=True)] = 1.0  # gradient norm; 0: off
    clip_z: Annotated[float, Field(ge=0), Tunable(2.0, 6.0, live=True)] = (
        0.0  # standard deviations of past norms; 0: off
    )
    dropout: Annotated[float, Field(ge=0, lt=1), Tunable(0.0, 0.5, live=True)] | None = None  # None: the model's own
    layer_decay: LayerDecay = 1.0  # of the learning rate, a block further from the outputs; 1: off
    batch_growth: BatchGrowth = ()  # progress at which the batch doubles, each time
    reshuffle: Annotated[int, Field(ge=0)] = 0  # another order of the data: added to its seed
    bf16: bool = False

    def trained(self, model: Any) -> list[tuple[str, nn.Parameter]]:
        """The parameters that this strategy trains, by name; every other one stays frozen."""
        return [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def depths(self, model: Any) -> list[int]:
        """How many blocks lie between each trained parameter and the outputs. A block is what shares a name up to its first number
        ("layers.3"), or without one the module that holds it; blocks stand in the order in which the model names its parameters."""
        blocks = [_block(name) for name, _ in self.trained(model)]
        order = list(dict.fromkeys(blocks))
        return [len(order) - 1 - order.index(block) for block in blocks]

    def batches(self, progress: float) -> int:
        """How many batches of `batch_size` one update takes at this progress."""
        return 2 ** sum(progress >= share for share in self.batch_growth)

    def same_but_live(self, other: Training) -> bool:
        """Whether this strategy can take over from `other` inside of a segment."""
        return type(self) is type(other) and _without_live(self) == _without_live(other)

    def keeps_moments(self, other: Training) -> bool:
        """Whether a segment of this strategy goes on with the optimizer's state that one of `other` left: it trains the same parameters
        with the same optimizer, live fields aside."""
        one, two = _without_live(self), _without_live(other)
        return type(self) is type(other) and all(one.get(k) == two.get(k) for k in _OF_MOMENTS)


class FineTune(Training):
    """Gradient training of the encoder's last layers and head."""

    kind: Literal["fine_tune"] = "fine_tune"
    trains: Literal["top", "all"] = "top"  # "top": the last `layers` layers and the head; "all": embeddings too
    layers: Annotated[int, Field(ge=0)] = 3
    dropout: Annotated[float, Field(ge=0, lt=1), Tunable(0.0, 0.5, live=True)] | None = 0.0
    max_length: int = 256
    augment: Augment = Augment()  # when on, token ids are read in place of cached hidden states

    def trained(self, model: TextEncoder) -> list[tuple[str, nn.Parameter]]:
        """The parameters that this strategy trains, by name; every other one stays frozen."""
        if self.trains == "all" or not model.n_layers:
            return [(n, p) for n, p in model.named_parameters() if not n.startswith("backbone.pooler.")]
        head = [(f"head.{n}", p) for n, p in model.head.named_parameters()]
        last = list(model.layers())[max(0, model.n_layers - self.layers) :]
        wanted = {id(p) for layer in last for p in layer.parameters()}
        return [(n, p) for n, p in model.named_parameters() if id(p) in wanted] + head

    def depths(self, model: TextEncoder) -> list[int]:
        """The head 0, the last layer 1, and so on down to the embeddings. A model that cannot be cut: as any module."""
        layers = list(model.layers())
        if not layers:
            return super().depths(model)
        place = {id(p): n for n, layer in enumerate(layers) for p in layer.parameters()}
        found, depth = {}, len(layers) + 1
        for (
            name,
            parameter,
        ) in model.named_parameters():  # what comes before the layers is below them, what comes after is above
            if id(parameter) in place:
                depth = 0
            found[name] = len(layers) - place[id(parameter)] if id(parameter) in place else depth
            found[name] = 0 if name.startswith("head.") else found[name]
        return [found[name] for name, _ in self.trained(model)]


def _block(name: str) -> str:
    """'layers.3' of 'layers.3.norm.weight', 'embed' of 'embed.weight'."""
    words = name.split(".")
    number = next((n for n, word in enumerate(words) if word.isdigit()), None)
    return ".".join(words[:-1] if number is None else words[: number + 1])


def _without_live(strategy: Training) -> dict[str, Any]:
    data: dict[str, Any] = strategy.model_dump()
    for path in _LIVE:
        owner, _, key = path.rpartition(".")
        (data[owner] if owner else data).pop(key, None)
    inner = data["objective"].get("inner")
    while inner is not None:  # a wrapper's smoothing is that of the objective inside
        inner.pop("label_smoothing", None)
        inner = inner.get("inner")
    return data


class TrainModule(Training):
    """Gradient training of any module: every parameter of it that requires a gradient and is not frozen."""

    kind: Literal["train_module"] = "train_module"
    freeze: tuple[str, ...] = ()  # names of parameters and modules: these and all below them stay as they are

    def trained(self, model: Any) -> list[tuple[str, nn.Parameter]]:
        """The parameters that this strategy trains, by name; every other one stays frozen."""
        still = frozen_ids(model, self.freeze)
        return [(n, p) for n, p in super().trained(model) if id(p) not in still]


def frozen_ids(model: nn.Module, above: Sequence[str]) -> set[int]:
    """The parameters that are one of these or inside of one of these modules; one with several names (tied) by any of them."""
    named = model.named_parameters(remove_duplicate=False)
    return {id(p) for n, p in named if any(n == a or n.startswith(f"{a}.") for a in above)}


class Shape(Spec):
    """The model that a training of texts begins with: pretrained (`name`), or with random weights. `reads`: running text, pairs of a
    source and a target, conversations, or passages with a question."""

    reads: Literal["stream", "pairs", "prompts", "spans"]
    name: str | None = None
    width: int = 0
    layers: int = 0  # of a sequence-to-sequence model: on each side
    dropout: float = 0.0
    vocabulary: int = 0
    context: int = 512  # tokens at most at once
    lora: Lora | None = None  # trains an adapter beside the frozen weights

    @property
    def family(self) -> str:
        """Under what its best state is kept."""
        return "spans" if self.reads == "spans" else "model"


class TrainWriter(Training):
    """Gradient training of a model that writes or that finds answers: all its weights, or its adapter."""

    kind: Literal["train_writer"] = "train_writer"
    shape: Shape

    @property
    def made(self) -> Shape:
        """What the model is made as: dropout that is no module of its own, as in a model of pairs from scratch, is made with it."""
        return self.shape if self.dropout is None else self.shape.with_(dropout=self.dropout)


class FitWriter(Spec):
    """A cheap writer, fitted on train: what a model has to beat."""

    kind: Literal["fit_writer"] = "fit_writer"
    writer: Literal["ngram", "copy", "lead", "nearest", "dictionary", "extract", "passage", "choose"]
    count: int = 0  # of lead: sentences


class Decode(Spec):
    """Another way to write with the weights that stand, judged on the calibration split."""

    kind: Literal["decode"] = "decode"
    decoding: Decoding


class TryWay(Spec):
    """Measure a way to write with a finished model: its latency, then its texts against those of what stands. `engine`: what writes, as
    JSON; empty: our own. `share`: of the judged records; with less than all of them nothing is taken."""

    kind: Literal["try_way"] = "try_way"
    way: Way
    engine: dict[str, Any] = Field(default_factory=dict)
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


class Mix(Spec):
    """The language model that stands and the n-gram model as one: their shares are fitted on the calibration split."""

    kind: Literal["mix"] = "mix"
    ngram: str  # the state


class Recount(Spec):
    """The n-gram model counted again, on the control and calibration splits too, when nothing is left to be decided with them. Whether
    that helps is decided by counting control too and judging on calibration."""

    kind: Literal["recount"] = "recount"


class AsGiven(Spec):
    """Judge a module as it was given, before anything is trained. `shape`: of a pretrained model of texts."""

    kind: Literal["as_given"] = "as_given"
    shape: Shape | None = None


class Profile(Spec):
    """Measure lengths and throughput on this machine."""

    kind: Literal["profile"] = "profile"


class Average(Spec):
    """Compare the raw weights at the end of training with an average: of its own, or of `members` that began where it did. "soup": as far
    as each of them helps; "mean": of all of them, since they are the same training in several orders of the data."""

    kind: Literal["average"] = "average"
    which: Literal["ema", "tail", "soup", "mean"]
    members: tuple[str, ...] = ()  # of the soup or the mean


class Predict(Spec):
    """Fit one thing about prediction on the calibration split, around the predictor `base`."""

    kind: Literal["predict"] = "predict"
    what: Literal["calibrate", "thresholds", "blend"]
    base: Predictor


class Refit(Spec):
    """The linear state `of` solved again as `fit` says, on train and on the rows that judged it, when nothing is left to be decided with
    them. Judged with the control rows in train and the calibration rows out of it: it must not be worse."""

    kind: Literal["refit"] = "refit"
    of: str
    fit: FitLinear


class TryRecipe(Spec):
    """Measure a way to answer with the models of a finished run: fitted on the calibration rows, judged on rows that it was not fitted
    on, timed beside what stands. `engine`: what the encoder runs on, as JSON; empty: as it stands. `share`: of the rows; with less than
    all of them nothing is taken."""

    kind: Literal["try_recipe"] = "try_recipe"
    recipe: Recipe
    engine: dict[str, Any] = Field(default_factory=dict)
    share: Annotated[float, Field(gt=0, le=1)] = 1.0


class Serving(Spec):
    """Measure what stands as a busy server runs it: texts a second by threads and by how many texts are answered together."""

    kind: Literal["serving"] = "serving"


class Promise(Spec):
    """Withhold answers, so that the right one is among the candidates with the probability `coverage`; on rows set aside for it."""

    kind: Literal["promise"] = "promise"
    coverage: Annotated[float, Field(gt=0, lt=1)]


class Diagnose(Spec):
    """Say what is the matter with the run, and what to do next: from what is in the journal, and from what is measured where the clock can
    pay for it. `by`: the convex model that says what rows of train it would call otherwise, and what more rows would bring; "": nothing
    is measured."""

    kind: Literal["diagnose"] = "diagnose"
    by: Literal["", "head", "linear"] = ""


class ReadTest(Spec):
    """Evaluate the incumbent on the test split: once, at the end."""

    kind: Literal["read_test"] = "read_test"


Action = Annotated[
    FitLinear | FitHead | FineTune | TrainModule | TrainWriter | FitWriter | AsGiven | Profile | Average | Predict | Refit | Decode
    | TryWay | Mix | Recount | TryRecipe | Promise | Serving | Diagnose | ReadTest,
    Field(discriminator="kind"),
]  # fmt: skip


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
    patience: Annotated[int, Field(ge=0)] = 0  # looks at validation in a row without a gain that stop it; 0: any number
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1  # the chance of a false gain that its comparisons may have, each
