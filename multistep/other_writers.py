"""The other models that write, beside the neural one (writing.py), behind the same interface; and what a speaker is worth on records.

    Counted  the n-gram model; Mixed: both, where every token is a character
    Simple   a cheap writer without losses (models/baselines.py and its neighbours)
    Spans    a model that finds answers in passages

Shapes: N records, T tokens of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from multistep.codec import Codec
from multistep.data.cells import Record
from multistep.evaluate import EncoderText, encode
from multistep.generate import request_number, several
from multistep.metrics.texts import loss_statistics, measure_rows, statistics
from multistep.models.baselines import Writer
from multistep.models.encoder import Encoder, load_backbone
from multistep.models.mixed import Mixture
from multistep.models.ngram import NGram
from multistep.models.spans import SpanEncoder
from multistep.predictors.decoding import Greedy, Sample
from multistep.predictors.ways import Way, plain
from multistep.spans import SpanRows
from multistep.subwords import encode_ids, load_tokenizer
from multistep.tasks.writing import LOSSES, Writing
from multistep.types import MetricValue, Prediction
from multistep.writing import Neural, Speaker, sizes

READ_TOKENS = 128  # of a sentence, by the encoder that ranks sentences


@dataclass
class Counted:
    """The n-gram model; its tokens are those of `codec`, so that perplexities can be compared."""

    ngram: NGram
    codec: Codec
    decoding: Way = field(default_factory=Greedy)

    def losses(self, records: Sequence[Record], running: bool) -> np.ndarray:
        n, bytes_N = len(records), sizes(records)
        nats_N = np.bincount(np.repeat(np.arange(n), bytes_N), self.byte_nats(records, running), n)
        lengths_C = [len(p) for p in self.codec.pieces(_counted(records))]
        tokens_N = np.bincount(np.repeat(np.arange(n), [len(r.counted) for r in records]), lengths_C, n)
        return loss_statistics(nats_N, tokens_N, bytes_N)

    def byte_nats(self, records: Sequence[Record], running: bool) -> np.ndarray:
        texts = _counted(records)
        return self.ngram.nats_of_bytes(["".join(texts)] if running else texts)

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        decoding = plain(self.decoding)
        warm, seed = (decoding.temperature, decoding.seed) if isinstance(decoding, Sample) else (0.0, 0)
        most, stop = decoding.max_new_tokens, decoding.stop
        return [Prediction(self.ngram.go_on(r.source, most, warm, seed + n, stop)) for n, r in enumerate(records)]


def _counted(records: Sequence[Record]) -> list[str]:
    return [text for r in records for text in r.counted]


@dataclass
class Mixed:
    """share x the neural model + (1 - share) x the n-gram model, token by token; every token is a character."""

    neural: Neural
    counted: Counted
    share: float

    def losses(self, records: Sequence[Record], running: bool) -> np.ndarray:
        neural_T, counted_T, owner_T = self.parts(records, running)
        kept = owner_T >= 0
        nats_T = mixed_nats(neural_T, counted_T, self.share)
        nats_N = np.bincount(owner_T[kept], nats_T[kept], len(records))
        return loss_statistics(nats_N, np.bincount(owner_T[kept], minlength=len(records)), sizes(records))

    def parts(self, records: Sequence[Record], running: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What every token costs under either model, and whose it is. The end of a document is the neural model's alone."""
        neural_T, owner_T = self.neural.token_nats(records, running)
        ids_T = self.neural.stream(records, running)[0]
        bytes_B = self.counted.byte_nats(records, running)
        ends_C = np.cumsum([len(c.encode("utf-8", "replace")) for r in records for c in r.targets[0]])
        sums_B = np.concatenate([[0.0], np.cumsum(bytes_B)])
        costs_C = np.diff(sums_B[np.concatenate([[0], ends_C])])
        special = (ids_T == self.neural.codec.bos) | (ids_T == self.neural.codec.eos)
        counted_T = neural_T.copy()
        counted_T[~special] = costs_C
        return neural_T, counted_T, owner_T

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        model = Mixture(self.neural.model, self.counted.ngram, self.neural.codec.tokenizer, self.share)
        prompts = self.neural.prompts(records)
        found = several(
            model, prompts, plain(self.neural.decoding), [self.neural.codec.eos], 1, decode=self.neural.codec.text,
            requests=[request_number(p) for p in prompts],
        )  # fmt: skip
        return [self.neural.said(first) for first, *_ in found]


def mixed_nats(a_T: np.ndarray, b_T: np.ndarray, share: float) -> np.ndarray:
    if share >= 1.0:
        return a_T
    return -np.logaddexp(math.log(share) - a_T, math.log1p(-share) - b_T)


@dataclass
class Simple:
    writer: Writer

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        return self.writer.write(records)

    def losses(self, records: Sequence[Record], running: bool) -> None:
        return None


@dataclass
class Spans:
    """A model that finds answers in passages. `context`: tokens of a question with a window of its passage; `longest`: of an answer;
    below the confidence `least` the answer is that there is none."""

    model: SpanEncoder
    tokenizer: Tokenizer
    context: int
    device: str
    longest: int = 64
    least: float = 0.0

    def rows(self, records: Sequence[Record]) -> SpanRows:
        return SpanRows(records, self.tokenizer, self.context, self.model.pad_id, self.device)

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        return self.rows(records).answers(self.model, self.longest, self.least)

    def losses(self, records: Sequence[Record], running: bool) -> None:
        return None


def encoder_features(
    name: str, device: str, watch: Callable[[float], None] | None = None
) -> Callable[[Sequence[str]], np.ndarray]:
    """Features [N,D] of texts by a pretrained encoder (folder or hub name), which the writers that rank sentences read."""
    tokenizer, model = load_tokenizer(name), Encoder(load_backbone(name), 2).to(device)
    rows = EncoderText(model, lambda texts: encode_ids(tokenizer, texts, READ_TOKENS)[0], model.pad_id).rows
    return lambda texts: encode(model, rows(texts), watch=watch)


def measured(
    speaker: Speaker, task: Writing, metric: str, records: Sequence[Record], running: bool, seed: int = 0
) -> dict[str, MetricValue]:
    """The metric, the task's others and bits per byte on these records, as far as the speaker has texts and losses."""
    names = list(dict.fromkeys([metric, *task.metrics, "bits_per_byte"]))
    losses = speaker.losses(records, running)
    texts = [str(p.value) for p in speaker.write(records)] if any(n not in LOSSES for n in names) else []
    found: dict[str, MetricValue] = {}
    for name in names:
        if name not in LOSSES:
            found[name] = measure_rows(name, statistics(name, texts, [r.targets for r in records]), seed)
        elif losses is not None:
            found[name] = measure_rows(name, losses, seed)
    return found
