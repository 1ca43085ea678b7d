"""The arithmetic of a run: what things cost, and what the budget can buy.

Costs in seconds come from the profile's measured throughput; under budgets in updates or tokens only gradient training costs.
Every number here is a stated rule; where it was calibrated, LOG.md has the runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import TypeAdapter

from multistep.config import OptimizerConfig
from multistep.controllers.learnt import Learnt
from multistep.controllers.script import BasePlan, Problem
from multistep.controllers.space import Point, Space, settled, space_of
from multistep.controllers.wealth import Purse
from multistep.metrics.power import FEWEST_ROWS
from multistep.objectives import BinaryCrossEntropy, CrossEntropy, MeanSquaredError, Objective
from multistep.optimizers import AdamW
from multistep.predictors import Predictor
from multistep.schedules import Schedule
from multistep.strategy import Action, FineTune, FitLinear
from multistep.types import Outcome, Spec

LENGTHS = (32, 64, 128, 256)
FINE_TUNE_LR = 3e-4  # for a width of 384; scaled by (384 / width)^1.5
SOLVED_HEAD_LR = 0.05  # a head that is solved to its optimum moves slowly while the encoder under it moves
LABEL_SMOOTHING = 0.1  # of cross-entropy; the temperature fitted afterwards takes the softness back
LINEAR_CHARACTERS_S = (
    1.5e6  # prior: features and solve, characters of train a second; corrected by what the incumbent took
)
# With fewer epochs for all layers, the last half on cached states is trained for longer; a search shares what there is among its members.
ALL_LAYERS_EPOCHS, SEARCHED_EPOCHS = 2.0, 6.4
# With fewer epochs for the last half, fewer layers are trained for so long. The more layers move, the less each of them may:
HALF_EPOCHS, SHALLOW, DEEP = 1.2, 2.0, 2 / 3  # the rate of fewer than half, and of all of them, times that of half
PACE = 0.8  # of the speed that forward passes promise: padding, the optimizer's step
ENCODE_SHARE = 0.75  # of what is left: encoding train once and judging may take so much, the rest is for fine-tuning
LEAST_READ = 0.5  # of the tokens: texts are not cut so far that the encoder sees less
MOST_EPOCHS = 12.0  # a trunk is not made longer than this: fine-tuning has converged long before


class Scratch(Spec):
    """How a small model with random weights is trained, whole. On small data it overfits soon after `most_epochs`."""

    lr: float  # AdamW's
    dropout: float
    least_epochs: float  # with fewer it is not begun under a budget of time
    most_epochs: float
    pace: float = PACE


SCRATCH: Mapping[str, Scratch] = {  # by what the profile calls the encoder; calibrated in LOG.md
    "scratch": Scratch(lr=2e-3, dropout=0.1, least_epochs=3.0, most_epochs=4.0, pace=0.5),  # a BERT, 128 wide
    "lstm": Scratch(lr=8e-3, dropout=0.3, least_epochs=1.0, most_epochs=4.0),  # 64 wide
}

_PREDICTOR: TypeAdapter[Predictor] = TypeAdapter(Predictor)


class Plan(BasePlan):
    """What a script keeps track of while it runs. All methods are arithmetic on the profile and on what was told."""

    of = "labels"

    def __init__(self, problem: Problem, purse: Purse | None = None, all_layers: float = ALL_LAYERS_EPOCHS):
        super().__init__(problem.budget, problem.target, purse)
        self.problem = problem
        self.all_layers = all_layers  # epochs of them that are worth more than those of the last half
        self.timed = problem.unit == "seconds"
        self.incumbent: Predictor | None = None
        self.families: dict[str, str] = {}
        self.max_length = 0
        self.ends: list[str] = []  # of fine-tunings that came to their end; all began at the same weights
        self.kept_s = 0.0  # set aside for a diagnosis
        self.linear_s = sum(problem.characters.values()) / LINEAR_CHARACTERS_S
        self.short = False  # the trunk sees train too seldom for its averages to be better
        self.members = 0  # trainings of whose weights the mean was taken
        self.begins: str | None = None  # the state at which every training of the encoder begins
        # linear states on all of train: how each is solved again, at the strength that was chosen, and what it took
        self.solved: dict[str, tuple[FitLinear, float]] = {}
        self.refit_s = 0.0  # set aside for that
        self.depth = 0  # how many layers they train
        self.depth_rule = ""  # why so many
        self.learnt: Learnt | None = None  # of a run that is given more: what its best training was found to need

    @property
    def scratch(self) -> Scratch | None:
        """How the encoder is trained when its weights are random; None for a pretrained one."""
        return SCRATCH.get(self.facts["encoder"])

    @property
    def optimizer(self) -> OptimizerConfig:
        """What was asked for; where that was "auto", what the profile found by the rules of choose.py."""
        chosen = self.facts.get("optimizer")
        return self.problem.config.optimizer if chosen is None else OptimizerConfig.model_validate(chosen["settings"])

    # ------------------------------------------------------------------ the ground of a search (members.Ground)

    least_updates = 60.0

    @property
    def seed(self) -> int:
        return self.problem.config.seed

    @property
    def few_rows(self) -> bool:
        return self.problem.rows["control"] < FEWEST_ROWS

    def spare(self) -> float:
        return max(0.0, self.remaining - (2 * self.encode_s(self.problem.rows["control"]) + 2.0 if self.timed else 0.0))

    def overhead(self) -> float:
        return self.encode_s(self.problem.rows["control"]) + 0.3 if self.timed else 0.0

    def training_updates(self, amount: float) -> float:
        return self.updates(amount, self.depth)

    def prior(self) -> FineTune:
        """The calibrated prior; in a run that is given more with what its best training was found to need. The rate of that is as far
        from its prior as it was: another depth has another prior."""
        prior, found = self.fine_tune(layers=self.depth), self.learnt
        if (
            found is None
            or not isinstance(found.action, FineTune)
            or found.action.optimizer.kind != prior.optimizer.kind
        ):
            return prior
        was = found.action
        lr = prior.optimizer.lr * was.optimizer.lr / (self.problem.config.optimizer.lr or self.prior_lr(was.layers))
        action = prior.with_(
            optimizer=was.optimizer, objective=was.objective, dropout=was.dropout, batch_size=was.batch_size
        )
        return action.with_(optimizer=was.optimizer.with_(lr=found.rate(action, lr)))

    def space(self) -> Space:
        """What the user has not fixed."""
        config = self.problem.config
        given = {
            "optimizer.lr": config.optimizer.lr, "dropout": config.dropout,
            "objective.label_smoothing": config.label_smoothing if config.objective is None else config.objective,
            "optimizer.weight_decay": (config.optimizer.model_extra or {}).get("weight_decay"),
        }  # fmt: skip
        return space_of(self.prior(), [path for path, value in given.items() if value is not None], batches=True)

    def at(self, point: Point, schedule: Schedule) -> FineTune:
        return settled(self.prior().with_(schedule=schedule), point)

    def merit(self, outcome: Outcome) -> float:
        return self.problem.sign * outcome.metrics[self.problem.metric].value if outcome.metrics else float("-inf")

    # ------------------------------------------------------------------ running trials

    def patience(self, stage: str, action: Action, commit: bool) -> int:
        return (
            self.problem.config.patience if stage == "trunk" and commit else 0
        )  # what cools down has to get to its end

    def told(self, action: Action, outcome: Outcome) -> None:
        if (
            isinstance(action, FineTune)
            and outcome.ok
            and outcome.state
            and not {"diagnosis", "stopped"} & set(outcome.facts)
        ):
            self.ends.append(outcome.state)
        rows, facts = self.problem.rows, outcome.facts
        if isinstance(action, FitLinear) and outcome.ok and outcome.state and facts.get("rows") == rows["train"]:
            strength = facts.get("strength", 0.0) / (rows["train"] + rows["control"] + rows["calibration"])
            self.solved[outcome.state] = action.with_(l2s=(strength,)), outcome.cost.wall_s
        self.families = dict(outcome.families)
        if outcome.incumbent is not None:
            self.incumbent = _PREDICTOR.validate_python(outcome.incumbent)

    # ------------------------------------------------------------------ costs

    def encode_s(self, rows: float, max_length: int | None = None) -> float:
        """Seconds of the encoder's forward pass over so many rows."""
        if not self.timed:
            return 0.0
        per_row = self.tokens_a_row(max_length or self.max_length)
        return rows * per_row / self.facts["forward_tokens_s"]

    def tokens_a_row(self, max_length: int) -> float:
        tokens = {int(k): v for k, v in self.facts["mean_tokens"].items()}
        return tokens[min((n for n in tokens if n >= max_length), default=max(tokens))]

    def train_tokens_s(self, layers: int) -> float:
        """Tokens a second of training the last layers on cached states: backward costs two forwards. Where there are none, the
        forward pass is whole."""
        share = layers / self.facts["n_layers"] if self.facts["n_layers"] else 1.0
        forward = 1.0 if self.reads_ids else share
        pace = (self.scratch.pace if self.scratch else PACE) * self.facts["forward_tokens_s"]
        if "train_tokens_s" in self.facts:  # measured, of all layers
            pace = 3 * self.facts["train_tokens_s"]
        return pace * self.facts.get("processes", 1) / (forward + 2 * share)

    @property
    def reads_ids(self) -> bool:
        """Whether no hidden states are cached: texts change every epoch, or the objective looks into the embeddings."""
        config = self.problem.config
        return config.augment.on or (config.objective is not None and config.objective.reads_tables())

    @property
    def growth(self) -> float:
        """How many batches an update takes on average, when the batch doubles at shares of the training."""
        return 1.0 + sum((1 - share) * 2**n for n, share in enumerate(self.problem.config.batch_growth))

    def epochs(self, amount: float, layers: int) -> float:
        """How many passes over train `amount` of the budget buys."""
        rows, per_row = self.problem.rows["train"], self.tokens_a_row(self.max_length)
        match self.problem.unit:
            case "seconds":
                return amount * self.train_tokens_s(layers) / (rows * per_row)
            case "updates":
                return amount * self.problem.config.batch_size * self.growth / rows
            case "tokens":
                return amount / (rows * per_row)

    def updates(self, amount: float, layers: int) -> float:
        return self.epochs(amount, layers) * self.problem.rows["train"] / (self.problem.config.batch_size * self.growth)

    def finish_s(self, with_encoder: bool) -> float:
        """Seconds that the end takes: calibration and test, the bundle, the report."""
        rows = self.problem.rows
        linear = self.linear_s * self.problem.characters["test"] / max(1, sum(self.problem.characters.values()))
        encoder = self.encode_s(rows["calibration"] + rows["test"]) if with_encoder else 0.0
        return 1.0 + 0.01 * self.problem.budget + 0.5 * linear + 1.15 * encoder

    # ------------------------------------------------------------------ choices

    def choose_length(self) -> tuple[int, int | None]:
        """(truncation, rows of train to encode or None for all) that the clock can pay; (0, None) when it can pay none."""
        config = self.problem.config
        cap = min((n for n in LENGTHS if n >= self.facts["p95_tokens"]), default=LENGTHS[-1])
        lengths = (config.max_length,) if config.max_length else self._lengths(cap)
        if not self.timed:
            return lengths[0], None
        rows = self.problem.rows
        judged = rows["control"] * 2 + rows["calibration"] + rows["test"]
        for length in lengths:
            if self.encode_s(rows["train"] + judged, length) <= ENCODE_SHARE * self.remaining:
                return length, None
        for length in lengths:
            left = ENCODE_SHARE * self.remaining - self.encode_s(judged, length)
            affordable = int(left / max(1e-9, self.encode_s(1, length)))
            if affordable >= max(2000, 0.1 * rows["train"]):
                return length, affordable
        return 0, None

    def _lengths(self, cap: int) -> tuple[int, ...]:
        """Truncations worth having, longest first: a model that reads less than half of the text is not."""
        half = LEAST_READ * self.tokens_a_row(cap)
        return tuple(n for n in reversed(LENGTHS) if n <= cap and self.tokens_a_row(n) >= half)

    def half(self) -> int:
        return max(1, self.facts["n_layers"] // 2)

    def objective(self, label_smoothing: float | None) -> Objective:
        if self.problem.config.objective is not None:
            return self.problem.config.objective
        match self.problem.task:
            case "classify":
                return CrossEntropy(label_smoothing=LABEL_SMOOTHING if label_smoothing is None else label_smoothing)
            case "multilabel":
                return BinaryCrossEntropy(label_smoothing=label_smoothing or 0.0)
            case "regress":
                return MeanSquaredError()

    def fine_tune(self, lr: float | None = None, layers: int | None = None) -> FineTune:
        """The calibrated prior, with what the user fixed laid over it."""
        config, scratch = self.problem.config, self.scratch
        depth = layers or config.layers or self.facts["n_layers"]
        optimizer = self.optimizer.at(lr or config.optimizer.lr or self.prior_lr(depth))
        return FineTune(
            trains="all" if scratch or not self.facts["n_layers"] else "top",
            layers=min(depth, self.facts["n_layers"]),
            optimizer=optimizer,
            head_lr=1.0 if scratch else SOLVED_HEAD_LR,
            objective=self.objective(config.label_smoothing),
            schedule=config.schedule,
            batch_size=config.batch_size,
            micro_batch=config.micro_batch,
            clip=config.clip,
            clip_z=config.clip_z,
            layer_decay=config.layer_decay,
            batch_growth=config.batch_growth,
            augment=config.augment,
            dropout=config.dropout if config.dropout is not None else (scratch.dropout if scratch else 0.0),
            max_length=self.max_length,
            bf16=self.facts["precision"] == "bf16",
        )

    def prior_lr(self, depth: int | None = None) -> float:
        """The calibrated learning rate: AdamW's of the runs in LOG.md, and for the others that times the ratio of their priors."""
        scratch = self.scratch
        calibrated = scratch.lr if scratch else FINE_TUNE_LR * min(1.0, (384 / self.facts["hidden"]) ** 1.5)
        if depth is not None and not scratch:
            calibrated *= self._by_depth(depth)
        regime = "scratch" if scratch else "fine_tune"
        ratio = self.optimizer.member.rates[regime].prior / AdamW.rates[regime].prior
        return calibrated * ratio

    def _by_depth(self, depth: int) -> float:
        """SHALLOW below half of the layers; from half on down to DEEP for all of them, as of an encoder that cannot be cut."""
        half, total = self.half(), self.facts["n_layers"]
        if total < 2 or depth >= total:
            return DEEP
        return SHALLOW if depth < half else DEEP ** ((depth - half) / (total - half))

    def choose_depth(self) -> None:
        """How many layers the time that is left can train."""
        whole = self.facts["n_layers"], ""
        self.depth, self.depth_rule = whole if self.scratch else self.layers(self.remaining)

    def layers(self, amount: float) -> tuple[int, str]:
        """How many layers to train, and the rule that says so."""
        total, config = self.facts["n_layers"], self.problem.config
        if config.layers is not None:
            return min(config.layers, total) or total, "layers was given"
        if total < 2:
            return total, "the encoder cannot be cut"
        whole, half = self.epochs(amount, total), self.half()
        if not self.timed or whole >= self.all_layers:
            return total, f"all {total} layers see {whole:.1f} epochs"
        depth = next((n for n in range(half, 1, -1) if self.epochs(amount, n) >= HALF_EPOCHS), 1)
        why = f"all {total} layers would see {whole:.1f} epochs (< {self.all_layers:g})"
        if depth < half:
            why += f", the last {half} {self.epochs(amount, half):.1f} (< {HALF_EPOCHS:g})"
        return depth, f"{why}: the last {depth} only"
