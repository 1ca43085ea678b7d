"""A small GPT over characters and tinyshakespeare to train it on: the CPU recipe of karpathy/nanoGPT, written anew.

Four pre-norm blocks of causal self-attention and a GELU network, four heads, width 128, a context of 64 characters, no biases,
the output layer tied to the table of characters; 0.80 million parameters. The recipe: batches of 12 windows, AdamW at 1e-3 after
100 updates of warm-up, betas 0.9 and 0.99, decay 0.1, clip 1, no dropout, 2000 updates; it says about 1.88 nats a character.

    model = GPT(GPTSize(vocabulary=len(characters())), seed=0)
    train, validation = windows("train"), windows("validation", stride=64)  # (inputs, targets), as multistep.optimize takes them

Sources: Radford et al. 2019 (the architecture); Press and Wolf 2017, arXiv 1608.05859 (tied tables).
Shapes: B rows, T positions, H heads, C width, V characters.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _common import data_folder

DATA = "tinyshakespeare"
INIT_SD = 0.02


class GPTSize(NamedTuple):
    vocabulary: int
    context: int = 64
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.0


class Block(nn.Module):
    """x + attention(norm(x)), then x + network(norm(x))."""

    def __init__(self, size: GPTSize):
        super().__init__()
        self.heads, self.drop = size.heads, size.dropout
        self.first_norm = nn.LayerNorm(size.width, bias=False)
        self.attend = nn.Linear(size.width, 3 * size.width, bias=False)  # queries, keys and values at once
        self.attended = nn.Linear(size.width, size.width, bias=False)
        self.second_norm = nn.LayerNorm(size.width, bias=False)
        self.up = nn.Linear(size.width, 4 * size.width, bias=False)
        self.down = nn.Linear(4 * size.width, size.width, bias=False)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        rows, positions, width = x_BTC.shape
        parts = self.attend(self.first_norm(x_BTC)).view(rows, positions, 3, self.heads, -1)
        q_BHTC, k_BHTC, v_BHTC = parts.permute(2, 0, 3, 1, 4)
        drop = self.dropout.p if self.training else 0.0
        mixed_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, dropout_p=drop, is_causal=True)
        mixed_BTC = mixed_BHTC.transpose(1, 2).reshape(rows, positions, width)
        x_BTC = x_BTC + self.dropout(self.attended(mixed_BTC))
        return x_BTC + self.dropout(self.down(F.gelu(self.up(self.second_norm(x_BTC)))))


class GPT(nn.Module):
    """Logits [B,T,V] of the character after every position, from ids [B,T] with T up to the context. Same seed, same weights."""

    def __init__(self, size: GPTSize, seed: int = 0):
        super().__init__()
        self.size = size
        # The head comes first, so that the tied table goes by its name: optimizers know an output layer by it.
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.characters = nn.Embedding(size.vocabulary, size.width)
        self.characters.weight = self.head.weight
        self.places = nn.Embedding(size.context, size.width)
        self.dropout = nn.Dropout(size.dropout)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            # What adds to the residual stream starts smaller: there are two such layers a block.
            added = name.endswith(("attended.weight", "down.weight"))
            sd = INIT_SD / (2 * size.layers) ** 0.5 if added else INIT_SD
            nn.init.normal_(parameter, std=sd, generator=generator)

    def forward(self, ids_BT: Tensor) -> Tensor:
        places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTC = self.dropout(self.characters(ids_BT) + self.places(places_T))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))


# ---------------------------------------------------------------------------------------------- data


@cache
def text(split: str) -> str:
    """A split's characters ("train": the first 90 %, "validation": the last 10 %, as nanoGPT cuts them)."""
    with gzip.open(data_folder(DATA) / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return "".join(json.loads(line)["text"] for line in file)


@cache
def characters() -> str:
    """The vocabulary: every character of both splits, sorted; an id is a place in it."""
    return "".join(sorted(set(text("train") + text("validation"))))


@cache
def ids(split: str) -> Tensor:
    """The split as ids [characters], int64."""
    place = {c: i for i, c in enumerate(characters())}
    return torch.tensor([place[c] for c in text(split)])


def windows(split: str, context: int = 64, stride: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets [N, context], each a view of the text: targets are the inputs one character on.

    Stride 1 gives every window, for drawing from at random; stride = context gives every character once, for judging.
    """
    ids_N = ids(split)
    return ids_N[:-1].unfold(0, context, stride), ids_N[1:].unfold(0, context, stride)


def decode(ids_T: Tensor) -> str:
    """Ids back into text."""
    return "".join(characters()[i] for i in ids_T.tolist())
