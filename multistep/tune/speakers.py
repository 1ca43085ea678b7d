"""What the trials of a language run share: records, tokenizer, models by shape and state, speakers. Nothing here decides.

Everything can be rebuilt from the run's folder and the data. Shapes: N records.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from multistep import dialogue
from multistep.budget import parse_budget
from multistep.codec import Codec
from multistep.config import FitConfig
from multistep.data.cells import Record
from multistep.data.records import LanguageData
from multistep.models.adapter import add_adapter, merged
from multistep.models.baselines import Copy, Dictionary, Lead, Nearest, Writer, load_writer
from multistep.models.choose import Choose
from multistep.models.decoder import load_decoder, new_decoder
from multistep.models.extract import Extract
from multistep.models.ngram import NGram
from multistep.models.passage import Passage
from multistep.models.seq2seq import load_seq2seq, new_seq2seq
from multistep.models.source import default_encoders
from multistep.models.spans import SpanEncoder, load_span_encoder
from multistep.objectives import NextToken, Seq2Seq
from multistep.other_writers import Counted, Mixed, Simple, Spans, encoder_features
from multistep.predictors.decoding import Greedy
from multistep.predictors.ways import Way, read_way
from multistep.state import read_folder, replace_folder
from multistep.strategy import FitWriter, Shape, TrainWriter
from multistep.subwords import load_tokenizer, train_bytes, train_characters, unknown_rate
from multistep.tasks.writing import Writing
from multistep.writing import Neural, Speaker, sizes

ALPHABET = 512  # different characters at most for a tokenizer whose tokens are characters
CHARACTERS_A_TOKEN = 600  # of train, for each entry of a byte-pair vocabulary from scratch
VOCABULARY = (512, 16384)
NGRAM_BYTES = 50_000_000  # of train that are counted
UNKNOWN_LIMIT = 0.05
ENCODED_S = 20_000  # characters a second that an encoder reads, on two slow cores
ENCODE_SHARE = 0.25  # of the budget: encoding train's sentences may take so much
JUDGED_BYTES = 200_000  # of right answers, where losses are judged
WATCHED_BYTES = 60_000  # of right answers, for looks while a training runs
JUDGED_ROWS = (50, 500)  # where texts are
_ANY = 10**9
Pretrained = Literal["", "decoder", "seq2seq", "encoder"]


class Speakers:
    """`pretrained`: what --model names ("decoder", "seq2seq", "encoder"), or ""."""

    def __init__(
        self, config: FitConfig, data: LanguageData, task: Writing, out: Path, pretrained: Pretrained, device: str
    ):
        self.config, self.data, self.task, self.out = config, data, task, out
        self.pretrained, self.device = pretrained, device
        self.records = {
            "train": data.train, "control": data.control, "calibration": data.calibration, "test": data.test,
        }  # fmt: skip
        self.watch: Callable[[float], None] | None = None  # long work tells it how far it is
        self.facts: dict[str, Any] = {}  # of the profile
        self._codec: Codec | None = None
        self._base: dict[str, Any] = {}
        self._encode: Callable[[Sequence[str]], np.ndarray] | None = None

    # ------------------------------------------------------------------ data

    @property
    def judges(self) -> dict[str, list[Record]]:
        """The records that decide, by split. Where nothing is left to decide with the calibration half, it joins the control half: answers
        found in passages and choices are not decoded, and without unanswerable questions there is no confidence to fit."""
        found_there = self.task.answers in ("passage", "choices") and self.pretrained in ("", "encoder")
        if not found_there or any(not t.strip() for r in self.data.train for t in r.targets):
            return self.records
        return {**self.records, "control": [*self.records["control"], *self.records["calibration"]]}

    def judged(self, split: str, texts: bool) -> list[Record]:
        """The records of a split that decide: a fixed few where texts are written, else the first bytes of it."""
        records = self.judges[split]
        if texts:
            most = int(self.facts.get("judged_rows", JUDGED_ROWS[1]))
            if len(records) <= most:
                return list(records)
            order = np.random.default_rng(self.config.seed).permutation(len(records))[:most]
            return [records[i] for i in sorted(order.tolist())]
        most, ends = int(self.facts.get("judged_bytes", JUDGED_BYTES)), np.cumsum(sizes(records))
        return list(records[: max(2, int(np.searchsorted(ends, most, side="right")))])

    def watched(self) -> list[Record]:
        """The first of the judged records: what looks during a training read."""
        kept, size = [], 0
        for record in self.judged("control", texts=False):
            size += sum(map(len, record.counted))
            if len(kept) >= 2 and size > WATCHED_BYTES:
                break
            kept.append(record)
        return kept

    # ------------------------------------------------------------------ tokenizer

    @property
    def codec(self) -> Codec:
        """The tokenizer of a pretrained model, or one trained on train alone and kept in the run's folder."""
        if self._codec is None:
            own = self.pretrained in ("decoder", "seq2seq")
            self._codec = Codec.load(self.config.model if own else self._trained())
            dialogue.ensure_template(self._codec.tokenizer)
        return self._codec

    def _trained(self) -> Path:
        folder = self.out / "tokenizer"
        if folder.exists():
            return folder
        temporary = self.out / ".tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        texts = self._to_learn()
        if self._by_characters(texts):
            train_characters(texts, temporary / "tokenizer.json")
        else:
            train_bytes(texts, self._vocabulary(texts), temporary / "tokenizer.json", ends=self.task.writes)
        _tokenizer_config(temporary)
        replace_folder(temporary, folder)
        return folder

    def _to_learn(self) -> list[str]:
        """Train's texts, both sides of it."""
        asked = [] if self.task.kind == "lm" else [self.task.reads(r) for r in self.data.train]
        return [*asked, *(t for r in self.data.train for t in r.targets)]

    def _by_characters(self, texts: Sequence[str]) -> bool:
        wanted = self.config.tokenizer
        if wanted != "auto":
            return wanted == "characters"
        return self.task.kind == "lm" and len(set().union(*texts)) <= ALPHABET

    def _vocabulary(self, texts: Sequence[str]) -> int:
        if self.config.vocabulary is not None:
            return self.config.vocabulary
        fitting = sum(map(len, texts)) // CHARACTERS_A_TOKEN // 128 * 128
        return int(min(VOCABULARY[1], max(VOCABULARY[0], fitting)))

    @property
    def characters(self) -> bool:
        """Whether every token is a character."""
        if self.pretrained:
            return False
        kind = self.codec.tokenizer.backend_tokenizer.model
        return type(kind).__name__ == "WordLevel"

    @property
    def positions(self) -> int:
        """How many tokens the pretrained model can take at once; a large number where nothing bounds it."""
        if not self.pretrained:
            return _ANY
        from transformers import AutoConfig

        settings = AutoConfig.from_pretrained(self.config.model).to_dict()
        return int(settings.get("max_position_embeddings") or settings.get("n_positions") or _ANY)

    # ------------------------------------------------------------------ models

    def model(self, shape: Shape, state: str | None = None) -> Any:
        """The model of this shape with a state's weights; None: as it begins."""
        model = self._new(shape)
        if state is not None:
            tensors = read_folder(self.folder(state))[1]
            values = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
            model.load_state_dict(values, strict=False)
        return model.to(self.device)

    def _new(self, shape: Shape) -> Any:
        codec, seed = self.codec, self.config.seed
        ids = {"pad": codec.pad, "bos": codec.bos, "eos": codec.eos}
        if shape.name is None:
            if shape.reads == "pairs":
                return new_seq2seq(shape.vocabulary, shape.width, shape.layers, shape.context, ids, seed, shape.dropout)
            return new_decoder(shape.vocabulary, shape.width, shape.layers, shape.context, ids, seed)
        match shape.reads:
            case "pairs":
                model = load_seq2seq(shape.name)
            case "spans":
                return load_span_encoder(shape.name)
            case _:
                model = load_decoder(shape.name)
        if shape.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                add_adapter(model, shape.lora)
        return model

    def spans(self, model: SpanEncoder, shape: Shape, longest: int = 64, least: float = 0.0) -> Spans:
        assert shape.name is not None
        return Spans(model, load_tokenizer(shape.name), shape.context, self.device, longest, least)

    # ------------------------------------------------------------------ states and speakers

    def folder(self, state: str) -> Path:
        return self.out / "states" / state

    def shape_of(self, state: str) -> Shape:
        """The shape of a state, found where its weights were trained or averaged."""
        return Shape(**read_folder(self.folder(state))[0]["shape"])

    def keep_writer(self, state: str, writer: Writer | NGram) -> None:
        temporary = self.folder(f".{state}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        writer.save(temporary)
        replace_folder(temporary, self.folder(state))

    def fit(self, action: FitWriter) -> tuple[Writer | NGram, dict[str, Any]]:
        """The writer, fitted on train, and what it found."""
        train = self.data.train
        match action.writer:
            case "ngram":
                return self.count("train"), {}
            case "copy":
                return Copy(), {}
            case "lead":
                return Lead(action.count), {}
            case "nearest":
                return Nearest.fit(train), {}
            case "dictionary":
                return Dictionary.fit([r.source for r in train], [r.targets[0] for r in train]), {}
            case "extract":
                return Extract.fit(train, self.encode)
            case "passage":
                return Passage.fit(train)
            case "choose":
                return Choose.fit(train, self.encode)

    def count(self, *splits: str) -> NGram:
        """The n-gram model of these splits, in the order of the text; of a huge one the last part is counted."""
        texts, size = [], 0
        for record in reversed([r for split in splits for r in self.records[split]]):
            texts += reversed(record.counted)
            size += sum(map(len, record.counted))
            if size > NGRAM_BYTES:
                break
        texts.reverse()
        return NGram.fit(["".join(texts)] if self.data.stream else texts)

    @property
    def encode(self) -> Callable[[Sequence[str]], np.ndarray] | None:
        """Features [N,D] of texts by a pretrained encoder that knows their script; None where there is none."""
        if self.config.model == "none" or not self._can_encode():
            return None
        if self._encode is None and (name := self.encoder_name()) is not None:
            self._encode = encoder_features(name, self.device, self.watch)
        return self._encode

    def _can_encode(self) -> bool:
        """Whether the encoder reads train in its share of a budget of time: what is begun has to end."""
        budget = parse_budget(self.config.budget)
        characters = sum(len(self.task.reads(r)) for r in self.data.train)
        return budget.unit != "seconds" or characters <= ENCODED_S * ENCODE_SHARE * budget.amount

    @property
    def ranking_encoder(self) -> str | None:
        """The encoder whose features rank sentences and choices; None where none does."""
        return self.encoder_name() if self._encode is not None else None

    def encoder_name(self) -> str | None:
        if self.pretrained == "encoder":
            return self.config.model
        sample = [self.task.reads(r) for r in self.data.train[:300]]
        return next((n for n in default_encoders() if unknown_rate(load_tokenizer(n), sample) <= UNKNOWN_LIMIT), None)

    def rows(self, model: Any, strategy: TrainWriter, records: Sequence[Record]) -> Any:
        """What `train` reads; and what was cut of it, by its name."""
        shape = strategy.shape
        if shape.reads == "spans":
            return self.spans(model, shape).rows(records), {}
        neural = Neural(model, self.codec, self.task, shape.reads, shape.context)
        rows = neural.rows(records, self.data.stream)
        rows.whole = strategy.optimizer.closure or not isinstance(strategy.objective, NextToken | Seq2Seq)
        return rows, {k: c._asdict() for k, c in neural.cut.items()}

    def neural(self, model: Any, shape: Shape, decoding: Way | None = None) -> Neural:
        """A model that writes, its adapter merged. Judged in the precision that it is trained in."""
        assert shape.reads != "spans"
        ready = merged(model) if shape.lora is not None else model
        return Neural(
            ready, self.codec, self.task, shape.reads, shape.context, decoding or self.greedy(),
            bool(self.facts.get("bf16")), self.watch,
        )  # fmt: skip

    def greedy(self) -> Greedy:
        return Greedy(max_new_tokens=int(self.facts.get("new_tokens", 128)))

    def speaker(self, standing: dict[str, Any]) -> Speaker:
        """What stands, ready to write. `standing`: kind, state and what else the kind needs."""
        match standing["kind"]:
            case "writer":
                return Simple(load_writer(self.folder(standing["state"]), self.encode))
            case "ngram":
                return Counted(NGram.load(self.folder(standing["state"])), self.codec, self.decoding(standing))
            case "spans":
                shape = self.shape_of(standing["state"])
                return self.spans(self.model(shape, standing["state"]), shape, standing["longest"], standing["least"])
            case "mixed":
                neural = self._trained_model(standing)
                ngram = NGram.load(self.folder(standing["ngram"]))
                return Mixed(neural, Counted(ngram, self.codec, neural.decoding), standing["share"])
            case _:
                return self._trained_model(standing)

    def _trained_model(self, standing: dict[str, Any]) -> Neural:
        shape = self.shape_of(standing["state"])
        return self.neural(self.model(shape, standing["state"]), shape, self.decoding(standing))

    def decoding(self, standing: dict[str, Any]) -> Way:
        given = standing.get("decoding")
        return self.greedy() if given is None else read_way(given)


def _tokenizer_config(folder: Path) -> None:
    """With which AutoTokenizer loads what we trained."""
    import json

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    if '"<unk>"' in (folder / "tokenizer.json").read_text(encoding="utf-8"):
        config["unk_token"] = "<unk>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
