"""One token after another: what writes with a model, and what it remembers between two tokens.

A stepper reads prompts once (`start`) and then takes a token a row (`step`); `keep` drops, repeats or reorders rows. The classes
that are trained from scratch here (Llama, M2M100) have steppers of their own: the same mathematics on fused weights and caches
that are allocated once, without the cost of a module call for every part. Every other model goes through transformers' cache.
Shapes: B rows, T positions so far, S source positions, H heads, D width, E width of a head, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multistep.models.encoder import pad

GROW = 64  # positions that a full cache grows by
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


def stepper_of(model: Any, start_id: int | None = None) -> Stepper:
    """The fastest stepper that fits the model. `start_id`: the first token of a target (sequence-to-sequence models)."""
    config = model.config
    if config.is_encoder_decoder:
        start = config.decoder_start_token_id if start_id is None else start_id
        ours = type(model).__name__ == "M2M100ForConditionalGeneration" and config.activation_function == "relu"
        return M2MSteps(model, start) if ours and _plain(model.model.decoder) else CachedSeq2Seq(model, start)
    ours = type(model).__name__ == "LlamaForCausalLM" and config.hidden_act == "silu"
    rope = (config.rope_parameters or {}).get("rope_type", "default") if ours else ""
    return LlamaSteps(model) if rope == "default" and _plain(model.model) else CachedDecoder(model)


def _plain(body: nn.Module) -> bool:
    """Whether its weights are all there is to its layers: an adapted or quantized layer computes more than they say."""
    return all(type(module).__module__.startswith(_PLAIN) for module in body.modules())


class Cache:
    """Keys and values [L,B,H,T,E] with room to grow."""

    def __init__(self, layers: int, rows: int, heads: int, width: int, positions: int, like: Tensor):
        shape = (layers, rows, heads, positions + GROW, width)
        self.keys, self.values = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.length = 0

    def put(self, layer: int, key_BHNE: Tensor, value_BHNE: Tensor) -> tuple[Tensor, Tensor]:
        """Append N positions in a layer; all of that layer's so far. `advance` after the last layer."""
        end = self.length + key_BHNE.shape[2]
        if end > self.keys.shape[3]:
            more = (0, 0, 0, end - self.keys.shape[3] + GROW)
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        self.keys[layer, :, :, self.length : end] = key_BHNE
        self.values[layer, :, :, self.length : end] = value_BHNE
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, positions: int) -> None:
        self.length += positions

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


# ---------------------------------------------------------------------------------------------- Llama


class LlamaSteps:
    """A Llama of transformers, with query, key and value (and gate and up) in one product each."""

    def __init__(self, model: Any):
        config = model.config
        self.config, self.model = config, model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = config.head_dim or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.layers = [_llama_layer(layer) for layer in model.model.layers]
        self.cache: Cache | None = None

    @torch.no_grad()
    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        table = self.model.model.embed_tokens.weight
        longest = max(len(p) for p in prompts)
        self.pads_B = torch.tensor([longest - len(p) for p in prompts], device=table.device)  # prompts end together
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = prompt
        self.cache = Cache(len(self.layers), len(prompts), self.kv_heads, self.width, longest, table)
        places_T = torch.arange(longest, device=table.device)
        seen_BTT = (places_T[None, :] <= places_T[:, None])[None] & (
            places_T[None, None, :] >= self.pads_B[:, None, None]
        )
        seen_BTT = seen_BTT | torch.eye(
            longest, dtype=torch.bool, device=table.device
        )  # padding sees itself: no empty row
        return self._forward(
            torch.from_numpy(ids).to(table.device), places_T[None] - self.pads_B[:, None], seen_BTT[:, None]
        )

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        assert self.cache is not None
        now = self.cache.length
        seen = None
        if bool(self.pads_B.any()):
            seen = (torch.arange(now + 1, device=tokens_B.device)[None, :] >= self.pads_B[:, None])[:, None, None]
        return self._forward(tokens_B[:, None], now - self.pads_B[:, None], seen)

    def keep(self, rows: Tensor) -> None:
        assert self.cache is not None
        self.cache.keep(rows)
        self.pads_B = self.pads_B[rows]

    def _forward(self, ids_BN: Tensor, positions_BN: Tensor, seen: Tensor | None) -> Tensor:
        assert self.cache is not None
        body, (rows, n) = self.model.model, ids_BN.shape
        x_BND = F.embedding(ids_BN, body.embed_tokens.weight)
        cos, sin = (t[:, None] for t in body.rotary_emb(x_BND, positions_BN.clamp(min=0)))
        sizes = [self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width]
        for number, layer in enumerate(self.layers):
            query, key, value = F.linear(self._norm(x_BND, layer["norm"]), layer["qkv"], layer["qkv_bias"]).split(
                sizes, -1
            )
            query = _rotate(query.view(rows, n, self.heads, self.width).transpose(1, 2), cos, sin)
            key = _rotate(key.view(rows, n, self.kv_heads, self.width).transpose(1, 2), cos, sin)
            value = value.view(rows, n, self.kv_heads, self.width).transpose(1, 2)
            keys, values = self.cache.put(number, key, value)
            mixed = F.scaled_dot_product_attention(query, keys, values, seen, enable_gqa=self.heads != self.kv_heads)
            x_BND = x_BND + F.linear(mixed.transpose(1, 2).reshape(rows, n, -1), layer["out"], layer["out_bias"])
            gate, up = F.linear(self._norm(x_BND, layer["mlp_norm"]), layer["gate_up"], layer["gate_up_bias"]).chunk(
                2, -1
            )
            x_BND = x_BND + F.linear(F.silu(gate) * up, layer["down"], layer["down_bias"])
        self.cache.advance(n)
        return self.model.lm_head(self._norm(x_BND[:, -1], body.norm.weight))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


def _llama_layer(layer: Any) -> dict[str, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "norm": layer.input_layernorm.weight, "mlp_norm": layer.post_attention_layernorm.weight,
        **_fused("qkv", attention.q_proj, attention.k_proj, attention.v_proj), **_fused("out", attention.o_proj),
        **_fused("gate_up", mlp.gate_proj, mlp.up_proj), **_fused("down", mlp.down_proj),
    }  # fmt: skip


def _rotate(x_BHNE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BHNE.chunk(2, -1)
    return x_BHNE * cos + torch.cat((-b, a), -1) * sin


def _fused(name: str, *linears: Any) -> dict[str, Any]:
    """The weights of linear layers on the same input, one above the other; likewise their biases."""
    weight = linears[0].weight if len(linears) == 1 else torch.cat([m.weight for m in linears]).detach()
    biased = linears[0].bias is not None
    bias = None if not biased else torch.cat([m.bias for m in linears]).detach()
    return {name: weight, f"{name}_bias": bias}


# ---------------------------------------------------------------------------------------------- M2M100


class M2MSteps:
    """The decoder of an M2M100; keys and values of the source are computed once."""

    def __init__(self, model: Any, start_id: int):
        self.model, self.start_id, self.decoder = model, start_id, model.model.decoder
        config = model.config
        self.heads, self.width = config.decoder_attention_heads, config.d_model // config.decoder_attention_heads
        self.scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.layers = [_m2m_layer(layer) for layer in self.decoder.layers]
        self.cache: Cache | None = None

    @torch.no_grad()
    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        device = self.model.lm_head.weight.device
        source_BS, mask_BS = pad(prompts, self.model.config.pad_token_id)
        source_BS, mask_BS = source_BS.to(device), mask_BS.to(device)
        memory_BSD = self.model.model.encoder(source_BS, attention_mask=mask_BS.long()).last_hidden_state
        self.seen = None if bool(mask_BS.all()) else mask_BS[:, None, None]
        shape = (*source_BS.shape, 2, self.heads, self.width)
        self.sources = [
            F.linear(memory_BSD, layer["source"], layer["source_bias"]).view(shape).permute(2, 0, 3, 1, 4).contiguous()
            for layer in self.layers
        ]
        self.cache = Cache(len(self.layers), len(prompts), self.heads, self.width, 1, memory_BSD)
        return self.step(torch.full((len(prompts),), self.start_id, device=device))

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        assert self.cache is not None
        table = self.decoder.embed_positions
        place = table.padding_idx + 1 + self.cache.length
        if place >= table.weights.shape[0]:
            table.make_weights(place + GROW, table.embedding_dim, table.padding_idx)
        x_BD = F.embedding(tokens_B, self.model.lm_head.weight) * self.scale + table.weights[place].to(tokens_B.device)
        shape = (len(tokens_B), self.heads, 1, self.width)
        for number, layer in enumerate(self.layers):
            parts = F.linear(_layer_norm(x_BD, layer["norm"]), layer["qkv"], layer["qkv_bias"]).chunk(3, -1)
            query, key, value = (p.reshape(shape) for p in parts)
            keys, values = self.cache.put(number, key, value)
            mixed = F.scaled_dot_product_attention(query, keys, values)
            x_BD = x_BD + F.linear(mixed.reshape(len(x_BD), -1), layer["out"], layer["out_bias"])
            query = F.linear(_layer_norm(x_BD, layer["cross_norm"]), layer["query"], layer["query_bias"]).view(shape)
            source = self.sources[number]
            mixed = F.scaled_dot_product_attention(query, source[0], source[1], self.seen)
            x_BD = x_BD + F.linear(mixed.reshape(len(x_BD), -1), layer["cross_out"], layer["cross_out_bias"])
            inner = F.linear(_layer_norm(x_BD, layer["mlp_norm"]), layer["up"], layer["up_bias"])
            x_BD = x_BD + F.linear(F.relu(inner), layer["down"], layer["down_bias"])
        self.cache.advance(1)
        return self.model.lm_head(_layer_norm(x_BD, self.decoder.layer_norm))

    def keep(self, rows: Tensor) -> None:
        assert self.cache is not None
        self.cache.keep(rows)
        self.sources = [s[:, rows] for s in self.sources]
        self.seen = None if self.seen is None else self.seen[rows]


def _m2m_layer(layer: Any) -> dict[str, Any]:
    own, cross = layer.self_attn, layer.encoder_attn
    return {
        "norm": layer.self_attn_layer_norm, "cross_norm": layer.encoder_attn_layer_norm, "mlp_norm": layer.final_layer_norm,
        **_fused("qkv", own.q_proj, own.k_proj, own.v_proj), **_fused("out", own.out_proj),
        **_fused("query", cross.q_proj), **_fused("source", cross.k_proj, cross.v_proj), **_fused("cross_out", cross.out_proj),
        **_fused("up", layer.fc1), **_fused("down", layer.fc2),
    }  # fmt: skip


def _layer_norm(x: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


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
        return self._forward(torch.from_numpy(ids).to(device), positions_BT)

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(tokens_B), 1)], 1)
        return self._forward(tokens_B[:, None], self.mask_BT.sum(1, keepdim=True) - 1)

    def _forward(self, ids_BN: Tensor, positions_BN: Tensor) -> Tensor:
        found = self.model(
            input_ids=ids_BN, attention_mask=self.mask_BT, position_ids=positions_BN, past_key_values=self.past,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        self.past = found.past_key_values
        return found.logits[:, -1]

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
        found = self.model(
            encoder_outputs=(self.memory_BSD,), attention_mask=self.mask_BS, decoder_input_ids=tokens_B[:, None],
            past_key_values=self.past, use_cache=True,
        )  # fmt: skip
        self.past = found.past_key_values
        return found.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        if self.past is not None:
            self.past.reorder_cache(rows)
        self.memory_BSD, self.mask_BS = self.memory_BSD[rows], self.mask_BS[rows]
