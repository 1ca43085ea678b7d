"""Questions and passages as rows of an encoder that answers with a span; and the answers that it gives.

A passage longer than a row is covered by overlapping windows, so nothing of it is left out; a question of more than half a row is cut
there, and counted. In training a window that does not hold the whole answer has none. Rows are what `train` and judging read.
    answer      over all windows the span (start <= end <= start + longest) with the highest p(start) p(end) of its window
    confidence  p(span) / (p(span) + p(no answer)) in that window, the first token being "no answer"
Source: Devlin et al. 2019, arXiv 1810.04805, sections 4.2 and 4.3; Alberti et al. 2019, arXiv 1901.08634 (windows).
Differs: only the passage and the first token can be the answer; windows are compared by probabilities, not logits.
Shapes: W windows, N records, B rows of a batch, T tokens; the last dimension of places is (start, end), both inclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from multistep.allocation import in_halves
from multistep.data.batches import Batches, by_length
from multistep.data.cells import Record
from multistep.models.encoder import pad
from multistep.models.passage import answer_threshold
from multistep.models.spans import SpanEncoder
from multistep.precision import mixed
from multistep.sequences import judge_tokens
from multistep.subwords import encode_places, pair_frame
from multistep.types import Prediction, UserError

_NEVER = -1e9
_LEAST_ROOM = 8  # tokens of the passage in a window


@dataclass(frozen=True)
class Window:
    """Tokens `first` to before `end` of a record's passage."""

    record: int
    first: int
    end: int


class SpanRows:
    """Rows are windows; those whose right answer is known, and stands in its passage where there is one, are trained and judged on."""

    def __init__(
        self, records: Sequence[Record], tokenizer: Tokenizer, max_length: int, pad_id: int, device: str,
        overlap: int | None = None,
    ):  # fmt: skip
        """`overlap`: tokens that neighbouring windows share; None: a third of what a window has for the passage."""
        self.records, self.pad_id, self.device, self.max_length = list(records), pad_id, device, max_length
        self.frame = pair_frame(tokenizer)
        if not self.frame.before:
            raise UserError("model: its tokenizer puts no token before a text, so that 'no answer' has no place.")
        contexts = list(dict.fromkeys(r.context for r in records))
        self._contexts = dict(zip(contexts, encode_places(tokenizer, contexts), strict=True))
        most = max_length // 2
        asked = [ids for ids, _ in encode_places(tokenizer, [r.source for r in records])]
        self.cut_questions = sum(len(ids) > most for ids in asked)
        self._questions = [ids[:most] for ids in asked]
        special = len(self.frame.before) + len(self.frame.between) + len(self.frame.after)
        if max_length - most - special < _LEAST_ROOM:
            least = 2 * (special + _LEAST_ROOM)
            raise UserError(f"max_length: {max_length} tokens leave no room for a passage. Give {least} or more.")
        self.windows: list[Window] = []
        for i, ids in enumerate(self._questions):
            self.windows += _windows(i, len(self._tokens(i)), max_length - special - len(ids), overlap)
        self.lengths_N = np.array([self._length(w) for w in self.windows], dtype=np.int64)
        self._golds = [self._gold(r) for r in records]
        self._places = [self._place(w) for w in self.windows]
        self.taught = np.array([w for w, window in enumerate(self.windows) if self._known(window)], dtype=np.int64)

    def __len__(self) -> int:
        """Windows to train on."""
        return len(self.taught)

    @property
    def longest(self) -> int:
        """Tokens of the longest answer but 1 %; the longest that `answers` need look for, where these are rows of train."""
        lengths = [end - start for gold in self._golds if gold for start, end in [gold]]
        return int(np.percentile(lengths, 99)) + 1 if lengths else 1

    def facts(self) -> dict[str, int]:
        """What became of the records. `apart`: answers that no window holds whole."""
        held = {w.record for w, place in zip(self.windows, self._places, strict=True) if place != (0, 0)}
        known = {self.windows[w].record for w in self.taught.tolist()}
        return {
            "records": len(self.records), "windows": len(self.windows), "taught": len(self.taught),
            "with_answer": len(held), "further_windows": len(self.windows) - len(self.records),
            "not_taught": len(self.records) - len(known), "cut_questions": self.cut_questions,
            "apart": sum(gold is not None and i not in held for i, gold in enumerate(self._golds)),
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------ training, judging

    def order(self, batch_size: int, seed: int) -> SpanOrder:
        return SpanOrder(Batches(self.lengths_N[self.taught], batch_size, seed), self.taught)

    def tokens(self, rows: np.ndarray) -> int:
        return int(self.lengths_N[rows].sum())

    def load(self, rows: np.ndarray) -> tuple[Any, Tensor]:
        """(ids, mask, segments, where an answer may be; all [B,T]) and places [B,2]; (0, 0): no answer here."""
        places_B2 = torch.tensor([self._places[r] for r in rows], dtype=torch.long).reshape(-1, 2)
        return self._inputs(rows), places_B2.to(self.device)

    def outputs(self, model: SpanEncoder, inputs: Any) -> Tensor:
        """Logits [B,T,2], very low outside of the passage and the first token."""
        ids_BT, mask_BT, segments_BT, allowed_BT = inputs
        return model(ids_BT, mask_BT, segments_BT).masked_fill(~allowed_BT[..., None], _NEVER)

    # ------------------------------------------------------------------------------------------ answers

    @torch.no_grad()
    def answers(
        self, model: SpanEncoder, longest: int = 64, least: float = 0.0, *, bf16: bool = False
    ) -> list[Prediction]:
        """One for every record: a verbatim slice of its passage with its confidence; below the confidence `least`, "" with the
        confidence that there is none. `longest`: tokens."""
        model.eval()
        best: list[tuple[float, float, str]] = [(-np.inf, 0.0, "")] * len(self.records)

        def one(rows: np.ndarray) -> None:
            inputs = self._inputs(rows)
            with mixed(bf16, inputs[0].device.type):
                logits_BT2 = self.outputs(model, inputs)
            log_BT2 = torch.log_softmax(logits_BT2.float(), 1).cpu().numpy()
            for row, start, end, score, none in _best_spans(log_BT2, inputs[3].cpu().numpy(), longest):
                window = self.windows[rows[row]]
                if score > best[window.record][0]:
                    sure = float(1 / (1 + np.exp(np.clip(none - score, -700, 700))))
                    best[window.record] = (score, sure, self._slice(window, start, end))

        for part in by_length(self.lengths_N, judge_tokens(self.device, 2)):
            in_halves(part, one)
        return [
            Prediction(text, sure) if sure >= least or not text else Prediction("", 1 - sure) for _, sure, text in best
        ]

    # ------------------------------------------------------------------------------------------ rows

    def _tokens(self, record: int) -> np.ndarray:
        return self._contexts[self.records[record].context][0]

    def _before(self, record: int) -> int:
        """The place of the first token of the passage in a row."""
        return len(self.frame.before) + len(self._questions[record]) + len(self.frame.between)

    def _length(self, window: Window) -> int:
        return self._before(window.record) + window.end - window.first + len(self.frame.after)

    def _inputs(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        ids, segments, allowed = [], [], []
        for window in (self.windows[r] for r in rows):
            passage = self._tokens(window.record)[window.first : window.end]
            parts = [self.frame.before, self._questions[window.record], self.frame.between, passage, self.frame.after]
            ids.append(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]))
            segments.append(np.repeat(self.frame.segments, [len(part) for part in parts]))
            may = np.zeros(len(ids[-1]), dtype=np.int64)
            may[self._before(window.record) :][: len(passage)] = 1
            may[0] = 1
            allowed.append(may)
        ids_BT, mask_BT = pad(ids, self.pad_id)
        segments_BT, allowed_BT = pad(segments, 0)[0], pad(allowed, 0)[0].bool()
        return tuple(t.to(self.device) for t in (ids_BT, mask_BT, segments_BT, allowed_BT))

    def _gold(self, record: Record) -> tuple[int, int] | None:
        """First and last token, in its passage, of the first right answer that stands there."""
        _, places_T2 = self._contexts[record.context]
        for target, start in zip(record.targets, record.starts, strict=False):
            if start >= 0 and target.strip():
                inside = np.flatnonzero((places_T2[:, 1] > start) & (places_T2[:, 0] < start + len(target)))
                if len(inside):
                    return int(inside[0]), int(inside[-1])
        return None

    def _place(self, window: Window) -> tuple[int, int]:
        gold = self._golds[window.record]
        if gold is None or gold[0] < window.first or gold[1] >= window.end:
            return 0, 0
        shift = self._before(window.record) - window.first
        return gold[0] + shift, gold[1] + shift

    def _known(self, window: Window) -> bool:
        """Whether the window has a target: its answer stands in the passage, or there is said to be none."""
        targets = self.records[window.record].targets
        return self._golds[window.record] is not None or (len(targets) > 0 and not any(t.strip() for t in targets))

    def _slice(self, window: Window, start: int, end: int) -> str:
        """The characters of tokens `start` to `end` of a row, without space around them."""
        context = self.records[window.record].context
        places_T2 = self._contexts[context][1]
        shift = window.first - self._before(window.record)
        return context[int(places_T2[start + shift, 0]) : int(places_T2[end + shift, 1])].strip()


class SpanOrder:
    """Batches of the windows that are trained on."""

    def __init__(self, batches: Batches, rows: np.ndarray):
        self.batches, self.rows, self.per_epoch = batches, rows, batches.per_epoch

    def at(self, position: int) -> np.ndarray:
        return self.rows[self.batches.at(position)]


def best_least(predictions: Sequence[Prediction], records: Sequence[Record], score: Any) -> float:
    """The `least` that scores best on records with known answers; `predictions`: with `least` 0. `score`: (text, targets) -> 0..1.
    0 where every record has an answer."""
    empty_N = np.array([not any(t.strip() for t in r.targets) for r in records])
    if not empty_N.any():
        return 0.0
    gain = [0.0 if e else score(p.value, r.targets) for p, r, e in zip(predictions, records, empty_N, strict=True)]
    return answer_threshold(np.array([p.confidence or 0.0 for p in predictions]), np.array(gain), empty_N)


def _windows(record: int, length: int, room: int, overlap: int | None) -> list[Window]:
    """Windows of `room` tokens over `length`; the last one ends with the passage."""
    shared = min(room // 3 if overlap is None else overlap, room - 1)
    starts = list(range(0, max(1, length - shared), room - shared)) if length > room else [0]
    return [Window(record, start, min(length, start + room)) for start in starts]


def _best_spans(log_BT2: np.ndarray, allowed_BT: np.ndarray, longest: int) -> list[tuple[int, int, int, float, float]]:
    """(row, start, end, log p of the span, log p of no answer) of each row that has a place for an answer."""
    n_rows, n_tokens, _ = log_BT2.shape
    inside_BT = allowed_BT.copy()
    inside_BT[:, 0] = False
    start_BT = np.where(inside_BT, log_BT2[..., 0], -np.inf)
    end_BT = np.where(inside_BT, log_BT2[..., 1], -np.inf)
    best_BT, width_BT = np.full((n_rows, n_tokens), -np.inf), np.zeros((n_rows, n_tokens), dtype=np.int64)
    for width in range(
        min(longest, n_tokens)
    ):  # the passage is one run of tokens: what lies between two of it is of it
        here = start_BT[:, : n_tokens - width] + end_BT[:, width:]
        better = here > best_BT[:, : n_tokens - width]
        best_BT[:, : n_tokens - width][better] = here[better]
        width_BT[:, : n_tokens - width][better] = width
    found = []
    for row in np.flatnonzero(inside_BT.any(1)).tolist():
        start = int(best_BT[row].argmax())
        end = start + int(width_BT[row, start])
        found.append((row, start, end, float(best_BT[row, start]), float(log_BT2[row, 0].sum())))
    return found
