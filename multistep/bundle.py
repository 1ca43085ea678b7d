"""The bundle: what is served. Weights, tokenizer, task, predictor, card, in one folder that is replaced whole or not at all.

model/  multistep.json           task, predictor, which models, lengths, versions
        config.json, model.safetensors, tokenizer.json, tokenizer_config.json, head.safetensors    the encoder, if the predictor needs it
        linear/                  the linear model and its vectorizer, if the predictor needs it
        engines/                 what other engines run, where one was chosen (multistep/engines)
        README.md                the card
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter
from tokenizers import Tokenizer

from multistep import __version__
from multistep.engines import OnnxText, Runtime, prepare
from multistep.evaluate import EncoderText, Engine, TextModel
from multistep.files import read_info
from multistep.language_bundle import LanguageBundle, load_language_bundle
from multistep.models.linear import Linear
from multistep.models.saved import load_model, save_model
from multistep.predictors import Asked, Predictor, predict
from multistep.state import replace_folder
from multistep.subwords import encode_ids, read_tokenizer, save_tokenizer
from multistep.tasks import Task
from multistep.types import Prediction, Spec, UserError

FORMAT = 1
_TASK: TypeAdapter[Task] = TypeAdapter(Task)
_PREDICTOR: TypeAdapter[Predictor] = TypeAdapter(Predictor)


class EngineChoice(Spec):
    """What a bundle that gives labels runs on: "engine" in multistep.json. `threads`: of torch; `batch`: texts at once at most; 0: as
    it comes."""

    encoder: Runtime | None = None
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    batch: Annotated[int, Field(ge=0, le=65_536)] = 0


@dataclass
class Bundle:
    """A loaded bundle: texts in, predictions out."""

    task: Task
    predictor: Predictor
    engine: Engine
    info: dict[str, Any]

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        return predict(self.task, self.predictor, self.engine, list(texts))

    def scored(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Logits [N,K] and decisions [N], as predictions are made."""
        return self.predictor.decide(self.task, Asked(self.engine, self.predictor.models(), texts))


def write_bundle(
    folder: Path, task: Task, predictor: Predictor, models: Mapping[str, Linear | EncoderText],
    tokenizer: Tokenizer | None, max_length: int, extra: Mapping[str, Any], card: str = "", runs_on: Path | None = None,
) -> None:  # fmt: skip
    """Write what `predictor` needs of `models` into `folder`, in one step; an older bundle there is replaced. "encoder@32", the encoder
    on 32 tokens of a text, needs the encoder. `card`: the README.md; `runs_on`: the folder of an engine that the encoder runs on."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        info: dict[str, Any] = {
            "format": FORMAT, "multistep": __version__, "task": task.model_dump(mode="json"),
            "predictor": predictor.model_dump(mode="json"), "models": sorted(predictor.models()), **extra,
        }  # fmt: skip
        for name in dict.fromkeys(m.partition("@")[0] for m in predictor.models()):
            model = models[name]
            if isinstance(model, Linear):
                (temporary / "linear").mkdir()
                model.save(temporary / "linear")
            else:
                assert tokenizer is not None
                save_model(model.model, temporary)
                save_tokenizer(tokenizer, temporary, max_length)
                info["encoder"] = {
                    "max_length": max_length, "pad_id": model.pad_id, "bf16": model.bf16,
                    "scale": model.scale, "mean": model.mean,
                }  # fmt: skip
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        if runs_on is not None:
            shutil.copytree(runs_on, temporary / "engines" / runs_on.name)
        (temporary / "multistep.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_bundle(path: Path) -> Path:
    """The bundle of a run's folder, or `path` itself when it is one. Raises UserError when there is none."""
    if not path.exists():
        raise UserError(f"{path}: no such folder. Give the folder named by --out, or its model/ folder.")
    for folder in (path / "model", path):
        if (folder / "multistep.json").exists():
            return folder
    if (path / "journal.jsonl").exists():
        raise UserError(f"{path}: this run has no model yet. Go on with: multistep resume {path}")
    raise UserError(f"{path}: not a run and not a bundle (no multistep.json). Give the folder named by --out.")


def load_bundle(path: Path, device: str = "cpu") -> Bundle | LanguageBundle:
    """Load a bundle for prediction on `device`. Raises UserError when it is missing, damaged or of a newer format."""
    folder = find_bundle(path)
    try:
        info = read_info(folder)
        if info["format"] > FORMAT:
            raise UserError(f"{folder}: made by a newer multistep (format {info['format']}). Update multistep.")
        if info.get("language"):
            return load_language_bundle(folder, info, device)
        task, predictor = _TASK.validate_python(info["task"]), _PREDICTOR.validate_python(info["predictor"])
        chosen = EngineChoice.parse(info.get("engine") or {}, "engine")
        models: dict[str, Any] = {}
        if "linear" in info["models"]:
            models["linear"] = Linear.load(folder / "linear")
        if "encoder" in info:
            encoder: Any = load_encoder_text(folder, info["encoder"], device)
            if chosen.encoder is not None:
                runtime = chosen.encoder.with_(threads=chosen.encoder.threads or chosen.threads)
                encoder = prepare(encoder, runtime, folder, make=False)
            models |= {m: _reading(encoder, folder, m) for m in info["models"] if m.startswith("encoder")}
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:  # the last two: JSON of another shape
        if isinstance(error, UserError):
            raise
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"{folder}: the bundle is damaged ({reason}). Make it again with: multistep fit") from None
    return Bundle(task, predictor, Engine(models, chosen.threads, chosen.batch), {**info, "path": str(folder)})


def _reading(encoder: EncoderText | OnnxText, folder: Path, name: str) -> TextModel:
    """The encoder, of "encoder@32" reading 32 tokens of a text."""
    length = name.partition("@")[2]
    return shortened(encoder, read_tokenizer(folder / "tokenizer.json"), int(length)) if length else encoder


def shortened(encoder: TextModel, tokenizer: Tokenizer, tokens: int) -> TextModel:
    """The encoder reading so many tokens of a text."""
    assert isinstance(encoder, EncoderText | OnnxText)
    return replace(encoder, tokenize=lambda texts: encode_ids(tokenizer, texts, tokens)[0])


def load_encoder_text(folder: Path, settings: Mapping[str, Any], device: str) -> EncoderText:
    """The encoder of a bundle on torch, whatever engine was chosen; `settings`: "encoder" of its multistep.json."""
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    max_length = int(settings["max_length"])

    def tokenize(texts: Sequence[str]) -> list[np.ndarray]:
        return encode_ids(tokenizer, texts, max_length)[0]

    return EncoderText(
        load_model(folder).to(device),
        tokenize,
        settings["pad_id"],
        settings["bf16"],
        settings["scale"],
        settings["mean"],
    )
