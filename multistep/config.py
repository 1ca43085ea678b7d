"""The configuration of a run: what the user asked for, from options, a YAML file and `key=value` overrides.

The resolved configuration is written into the run's folder; running it again repeats the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from multistep.augment import Augment
from multistep.budget import parse_budget
from multistep.models.adapter import Lora
from multistep.objectives import Objective
from multistep.optimizers import GRADIENT_OPTIMIZERS, SECOND_ORDER, AdamW
from multistep.optimizers.base import GradientOptimizer
from multistep.schedules import Linear, Schedule
from multistep.strategy import BatchGrowth, LayerDecay
from multistep.tasks import TASKS
from multistep.tasks.writing import WRITING
from multistep.types import Spec, UserError, nearest

KINDS: Mapping[str, type[GradientOptimizer]] = {
    m.model_fields["kind"].default: m for m in (*GRADIENT_OPTIMIZERS, *SECOND_ORDER)
}


TASK_KINDS = tuple(t.model_fields["kind"].default for t in TASKS)
# What only one kind of task reads: given to the other it would do nothing.
OF_LABELS = {"batch_size": " Write batch_tokens.", "layers": "", "soup": "", "augment": ""}
OF_WRITING = {
    "batch_tokens": " Write batch_size.", "adapter": "", "lora": "", "tokenizer": "", "vocabulary": "", "width": "", "depth": "",
}  # fmt: skip
STAGES_OF_LABELS = ("linear", "refit")


class OptimizerConfig(Spec):
    """What may be fixed of the optimizer: its kind, and any of that kind's settings. lr None: chosen by the run."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str = "auto"  # chosen by stated rules (docs/optimize.md), or one of `multistep list optimizers`
    lr: Annotated[float, Field(gt=0, le=1000)] | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        self.at(self.lr or 1e-3)
        return self

    @property
    def member(self) -> type[GradientOptimizer]:
        if self.kind == "auto":  # settings without a kind are AdamW's
            return AdamW
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not an optimizer.{nearest(self.kind, list(KINDS))}")
        return KINDS[self.kind]

    def at(self, lr: float) -> Any:
        """The optimizer with these settings and this learning rate. Raises ValueError naming a key that it does not have."""
        settings = {k: v for k, v in (self.model_extra or {}).items() if v is not None}
        return self.member.parse({**settings, "lr": lr}, "optimizer")


def check_layer_decay(layer_decay: float, optimizer: OptimizerConfig) -> None:
    """Raises UserError when learning rates of layers were asked for, of an optimizer that has none."""
    if layer_decay != 1.0 and optimizer.member.closure:
        kind = optimizer.kind
        raise UserError(
            f"layer_decay: {kind} solves for its step, so there is no learning rate to lower by layers. Leave it at 1."
        )


class FitConfig(Spec):
    """Everything `fit` can be told. Only `data` is needed."""

    data: str
    task: str = "auto"  # auto, classify, multilabel, regress; lm, translate, summarize, answer, chat
    metric: str | None = None  # None: the task's own
    budget: Annotated[str, Field(validate_default=True)] = "5m"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    test: bool = True  # false: no test split is made and none is read; somebody else holds rows back
    out: str | None = None  # None: runs/<name of the data>
    text: tuple[str, ...] = ()  # None: inferred
    label: str | None = None
    model: str = "auto"  # auto, lstm (labels only), none, a folder, a hub name
    controller: Literal["staged", "race", "fixed", "reactive", "halving", "population", "bayes", "random"] = "staged"
    skip: tuple[Literal["linear", "race", "average", "predict", "refit"], ...] = ()  # stages that are left out
    until: str | None = None  # METRIC=VALUE at which training ends, such as f1=0.93; None: with the budget
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: Objective | None = None  # None: the task's own
    schedule: Schedule = Linear()
    layers: Annotated[int, Field(ge=0)] | None = None  # last layers to train; None: chosen by the clock
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    micro_batch: Annotated[int, Field(ge=0)] = 0
    max_length: Annotated[int, Field(ge=8, le=8192)] | None = None  # tokens; longer texts are cut (and counted)
    clip: Annotated[float, Field(ge=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None  # None: 0, or what `plan.SCRATCH` says from scratch
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None  # None: 0.1 for classes, 0 for multilabel
    clip_z: Annotated[float, Field(ge=0)] = 0.0  # standard deviations above the mean of past norms; 0: off
    layer_decay: LayerDecay = 1.0  # the learning rate's factor, a layer further from the head; 1: off
    augment: Augment = Augment()  # changes to the words of train, made anew every epoch of a fine-tuning
    batch_growth: BatchGrowth = ()  # shares of a training at which the batch doubles
    soup: bool = False  # try the mean of the weights of the race's probes and the trunk
    patience: Annotated[int, Field(ge=0, le=1000)] = 0  # looks in a row without a gain that end a training; 0: off
    adapter: Literal["none", "lora"] = (
        "none"  # of a pretrained model that writes: train an adapter beside frozen weights
    )
    lora: Lora = Lora()
    tokenizer: Literal["auto", "characters", "bytes"] = (
        "auto"  # of a model that writes, from scratch; bytes: byte pairs
    )
    vocabulary: Annotated[int, Field(ge=259, le=200_000)] | None = None  # of byte pairs; None: by the size of train
    width: Annotated[int, Field(ge=16, le=8192, multiple_of=16)] | None = None  # of a model that writes, from scratch
    depth: Annotated[int, Field(ge=1, le=100)] | None = (
        None  # its layers (on each side); None: by data, budget and speed
    )
    batch_tokens: Annotated[int, Field(ge=1, le=10**8)] | None = (
        None  # an update of a model that writes; None: by the budget
    )
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @field_validator("task")
    @classmethod
    def _task(cls, value: str) -> str:
        known = ["auto", *TASK_KINDS, *WRITING]
        if value not in known:
            raise UserError(f"task: unknown {value!r}.{nearest(value, known)}")
        return value

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> str:
        return str(parse_budget(value))

    @model_validator(mode="after")
    def _layers(self) -> Self:
        check_layer_decay(self.layer_decay, self.optimizer)
        return self

    @model_validator(mode="after")
    def _one_smoothing(self) -> Self:
        if self.objective is not None and self.label_smoothing is not None:
            raise UserError("label_smoothing: an objective was given too. Write objective.label_smoothing instead.")
        return self

    @model_validator(mode="after")
    def _read_by_its_task(self) -> Self:
        writes = self.task in WRITING
        for key, instead in (OF_LABELS if writes else OF_WRITING).items():
            if getattr(self, key) != type(self).model_fields[key].default:
                who, not_by = ("with labels", self.task) if writes else (f"that write ({', '.join(WRITING)})", "labels")
                raise UserError(f"{key}: read by tasks {who} alone, not by {not_by}.{instead or ' Leave it out.'}")
        if stages := [stage for stage in self.skip if writes and stage in STAGES_OF_LABELS]:
            raise UserError(f"skip: {self.task} has no stage {stages[0]!r}. It may skip race, average and predict.")
        return self

    @field_validator("text", "skip", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


_TEXTS = ("task", "metric", "budget", "out", "label", "model", "until")  # never numbers, whatever they look like


def resolve(source: str, options: Mapping[str, Any], overrides: Sequence[str]) -> FitConfig:
    """`source` is a .yaml configuration or data; `options` that are not None win over it, `overrides` win over both.

    Raises UserError with one line for an unknown key (naming the nearest), a wrong type or an unreadable file.
    """
    data: dict[str, Any] = {}
    if source.endswith((".yaml", ".yml")):
        data = _read_yaml(Path(source))
    else:
        data["data"] = source
    data |= {k: v for k, v in options.items() if v is not None and v != ()}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} is not key=value. Write e.g. optimizer.lr=1e-4.")
        _set(data, key.split("."), value if key in _TEXTS else _typed(value), override)
    if "data" not in data:
        raise UserError(f"{source}: the key 'data' is missing. Name the file, folder or hub dataset to learn from.")
    config = FitConfig.parse(data)
    return config if config.out else config.with_(out=str(Path("runs") / _stem(config.data)))


def _stem(source: str) -> str:
    """The data's name without its folder and endings; of "." and ".." that of the folder they are."""
    name = Path(source).name
    if name in ("", ".."):
        name = Path(source).resolve().name
    for suffix in (".gz", ".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt"):
        name = name.removesuffix(suffix)
    return name if name.strip(".") else "run"


def save_config(config: FitConfig, path: Path) -> None:
    import yaml

    path.write_text(
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (UnicodeDecodeError, OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:160]}).") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a configuration is 'key: value' lines, this is {type(data).__name__}.")
    if "data" in data and isinstance(data["data"], str):
        beside = path.parent / data["data"]
        if not Path(data["data"]).exists() and beside.exists():
            data["data"] = str(beside)
    return data


def _set(data: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    if path[0] not in FitConfig.model_fields:
        raise UserError(f"unknown key {'.'.join(path)!r}.{nearest(path[0], list(FitConfig.model_fields))}")
    top = data
    for key in path[:-1]:
        inner = data.setdefault(key, _default(key) if data is top else {})
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {key!r} has no keys below it.")
        data = inner
    data[path[-1]] = value


def _default(key: str) -> dict[str, Any]:
    """What a section starts from: the kind of its default, where it has kinds."""
    default = FitConfig.model_fields[key].default
    return default.model_dump(include={"kind"}) if isinstance(default, Spec) else {}


def _typed(value: str) -> Any:
    """YAML's types, and 1e-4 as a number too (YAML 1.1 reads it as text)."""
    import yaml

    try:
        return float(value) if "e" in value.lower() and value[0] in "0123456789.-+" else yaml.safe_load(value)
    except (ValueError, yaml.YAMLError):
        return value
