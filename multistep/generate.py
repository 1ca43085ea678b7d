"""The generation engine: prompts in, token ids out, token by token or whole; batched, with cached keys and values.

Rows that have ended leave the batch. What a request gets does not depend on what else is in the batch (up to the rounding of sums
in batches of other shapes; random numbers are drawn per request and position).
Shapes: B rows, K beams, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from multistep.allocation import in_halves
from multistep.models.step import Stepper, stepper_of
from multistep.predictors.decoding import Beam, Decoding, Greedy, Sample

BATCH = 32  # prompts at once
BEAMS = 64  # beams at once
_BLOCK = 64  # logits of which the largest is found first


@dataclass
class Written:
    """What a request gave. `score`: mean log-probability a token, in nats; `ended`: by an end token or stop text, not by length."""

    ids: list[int] = field(default_factory=list)
    score: float = 0.0
    ended: bool = False


Decode = Callable[[list[int]], str]  # token ids -> text, for stop texts


class Pen(Protocol):
    """What writes in place of `generate` (multistep/engines/writers.py)."""

    def write(
        self, prompts: Sequence[np.ndarray], decoding: Decoding, end_ids: Sequence[int], decode: Decode | None = None,
        watch: Callable[[float], None] | None = None,
    ) -> list[Written]:  # fmt: skip
        """A text for every prompt, in order, as `generate` gives them."""
        ...

    def can(self, decoding: Decoding) -> bool:
        """Whether it writes so."""
        ...


def generate(
    model: Any, prompts: Sequence[np.ndarray], decoding: Decoding, end_ids: Sequence[int], *,
    decode: Decode | None = None, batch: int = BATCH, watch: Callable[[float], None] | None = None,
) -> list[Written]:  # fmt: skip
    """A text for every prompt (token ids), in order. `end_ids`: the tokens that end a text. Raises ValueError on an empty prompt."""
    return [
        found[0] for found in several(model, prompts, decoding, end_ids, 1, decode=decode, batch=batch, watch=watch)
    ]


def several(
    model: Any, prompts: Sequence[np.ndarray], decoding: Decoding, end_ids: Sequence[int], n: int, *,
    decode: Decode | None = None, batch: int = BATCH, watch: Callable[[float], None] | None = None,
    requests: Sequence[int] | None = None,
) -> list[list[Written]]:  # fmt: skip
    """`n` texts for every prompt: draws, the k-th with the seed + k; or the best of a beam, the best first, fewer where it holds fewer.
    A prompt is read once. `requests`: numbers that the draws of the prompts depend on, their places by default. Raises ValueError on
    an empty prompt, and on several texts from a way that has one."""
    if any(len(p) == 0 for p in prompts):
        raise ValueError("generate: a prompt has no token; give at least the begin token")
    if n > 1 and isinstance(decoding, Greedy):
        raise ValueError("several: greedy writing has one text to give; draw, or search with a beam")
    found: list[list[Written]] = [[] for _ in prompts]
    order = np.argsort([len(p) for p in prompts], kind="stable")
    size = max(1, min(batch, BEAMS // decoding.beams)) if isinstance(decoding, Beam) else max(1, batch // n)
    stepper = stepper_of(model)

    def one(part: np.ndarray) -> None:
        these = [prompts[i] for i in part]
        if isinstance(decoding, Beam):
            done = [row[:n] for row in beam_search(stepper, these, decoding, end_ids, decode)]
        else:
            numbers = [int(i) if requests is None else requests[i] for i in part]
            for _ in (writing := OneByOne(stepper, these, decoding, end_ids, decode, numbers, n)):
                pass
            done = [writing.written[row * n : (row + 1) * n] for row in range(len(these))]
        for i, row in zip(part, done, strict=True):
            found[int(i)] = row

    for start in range(0, len(order), size):
        in_halves(order[start : start + size], one)
        if watch is not None:
            watch(min(1.0, (start + size) / len(order)))
    return found


def stream(
    model: Any, prompt: np.ndarray, decoding: Greedy | Sample, end_ids: Sequence[int], decode: Decode | None = None,
    request: int = 0,
) -> Iterator[int]:  # fmt: skip
    """The tokens of one text as they are written, the end token left out; what a stop text may begin with is held back until it is
    known that none comes. `request`: what its draws depend on."""
    writing = OneByOne(stepper_of(model), [prompt], decoding, end_ids, decode, [request])
    ids, given = writing.written[0].ids, 0
    for _ in writing:
        sure = len(ids)
        if decoding.stop and decode is not None:
            text = decode(ids).rstrip("\ufffd")  # the beginning of a character
            kept = len(text) - held(text, decoding.stop)
            while sure > given and len(decode(ids[:sure])) > kept:
                sure -= 1
        yield from ids[given:sure]
        given = sure
    yield from ids[given:]


class OneByOne:
    """Greedy and sampled writing, `n` texts a prompt. Iterating makes a step at a time and gives the new tokens of the rows that go on,
    by row. A row that is put into `leaving` between two steps is written no further."""

    def __init__(
        self, stepper: Stepper, prompts: Sequence[np.ndarray], decoding: Greedy | Sample, end_ids: Sequence[int],
        decode: Decode | None, requests: Sequence[int], n: int = 1,
    ):  # fmt: skip
        self.stepper, self.prompts, self.decoding, self.decode = stepper, prompts, decoding, decode
        self.ends = set(end_ids)
        self.leaving: set[int] = set()
        self.written = [Written() for _ in range(len(prompts) * n)]
        self._requests, self._n = requests, n

    def __iter__(self) -> Iterator[dict[int, int]]:
        decoding, alive = self.decoding, list(range(len(self.written)))
        logits_BV = self.stepper.start(self.prompts)
        if self._n > 1:
            again = torch.arange(len(self.prompts), device=logits_BV.device).repeat_interleave(self._n)
            self.stepper.keep(again)
            logits_BV = logits_BV[again]
        for place in range(decoding.max_new_tokens):
            logits_BV = self._shaped(logits_BV.float(), alive, place)
            tokens = self._choose(logits_BV, alive, place)
            gained = logits_BV.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
            new, going = {}, []
            for slot, (row, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
                written = self.written[row]
                written.score += gained[slot]
                if token in self.ends:
                    written.ended = True
                    continue
                written.ids.append(token)
                if stopped(written, self.decoding, self.decode):
                    continue
                new[row] = token
                going.append(slot)
            if new:
                yield new
            going = [slot for slot in going if alive[slot] not in self.leaving]
            if not going or place + 1 == decoding.max_new_tokens:
                break
            if len(going) < len(alive):
                keep = torch.tensor(going, device=tokens.device)
                self.stepper.keep(keep)
                tokens, alive = tokens[keep], [alive[slot] for slot in going]
            logits_BV = self.stepper.step(tokens)
        for written in self.written:
            written.score /= max(1, len(written.ids) + written.ended)

    def _shaped(self, logits_BV: Tensor, alive: Sequence[int], place: int) -> Tensor:
        return shape(logits_BV, [self.written[r].ids for r in alive], self.decoding, self.ends, place)

    def _choose(self, logits_BV: Tensor, alive: Sequence[int], place: int) -> Tensor:
        if isinstance(self.decoding, Greedy):
            return likeliest(logits_BV)
        allowed_BV = narrowed(logits_BV / self.decoding.temperature, self.decoding)
        n, seed = self._n, self.decoding.seed
        draws = [draw(seed + row % n, self._requests[row // n], place) for row in alive]
        cumulated_BV = allowed_BV.softmax(-1).double().cumsum(-1)
        level_B = torch.tensor(draws, dtype=torch.float64, device=logits_BV.device) * cumulated_BV[:, -1]
        return torch.searchsorted(cumulated_BV, level_B[:, None], right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


def stopped(written: Written, decoding: Decoding, decode: Decode | None) -> bool:
    """Whether the text holds a stop text by now; the tokens from where it begins are taken back, one that it begins inside of whole."""
    if not decoding.stop or decode is None:
        return False
    text = decode(written.ids)
    places = [at for s in decoding.stop if (at := text.find(s)) >= 0]
    if not places:
        return False
    scored = len(written.ids)
    while written.ids and len(decode(written.ids)) > min(places):
        written.ids.pop()
    written.score *= (len(written.ids) + 1) / scored  # its mean stays one over all that was scored
    written.ended = True
    return True


def held(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def likeliest(logits_BV: Tensor) -> Tensor:
    """The place of the largest logit of each row, the first of equals. The largest value of a block is found many at once, a place
    one after the other: so the block first, then the place in it."""
    rows, size = logits_BV.shape
    if size < 4 * _BLOCK or logits_BV.device.type != "cpu":
        return logits_BV.argmax(-1)
    whole = size // _BLOCK * _BLOCK
    best_BK = logits_BV[:, :whole].view(rows, -1, _BLOCK).amax(-1)
    if whole < size:
        best_BK = torch.cat([best_BK, logits_BV[:, whole:].amax(-1, keepdim=True)], 1)
    places_BP = (best_BK.argmax(-1, keepdim=True) * _BLOCK + torch.arange(_BLOCK)).clamp_(max=size - 1)
    return places_BP.gather(1, logits_BV.gather(1, places_BP).argmax(-1, keepdim=True))[:, 0]


def draw(seed: int, request: int, place: int) -> float:
    """A uniform random number of a request and a position alone."""
    return float(np.random.default_rng([seed, request, place]).random())


def request_number(prompt: np.ndarray) -> int:
    """A number of a prompt's tokens alone, for its draws."""
    return crc32(np.ascontiguousarray(prompt, np.int64).tobytes())


def shape(
    logits_BV: Tensor, written: Sequence[Sequence[int]], decoding: Decoding, ends: set[int], place: int
) -> Tensor:
    """Penalties and bans that depend on what was written so far."""
    if decoding.repetition_penalty != 1.0:
        logits_BV = logits_BV.clone()
        for row, ids in enumerate(written):
            seen = torch.tensor(sorted(set(ids)), dtype=torch.long, device=logits_BV.device)
            value = logits_BV[row, seen]
            penalty = decoding.repetition_penalty
            logits_BV[row, seen] = torch.where(value > 0, value / penalty, value * penalty)
    banned = [_repeats(ids, decoding.no_repeat_ngram) for ids in written]
    if place < decoding.min_new_tokens:
        banned = [b | ends for b in banned]
    if any(banned):
        logits_BV = logits_BV.clone()
        for row, tokens in enumerate(banned):
            logits_BV[row, sorted(tokens)] = -torch.inf
    return logits_BV


def _repeats(ids: Sequence[int], n: int) -> set[int]:
    """Tokens that would complete an n-gram which is there already."""
    if not n or len(ids) < n:
        return set()
    last = tuple(ids[len(ids) - n + 1 :])
    return {ids[i + n - 1] for i in range(len(ids) - n + 1) if tuple(ids[i : i + n - 1]) == last}


def narrowed(logits_BV: Tensor, decoding: Sample) -> Tensor:
    """The logits with all but the likeliest tokens at minus infinity: top-k, min-p and top-p, in this order."""
    if decoding.top_k and decoding.top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(decoding.top_k, -1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    if decoding.min_p:
        p_BV = logits_BV.softmax(-1)
        logits_BV = logits_BV.masked_fill(p_BV < decoding.min_p * p_BV.amax(-1, keepdim=True), -torch.inf)
    if decoding.top_p < 1.0:
        p_BV, order_BV = logits_BV.softmax(-1).sort(-1, descending=True)
        outside_BV = p_BV.cumsum(-1) - p_BV >= decoding.top_p  # the token that crosses the limit stays
        logits_BV = logits_BV.masked_fill(outside_BV.scatter(-1, order_BV, outside_BV), -torch.inf)
    return logits_BV


# ---------------------------------------------------------------------------------------------- beams


def beam_search(
    stepper: Stepper, prompts: Sequence[np.ndarray], decoding: Beam, end_ids: Sequence[int], decode: Decode | None
) -> list[list[Written]]:
    """Beam search: the best texts of each prompt, the best first. A row is done when its K best finished texts cannot be beaten by
    what its beams could still become."""
    k, ends = decoding.beams, set(end_ids)
    first_BV = stepper.start(prompts)
    rows = list(range(len(prompts)))  # of the batch, those that are still searched
    beams: list[list[list[int]]] = [[[]] for _ in rows]
    scores: list[list[float]] = [[0.0] for _ in rows]
    finished: list[list[Written]] = [[] for _ in prompts]
    logits_NV = first_BV
    for place in range(decoding.max_new_tokens):
        written = [ids for row in rows for ids in beams[row]]
        logp_NV = shape(logits_NV.float(), written, decoding, ends, place).log_softmax(-1)
        so_far = torch.tensor([score for row in rows for score in scores[row]], device=logp_NV.device)
        best = _best(logp_NV.add_(so_far[:, None]), [len(beams[row]) for row in rows], 2 * k)
        take: list[int] = []  # places in the batch as it is now
        tokens: list[int] = []
        going, base = [], 0
        for row, ranked in zip(rows, best, strict=True):
            count = len(beams[row])
            found: list[tuple[int, int, float]] = []
            for rank, (value, index) in enumerate(ranked):
                beam, token = divmod(index, logp_NV.shape[1])
                if value == -np.inf:
                    continue
                ids = beams[row][beam]
                if token in ends:
                    if rank < k:
                        finished[row].append(Written(list(ids), value / _length(len(ids) + 1, decoding), True))
                elif len(found) < k:
                    if decoding.stop and stopped(ended := Written([*ids, token]), decoding, decode):
                        if rank < k:
                            finished[row].append(Written(ended.ids, value / _length(len(ids) + 1, decoding), True))
                    else:
                        found.append((beam, token, value))
            finished[row] = sorted(finished[row], key=lambda w: -w.score)[:k]
            if found and not _settled(finished[row], found[0][2], place + 1, decoding):
                take += [base + beam for beam, _, _ in found]
                tokens += [token for _, token, _ in found]
                beams[row] = [[*beams[row][beam], token] for beam, token, _ in found]
                scores[row] = [value for _, _, value in found]
                going.append(row)
            base += count
        rows = going
        if not rows or place + 1 == decoding.max_new_tokens:
            break
        stepper.keep(torch.tensor(take, device=logits_NV.device))
        logits_NV = stepper.step(torch.tensor(tokens, device=logits_NV.device))
    for row in rows:  # what the length cut off competes too
        cut = [
            Written(ids, score / _length(len(ids), decoding))
            for ids, score in zip(beams[row], scores[row], strict=True)
        ]
        finished[row] = sorted(finished[row] + cut, key=lambda w: -w.score)
    return [found or [Written()] for found in finished]


def _best(total_NV: Tensor, counts: Sequence[int], most: int) -> list[list[tuple[float, int]]]:
    """For each row, which has so many of the N beams, its best (score, beam x V + token), the best first."""
    parts = total_NV.view(len(counts), -1, total_NV.shape[1]) if len(set(counts)) == 1 else total_NV.split(list(counts))
    found = []
    for part in [parts.flatten(1)] if isinstance(parts, Tensor) else [p.flatten()[None] for p in parts]:
        values, places = part.topk(min(most, part.shape[1]))
        found += [list(zip(v, i, strict=True)) for v, i in zip(values.tolist(), places.tolist(), strict=True)]
    return found


def _length(n: int, decoding: Beam) -> float:
    return float(max(1, n)) ** decoding.length_penalty


def _settled(finished: Sequence[Written], best: float, length: int, decoding: Beam) -> bool:
    if len(finished) < decoding.beams:
        return False
    reach = decoding.max_new_tokens if decoding.length_penalty > 0 else length
    return finished[-1].score >= best / _length(reach, decoding)
