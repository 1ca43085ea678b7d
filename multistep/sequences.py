"""Token sequences as training rows: pairs for models that read and write, blocks of a stream and prompted texts for decoders.

All of them are what `train` reads (order, load, outputs, tokens) and what judging reads (parts, rows with their losses). `whole`:
outputs are logits; else those of a large vocabulary are left to the loss, which makes them piece by piece.
Shapes: B rows, S source tokens, T target tokens, V tokens of the vocabulary, M target tokens of a batch that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multistep.data.batches import Batches, by_length
from multistep.models.encoder import pad
from multistep.models.projection import outputs_of
from multistep.objectives.shapes import IGNORED, Hidden

_JUDGE_TOKENS, _ON_A_GPU, _LOGITS = (
    4096,
    32_768,
    2**28,
)  # padded tokens at once while judging; there, with so many logits at most


def judge_tokens(device: str, outputs: int) -> int:
    """Padded tokens that are judged at once: what fills the device ("cpu" or "cuda"). `outputs`: logits of a token."""
    return _JUDGE_TOKENS if device == "cpu" else max(_JUDGE_TOKENS, min(_ON_A_GPU, _LOGITS // outputs))


class PairRows:
    """Sources and targets of a sequence-to-sequence model; targets end with the end token. Bucketed by length.

    In training only the positions that count are projected to the vocabulary: outputs [1,M,V] for targets [1,M].
    """

    whole = True

    def __init__(
        self, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], pad_id: int, start_id: int, device: str
    ):
        self.sources, self.targets = list(sources), list(targets)
        self.pad_id, self.start_id, self.device = pad_id, start_id, device
        self.lengths_N = np.array([len(s) + len(t) for s, t in zip(sources, targets, strict=True)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sources)

    def order(self, batch_size: int, seed: int) -> Batches:
        return Batches(self.lengths_N, batch_size, seed)

    def tokens(self, rows: np.ndarray) -> int:
        return int(self.lengths_N[rows].sum())

    def load(self, rows: np.ndarray) -> tuple[Any, Tensor]:
        """(source ids [B,S], their mask, decoder ids [B,T], which of them count [B,T]) and the targets that count [1,M]."""
        source_BS, mask_BS = pad([self.sources[r] for r in rows], self.pad_id)
        target_BT, counts_BT = pad([self.targets[r] for r in rows], self.pad_id)
        decoder_BT = torch.cat([torch.full((len(rows), 1), self.start_id), target_BT[:, :-1]], 1)
        inputs = tuple(t.to(self.device) for t in (source_BS, mask_BS, decoder_BT, counts_BT))
        return inputs, target_BT[counts_BT][None].to(self.device)

    def outputs(self, model: Any, inputs: Any) -> Tensor | Hidden:
        source_BS, mask_BS, decoder_BT, counts_BT = inputs
        called = {"input_ids": source_BS, "attention_mask": mask_BS.long(), "decoder_input_ids": decoder_BT}
        return outputs_of(model, called, counts_BT, self.whole)

    def parts(self, tokens: int) -> list[np.ndarray]:
        """All rows once, in batches of similar length, of at most so many padded tokens."""
        return by_length(self.lengths_N, tokens)

    def counts(self, rows: np.ndarray) -> list[int]:
        """How many target tokens each row has."""
        return [len(self.targets[r]) for r in rows]

    def subset(self, rows: Sequence[int]) -> PairRows:
        some = [self.sources[r] for r in rows], [self.targets[r] for r in rows]
        return PairRows(*some, self.pad_id, self.start_id, self.device)


class PromptRows:
    """Texts of a decoder with the positions that count: all of a text, or the answers to its prompts. Bucketed by length.

    `counts`: for each text a boolean for every token, whether it is to be predicted (the first never is).
    """

    whole = True

    def __init__(self, ids: Sequence[np.ndarray], counted: Sequence[np.ndarray], pad_id: int, device: str):
        self.ids, self.counted, self.pad_id, self.device = list(ids), list(counted), pad_id, device
        self.lengths_N = np.array([len(row) for row in ids], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def order(self, batch_size: int, seed: int) -> Batches:
        return Batches(self.lengths_N, batch_size, seed)

    def tokens(self, rows: np.ndarray) -> int:
        return int(self.lengths_N[rows].sum())

    def load(self, rows: np.ndarray) -> tuple[Any, Tensor]:
        """(ids [B,T], which of the next tokens count [B,T]) and those tokens [1,M]."""
        ids_BT, _ = pad([self.ids[r] for r in rows], self.pad_id)
        counted_BT, _ = pad([self.counted[r].astype(np.int64) for r in rows], 0)
        counts_BT = counted_BT[:, 1:].bool()
        inputs = ids_BT[:, :-1].to(self.device), counts_BT.to(self.device)
        return inputs, ids_BT[:, 1:][counts_BT][None].to(self.device)

    def outputs(self, model: Any, inputs: Any) -> Tensor | Hidden:
        ids_BT, counts_BT = inputs  # padding is on the right: no real token attends to it
        return outputs_of(model, {"input_ids": ids_BT}, counts_BT, self.whole)

    def parts(self, tokens: int) -> list[np.ndarray]:
        return by_length(self.lengths_N, tokens)

    def counts(self, rows: np.ndarray) -> list[int]:
        return [int(self.counted[r][1:].sum()) for r in rows]

    def subset(self, rows: Sequence[int]) -> PromptRows:
        return PromptRows([self.ids[r] for r in rows], [self.counted[r] for r in rows], self.pad_id, self.device)


class BlockRows:
    """Windows of a stream of tokens: documents one after the other, none attending to another. A row is where its window starts.

    `starts`: where documents begin. Every epoch cuts the stream at another phase, so that no token is always the first of a window.
    """

    whole = True

    def __init__(self, stream: np.ndarray, starts: Sequence[int], block: int, device: str):
        if len(stream) < 2:
            raise ValueError("BlockRows needs a stream of two tokens or more")
        self.stream, self.starts_D, self.device = stream, np.asarray(starts, dtype=np.int64), device
        self.block = min(block, len(stream) - 1)

    def __len__(self) -> int:
        return max(1, (len(self.stream) - 1) // self.block)

    def order(self, batch_size: int, seed: int) -> Windows:
        return Windows(len(self.stream), self.block, batch_size, seed)

    def tokens(self, rows: np.ndarray) -> int:
        return len(rows) * self.block

    def load(self, rows: np.ndarray) -> tuple[Any, Tensor]:
        """(ids [B,T], positions [B,T] within documents or None) and the next tokens [B,T]; -100 across documents."""
        take_BT = np.asarray(rows)[:, None] + np.arange(self.block + 1)
        take_BT = np.minimum(take_BT, len(self.stream) - 1)
        ids_BT = torch.from_numpy(self.stream[take_BT].astype(np.int64))
        targets_BT = ids_BT[:, 1:].clone()
        positions_BT = None
        if len(self.starts_D) > 1:
            document_BT = np.searchsorted(self.starts_D, take_BT, side="right")
            first_BT = np.maximum(self.starts_D[document_BT - 1], take_BT[:, :1])
            positions_BT = torch.from_numpy(take_BT - first_BT)[:, :-1]
            targets_BT[torch.from_numpy(document_BT[:, 1:] != document_BT[:, :-1])] = IGNORED
        inputs = ids_BT[:, :-1].to(self.device), None if positions_BT is None else positions_BT.to(self.device)
        return inputs, targets_BT.to(self.device)

    def outputs(self, model: Any, inputs: Any) -> Tensor | Hidden:
        ids_BT, positions_BT = inputs
        placed = {} if positions_BT is None else {"position_ids": positions_BT}
        return outputs_of(model, {"input_ids": ids_BT, **placed}, None, self.whole)


class Windows:
    """Batches of window starts, epoch after epoch, by position alone."""

    def __init__(self, length: int, block: int, batch_size: int, seed: int):
        self.length, self.block, self.seed = length, block, seed
        self.batch_size = batch_size
        self.per_epoch = max(1, (length - 1) // block // batch_size)
        self._epoch, self._plan = -1, np.zeros((0, 0), dtype=np.int64)

    def at(self, position: int) -> np.ndarray:
        """The starts of the windows of batch `position`, counted from the start of training."""
        epoch, index = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            spare = self.length - 1 - self.block
            starts = np.arange(int(rng.integers(self.block)), max(1, spare + 1), self.block)
            wanted = self.per_epoch * self.batch_size
            order = rng.permutation(starts)
            if len(order) < wanted:  # the phase cost a window, or the stream is shorter than a batch
                order = np.concatenate([order, rng.integers(max(1, spare + 1), size=wanted - len(order))])
            self._plan, self._epoch = order[:wanted].reshape(self.per_epoch, self.batch_size), epoch
        return self._plan[index]


def windows(length: int, block: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """A sliding window over a stream: (start, end, first) — tokens first..end are judged, those before are context."""
    done = 1
    start = 0
    while done < length:
        end = min(length, start + block + 1)
        yield start, end, done
        done = end
        start = max(0, end - 1 - (block - stride))
