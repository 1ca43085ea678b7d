"""A model that writes, as CTranslate2 reads it: model.bin, config.json and the vocabulary, a token an id.

Models of the M2M100 and Llama classes go through CTranslate2's loaders as they are in memory; all others through its converter, from
a folder. Its loader of M2M100 takes positions to begin at 2, as they do where padding has id 1; here padding has id 0 and positions
begin at 1, so the table of positions is set once more, and long enough for long texts.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from multistep.codec import Codec
from multistep.types import UserError

POSITIONS = 2048  # of an M2M100, at least: its table is computed, so that more cost only their memory
_VOCABULARIES = ("shared_vocabulary.json", "target_vocabulary.json", "vocabulary.json")
_OWN = {"M2M100ForConditionalGeneration": "M2M100Loader", "LlamaForCausalLM": "LlamaLoader"}


def convert(model: Any, codec: Codec, folder: Path, int8: bool) -> None:
    """Write the model into `folder` (there already). Raises UserError where CTranslate2 has no such model."""
    quantization = "int8_float32" if int8 else "float32"
    if type(model).__name__ in _OWN:
        spec = _spec(model, codec)
        spec.validate()
        spec.optimize(quantization=quantization)
        spec.save(str(folder))
    else:
        _through_folder(model, codec, folder, quantization)
    mend_config(folder, codec)
    check_vocabulary(folder, codec)


def vocabulary_of(folder: Path) -> list[str]:
    """The tokens of a converted model, by id."""
    for name in _VOCABULARIES:
        if (folder / name).exists():
            return json.loads((folder / name).read_text(encoding="utf-8"))
    raise UserError(f"{folder}: no vocabulary in it. Make it again.")


def mend_config(folder: Path, codec: Codec) -> None:
    """CTranslate2 wants a token for unknown ones; a tokenizer of bytes has none, and padding, which no text holds, stands in."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("unk_token") is None or config["unk_token"] == "":
        config["unk_token"] = codec.tokenizer.convert_ids_to_tokens(codec.pad)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def check_vocabulary(folder: Path, codec: Codec) -> None:
    found = vocabulary_of(folder)
    known = codec.tokenizer.convert_ids_to_tokens(list(range(min(len(found), len(codec.tokenizer)))))
    wrong = next((i for i, (a, b) in enumerate(zip(found, known, strict=False)) if a != b), None)
    if wrong is not None or len(set(found)) != len(found):
        raise UserError(
            f"ctranslate2: token {wrong} of the converted vocabulary is not the tokenizer's. Use the runtime torch."
        )


def _spec(model: Any, codec: Codec) -> Any:
    from ctranslate2.converters import transformers as converters

    twin = copy.deepcopy(model).float().cpu()  # the loader takes it apart
    positions = _positions(twin) if model.config.is_encoder_decoder else None
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            spec = converters.M2M100Loader()(twin, codec.tokenizer)
            for side in (spec.encoder, spec.decoder):
                side.position_encodings.encodings = positions
        else:
            spec = converters.LlamaLoader()(twin, codec.tokenizer)
    return spec


def _positions(model: Any) -> torch.Tensor:
    """The table [P,D] of what is added at each position, from the first on."""
    table = model.model.decoder.embed_positions
    count = max(POSITIONS, model.config.max_position_embeddings) + table.padding_idx + 1
    return table.get_embedding(count, table.embedding_dim, table.padding_idx)[table.padding_idx + 1 :]


def _through_folder(model: Any, codec: Codec, folder: Path, quantization: str) -> None:
    from ctranslate2.converters import TransformersConverter
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="multistep-") as temporary:
        model.save_pretrained(temporary)
        tokenizer = copy.deepcopy(codec.tokenizer)  # a token an id, where the model has more ids than there are tokens
        tokenizer.add_tokens([f"<none{i}>" for i in range(len(tokenizer), model.config.vocab_size)])
        tokenizer.save_pretrained(temporary)
        try:
            TransformersConverter(temporary).convert(str(folder), quantization=quantization, force=True)
        # The converter has no error of its own: a class it has no loader for is a ValueError, an activation or a position encoding that it
        # does not know a NotImplementedError or KeyError, a part that the class lacks an AttributeError.
        except (ValueError, NotImplementedError, AttributeError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            raise UserError(
                f"ctranslate2: no conversion of a {type(model).__name__} ({reason}). Use the runtime torch."
            ) from None
