"""What the trials of a run share: data, tokens, models, logits and the states on disk.

Everything here can be rebuilt from the run's folder and the data; nothing here decides. Shapes: N rows, D hidden width, K outputs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from multistep import team
from multistep.config import FitConfig
from multistep.data import Dataset
from multistep.evaluate import EncoderText, Rows, Watch, cache_folder, encode, head_logits, keep_hidden
from multistep.metrics import Scored
from multistep.models.base import TextEncoder
from multistep.models.encoder import Encoder, load_backbone, new_backbone
from multistep.models.linear import Linear
from multistep.models.lstm import LSTM, new_lstm
from multistep.models.source import HUB_ENGLISH, default_encoders, fingerprint, packaged_encoder
from multistep.predictors import Predictor
from multistep.state import read_folder, replace_file, write_folder
from multistep.subwords import encode_ids, load_tokenizer, train_tokenizer, train_words, unknown_rate
from multistep.tasks import Regress, Task
from multistep.types import UserError

UNKNOWN_LIMIT = 0.05  # a pretrained tokenizer that does not know more of the text than this is not used
_HIDDEN_BYTES = 3 * 2**30  # cached hidden states may take this much memory
_CACHED_FILES = 24
SCRATCH_WIDTH, SCRATCH_LAYERS, SCRATCH_VOCABULARY = 128, 1, 8000  # deeper and wider did worse in minutes (LOG.md)
LSTM_WIDTH, LSTM_VOCABULARY = 64, 10_000


class Workbench:
    """Data and models of one run. `out` is the run's folder."""

    def __init__(self, config: FitConfig, dataset: Dataset, task: Task, out: Path):
        self.config, self.dataset, self.task, self.out = config, dataset, task, out
        self.watch: Watch | None = None  # long encoding tells it how far it is
        self.device = device_for(config.device)
        splits = {
            "train": dataset.train, "control": dataset.control,
            "calibration": dataset.calibration, "test": dataset.test,
        }  # fmt: skip
        self.texts: dict[str, list[str]] = {k: [e.text for e in v] for k, v in splits.items()}
        self.targets: dict[str, np.ndarray] = {k: task.encode([e.label for e in v]) for k, v in splits.items()}
        self.source: str | None = None  # the pretrained encoder's folder or hub name; None when there is none
        self.scratch = ""  # "scratch" (a small BERT) or "lstm" when the weights are random, else ""
        self.tokenizer: Tokenizer | None = None
        self.max_length = 0
        self._base: TextEncoder | None = None
        self._rows: dict[str, Rows] = {}
        self.truncated: dict[str, int] = {}
        self._logits: dict[tuple[str, str], np.ndarray] = {}
        self._linear: dict[str, Linear] = {}

    # ------------------------------------------------------------------ the encoder

    def find_encoder(self) -> str:
        """Choose the pretrained encoder and its tokenizer; '' when one is there, else why none is used."""
        wanted = self.config.model
        if wanted == "none":
            return "--model none"
        if wanted == LSTM:
            return "--model lstm starts from scratch"
        names = default_encoders() if wanted == "auto" else iter([wanted])
        why = "no pretrained encoder is installed and the hub cannot be reached"
        sample = self.texts["train"][:500]
        for name in names:
            tokenizer = load_tokenizer(name)
            unknown = unknown_rate(tokenizer, sample)
            if unknown > UNKNOWN_LIMIT and wanted == "auto":
                why = f"the tokenizer of {Path(name).name} does not know {unknown:.0%} of this text"
                continue
            self.source, self.tokenizer = name, tokenizer
            return ""
        return why

    def start_from_scratch(self) -> None:
        """A tokenizer trained on train, a small model with random weights."""
        path = self.out / "tokenizer.json"
        self.scratch = LSTM if self.config.model == LSTM else "scratch"
        if not path.exists():
            temporary = self.out / ".tokenizer.json.tmp"  # whole under its name or not at all
            if self.scratch == LSTM:
                train_words(self.texts["train"], LSTM_VOCABULARY, temporary)
            else:
                train_tokenizer(self.texts["train"], SCRATCH_VOCABULARY, temporary)
            replace_file(temporary, path)
        self.tokenizer = Tokenizer.from_file(str(path))

    def adopt(self, facts: dict[str, Any]) -> None:
        """Take over what an earlier process of this run found in its profile."""
        if self.has_encoder or facts["encoder"] == "none":
            return
        if facts["encoder"] in ("scratch", LSTM):
            self.start_from_scratch()
        else:
            self.source, self.tokenizer = facts["encoder"], load_tokenizer(facts["encoder"])

    @property
    def base_model(self) -> str | None:
        """The pretrained encoder by a name that means something elsewhere: no path of this machine."""
        if self.source is None or not Path(self.source).is_dir():
            return self.source
        return HUB_ENGLISH if self.source == packaged_encoder() else Path(self.source).name

    @property
    def has_encoder(self) -> bool:
        return self.source is not None or bool(self.scratch)

    def base(self) -> TextEncoder:
        """The encoder before any training, with its head at zero. [PAD] is the first special token of a tokenizer of ours: id 0."""
        if self._base is None:
            seed, n_outputs = self.config.seed, self.task.n_outputs
            with torch.random.fork_rng(devices=[]):
                if self.source is not None:
                    self._base = Encoder(load_backbone(self.source), n_outputs)
                else:
                    assert self.tokenizer is not None and self.scratch
                    size = self.tokenizer.get_vocab_size()
                    if self.scratch == LSTM:
                        self._base = new_lstm(size, 0, LSTM_WIDTH, n_outputs, seed)
                    else:
                        backbone = new_backbone(size, 0, SCRATCH_WIDTH, SCRATCH_LAYERS, 512, seed)
                        self._base = Encoder(backbone, n_outputs)
            self._check_length(self._base)
        return self._base

    def _check_length(self, encoder: TextEncoder) -> None:
        """Raises UserError where texts are to be cut at more tokens than the encoder can read."""
        wanted, most = self.config.max_length, encoder.positions
        if wanted is not None and most is not None and wanted > most:
            name = self.base_model or "the encoder from scratch"
            raise UserError(
                f"max_length: {wanted} tokens, but {name} has {most} positions. Give {most} or less, or a model without such a limit "
                "(model=lstm)."
            )

    def reseeded(self, seed: int) -> Workbench:
        """The same data and tokens; what is random in the weights is drawn anew from `seed`."""
        import copy

        twin = copy.copy(self)
        twin.config = self.config.with_(seed=seed)
        if self.source is None:
            twin._base = None
        return twin

    def encoder(self, state: str | None = None) -> TextEncoder:
        """A fresh encoder on the device, with the weights of `state` laid over the first ones."""
        import copy

        model = copy.deepcopy(self.base())
        if state is not None:
            self._overlay(model, state)
        return model.to(self.device).eval()

    def _overlay(self, model: TextEncoder, state: str) -> None:
        meta, tensors = read_folder(self.state_folder(state))
        if meta.get("start"):
            self._overlay(model, meta["start"])
        values = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        model.load_state_dict(values, strict=False)

    @property
    def units(self) -> tuple[float, float]:
        """(scale, mean) between a head's outputs and the task's logits."""
        return (self.task.scale, self.task.mean) if isinstance(self.task, Regress) else (1.0, 0.0)

    # ------------------------------------------------------------------ tokens and features

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        assert self.tokenizer is not None
        return encode_ids(self.tokenizer, texts, self.max_length)[0]

    def rows(self, split: str, max_length: int) -> Rows:
        """Token ids and targets of a split; longer texts are cut, and counted in `truncated`."""
        self.use_length(max_length)
        if split not in self._rows:
            assert self.tokenizer is not None
            ids, self.truncated[split] = encode_ids(self.tokenizer, self.texts[split], max_length)
            self._rows[split] = Rows(ids, self.pad_id, self.device, self._train_targets(split))
        return self._rows[split]

    def use_length(self, max_length: int) -> None:
        """Texts are cut at so many tokens from now on."""
        if max_length != self.max_length:
            self._rows.clear()
            self.max_length = max_length

    @property
    def pad_id(self) -> int:
        return self.base().pad_id

    def _train_targets(self, split: str) -> torch.Tensor:
        targets = self.targets[split]
        scale, mean = self.units
        return torch.from_numpy((targets - mean) / scale if isinstance(self.task, Regress) else targets)

    def fits_hidden(self, rows: Rows) -> bool:
        """Whether the hidden states of these rows may be kept in memory."""
        return int(rows.lengths_N.sum()) * self.base().width * 4 <= _HIDDEN_BYTES

    def features(
        self, split: str, max_length: int, *, bf16: bool, cut: int = 0, take: np.ndarray | None = None
    ) -> tuple[np.ndarray, bool]:
        """Pooled features [N,D] of the frozen encoder (of the rows `take`), and whether they came from the disk cache."""
        rows = self.rows(split, max_length)
        if take is None and rows.below is not None:  # the hidden states that are kept are another state's
            take = np.arange(len(rows.ids))
        part = rows if take is None else rows.subset(take)
        path = self._feature_path(part, max_length, bf16)
        cut = cut if take is None else 0
        if path is not None and path.exists():
            if cut > 0 and part.cut == 0:
                keep_hidden(self.encoder(), part, cut, bf16=bf16, watch=self.watch)
            return load_file(path)["features_ND"], True
        features_ND = encode(self.encoder(), part, bf16=bf16, cut=cut, watch=self.watch)
        if path is not None:
            _store(path, features_ND)
        return features_ND, False

    def _feature_path(self, rows: Rows, max_length: int, bf16: bool) -> Path | None:
        if self.source is None:
            return None
        digest = hashlib.sha256(f"{fingerprint(self.source)} {max_length} {bf16} {self.device}".encode())
        for row in rows.ids:
            digest.update(np.asarray(row, dtype=np.int32).tobytes() + b"|")
        return cache_folder() / "features" / f"{digest.hexdigest()[:40]}.safetensors"

    # ------------------------------------------------------------------ states and logits

    def state_folder(self, state: str) -> Path:
        return self.out / "states" / state

    def save_weights(self, state: str, model: TextEncoder, names: Sequence[str], start: str | None) -> None:
        """Keep the named parameters of `model` as a state; the others are those of `start`."""
        parameters = dict(model.named_parameters())
        tensors = {f"model.{n}": parameters[n] for n in names}
        write_folder(self.state_folder(state), {"family": "encoder", "start": start}, tensors)

    def linear(self, state: str) -> Linear:
        if state not in self._linear:
            self._linear[state] = Linear.load(self.state_folder(state))
        return self._linear[state]

    def keep_logits(self, state: str, split: str, logits_NK: np.ndarray) -> None:
        self._logits[state, split] = logits_NK
        folder = self.out / "states" / "logits"
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{state}.{split}.tmp.npy"
        np.save(temporary, logits_NK, allow_pickle=False)
        os.replace(temporary, folder / f"{state}.{split}.npy")

    def logits(self, family: str, state: str, split: str, bf16: bool = False) -> np.ndarray:
        """Logits [N,K] of a state on a split; computed once."""
        if (state, split) not in self._logits:
            path = self.out / "states" / "logits" / f"{state}.{split}.npy"
            if path.exists() and split != "test":
                self._logits[state, split] = np.load(path, allow_pickle=False)
            else:
                self.keep_logits(state, split, self._compute_logits(family, state, split, bf16))
        return self._logits[state, split]

    def _compute_logits(self, family: str, state: str, split: str, bf16: bool) -> np.ndarray:
        if family == "linear":
            return self.linear(state).logits(self.texts[split])
        model = self.encoder(state)
        return self.encoder_logits(model, self.rows(split, self.max_length), bf16)

    def encoder_logits(self, model: TextEncoder, rows: Rows, bf16: bool) -> np.ndarray:
        scale, mean = self.units
        return head_logits(model, encode(model, rows, bf16=bf16, watch=self.watch)) * scale + mean

    def text_model(self, family: str, state: str, bf16: bool) -> Linear | EncoderText:
        """The state as it will be served."""
        if family == "linear":
            return self.linear(state)
        scale, mean = self.units
        return EncoderText(self.encoder(state), self.tokenize, self.pad_id, bf16, scale, mean)

    def scored(self, predictor: Predictor, states: dict[str, str], split: str, bf16: bool) -> Scored:
        """What a predictor over these states gives on a split."""
        logits = {m: self.logits(m, states[m], split, bf16) for m in predictor.models()}
        logits_NK, decisions = predictor.decide(self.task, logits)
        return Scored(self.targets[split], logits_NK, decisions)


def device_for(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' was asked for, but torch sees no GPU here. Use device=cpu or device=auto.")
    if wanted == "cpu" or not torch.cuda.is_available():
        return "cpu"
    team.check_gpus()
    return "cuda"


def _store(path: Path, features_ND: np.ndarray) -> None:
    """Keep features in the cache if there is room; the cache is a convenience and never stops a run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"features_ND": features_ND}, temporary)
        os.replace(temporary, path)
        files = sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        for old in files[:-_CACHED_FILES]:
            old.unlink(missing_ok=True)
    except Exception:  # safetensors raises its own kinds for a full disk
        return
