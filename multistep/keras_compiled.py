"""What a Keras model was compiled with, in our words: the loss as an objective, the optimizer as a member of the list.

Only Keras's own configurations are read, on any backend. What is not listed is refused by name: a loss that is silently another is
worse than one line more in the call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
from keras.src.losses.losses import LossFunctionWrapper  # neither is public
from keras.src.models import Functional  # what keras.Model(inputs, outputs) makes

from multistep.types import Spec, UserError, nearest

Link = Literal["identity", "sigmoid", "softmax"]  # what the model's last layer makes of logits

_MEANS = (
    "sum_over_batch_size",
    "mean",
    "mean_with_sample_weight",
)  # reductions that are our mean; the first is Keras's default
_LOSSES = {  # Keras's name -> our kind; its short names are resolved by Keras
    "binary_crossentropy": "binary_cross_entropy",
    "categorical_crossentropy": "cross_entropy",
    "sparse_categorical_crossentropy": "cross_entropy",
    "mean_squared_error": "mse",
    "mean_absolute_error": "mae",
    "huber": "huber",
    "huber_loss": "huber",
}
_LINKS: Mapping[str, Link] = {"binary_cross_entropy": "sigmoid", "cross_entropy": "softmax"}
_OF_OUTPUTS = ("mse", "mae", "huber")  # read the model's outputs as they are: a final sigmoid is trained through
WRAPPERS = ("r_drop", "fgm", "penalized")  # by kind, as multistep.objectives has them: that imports torch
ACTIVATIONS: Mapping[Link, Any] = {"sigmoid": keras.activations.sigmoid, "softmax": keras.activations.softmax}
_NOT_CARRIED = ("clipvalue", "use_ema", "gradient_accumulation_steps", "amsgrad")
_DECOUPLED = ("adamw", "nadam", "lion", "sgd")  # decay as Keras does; in the others it goes through the gradient
_CLIP = 1.0  # where the optimizer does not say: what `optimize` takes


class Goal(NamedTuple):
    """What is minimized: our objective, how the model's outputs come from logits, and whether targets are one-hot."""

    objective: dict[str, Any]
    link: Link
    one_hot: bool


class Updates(NamedTuple):
    optimizer: dict[str, Any]
    clip: float


def goal_of(model: Any, objective: Any) -> Goal:
    """The objective of the compiled loss, or the one given. Raises UserError on a loss that has no counterpart."""
    if objective is not None:
        found: dict[str, Any] = _of_kind(objective)
        if _core(found) in _OF_OUTPUTS:
            return Goal(found, "identity", False)
        last = last_layer(model)
        ends = last.activation if isinstance(last, keras.layers.Dense | keras.layers.Activation) else None
        for link, activation in ACTIVATIONS.items():
            if ends is activation:
                return Goal(found, link, False)
        return Goal(found, "identity", False)
    loss = model.loss if model.compiled else None
    if loss is None:
        raise UserError(
            'loss: the model is not compiled with one. Call model.compile(loss=...) or give objective="mse".'
        )
    settings = {"from_logits": False, "label_smoothing": 0.0, "delta": 1.0}
    if isinstance(loss, keras.losses.Loss):
        name, settings = str(_snake(type(loss).__name__)), {**settings, **loss.get_config(), **_arguments(loss)}
    elif isinstance(loss, str) or callable(loss):
        function: Any = keras.losses.get(loss) if isinstance(loss, str) else loss
        name = _snake(type(function).__name__) if isinstance(function, keras.losses.Loss) else function.__name__
    else:
        raise UserError("loss: a model of several outputs is trained on one loss only. Give a model with one output.")
    if name not in _LOSSES:
        raise UserError(f"loss: {name!r} has no counterpart here.{nearest(name, list(_LOSSES))} Or give objective=.")
    if settings.get("ignore_class") is not None:
        raise UserError("loss: ignore_class has no counterpart here. Leave those rows out.")
    if settings.get("reduction", _MEANS[0]) not in _MEANS:
        raise UserError(
            f"loss: reduction={settings['reduction']!r} has no counterpart here: the mean over the batch is minimized. Leave it out, "
            "and give the optimizer a learning rate for the mean."
        )
    kind = _LOSSES[name]
    found = {"kind": kind}
    if kind == "huber":
        found["delta"] = float(settings["delta"])
    if settings["label_smoothing"] and kind.endswith("cross_entropy"):
        found["label_smoothing"] = float(settings["label_smoothing"])
    link: Link = "identity" if settings["from_logits"] else _LINKS.get(kind, "identity")
    return Goal(found, link, name == "categorical_crossentropy")


def last_layer(model: Any) -> Any:
    """The layer that makes the output; None where the model does not say, as one that is a class of the user's own."""
    if isinstance(model, keras.Sequential):
        return last_layer(model.layers[-1]) if model.layers else None
    if isinstance(model, Functional):
        return last_layer(model.outputs[0]._keras_history.operation) if len(model.outputs) == 1 else None
    return None if isinstance(model, keras.Model) else model


def _of_kind(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        return {"kind": given}
    return given.model_dump() if isinstance(given, Spec) else dict(given)


def _core(objective: Mapping[str, Any]) -> Any:
    """The kind of what is inside of all wrappers; one that does not say wraps cross-entropy."""
    while objective.get("kind") in WRAPPERS:
        objective = _of_kind(objective.get("inner") or "cross_entropy")
    return objective.get("kind")


def updates_of(model: Any, optimizer: Any) -> Updates:
    """The compiled optimizer, its learning rate (of now, where it has a schedule) taken as given; or the one given."""
    if optimizer is not None:
        return Updates(_of_kind(optimizer), _CLIP)
    own = model.optimizer if model.compiled else None
    if own is None:
        return Updates({"kind": "auto"}, _CLIP)
    config = own.get_config()
    name = type(own).__name__
    found = _settings(name, config)
    unlike = [k for k in _NOT_CARRIED if config.get(k)]
    if config.get("weight_decay") and found["kind"] not in _DECOUPLED:
        unlike.append("weight_decay")
    if unlike:
        raise UserError(
            f"optimizer: {unlike[0]} of Keras's {name} is not carried over. Leave it out, or give optimizer=."
        )
    clip = config.get("global_clipnorm") or config.get("clipnorm") or _CLIP
    if config.get("weight_decay"):
        found["weight_decay"] = float(config["weight_decay"])
    return Updates({**found, "lr": float(own.learning_rate)}, float(clip))


def _settings(name: str, c: Mapping[str, Any]) -> dict[str, Any]:
    match name:
        case "Adam" if c.get("weight_decay"):  # decoupled, in Keras
            return {"kind": "adamw", "beta1": c["beta_1"], "beta2": c["beta_2"], "eps": c["epsilon"]}
        case "Adam":
            return {"kind": "adam", "beta1": c["beta_1"], "beta2": c["beta_2"], "eps": c["epsilon"]}
        case "AdamW":
            return {
                "kind": "adamw",
                "beta1": c["beta_1"],
                "beta2": c["beta_2"],
                "eps": c["epsilon"],
                "weight_decay": 0.0,
            }
        case "SGD" if c["momentum"]:
            return {"kind": "nesterov" if c["nesterov"] else "momentum", "momentum": c["momentum"]}
        case "SGD":
            return {"kind": "sgd"}
        case "RMSprop" if not (c["momentum"] or c["centered"]):
            return {"kind": "rmsprop", "alpha": c["rho"], "eps": c["epsilon"]}
        case "Adagrad":
            return {"kind": "adagrad", "eps": c["epsilon"], "initial_accumulator": c["initial_accumulator_value"]}
        case "Nadam":
            return {
                "kind": "nadam",
                "beta1": c["beta_1"],
                "beta2": c["beta_2"],
                "eps": c["epsilon"],
                "weight_decay": 0.0,
            }
        case "Lion":
            return {"kind": "lion", "beta1": c["beta_1"], "beta2": c["beta_2"], "weight_decay": 0.0}
    raise UserError(f'optimizer: Keras\'s {name} with these settings has no counterpart here. Give optimizer="adamw".')


def targets_of(y: Any, goal: Goal, name: str) -> np.ndarray:
    """Targets as our objective reads them: one-hot rows as classes, classes as whole numbers, the rest as float32."""
    found = np.asarray(y)
    if found.dtype.kind not in "biuf":
        raise UserError(f"{name}: targets are {found.dtype}, not numbers. Give classes as 0, 1, 2, ...")
    if _core(goal.objective) != "cross_entropy":
        return found.astype(np.float32)
    if goal.one_hot:
        if found.ndim != 2 or not (np.isin(found, (0, 1)).all() and (found.sum(1) == 1).all()):
            raise UserError(f"{name}: categorical_crossentropy is supported for one-hot rows only. Give one 1 a row.")
        return found.argmax(1)
    whole = found.astype(np.int64)
    if (whole != found).any():
        raise UserError(f"{name}: classes have to be whole numbers. Give 0, 1, 2, ...")
    return whole


def check_losses(model: Any) -> None:
    """Raises UserError where a layer adds to the loss or bounds its weights: neither is carried over. The model was called once."""
    if model.losses:
        raise UserError(
            "model: it has regularizers, which are not carried over. Leave them out and give "
            'optimizer={"kind": "adamw", "weight_decay": 0.01}.'
        )
    bound = [v.path for v in model.trainable_variables if v.constraint is not None]
    if bound:
        raise UserError(f"model: {bound[0]} has a constraint, which is not carried over. Leave it out.")


def _arguments(loss: Any) -> dict[str, Any]:
    """What the loss's function is called with: Huber's delta is not in its configuration."""
    return dict(loss._fn_kwargs) if isinstance(loss, LossFunctionWrapper) else {}


def _snake(name: str) -> str:
    """BinaryCrossentropy -> binary_crossentropy"""
    return "".join(("_" if c.isupper() and n else "") + c.lower() for n, c in enumerate(name))
