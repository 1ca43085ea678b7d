"""One token after another: what writes with a model, and what it remembers between two tokens.

A stepper reads prompts once (`start`) and then takes a token a row (`step`); `keep` drops, repeats or reorders rows. The classes
that are trained from scratch here (Llama, M2M100) have steppers of their own (llama_steps.py, m2m_steps.py). Every other model goes
through transformers' cache. A stepper copies weights when it is made: make one for many texts.
Shapes: B rows, T positions so far, N positions at once, S source positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from multistep.models.encoder import pad
from multistep.models.llama_steps import LlamaSteps
from multistep.models.m2m_steps import M2MSteps
from multistep.models.mixed import MixedSteps, Mixture

_TABLES = ("wpe", "embed_positions", "position_embeddings")  # what transformers calls a table of positions
_PLAIN = ("torch.nn.modules.", "transformers.models.", "transformers.activations")  # where plain modules are defined


class Stepper(Protocol):
    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        """Read a prompt (or source) a row; the logits [B,V] of the first token to write."""
        ...

    def step(self, tokens_B: Tensor) -> Tensor:
        """Take the token that each row wrote; the logits [B,V] of the next."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may be taken several times."""
        ...


class ReadsSeveral(Stepper, Protocol):
    """A stepper whose only row can take tokens on trial."""

    def several(self, tokens_N: Tensor) -> Tensor:
        """Take N tokens of the only row at once: the logits [N,V] after each of them."""
        ...

    def back(self, positions: int) -> None:
        """Forget the last so many positions."""
        ...


def stepper_of(model: Any, start_id: int | None = None) -> Stepper:
    """The fastest stepper that fits the model. `start_id`: the first token of a target (sequence-to-sequence models)."""
    if isinstance(model, Mixture):
        return MixedSteps(model, stepper_of(model.model))
    config = model.config
    if config.is_encoder_decoder:
        start = config.decoder_start_token_id if start_id is None else start_id
        ours = type(model).__name__ == "M2M100ForConditionalGeneration" and config.activation_function == "relu"
        return M2MSteps(model, start) if ours and _plain(model.model.decoder) else CachedSeq2Seq(model, start)
    ours = type(model).__name__ == "LlamaForCausalLM" and config.hidden_act == "silu"
    rope = (config.rope_parameters or {}).get("rope_type", "default") if ours else ""
    ours = rope == "default" and model.lm_head.weight.dtype == torch.float32 and _plain(model.model)
    return LlamaSteps(model) if ours else CachedDecoder(model)


def positions_of(model: Any) -> int | None:
    """How many positions there are for a prompt with its answer (for the answer, of a sequence-to-sequence model) where the model has a
    table of them; None where it turns, compares or computes positions. Rows that a class keeps for padding are not used."""
    body = model.get_decoder() if model.config.is_encoder_decoder else model
    tables = [m for name, m in body.named_modules() if name.split(".")[-1] in _TABLES and isinstance(m, nn.Embedding)]
    unused = [vars(t).get("offset", 0) if t.padding_idx is None else t.padding_idx + 1 for t in tables]
    return min((t.num_embeddings - n for t, n in zip(tables, unused, strict=True)), default=None)


def _plain(body: nn.Module) -> bool:
    """Whether its weights are all there is to its layers: an adapted or quantized layer computes more than they say."""
    return all(type(module).__module__.startswith(_PLAIN) for module in body.modules())


# ---------------------------------------------------------------------------------------------- any other model


class CachedDecoder:
    """A causal language model through transformers' own cache; prompts are padded on the left."""

    def __init__(self, model: Any):
        self.model = model

    @torch.no_grad()
    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        device = self.model.device
        longest = max(len(p) for p in prompts)
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :], mask[i, longest - len(prompt) :] = prompt, 1
        self.mask_BT = torch.from_numpy(mask).to(device)
        positions_BT = (self.mask_BT.cumsum(1) - 1).clamp(min=0)
        self.past = None
        return self._forward(torch.from_numpy(ids).to(device), positions_BT)[:, -1]

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(tokens_B), 1)], 1)
        return self._forward(tokens_B[:, None], self.mask_BT.sum(1, keepdim=True) - 1)[:, -1]

    @torch.no_grad()
    def several(self, tokens_N: Tensor) -> Tensor:
        at, n = self.mask_BT.shape[1], len(tokens_N)
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(1, n)], 1)
        return self._forward(tokens_N[None], torch.arange(at, at + n, device=tokens_N.device)[None], n)[0]

    def back(self, positions: int) -> None:
        self.past.crop(-positions)  # pyright: ignore[reportOptionalMemberAccess]
        self.mask_BT = self.mask_BT[:, : self.mask_BT.shape[1] - positions]

    def _forward(self, ids_BN: Tensor, positions_BN: Tensor, last: int = 1) -> Tensor:
        found = self.model(
            input_ids=ids_BN, attention_mask=self.mask_BT, position_ids=positions_BN, past_key_values=self.past,
            use_cache=True, logits_to_keep=last,
        )  # fmt: skip
        self.past = found.past_key_values
        return found.logits

    def keep(self, rows: Tensor) -> None:
        self.past.batch_select_indices(rows)  # pyright: ignore[reportOptionalMemberAccess]
        self.mask_BT = self.mask_BT[rows]


class CachedSeq2Seq:
    """A sequence-to-sequence model through transformers' own cache."""

    def __init__(self, model: Any, start_id: int):
        self.model, self.start_id = model, start_id

    @torch.no_grad()
    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        device = self.model.device
        source_BS, mask_BS = pad(prompts, self.model.config.pad_token_id or 0)
        self.mask_BS, self.past = mask_BS.long().to(device), None
        self.memory_BSD = self.model.get_encoder()(
            source_BS.to(device), attention_mask=self.mask_BS, return_dict=True
        ).last_hidden_state
        return self.step(torch.full((len(prompts),), self.start_id, device=device))

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        return self._forward(tokens_B[:, None])[:, -1]

    @torch.no_grad()
    def several(self, tokens_N: Tensor) -> Tensor:
        return self._forward(tokens_N[None])[0]

    def back(self, positions: int) -> None:
        self.past.crop(-positions)  # pyright: ignore[reportOptionalMemberAccess]

    def _forward(self, ids_BN: Tensor) -> Tensor:
        found = self.model(
            encoder_outputs=(self.memory_BSD,), attention_mask=self.mask_BS, decoder_input_ids=ids_BN,
            past_key_values=self.past, use_cache=True,
        )  # fmt: skip
        self.past = found.past_key_values
        return found.logits

    def keep(self, rows: Tensor) -> None:
        if self.past is not None:
            self.past.reorder_cache(rows)
        self.memory_BSD, self.mask_BS = self.memory_BSD[rows], self.mask_BS[rows]
