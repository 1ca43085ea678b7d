"""From texts to logits: the engine that predictors ask, and the rows that encoders read.

Encoding runs over length-bucketed batches. Everything here serves both training and serving, so what is evaluated is what is served.
Shapes: N rows, B batch, T tokens, D hidden width, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from multistep.allocation import in_halves, room
from multistep.data.batches import Batches, by_length
from multistep.models.base import TextEncoder
from multistep.models.encoder import pad
from multistep.precision import mixed

Watch = Callable[[float], None]  # told the share that is done, after every batch; may raise to stop


class TextModel(Protocol):
    """A model that a predictor can name."""

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """[N,K] float64."""
        ...


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """As many threads of torch for what runs inside; 0 changes nothing. The number belongs to the calling thread, so it is set where
    the work is done and not once for all."""
    before = torch.get_num_threads()
    if threads in (0, before):
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Engine:
    """The models of a bundle, by name ("linear", "encoder"). `threads`: of torch; `batch`: texts at once at most; 0: as it comes."""

    def __init__(self, models: Mapping[str, TextModel], threads: int = 0, batch: int = 0):
        self.models = dict(models)
        self.threads, self.batch = threads, batch

    def logits(self, model: str, texts: Sequence[str]) -> np.ndarray:
        chosen, size = self.models[model], self.batch or max(1, len(texts))
        with on_threads(self.threads):
            found = [chosen.logits(texts[i : i + size]) for i in range(0, len(texts), size)]
        return np.concatenate(found) if found else chosen.logits(texts)


@dataclass
class Rows:
    """Encoder inputs of one split: token ids, or the hidden states after `cut` layers; and targets where they are known."""

    ids: list[np.ndarray]
    pad_id: int
    device: str
    targets: Tensor | None = None
    cut: int = 0
    hidden_SD: Tensor | None = (
        None  # the rows' hidden states one after the other, S tokens in all; where there was room
    )
    below: str | None = None  # the state of whose layers they are, where it is not the first

    def __post_init__(self) -> None:
        self.lengths_N = np.array([len(r) for r in self.ids], dtype=np.int64)
        self.starts_N = np.concatenate([[0], np.cumsum(self.lengths_N)])

    def order(self, batch_size: int, seed: int) -> Batches:
        return Batches(self.lengths_N, batch_size, seed)

    def tokens(self, rows: np.ndarray) -> int:
        return int(self.lengths_N[rows].sum())

    def inputs(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Token ids [B,T] or hidden states [B,T,D], and the mask [B,T]."""
        if self.hidden_SD is None:
            ids_BT, mask_BT = pad([self.ids[r] for r in rows], self.pad_id)
            return ids_BT.to(self.device), mask_BT.to(self.device)
        lengths = self.lengths_N[rows]
        mask = np.arange(lengths.max())[None, :] < lengths[:, None]
        take = np.where(mask, self.starts_N[rows][:, None] + np.arange(mask.shape[1]), self.starts_N[rows][:, None])
        hidden_BTD = self.hidden_SD[torch.from_numpy(take).to(self.hidden_SD.device)].to(self.device)
        return hidden_BTD, torch.from_numpy(mask).to(self.device)

    def load(self, rows: np.ndarray) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((inputs, mask), targets) of these rows."""
        assert self.targets is not None
        return self.inputs(rows), self.targets[torch.from_numpy(rows)].to(self.device)

    def outputs(self, model: TextEncoder, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """The model's outputs [B,K] for inputs that `load` gave."""
        return model(*inputs, self.cut)

    def subset(self, rows: np.ndarray) -> Rows:
        """Some of the rows, from their token ids."""
        targets = None if self.targets is None else self.targets[torch.from_numpy(rows)]
        return Rows([self.ids[r] for r in rows], self.pad_id, self.device, targets)

    def beginning(self, count: int) -> Rows:
        """The first rows, with what is kept of them."""
        hidden_SD = None if self.hidden_SD is None else self.hidden_SD[: int(self.starts_N[: count + 1][-1])]
        targets = None if self.targets is None else self.targets[:count]
        return Rows(self.ids[:count], self.pad_id, self.device, targets, self.cut, hidden_SD, self.below)


@torch.no_grad()
def encode(
    model: TextEncoder, rows: Rows, *, bf16: bool = False, cut: int = 0, watch: Watch | None = None, batch: int = 0
) -> np.ndarray:
    """Pooled features [N,D] float32. With `cut` > 0 the hidden states after `cut` layers are kept in `rows`. `batch`: rows at once
    at most, unless 0."""
    if cut > 0 and rows.cut == 0:
        keep_hidden(model, rows, cut, bf16=bf16, watch=watch)
    model.eval()
    features_ND = np.empty((len(rows.ids), model.width), dtype=np.float32)
    done = 0

    def one(part: np.ndarray) -> None:
        x, mask_BT = rows.inputs(part)
        with mixed(bf16, x.device.type):
            features_BD = model.upper(x, mask_BT, rows.cut) if rows.cut else model.features(x, mask_BT)
        features_ND[part] = features_BD.float().cpu().numpy()

    for part in by_length(rows.lengths_N, model.tokens_at_once(), batch):
        in_halves(part, one)
        done += len(part)
        if watch is not None:
            watch(done / len(rows.ids))
    return features_ND


@torch.no_grad()
def keep_hidden(model: TextEncoder, rows: Rows, cut: int, *, bf16: bool = False, watch: Watch | None = None) -> None:
    """Keep the hidden states after `cut` layers in `rows`: what training the layers above starts from. Goes on from states that are kept
    below."""
    assert rows.cut < cut
    model.eval()
    hidden_SD = room((int(rows.lengths_N.sum()), model.width), rows.device)
    done = 0

    def one(part: np.ndarray) -> None:
        x, mask_BT = rows.inputs(part)
        with mixed(bf16, x.device.type):
            hidden_BTD = model.lower(x, mask_BT, cut, rows.cut)
        places = np.concatenate([np.arange(int(rows.starts_N[r]), int(rows.starts_N[r + 1])) for r in part])
        hidden_SD[torch.from_numpy(places).to(hidden_SD.device)] = hidden_BTD[mask_BT].float().to(hidden_SD.device)

    for batch in by_length(rows.lengths_N, model.tokens_at_once()):
        in_halves(batch, one)
        done += len(batch)
        if watch is not None:
            watch(done / len(rows.ids))
    rows.hidden_SD, rows.cut = hidden_SD, cut


def head_logits(model: TextEncoder, features_ND: np.ndarray) -> np.ndarray:
    """Logits [N,K] float64 of the model's head on pooled features."""
    weight = model.head.weight.detach().cpu().numpy().astype(np.float64)
    bias = model.head.bias.detach().cpu().numpy().astype(np.float64)
    return features_ND.astype(np.float64) @ weight.T + bias


@dataclass
class EncoderText:
    """An encoder with its tokenizer, as a text model. `scale`, `mean`: a regression head's units (1 and 0 otherwise). `batch`: rows at
    once at most, `threads`: of torch while it computes; 0: as it comes."""

    model: TextEncoder
    tokenize: Callable[[Sequence[str]], list[np.ndarray]]
    pad_id: int
    bf16: bool = False
    scale: float = 1.0
    mean: float = 0.0
    batch: int = 0
    threads: int = 0

    def rows(self, texts: Sequence[str]) -> Rows:
        return Rows(self.tokenize(texts), self.pad_id, self.model.head.weight.device.type)

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.model.head.out_features))
        with on_threads(self.threads):
            features_ND = encode(self.model, self.rows(texts), bf16=self.bf16, batch=self.batch)
        return head_logits(self.model, features_ND) * self.scale + self.mean


def cache_folder() -> Path:
    """Where encoded features are kept: MULTISTEP_CACHE, else the user's cache folder."""
    import os

    root = os.environ.get("MULTISTEP_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "multistep"
    )
    return Path(root)
