"""Writing with an M2M100 of transformers: its decoder on fused weights; keys and values of the source are computed once.

Shapes: B rows, S source positions, T positions so far, N positions at once, D width, H heads, E width of a head, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multistep.models.cache import GROW, Cache, add_projected, attend, fused, project
from multistep.models.encoder import pad


class M2MSteps:
    """A stepper (models/step.py). `start_id`: the first token of a target."""

    def __init__(self, model: Any, start_id: int):
        config = model.config
        self.model, self.start_id, self.decoder = model, start_id, model.model.decoder
        self.table, self.head = model.lm_head.weight, model.lm_head.weight.detach().t()
        self.heads, self.width = config.decoder_attention_heads, config.d_model // config.decoder_attention_heads
        self.scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.layers = [_layer(layer) for layer in self.decoder.layers]

    @torch.inference_mode()
    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        device = self.table.device
        source_BS, mask_BS = pad(prompts, self.model.config.pad_token_id)
        source_BS, mask_BS = source_BS.to(device), mask_BS.to(device)
        memory_BSD = self.model.model.encoder(source_BS, attention_mask=mask_BS.long()).last_hidden_state
        hidden_BS = torch.zeros(mask_BS.shape, dtype=self.table.dtype, device=device).masked_fill(~mask_BS, -torch.inf)
        whole = bool(mask_BS.all())
        self.bias_BH1S = (
            hidden_BS[:1, None, None, :1] if whole else hidden_BS[:, None, None].expand(-1, self.heads, -1, -1)
        )
        with torch.autocast(device.type, enabled=False):
            found = [F.linear(memory_BSD.to(self.table.dtype), la.source.t(), la.source_bias) for la in self.layers]
        self.source_L2BHSE = torch.stack(
            [f.unflatten(-1, (2, self.heads, self.width)).permute(2, 0, 3, 1, 4) for f in found]
        )
        self.sources_B = torch.arange(len(prompts), device=device)
        self.cache = Cache(len(self.layers), len(prompts), self.heads, self.width, 1, self.table)
        self._views()
        return self.step(torch.full((len(prompts),), self.start_id, device=device))

    def _places(self, n: int) -> Tensor:
        """What is added to the embeddings of the next N positions [N,D]."""
        table = self.decoder.embed_positions
        place = table.padding_idx + 1 + self.cache.length
        if place + n > table.weights.shape[0]:
            table.make_weights(place + n + GROW, table.embedding_dim, table.padding_idx)
        return table.weights[place : place + n].to(self.table.device)

    @torch.inference_mode()
    def several(self, tokens_N: Tensor) -> Tensor:
        """Take N tokens of the only row at once: the logits [N,V] after each of them."""
        if len(self.sources_B) != 1:
            raise ValueError(f"several tokens at once are taken for one row, not for {len(self.sources_B)}")
        at, n = self.cache.length, len(tokens_N)
        self.cache.make_room(n)
        places_T = torch.arange(at + n, device=tokens_N.device)
        seen_NT = places_T <= places_T[at:, None]
        with torch.autocast(tokens_N.device.type, enabled=False):
            x_ND = self.table[tokens_N] * self.scale + self._places(n)
            for number, layer in enumerate(self.layers):
                qkv = F.linear(_norm(x_ND, layer.norm), layer.qkv.t(), layer.qkv_bias)
                query, keys, values = qkv.view(n, 3, self.heads, self.width).permute(1, 2, 0, 3)[:, None]
                self.cache.fill(number, keys, values, at)
                keys, values = self.cache.first(number, at + n)
                mixed = F.scaled_dot_product_attention(query, keys, values, seen_NT)
                x_ND = x_ND + F.linear(_flat(mixed), layer.out.t(), layer.out_bias)
                query = F.linear(_norm(x_ND, layer.cross_norm), layer.query.t(), layer.query_bias)
                query = query.view(n, self.heads, self.width).transpose(0, 1)[None]
                keys, values = self.source_L2BHSE[number].unbind(0)
                mixed = F.scaled_dot_product_attention(query, keys, values)
                x_ND = x_ND + F.linear(_flat(mixed), layer.cross_out.t(), layer.cross_out_bias)
                up = F.linear(_norm(x_ND, layer.mlp_norm), layer.up.t(), layer.up_bias)
                x_ND = x_ND + F.linear(up.relu_(), layer.down.t(), layer.down_bias)
            self.cache.length = at + n
            return _norm(x_ND, self.decoder.layer_norm) @ self.head

    def back(self, positions: int) -> None:
        """Forget the last so many positions."""
        self.cache.length -= positions

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> Tensor:
        b, place_1D = self.buffers, self._places(1)
        slots, keys, values = self.cache.open()
        torch.index_select(self.table, 0, tokens_B, out=b.x)
        b.x.mul_(self.scale).add_(place_1D)
        scale = self.width**-0.5
        for layer, slot, key, value, source in zip(
            self.layers, slots.unbind(0), keys.unbind(0), values.unbind(0), self.sources, strict=True
        ):
            project(_norm(b.x, layer.norm), layer.qkv, layer.qkv_bias, b.qkv)
            b.query.copy_(b.query_BHE)
            slot.copy_(b.kv_2BHE)
            attend(b.query_BH1E, key, value, self.nothing, scale, b.mixed)
            add_projected(b.x, b.mixed_BD, layer.out, layer.out_bias)
            project(_norm(b.x, layer.cross_norm), layer.query, layer.query_bias, b.query_BD)
            attend(b.query_BH1E, source[0], source[1], self.bias, scale, b.mixed)
            add_projected(b.x, b.mixed_BD, layer.cross_out, layer.cross_out_bias)
            project(_norm(b.x, layer.mlp_norm), layer.up, layer.up_bias, b.up)
            add_projected(b.x, b.up.relu_(), layer.down, layer.down_bias)
        logits_BV = b.x.new_empty((len(tokens_B), self.head.shape[1]))
        return torch.mm(_norm(b.x, self.decoder.layer_norm), self.head, out=logits_BV)

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        before, self.sources_B = self.sources_B, self.sources_B[rows]
        if torch.equal(before, self.sources_B):
            return  # beams of the same sources changed places
        self.source_L2BHSE = self.source_L2BHSE[:, :, rows]
        if len(self.bias_BH1S) > 1 or self.bias_BH1S.shape[3] > 1:
            self.bias_BH1S = self.bias_BH1S[rows]
        self._views()

    def _views(self) -> None:
        rows = self.source_L2BHSE.shape[2]
        keys, values = self.source_L2BHSE.flatten(2, 3).unbind(1)
        self.sources = list(zip(keys.transpose(2, 3).unbind(0), values.unbind(0), strict=True))
        self.bias = self.bias_BH1S.flatten(0, 1)
        self.nothing = self.table.new_zeros((1, 1, 1))  # is hidden of what was written
        self.buffers = _Buffers(rows, self)


class _Buffers:
    """What a step writes into, and views of it."""

    def __init__(self, rows: int, of: M2MSteps):
        new, width = of.table.new_empty, of.table.shape[1]
        self.x, self.qkv = new((rows, width)), new((rows, 3 * width))
        parts = self.qkv.view(rows, 3, of.heads, of.width)
        self.query_BHE, self.kv_2BHE = parts[:, 0], parts[:, 1:].transpose(0, 1)
        self.query = new((rows, of.heads, of.width))
        self.query_BH1E, self.query_BD = self.query.view(rows * of.heads, 1, -1), self.query.view(rows, -1)
        self.mixed = torch.empty_like(self.query_BH1E)
        self.mixed_BD = self.mixed.view(rows, -1)
        self.up = new((rows, of.layers[0].up.shape[1]))


class _Layer(NamedTuple):
    """Norms are modules, weights are [in,out]. `query` and `source`: the attention to what was read."""

    norm: Any
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    cross_norm: Any
    query: Tensor
    query_bias: Tensor | None
    source: Tensor
    source_bias: Tensor | None
    cross_out: Tensor
    cross_out_bias: Tensor | None
    mlp_norm: Any
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def _layer(layer: Any) -> _Layer:
    own, cross = layer.self_attn, layer.encoder_attn
    return _Layer(
        layer.self_attn_layer_norm, *fused(own.q_proj, own.k_proj, own.v_proj), *fused(own.out_proj),
        layer.encoder_attn_layer_norm, *fused(cross.q_proj), *fused(cross.k_proj, cross.v_proj), *fused(cross.out_proj),
        layer.final_layer_norm, *fused(layer.fc1), *fused(layer.fc2),
    )  # fmt: skip


def _flat(mixed_1HNE: Tensor) -> Tensor:
    return mixed_1HNE[0].transpose(0, 1).flatten(1)


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
