"""Exports of a model that writes: a folder for transformers and what reads its folders, and a CTranslate2 model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multistep.data.records import bare
from multistep.engines.converted import convert
from multistep.engines.runtime import Runtime, check_installed
from multistep.engines.writers import open_pen, refusal
from multistep.export.checked import TEXTS, check_texts
from multistep.export.labels import write_readme
from multistep.generate import generate
from multistep.language_bundle import LanguageBundle, in_transformers_words, save_neural
from multistep.predictors.decoding import Decoding, Greedy
from multistep.predictors.ways import plain
from multistep.types import UserError
from multistep.writing import Neural

_NEW = 24  # tokens of each text that is compared


def _neural(bundle: LanguageBundle) -> Neural:
    assert isinstance(bundle.speaker, Neural)
    return bundle.speaker


def _prompts(bundle: LanguageBundle) -> list[np.ndarray]:
    """The texts as the model reads them. A model that needs more than a text gets them as bare sources."""
    neural = _neural(bundle)
    if bundle.layout.context or bundle.layout.choices:
        ids = neural.codec.whole(TEXTS) if neural.reads == "pairs" else neural.codec.pieces(TEXTS)
        return [p[: neural.context] for p in ids if len(p)]
    found = bundle.task.kind == "lm"
    records = bare(TEXTS, bundle.layout, "the text")
    if found:
        records = [type(r)("".join(r.targets), ()) for r in records]
    return neural.prompts(records)


def to_folder(bundle: LanguageBundle, into: Path) -> str:
    """The whole model, its tokenizer and generation_config.json, as transformers reads them."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    neural = _neural(bundle)
    save_neural(neural, into)
    auto = AutoModelForSeq2SeqLM if neural.model.config.is_encoder_decoder else AutoModelForCausalLM
    how = json.dumps(in_transformers_words(neural.decoding, neural))
    write_readme(into, "A model that writes", _FOLDER.format(auto=auto.__name__, how=how, reads=_READS[neural.reads]))
    loaded: Any = auto.from_pretrained(into, dtype=torch.float32).eval()
    (ends, _), decoding = neural.endings(), _short(plain(neural.decoding))
    prompts = _prompts(bundle)
    theirs = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.from_numpy(prompt)[None]
            found = loaded.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=decoding.max_new_tokens, num_beams=1, do_sample=False,
                repetition_penalty=1.0, no_repeat_ngram_size=0, min_new_tokens=0, eos_token_id=ends,
            )[0].tolist()  # fmt: skip
            start = 1 if loaded.config.is_encoder_decoder else len(prompt)
            theirs.append([t for t in found[start:] if t not in (*ends, neural.codec.pad)])
    ours = [[t for t in w.ids if t != neural.codec.pad] for w in generate(neural.model, prompts, decoding, ends)]
    return check_texts(theirs, ours, "folder") + ", greedily"


def to_ctranslate2(bundle: LanguageBundle, into: Path) -> str:
    """model.bin, config.json and the vocabulary of CTranslate2, in float32, and the tokenizer."""
    runtime, neural = Runtime(runtime="ctranslate2"), _neural(bundle)
    check_installed(runtime)
    convert(neural.model, neural.codec, into, int8=False)
    neural.codec.tokenizer.save_pretrained(into / "tokenizer")
    tuned = plain(neural.decoding)
    decoding = tuned if not refusal(tuned) else Greedy(max_new_tokens=tuned.max_new_tokens)
    how: dict[str, Any] = {"beam_size": getattr(decoding, "beams", 1)}
    lines = _TRANSLATOR if neural.model.config.is_encoder_decoder else _GENERATOR
    longest = "max_decoding_length" if neural.model.config.is_encoder_decoder else "max_length"
    ends, _ = neural.endings()
    how |= {longest: decoding.max_new_tokens, "repetition_penalty": decoding.repetition_penalty,
            "no_repeat_ngram_size": decoding.no_repeat_ngram,
            "end_token": neural.codec.tokenizer.convert_ids_to_tokens(ends)}  # fmt: skip
    if not neural.model.config.is_encoder_decoder:
        how["include_prompt_in_result"] = False
    if how["beam_size"] > 1:
        how["length_penalty"] = getattr(decoding, "length_penalty", 1.0)
    said = ", ".join(f"{k}={v!r}" for k, v in how.items())
    bos = neural.codec.tokenizer.convert_ids_to_tokens(neural.codec.bos)
    write_readme(into, "A model that writes, for CTranslate2", lines.format(how=said, bos=bos))
    prompts, short = _prompts(bundle), _short(tuned)
    pen = open_pen(into, neural.codec, neural.model.config, runtime)
    theirs = [w.ids for w in pen.write(prompts, short, ends)]
    ours = [w.ids for w in generate(neural.model, prompts, short, ends)]
    return check_texts(theirs, ours, "ctranslate2") + ", greedily"


def to_onnx(bundle: LanguageBundle, into: Path) -> str:
    raise UserError(
        "onnx: a model that writes needs a graph with its cache, which is not made here. Use --to ctranslate2 or --to folder."
    )


def _short(decoding: Decoding) -> Greedy:
    return Greedy(max_new_tokens=min(_NEW, decoding.max_new_tokens))


WRITER_TARGETS: Mapping[str, Callable[[LanguageBundle, Path], str]] = {
    "folder": to_folder, "ctranslate2": to_ctranslate2, "onnx": to_onnx,
}  # fmt: skip

_READS = {
    "stream": "It goes on with a text: give it the begin token and the text's tokens, without an end token.",
    "pairs": "It reads a source, as the tokenizer gives it, and writes the answer.",
    "prompts": "It answers turns of a conversation: use the tokenizer's chat template with add_generation_prompt=True.",
}

_FOLDER = """
A folder of transformers: `{auto}` and `AutoTokenizer` load it. {reads} `generation_config.json` holds the tuned way of writing,
which `generate` obeys: {how}

```python
from transformers import {auto}, AutoTokenizer

folder, text = ".", "a text"
model, tokenizer = {auto}.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
batch = tokenizer(text, return_tensors="pt")
ids = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
print(tokenizer.decode(ids, skip_special_tokens=True))
```
"""

_TRANSLATOR = """
```python
import ctranslate2
from transformers import AutoTokenizer

folder, text = ".", "a text"
tokenizer, model = AutoTokenizer.from_pretrained(f"{{folder}}/tokenizer"), ctranslate2.Translator(folder, compute_type="float32")
tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
found = model.translate_batch([tokens], {how})[0].hypotheses[0]
print(tokenizer.decode(tokenizer.convert_tokens_to_ids(found), skip_special_tokens=True))
```

`compute_type="int8"` is faster and a little less exact.
"""

_GENERATOR = """
```python
import ctranslate2
from transformers import AutoTokenizer

folder, text = ".", "a text"
tokenizer, model = AutoTokenizer.from_pretrained(f"{{folder}}/tokenizer"), ctranslate2.Generator(folder, compute_type="float32")
tokens = [{bos!r}, *tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])]
found = model.generate_batch([tokens], {how})[0].sequences_ids[0]
print(tokenizer.decode(found, skip_special_tokens=True))
```

`compute_type="int8"` is faster and a little less exact. A model for conversations: make the tokens with the tokenizer's chat template.
"""
