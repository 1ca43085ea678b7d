"""A peer of course.py on tinyshakespeare: the CPU recipe of karpathy/nanoGPT in plain torch, for so many seconds.

The model of gpt.py (four layers, width 128, 0.80 million parameters) and the recipe that its first lines give: windows of 64 characters in
batches of 12, AdamW at 1e-3, warm-up over a twentieth, cosine to a tenth, clip 1, decay 0.1, the best of its looks at the last
tenth of what it was given. The schedule goes by the clock, where nanoGPT's goes by 2,000 updates; bf16 if an update is faster with it.
What the other GPT peers share is here too: characters, windows, and the nats of rows.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from _peers import FittedText, GivenText
from gpt import GPT, GPTSize

CONTEXT, BATCH, LR, FLOOR, WARMUP, DECAY = 64, 12, 1e-3, 0.1, 0.05, 0.1
HELD, LOOKS, LOOK_WINDOWS = 0.1, 8, 240  # share of the text to look at; looks; windows a look, as nanoGPT's 20 batches
_UNKNOWN_NATS = 21 * math.log(2)  # a character that was never seen: any of Unicode's, as in multistep
_AT_ONCE, _TIMED = 8192, 5  # characters judged at once; updates

Logits = Callable[[Tensor], Tensor]  # ids [B,T] -> logits [B,T,V]


class Characters(NamedTuple):
    """The characters of a text, sorted, and the text as ids: train, and its end held out."""

    known: dict[str, int]
    train_N: Tensor
    held_N: Tensor

    def ids(self, text: str) -> Tensor:
        """-1: never seen."""
        return torch.tensor([self.known.get(c, -1) for c in text])


def characters(text: str) -> Characters:
    known = {c: n for n, c in enumerate(sorted(set(text)))}
    ids_N = torch.tensor([known[c] for c in text])
    cut = int((1 - HELD) * len(ids_N))
    return Characters(known, ids_N[:cut], ids_N[cut:])


def windows(ids_N: Tensor, starts_B: Tensor, context: int) -> tuple[Tensor, Tensor]:
    take_BT = starts_B[:, None] + torch.arange(context + 1)
    cut_BT = ids_N[take_BT]
    return cut_BT[:, :-1], cut_BT[:, 1:]


@torch.no_grad()
def loss_on(logits: Logits, ids_N: Tensor, context: int, count: int) -> float:
    """Nats a character over `count` windows spread evenly."""
    starts = torch.linspace(0, len(ids_N) - context - 1, count).long()
    x, y = windows(ids_N, starts, context)
    found = [
        F.cross_entropy(logits(a).float().flatten(0, 1), b.flatten(), reduction="sum")
        for a, b in zip(x.split(_AT_ONCE // context), y.split(_AT_ONCE // context), strict=True)
    ]
    return float(torch.stack(found).sum()) / y.numel()


@torch.no_grad()
def nats_of(logits: Logits, found: Characters, rows: list[str], context: int) -> np.ndarray:
    """Nats of each row's characters [N]; the rows are one text. Windows slide by half, so that all but the first have half of one before.

    That is how multistep reads a text, and better for the peer than windows that do not overlap. Before the text stands a line's end.
    """
    ids_T = torch.cat([found.ids("\n"), found.ids("".join(rows))])
    seen_T = ids_T.clamp(min=0)
    nats_T = np.zeros(len(ids_T))
    places, done, start = [], 1, 0
    while done < len(ids_T):
        end = min(len(ids_T), start + context + 1)
        places.append((start, end, done))
        done, start = end, max(0, end - 1 - context // 2)
    at_once = max(1, _AT_ONCE // context)
    for first in range(0, len(places), at_once):
        some = places[first : first + at_once]
        take_BT = torch.tensor([s for s, _, _ in some])[:, None] + torch.arange(context + 1)
        x = seen_T[take_BT.clamp(max=len(ids_T) - 1)]
        losses_BT = F.cross_entropy(logits(x[:, :-1]).float().transpose(1, 2), x[:, 1:], reduction="none").double()
        for (start, end, judged), row in zip(some, losses_BT.numpy(), strict=True):
            nats_T[judged:end] = row[judged - start - 1 : end - start - 1]
    nats_T[(ids_T < 0).numpy()] = _UNKNOWN_NATS
    ends = np.cumsum([len(row) for row in rows])
    return np.diff(np.concatenate([[0.0], np.cumsum(nats_T[1:])])[np.concatenate([[0], ends])])


# ---------------------------------------------------------------------------------------------- the recipe


def nanogpt(given: GivenText) -> FittedText:
    clock, found = given.clock, characters(given.text)
    model = GPT(GPTSize(len(found.known)), seed=given.seed)
    generator = torch.Generator().manual_seed(given.seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99), fused=True)

    def loss_of(bf16: bool) -> Tensor:
        starts = torch.randint(len(found.train_N) - CONTEXT, (BATCH,), generator=generator)
        x, y = windows(found.train_N, starts, CONTEXT)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())

    def timed(bf16: bool) -> float:
        begun = 0.0
        for n in range(_TIMED + 1):
            begun = time.monotonic() if n == 1 else begun
            loss_of(bf16).backward()
        model.zero_grad()
        return (time.monotonic() - begun) / _TIMED

    spent = {bf16: timed(bf16) for bf16 in (False, True)}
    bf16 = spent[True] < spent[False]

    def logits(ids_BT: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(ids_BT)

    begun_s, looked_s, updates = clock.used_s, 0.0, 0
    best, kept = math.inf, copy.deepcopy(model.state_dict())
    looks = [n / LOOKS for n in range(1, LOOKS)]
    while True:
        done = (clock.used_s - begun_s) / (clock.limit_s - begun_s - 2 * looked_s)
        last = done >= 1
        if last or (looks and done >= looks[0]):
            before = clock.used_s
            looks = looks[1:]
            model.eval()
            loss = loss_on(logits, found.held_N, CONTEXT, LOOK_WINDOWS)
            model.train()
            looked_s = clock.used_s - before
            if loss < best:
                best, kept = loss, copy.deepcopy(model.state_dict())
            if last:
                break
        share = min(max(0.1, done / WARMUP), FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        for group in optimizer.param_groups:
            group["lr"] = LR * share
        loss_of(bf16).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        updates += 1
    model.load_state_dict(kept)
    model.eval()
    facts = {"updates": updates, "bf16": bf16, "found": round(best, 4)}
    return FittedText(lambda rows: nats_of(logits, found, rows, CONTEXT), facts)
