"""Keys and values of what was read and written so far, and attention over them, a position at a time.

Shapes: L layers, B rows, G heads of keys and values, R heads of queries for each of them, P positions that there is room for,
T positions so far, N positions at once, E width of a head. BG, GR: one dimension of both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROW = 64  # positions that a full cache grows by, at least


class Cache:
    """[L,2,BG,P,E], allocated once and again when it is full. Memory is written in place, so that a step copies nothing else."""

    def __init__(self, layers: int, rows: int, heads: int, width: int, positions: int, like: Tensor):
        self.heads, self.length = heads, 0
        self.data = like.new_empty((layers, 2, rows * heads, positions + GROW, width))

    def fill(self, layer: int, keys_BGNE: Tensor, values_BGNE: Tensor, at: int = 0) -> None:
        """N positions of a layer from position `at` on; `length` is set after the last."""
        for part, new in enumerate((keys_BGNE, values_BGNE)):
            self.data[layer, part, :, at : at + new.shape[2]] = new.flatten(0, 1)

    def make_room(self, positions: int) -> None:
        """For so many positions more."""
        lacking = self.length + positions - self.data.shape[3]
        if lacking > 0:
            self.data = F.pad(self.data, (0, 0, 0, max(GROW, self.length // 4, lacking)))

    def first(self, layer: int, positions: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B,G,T,E] of the first so many positions of a layer."""
        keys, values = self.data[layer, :, :, :positions].unflatten(1, (-1, self.heads)).unbind(0)
        return keys, values

    def open(self) -> tuple[Tensor, Tensor, Tensor]:
        """Take in a position: where its keys and values go [L,2,B,G,E], and with it all keys [L,BG,E,T] and values [L,BG,T,E]."""
        self.make_room(1)
        at, self.length = self.length, self.length + 1
        slots = self.data[:, :, :, at].unflatten(2, (-1, self.heads))
        keys, values = self.data[:, :, :, : self.length].unbind(1)
        return slots, keys.transpose(2, 3), values

    def keep(self, rows: Tensor) -> None:
        was = self.data.unflatten(2, (-1, self.heads))
        now = was.new_empty((*was.shape[:2], len(rows), *was.shape[3:]))
        now[..., : self.length, :] = was[:, :, rows, :, : self.length]  # the room behind them holds nothing yet
        self.data = now.flatten(2, 3)


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, out: Tensor) -> None:
    """Queries [BG,R,E], keys [BG,E,T], values [BG,T,E] -> out [BG,R,E]. `bias` [BG,1,T] or [1,1,1]: 0, or -inf for what is hidden.

    Three plain products are faster here than the fused kernel, which is made for many queries. Results go where they are told
    (`out=`), which also keeps autocast out: a step computes in the weights' own precision."""
    scores = query.new_empty((*query.shape[:2], keys.shape[2]))
    torch.baddbmm(bias, query, keys, alpha=scale, out=scores)
    torch.bmm(torch.softmax(scores, -1), values, out=out)


def fused(*linears: torch.nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Linear layers on the same input as one: weight [in,out] and bias [out]. A single layer's weight is not copied."""
    weight = linears[0].weight if len(linears) == 1 else torch.cat([m.weight for m in linears])
    biases: list[Tensor] = [m.bias for m in linears if m.bias is not None]
    return weight.detach().t(), torch.cat(biases).detach() if biases else None


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)


def add_projected(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """x <- x + y W + b"""
    x.addmm_(y, weight)
    if bias is not None:
        x.add_(bias)
