"""How to predict: a predictor is a frozen specification that wraps others down to the models whose outputs it reads.

Each member has
    models() -> the names of the models it needs
    combine(task, logits) -> logits [N, K], from a mapping of model name to that model's logits
    decide(task, logits) -> (logits [N, K], decisions)
It is data: it survives JSON and holds no model. `fit.py` makes candidates from a calibration split.
How texts are written is in ways.py. To add one: copy the nearest file, name it here, run the laws. No torch here.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from multistep.metrics import TaskLike
from multistep.predictors.affine import Affine
from multistep.predictors.base import Engine
from multistep.predictors.blend import Blend
from multistep.predictors.single import Single
from multistep.predictors.temperature import Temperature
from multistep.predictors.thresholds import Thresholds
from multistep.types import Prediction

PREDICTORS = (Single, Temperature, Affine, Thresholds, Blend)
Predictor = Annotated[Single | Temperature | Affine | Thresholds | Blend, Field(discriminator="kind")]
for _member in PREDICTORS:  # the wrappers name each other; only here are all of them known
    _member.model_rebuild(force=True, _types_namespace={"Predictor": Predictor})


def predict(task: TaskLike, predictor: Predictor, engine: Engine, texts: Sequence[str]) -> list[Prediction]:
    """Answers for `texts`: each model that the predictor needs is run once."""
    logits = {model: engine.logits(model, texts) for model in predictor.models()}
    return task.predictions(*predictor.decide(task, logits))


__all__ = [
    "PREDICTORS", "Affine", "Blend", "Engine", "Predictor", "Single", "Temperature", "Thresholds", "predict",
]  # fmt: skip
