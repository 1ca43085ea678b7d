"""Models that write, behind one interface: records in, texts and losses out. Training, judging and serving all ask here.

    Neural   a decoder or a sequence-to-sequence model; reads "stream" (running text), "pairs" or "prompts" (turns)
    the n-gram model, cheap writers, spans: other_writers.py

A loss is charged for every byte of a right answer, so that models with different tokenizers and windows can be compared: a character that
a tokenizer does not know costs the 21 bits of any code point on top. What is longer than the window is cut in training and writing, but
judged in windows, as a stream is; the end of a target that a sequence-to-sequence model has no positions for costs 8 bits a byte.
Shapes: N records, T tokens of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from multistep import dialogue
from multistep.allocation import in_halves
from multistep.codec import Codec
from multistep.data.cells import Record, Turn
from multistep.examples import Examples
from multistep.generate import Pen, Written, request_number, several, stream
from multistep.metrics.texts import loss_statistics
from multistep.models.step import positions_of
from multistep.precision import mixed
from multistep.predictors.decoding import Decoding, Greedy, Sample
from multistep.predictors.ways import Way, plain
from multistep.sequences import BlockRows, PairRows, PromptRows, judge_tokens, windows
from multistep.tasks.writing import Writing
from multistep.types import Prediction, UserError
from multistep.voting import answers

Reads = Literal["stream", "pairs", "prompts"]
Rows = PairRows | PromptRows | BlockRows
_UNKNOWN_NATS = 21 * math.log(2)
_BYTE_NATS = 8 * math.log(2)


class Cut(NamedTuple):
    """What did not fit: rows that were cut, and tokens that were left out of them."""

    rows: int = 0
    tokens: int = 0


class Speaker(Protocol):
    def write(self, records: Sequence[Record]) -> list[Prediction]:
        """An answer for each record; confidence: the mean probability of its tokens, where there is one."""
        ...

    def losses(self, records: Sequence[Record], running: bool) -> np.ndarray | None:
        """[N,3]: nats, tokens and bytes of what counts in every record (`Record.counted`); None where the writer has none. `running`:
        the records are pieces of one text."""
        ...


# ---------------------------------------------------------------------------------------------- neural


@dataclass
class Neural:
    """`context`: tokens at most of a source, a prompt with its answer, or a window of a stream. `pool`: what few-shot prompts choose
    from."""

    model: Any
    codec: Codec
    task: Writing
    reads: Reads
    context: int
    decoding: Way = field(default_factory=Greedy)
    bf16: bool = False
    watch: Callable[[float], None] | None = None
    pool: Examples | None = None
    cut: dict[str, Cut] = field(default_factory=dict)  # by what was cut, of the records last read
    pen: Pen | None = None  # the engine that writes (multistep/engines); None: `generate`, on the model itself

    @property
    def device(self) -> str:
        return next(iter(self.model.parameters())).device.type

    @property
    def positions(self) -> int | None:
        """Of a prompt with its answer (of pairs: of the answer) at most, where the model has a table of them."""
        return positions_of(self.model)

    # ------------------------------------------------------------------ rows

    def rows(self, records: Sequence[Record], running: bool = False) -> Rows:
        """What `train` reads, the first right answer of each record."""
        match self.reads:
            case "stream":
                stream, starts, _ = self.stream(records, running)
                return BlockRows(stream, starts, self.context, self.device)
            case "pairs":
                sources = self._cut("sources", self.codec.whole([self.task.reads(r) for r in records]), keep_last=True)
                targets = self._cut("targets", self.codec.targets([r.targets[0] for r in records]), keep_last=True)
                start = self.model.config.decoder_start_token_id
                return PairRows(sources, targets, self.codec.pad, start, self.device)
            case "prompts":
                found = [dialogue.render(self.codec.tokenizer, self._turns(r, True), self.context) for r in records]
                self.cut["conversations"] = Cut(sum(f.dropped + f.cut > 0 for f in found), sum(f.cut for f in found))
                return PromptRows([f.ids for f in found], [f.counted for f in found], self.codec.pad, self.device)

    def stream(self, records: Sequence[Record], running: bool) -> tuple[np.ndarray, list[int], np.ndarray]:
        """Ids of all records one after the other, where documents begin, and the record of every token (-1: begin tokens)."""
        ids, starts, owners = [], [], []
        length = 0
        for number, piece in enumerate(self.codec.pieces([r.targets[0] for r in records])):
            begins = not running or number == 0
            if begins:
                starts.append(length)
                piece = np.concatenate([[self.codec.bos], piece, [] if running else [self.codec.eos]]).astype(np.int64)
            owner = np.full(len(piece), number)
            owner[: int(begins)] = -1
            ids.append(piece)
            owners.append(owner)
            length += len(piece)
        return np.concatenate(ids), starts, np.concatenate(owners)

    def _turns(self, record: Record, answered: bool) -> tuple[Turn, ...]:
        asked = record.asked if record.turns else (Turn("user", self.task.reads(record)),)
        return (*asked, Turn("assistant", record.targets[0])) if answered and record.targets else asked

    def _cut(self, what: str, rows: list[np.ndarray], keep_last: bool) -> list[np.ndarray]:
        long = [len(r) - self.context for r in rows if len(r) > self.context]
        self.cut[what] = Cut(len(long), sum(long))
        if not long:
            return rows
        return [r if len(r) <= self.context else np.append(r[: self.context - 1], r[-1]) for r in rows]

    # ------------------------------------------------------------------ writing

    def prompts(self, records: Sequence[Record]) -> list[np.ndarray]:
        """What generation starts from."""
        match self.reads:
            case "stream":
                found = [np.append([self.codec.bos], p) for p in self.codec.pieces([r.source for r in records])]
                room, limit = self.context, self.positions
                if limit is not None:
                    room = max(1, min(room, limit - plain(self.decoding).max_new_tokens))
                return [p if len(p) <= room else p[-room:] for p in found]
            case "pairs":
                return self._cut("sources", self.codec.whole([self.task.reads(r) for r in records]), keep_last=True)
            case "prompts":
                room = max(1, self.context - plain(self.decoding).max_new_tokens)
                asked = [dialogue.prompt(self.codec.tokenizer, self._turns(r, False), room) for r in records]
                self.cut["conversations"] = Cut(sum(a.dropped + a.cut > 0 for a in asked), sum(a.cut for a in asked))
                return [a.ids for a in asked]

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        return answers(self, records, self.decoding)

    def candidates(self, records: Sequence[Record], decoding: Decoding, n: int) -> list[list[Written]]:
        """What every way to write is made of. A draw depends on its request's tokens, not on its place among others."""
        self.model.eval()
        ends, decoding = self.endings(decoding)
        prompts = self.prompts(records)
        # Several texts, and draws whose numbers belong to their request, are our own engine's.
        if self.pen is not None and n == 1 and not isinstance(decoding, Sample) and self.pen.can(decoding):
            return [[w] for w in self.pen.write(prompts, decoding, ends, self.codec.text, self.watch)]
        # On a CPU one token at a time is memory traffic, and autocast would cast every weight for every token.
        with mixed(self.bf16 and self.device == "cuda", self.device):
            return several(
                self.model, prompts, decoding, ends, n, decode=self.codec.text, watch=self.watch,
                requests=[request_number(p) for p in prompts],
            )  # fmt: skip

    @property
    def examples(self) -> Examples:
        return self.pool if self.pool is not None else Examples((), self.task.reads)

    def asked(self, record: Record) -> tuple[Turn, ...]:
        if self.reads != "prompts":
            raise UserError("decoding: few_shot and draft_revise are for models that read prompts; this one does not.")
        return self._turns(record, False)

    def shortened(self, text: str, tokens: int) -> str:
        spans = self.codec.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
        return text if len(spans) <= tokens else text[: spans[tokens - 1][1]].rstrip()

    def endings(self, decoding: Decoding | None = None) -> tuple[list[int], Decoding]:
        """The tokens that end a text; and the decoding (None: the tuned one), with the texts that do, and no more tokens than fit."""
        decoding = plain(self.decoding) if decoding is None else decoding
        if (limit := self.positions) is not None:
            most = limit if self.reads == "pairs" else limit - 1  # a prompt has a token
            if decoding.max_new_tokens > most:
                decoding = decoding.with_(max_new_tokens=most, min_new_tokens=min(decoding.min_new_tokens, most))
        if self.reads != "prompts":
            return [self.codec.eos], decoding
        ends = dialogue.endings(self.codec.tokenizer)
        return list(ends.ids), decoding.with_(stop=(*decoding.stop, *ends.texts)) if ends.texts else decoding

    def said(self, written: Written) -> Prediction:
        return Prediction(self.codec.text(written.ids).strip() if self.task.writes else self.codec.text(written.ids),
                          min(1.0, math.exp(written.score)) if math.isfinite(written.score) else None)  # fmt: skip

    def converse(self, turns: Sequence[Turn], decoding: Greedy | Sample) -> Iterator[str]:
        """The answer to a conversation, in pieces of whole characters."""
        self.model.eval()
        room = max(1, self.context - decoding.max_new_tokens)
        ends, ending = self.endings(decoding)
        assert isinstance(ending, Greedy | Sample)
        asked = dialogue.prompt(self.codec.tokenizer, turns, room).ids
        ids: list[int] = []
        given = 0
        for token in stream(self.model, asked, ending, ends, self.codec.text, request_number(asked)):
            ids.append(token)
            text = self.codec.text(ids)
            whole = len(text.rstrip("\ufffd"))  # the rest is the beginning of a character
            if whole > given:
                yield text[given:whole]
                given = whole

    # ------------------------------------------------------------------ losses

    def losses(self, records: Sequence[Record], running: bool) -> np.ndarray:
        nats_T, owner_T = self.token_nats(records, running)
        kept = owner_T >= 0
        nats_N = np.bincount(owner_T[kept], nats_T[kept], len(records))
        tokens_N = np.bincount(owner_T[kept], minlength=len(records))
        return loss_statistics(nats_N, tokens_N, sizes(records))

    @torch.no_grad()
    def token_nats(self, records: Sequence[Record], running: bool) -> tuple[np.ndarray, np.ndarray]:
        """What every token of the right answers costs, and whose it is."""
        self.model.eval()
        if self.reads == "stream":
            return self._stream_nats(records, running)
        rows, owner_R = self._judged(records)
        nats: list[np.ndarray] = []
        owners: list[np.ndarray] = []

        def one(part: np.ndarray) -> None:
            inputs, targets = rows.load(part)
            nats_T, owner_T = self._nats(rows, inputs, targets)[0], np.repeat(owner_R[part], rows.counts(part))
            nats.append(nats_T)
            owners.append(owner_T)
            self._tick(sum(map(len, owners)) / max(1, sum(rows.counts(np.arange(len(rows))))))

        for part in rows.parts(self._at_once()):
            in_halves(part, one)
        if self.reads == "pairs":
            lengths_N = np.array([len(t) for t in self.codec.targets([r.targets[0] for r in records])])
            missed_N = np.maximum(0, lengths_N - self.context)
            nats.append(np.repeat(_BYTE_NATS * sizes(records) / lengths_N, missed_N))
            owners.append(np.repeat(np.arange(len(records)), missed_N))
        return np.concatenate(nats), np.concatenate(owners)

    def _judged(self, records: Sequence[Record]) -> tuple[PairRows | PromptRows, np.ndarray]:
        """Rows to judge, and whose each is [rows]: of a conversation as many windows as it takes, so that all that counts is charged."""
        if self.reads == "pairs":
            rows = self.rows(records)
            assert isinstance(rows, PairRows)
            return rows, np.arange(len(records))
        ids, counted, owners = [], [], []
        self.cut["conversations"] = Cut()
        for number, record in enumerate(records):
            whole = dialogue.render(self.codec.tokenizer, self._turns(record, True))
            for start, end, first in windows(len(whole.ids), self.context, max(1, self.context // 2)):
                judged = whole.counted[start:end] & (np.arange(start, end) >= first)
                if judged.any():
                    ids.append(whole.ids[start:end])
                    counted.append(judged)
                    owners.append(number)
        return PromptRows(ids, counted, self.codec.pad, self.device), np.array(owners)

    def _stream_nats(self, records: Sequence[Record], running: bool) -> tuple[np.ndarray, np.ndarray]:
        """Sliding windows: every token but those of the first window has half a window or more before it."""
        stream, starts, owner_T = self.stream(records, running)
        rows = BlockRows(stream, starts, self.context, self.device)
        places = list(windows(len(stream), rows.block, max(1, rows.block // 2)))
        nats_T = np.zeros(len(stream))

        def one(some: np.ndarray) -> None:
            inputs, targets = rows.load(np.array([places[i][0] for i in some]))
            for i, nats in zip(some, self._nats(rows, inputs, targets), strict=True):
                start, end, judged = places[i]
                nats_T[judged:end] = nats[judged - start - 1 : end - start - 1]
            self._tick((int(some[-1]) + 1) / len(places))

        at_once = max(1, self._at_once() // rows.block)
        for first in range(0, len(places), at_once):
            in_halves(np.arange(first, min(first + at_once, len(places))), one)
        return nats_T, owner_T

    def _at_once(self) -> int:
        """Padded tokens that are judged at once."""
        return judge_tokens(self.device, len(self.codec.tokenizer))

    def _nats(self, rows: Rows, inputs: Any, targets: torch.Tensor) -> np.ndarray:
        with mixed(self.bf16, self.device):
            logits = rows.outputs(self.model, inputs)
        assert isinstance(logits, torch.Tensor)
        nats = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
        ).view(targets.shape)
        if self.codec.unknown is not None:
            nats = nats + _UNKNOWN_NATS * (targets == self.codec.unknown)
        return nats.cpu().double().numpy()

    def _tick(self, done: float) -> None:
        if self.watch is not None:
            self.watch(min(1.0, done))


def sizes(records: Sequence[Record]) -> np.ndarray:
    """UTF-8 bytes of what counts in each record."""
    return np.array([sum(len(text.encode("utf-8", "replace")) for text in r.counted) for r in records])
