"""The bundle of a model that writes or finds answers: one folder that is replaced whole or not at all.

model/  multistep.json                                              task, layout of the data, what stands, decoding
        config.json, model.safetensors, tokenizer files             a decoder or sequence-to-sequence model: loads in transformers
        generation_config.json                                      how it writes, in transformers' words
        adapter/                                                    the adapter alone, as peft reads it, where one was trained
        writer.json, ngram.safetensors ...                          a cheap writer
        examples.jsonl                                              what few-shot prompts choose from
        README.md                                                   the card

generation_config.json says what transformers has words for; multistep.json has all of it, and names what the other leaves out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multistep import __version__
from multistep.codec import Codec
from multistep.data.cells import Record
from multistep.data.records import bare, read_records, read_sources
from multistep.data.shapes import Layout
from multistep.engines import Runtime, prepare
from multistep.examples import FILE, Examples
from multistep.metrics.texts import signature
from multistep.models.baselines import load_writer
from multistep.models.choose import Choose
from multistep.models.encoder import load_backbone
from multistep.models.extract import Extract
from multistep.models.hub import load_pretrained
from multistep.models.ngram import NGram
from multistep.models.spans import load_span_encoder, save_span_encoder
from multistep.other_writers import Counted, Mixed, Simple, Spans, encoder_features, measured
from multistep.predictors.decoding import Beam, Greedy, Sample
from multistep.predictors.ways import Way, plain, read_way, shots, words
from multistep.report.card import with_section
from multistep.state import replace_folder
from multistep.subwords import load_tokenizer, save_tokenizer
from multistep.tasks.writing import LOSSES, Writing
from multistep.types import Prediction, UserError
from multistep.writing import Neural, Speaker

FORMAT = 1
TUNED = "How it predicts"  # the card's section


@dataclass
class LanguageBundle:
    """A loaded bundle: records or texts in, predictions out."""

    task: Writing
    layout: Layout
    speaker: Speaker
    info: dict[str, Any]

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """One answer a text, in order."""
        return self.answer(self.records(texts))

    def records(self, texts: Sequence[str]) -> list[Record]:
        """What `answer` reads of bare texts. Raises UserError."""
        if any(not text.strip() for text in texts):
            raise UserError("text: no text in it. Give at least one text.")
        records = bare(texts, self.layout, "the text")
        return [Record("".join(r.targets), ()) for r in records] if self.task.kind == "lm" else records

    def answer(self, records: Sequence[Record]) -> list[Prediction]:
        return self.speaker.write(list(records))

    def read(self, source: str | Path) -> list[Record]:
        """Records without their answers: of a file, of standard input ("-"), or of a text."""
        return read_sources(source, self.layout)

    def evaluate(self, source: str | Path) -> dict[str, Any]:
        """Score the bundle on data with right answers: each metric with its bootstrap standard error."""
        records = read_records(source, self.layout)
        references = [r.targets for r in records]
        values = measured(self.speaker, self.task, self.info["metric"], records, bool(self.info["stream"]))
        found = {
            name: {
                "value": v.value,
                "stderr": v.stderr,
                "signature": signature(name, () if name in LOSSES else references),
            }
            for name, v in values.items()
        }
        return {"metrics": found, "n": len(records), "data": str(source), "cut": self.cut()}

    def cut(self) -> dict[str, dict[str, int]]:
        """What of the records last read was too long for the model: rows and tokens, by what it was."""
        neural = self.speaker.neural if isinstance(self.speaker, Mixed) else self.speaker
        found = neural.cut if isinstance(neural, Neural) else {}
        return {what: {"rows": c.rows, "tokens": c.tokens} for what, c in found.items() if c.rows}


# ---------------------------------------------------------------------------------------------- writing


def write_language_bundle(
    folder: Path, task: Writing, layout: Layout, speaker: Speaker, standing: Mapping[str, Any], extra: Mapping[str, Any],
    adapter: Callable[[Path], None] | None = None, encoder: str | None = None,
) -> None:  # fmt: skip
    """Write what `speaker` needs into `folder`, in one step; an older bundle there is replaced. `adapter`: writes the adapter of
    the model into a folder, where one was trained. `encoder`: what ranked sentences, where something did."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        info: dict[str, Any] = {
            "format": FORMAT, "multistep": __version__, "language": True, "task": task.model_dump(mode="json"),
            "layout": layout.model_dump(mode="json"), "predictor": {"kind": standing["kind"]}, "standing": dict(standing), **extra,
        }  # fmt: skip
        match speaker:
            case Simple():
                speaker.writer.save(temporary)
                if encoder is not None and isinstance(speaker.writer, Extract | Choose):
                    load_backbone(encoder).save_pretrained(temporary / "encoder")
                    load_tokenizer(encoder).save(str(temporary / "encoder" / "tokenizer.json"))
            case Counted():
                speaker.ngram.save(temporary)
                speaker.codec.tokenizer.save_pretrained(temporary)
            case Mixed():
                speaker.counted.ngram.save(temporary)
                info["neural"] = save_neural(speaker.neural, temporary)
            case Neural():
                info["neural"] = save_neural(speaker, temporary)
                if adapter is not None:
                    adapter(temporary / "adapter")
            case Spans():
                save_span_encoder(speaker.model, temporary)
                save_tokenizer(speaker.tokenizer, temporary, speaker.context)
                info["spans"] = {"context": speaker.context, "longest": speaker.longest, "least": speaker.least}
        (temporary / "multistep.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_neural(neural: Neural, folder: Path) -> dict[str, Any]:
    """A folder of transformers; and what else the bundle has to know of the model."""
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    neural.model.generation_config = GenerationConfig(**in_transformers_words(neural.decoding, neural))
    neural.model.save_pretrained(folder)
    neural.codec.tokenizer.save_pretrained(folder)
    if shots(neural.decoding):
        neural.examples.save(folder)
    return {
        "reads": neural.reads, "context": neural.context, "bf16": neural.bf16,
        "not_in_generation_config": list(not_in_transformers_words(neural.decoding, neural)),
    }  # fmt: skip


def rewrite_decoding(
    folder: Path, neural: Neural, way: Way, policy: Mapping[str, Any], said: str, engine: Mapping[str, Any] | None = None,
    runs_on: Path | None = None,
) -> None:  # fmt: skip
    """Replace how a bundle's model writes, in one step: the weights stay as they are. `neural`: what the bundle was loaded as; its
    examples are kept where the way asks for some. `policy`: why, for multistep.json; `said`: the same in words, for the card.
    `engine`: what writes, none of it our own; `runs_on`: the folder of its files, where it has some."""
    from transformers import GenerationConfig

    info = json.loads((folder / "multistep.json").read_text(encoding="utf-8"))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(folder, temporary)
        (temporary / FILE).unlink(missing_ok=True)
        if shots(way):
            neural.examples.save(temporary)
        GenerationConfig(**in_transformers_words(way, neural)).save_pretrained(temporary)
        info["standing"] = {**info["standing"], "decoding": way.model_dump(mode="json")}
        info["neural"] = {**info["neural"], "not_in_generation_config": list(not_in_transformers_words(way, neural))}
        info["policy"] = dict(policy)
        info.pop("engine", None)
        shutil.rmtree(temporary / "engines", ignore_errors=True)
        if engine:
            info["engine"] = dict(engine)
        if runs_on is not None:
            shutil.copytree(runs_on, temporary / "engines" / runs_on.name)
        card = temporary / "README.md"
        if card.exists():
            card.write_text(with_section(card.read_text(encoding="utf-8"), TUNED, said), encoding="utf-8")
        (temporary / "multistep.json").write_text(json.dumps(info, indent=1, ensure_ascii=False), encoding="utf-8")
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def not_in_transformers_words(way: Way, neural: Neural) -> tuple[str, ...]:
    """What of it generation_config.json cannot say, or says otherwise. A tool that reads that file writes as the innermost way does."""
    inner = plain(way)
    stops = neural.endings(inner)[1].stop  # with those of the chat template
    said = [] if way == inner else [f"{words(way)}: there it is {words(inner)}"]
    if stops:
        said.append(f"stop texts: {', '.join(map(repr, stops))}")
    penalized = inner.repetition_penalty != 1.0 or inner.no_repeat_ngram > 0
    if penalized and not neural.model.config.is_encoder_decoder:
        said.append("repetition penalties: there the prompt counts too")
    if isinstance(inner, Sample):
        said.append(f"seed {inner.seed}")
    return tuple(said)


def in_transformers_words(way: Way, neural: Neural) -> dict[str, Any]:
    """Keys of generation_config.json: of a way that wraps others, those of the innermost one."""
    (ends, decoding), config = neural.endings(plain(way)), neural.model.config
    found: dict[str, Any] = {
        "max_new_tokens": decoding.max_new_tokens, "do_sample": False, "num_beams": 1,
        "eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": neural.codec.pad, "bos_token_id": neural.codec.bos,
    }  # fmt: skip
    if config.is_encoder_decoder:
        found["decoder_start_token_id"] = config.decoder_start_token_id
    if decoding.min_new_tokens:
        found["min_new_tokens"] = decoding.min_new_tokens
    if decoding.repetition_penalty != 1.0:
        found["repetition_penalty"] = decoding.repetition_penalty
    if decoding.no_repeat_ngram:
        found["no_repeat_ngram_size"] = decoding.no_repeat_ngram
    match decoding:
        case Beam():
            found |= {"num_beams": decoding.beams, "length_penalty": decoding.length_penalty, "early_stopping": False}
        case Sample():
            found |= {
                "do_sample": True,
                "temperature": decoding.temperature,
                "top_p": decoding.top_p,
                "top_k": decoding.top_k,
            }
            if decoding.min_p:
                found["min_p"] = decoding.min_p
        case Greedy():
            pass
    return found


# ---------------------------------------------------------------------------------------------- reading


def load_language_bundle(folder: Path, info: Mapping[str, Any], device: str = "cpu") -> LanguageBundle:
    """What `write_language_bundle` wrote. Raises ValueError, KeyError or OSError where it is damaged."""
    task, layout = Writing.parse(info["task"], "task"), Layout.parse(info["layout"], "layout")
    standing = info["standing"]
    given = standing.get("decoding")
    decoding: Way = Greedy() if given is None else read_way(given)
    speaker: Speaker
    match standing["kind"]:
        case "writer":
            ranked = (folder / "encoder").is_dir()
            encode = encoder_features(str(folder / "encoder"), device) if ranked else None
            speaker = Simple(load_writer(folder, encode))
        case "ngram":
            speaker = Counted(NGram.load(folder), Codec.load(folder), decoding)
        case "spans":
            settings = info["spans"]
            speaker = Spans(
                load_span_encoder(folder).to(device), load_tokenizer(str(folder)), settings["context"], device,
                settings["longest"], settings["least"],
            )  # fmt: skip
        case "mixed":
            neural = _load_neural(folder, info["neural"], task, decoding, device)
            speaker = Mixed(neural, Counted(NGram.load(folder), neural.codec, decoding), standing["share"])
        case _:
            speaker = _load_neural(folder, info["neural"], task, decoding, device)
    if engine := info.get("engine"):
        if not isinstance(speaker, Neural):
            raise UserError(
                f"engine: what writes here is a {standing['kind']}, which has one engine. Take it out of {folder}."
            )
        speaker = prepare(speaker, Runtime.parse(engine, "engine"), folder, make=False)
    return LanguageBundle(task, layout, speaker, {**info, "path": str(folder)})


def _load_neural(folder: Path, settings: Mapping[str, Any], task: Writing, decoding: Way, device: str) -> Neural:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if settings["reads"] == "pairs" else AutoModelForCausalLM
    model = load_pretrained(auto, str(folder), "the bundle's model").to(device).eval()
    return Neural(
        model, Codec.load(folder), task, settings["reads"], settings["context"], decoding, settings["bf16"],
        pool=Examples.load(folder, task.reads),
    )  # fmt: skip
