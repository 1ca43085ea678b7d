"""What a script for texts that are written knows and keeps track of: the problem, what things cost, the strategy that it begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from multistep.config import FitConfig
from multistep.controllers.learnt import Made, learnt
from multistep.controllers.script import BasePlan, Reserve, Steps, Target
from multistep.controllers.space import Point, Space, settled, space_of, value_of
from multistep.controllers.wealth import Purse
from multistep.metrics.power import FEWEST_ROWS, least_wins
from multistep.metrics.texts import LANGUAGE_METRICS
from multistep.metrics.verdicts import large
from multistep.objectives import NextToken, Seq2Seq, Span
from multistep.optimizers.base import Rate, Regime
from multistep.schedules import Schedule
from multistep.strategy import Action, Shape, TrainWriter
from multistep.tasks.writing import LOSSES, Writing
from multistep.types import Outcome, Spec, Unit

PROBE_UPDATES = 200  # of a race's probe, of a search's stretch; a shorter one from scratch says nothing
SMOOTHING = 0.1  # of labels, for targets that have many right wordings
FINISH_SHARE = 0.03  # of the budget: loading, judging, writing
SCRATCH_RATE = 6e-3  # muon's, from random weights: for 600 updates and more 2e-2 is too high (LOG.md, 2026-11-25)
SPANS_RATE, SPANS_HEAD = (
    1.5e-4,
    10.0,
)  # adamw's, where an encoder gets a new head for answers: 4e-5 is too low (LOG.md, 2026-11-25)


class LanguageProblem(Spec):
    """What a script knows before the first trial."""

    task: Writing
    metric: str
    config: FitConfig
    pretrained: Literal["", "decoder", "seq2seq", "encoder"] = ""  # what --model names
    regime: Regime = "scratch"
    rows: dict[str, int]  # by split
    bytes: dict[str, int]  # of right answers, by split
    budget: float
    unit: Unit
    target: Target | None = None


class Plan(BasePlan):
    """What is left, what things cost, and the trials so far."""

    of = "language"

    def __init__(self, problem: LanguageProblem, purse: Purse | None = None):
        super().__init__(problem.budget, problem.target, purse)
        self.problem = problem
        self.families: dict[str, str] = {}
        self.incumbent: dict[str, Any] = {}
        self.count_s = 0.0  # that counting train took
        self.reserved = 0.0  # for the end

    @property
    def timed(self) -> bool:
        return self.problem.unit == "seconds"

    def patience(self, stage: str, action: Action, commit: bool) -> int:
        return self.problem.config.patience if stage == "trunk" else 0

    def told(self, action: Action, outcome: Outcome) -> None:
        self.families, self.incumbent = dict(outcome.families), outcome.incumbent or {}

    def reserve(self, amount: float) -> Steps:
        """Keep so much for the end, in place of what was kept so far."""
        amount = round(max(0.0, amount) if self.timed else 0.0, 3)
        self.remaining, self.reserved = max(0.0, self.remaining + self.reserved - amount), amount
        yield Reserve(name="end", amount=amount)

    @property
    def shape(self) -> Shape | None:
        return Shape(**self.facts["shape"]) if self.facts.get("shape") else None

    @property
    def deciding(self) -> int:
        """Records of control that training is judged on, as the profile counted them."""
        return self.facts.get("deciding", self.problem.rows["control"])

    @property
    def dropout(self) -> float | None:
        """The model's own, where a training can have another: a model of pairs from scratch is made with it, and an encoder that finds
        answers comes without. None elsewhere: a Llama has none, and a pretrained model that writes keeps what it came with."""
        assert self.shape is not None
        if self.shape.reads == "spans":
            return 0.0
        return self.shape.dropout if self.shape.reads == "pairs" and self.shape.name is None else None

    # ------------------------------------------------------------------ the ground of a search (members.Ground)

    begins = None
    least_updates = float(PROBE_UPDATES)

    @property
    def seed(self) -> int:
        return self.problem.config.seed

    @property
    def few_rows(self) -> bool:
        """Of what is read off many tokens of a text, few texts are enough."""
        return self.problem.rows["control"] < FEWEST_ROWS and large(self.problem.metric, 1.0) > 0

    def overhead(self) -> float:
        return 1.1 * self.facts["judge_s"] if self.timed else 0.0

    def training_updates(self, amount: float) -> float:
        return self.updates(amount)

    def prior(self) -> TrainWriter:
        """What a search moves: the model's dropout, which a strategy leaves to it, is there as a number."""
        return self.strategy().with_(dropout=self.dropout)

    def space(self) -> Space:
        """What the user has not fixed. The batch stays: it is as large as memory and budget let it be."""
        c = self.problem.config
        given = {
            "optimizer.lr": c.optimizer.lr, "dropout": c.dropout,
            "objective.label_smoothing": c.label_smoothing if c.objective is None else c.objective,
            "optimizer.weight_decay": (c.optimizer.model_extra or {}).get("weight_decay"),
        }  # fmt: skip
        return space_of(self.prior(), [path for path, value in given.items() if value is not None])

    def at(self, point: Point, schedule: Schedule) -> TrainWriter:
        return settled(self.strategy(schedule=schedule), point)

    def merit(self, outcome: Outcome) -> float:
        found = outcome.metrics.get(self.problem.metric)
        sign = 1.0 if higher_is_better(self.problem.metric) else -1.0
        return float("-inf") if found is None else sign * found.value

    # ------------------------------------------------------------------ costs

    def updates(self, amount: float) -> float:
        """How many updates `amount` of the budget buys."""
        match self.problem.unit:
            case "seconds":
                return amount * self.facts["tokens_s"] / self.facts["batch_tokens"]
            case "updates":
                return amount
            case "tokens":
                return amount / self.facts["batch_tokens"]

    def epochs(self, amount: float) -> float:
        return self.updates(amount) * self.facts["batch_tokens"] / max(1, self.facts["train_tokens"])

    def spare(self) -> float:
        """What training may take of what is left: the end needs to be judged, and the reservations are gone already."""
        if not self.timed:
            return self.remaining
        return max(0.0, self.remaining - 3 * self.facts["judge_s"] - FINISH_SHARE * self.problem.budget)

    def _prior(self, kind: str, rates: Mapping[Regime, Rate]) -> float:
        regime = self.problem.regime
        if kind == "muon" and regime == "scratch":
            return SCRATCH_RATE
        return SPANS_RATE if kind == "adamw" and self.facts.get("fresh_head") else rates[regime].prior

    def strategy(self, lr: float | None = None, schedule: Schedule | None = None) -> TrainWriter:
        c, shape = self.problem.config, self.shape
        assert shape is not None
        optimizer = c.optimizer if c.optimizer.kind != "auto" else c.optimizer.with_(kind=self.facts["optimizer"])
        rate = lr or c.optimizer.lr or self._prior(optimizer.kind, optimizer.member.rates)
        smoothing = c.label_smoothing if c.label_smoothing is not None else SMOOTHING
        match shape.reads:
            case "pairs":
                objective = Seq2Seq(label_smoothing=smoothing)
            case "spans":
                objective = Span()
            case _:
                objective = NextToken(label_smoothing=c.label_smoothing or 0.0)
        return TrainWriter(
            optimizer=optimizer.at(rate), objective=c.objective or objective, schedule=schedule or c.schedule, shape=shape,
            batch_size=self.facts["batch_rows"], micro_batch=c.micro_batch, clip=c.clip, clip_z=c.clip_z,
            layer_decay=c.layer_decay, batch_growth=c.batch_growth, bf16=self.facts["bf16"],
            head_lr=SPANS_HEAD if self.facts.get("fresh_head") else 1.0,
        )  # fmt: skip


def higher_is_better(metric: str) -> bool:
    return LANGUAGE_METRICS[metric].higher_is_better


def fewest(metric: str) -> int:
    """Records of control without which no rates are raced and no training is watched. What is read off the losses of tokens needs no more
    than it takes for a test to find anything."""
    return least_wins() if metric in LOSSES else FEWEST_ROWS


def trained(made: Made, families: Mapping[str, str]) -> dict[str, Any] | None:
    """What more training goes on from: its state, and what a search moves of the strategy that made it, at the rate to ask for. None where
    no training stands: a pretrained model as it was given is none."""
    state = families.get("trunk", families.get("model", families.get("spans")))
    found = learnt(made, state)
    action = None if found is None else found.again()
    if not isinstance(action, TrainWriter):
        return None
    return {"state": state, "settings": {axis.path: value_of(action, axis.path) for axis in space_of(action).axes}}
