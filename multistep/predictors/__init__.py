"""How to predict: a predictor is a frozen specification that wraps others down to the models whose outputs it reads.

Each member has
    models() -> the names of the models it needs
    combine(task, logits) -> logits [N, K], from a mapping of model name to that model's logits
    decide(task, logits) -> (logits [N, K], decisions)
    stages(task, logits) -> [N], what answers each row: the models that it takes, by name
It is data: it survives JSON and holds no model. `fit.py` makes candidates from a calibration split.
How texts are written is in ways.py. To add one: copy the nearest file, name it here, run the laws. No torch here.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from multistep.metrics import TaskLike
from multistep.predictors.affine import Affine
from multistep.predictors.base import Asked, Engine
from multistep.predictors.blend import Blend
from multistep.predictors.cascade import Cascade
from multistep.predictors.conformal import Conformal
from multistep.predictors.costs import Costs
from multistep.predictors.isotonic import Isotonic
from multistep.predictors.single import Single
from multistep.predictors.temperature import Temperature
from multistep.predictors.thresholds import Thresholds
from multistep.predictors.vector import Vector
from multistep.types import Prediction

PREDICTORS = (Single, Temperature, Vector, Isotonic, Affine, Thresholds, Costs, Blend, Cascade, Conformal)
Predictor = Annotated[
    Single | Temperature | Vector | Isotonic | Affine | Thresholds | Costs | Blend | Cascade | Conformal,
    Field(discriminator="kind"),
]
for _member in PREDICTORS:  # the wrappers name each other; only here are all of them known
    _member.model_rebuild(force=True, _types_namespace={"Predictor": Predictor})


def predict(task: TaskLike, predictor: Predictor, engine: Engine, texts: Sequence[str]) -> list[Prediction]:
    """Answers for `texts`: a model runs once, on the rows that need it."""
    logits = Asked(engine, predictor.models(), texts)
    z_NK, decisions = predictor.decide(task, logits)
    found = task.predictions(z_NK, decisions)
    stages = predictor.stages(task, logits)
    if not isinstance(predictor, Conformal):
        return [replace(p, stage=stage) for p, stage in zip(found, stages, strict=True)]
    labels, among_NK = np.array(task.labels, dtype=object), predictor.candidates(task, z_NK)
    return [
        replace(p, stage=stage, candidates=tuple(labels[among_K]))
        for p, stage, among_K in zip(found, stages, among_NK, strict=True)
    ]


__all__ = [
    "PREDICTORS", "Affine", "Asked", "Blend", "Cascade", "Conformal", "Costs", "Engine", "Isotonic", "Predictor", "Single",
    "Temperature", "Thresholds", "Vector", "predict",
]  # fmt: skip
