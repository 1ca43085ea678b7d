"""Writing with a Llama of transformers: the same mathematics on fused weights, with as few operations a token as there can be.

A token costs some fifteen operations a layer, all on memory that is allocated once; on a CPU the operations, not their arithmetic,
are what small models spend their time on. Rotary positions are products of complex numbers: the rows of query and key weights are
put in pairs (i, i + E/2) for that, which changes no product of a query with a key.
Shapes: B rows, N positions at once, T positions so far, D width, H heads, G heads of keys and values, R = H / G, E width of a
head, C = E / 2 complex numbers, I inner width, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multistep.models.cache import GROW, Cache, add_projected, attend, fused, project


class LlamaSteps:
    """A stepper (models/step.py) for float32 weights."""

    def __init__(self, model: Any):
        config = model.config
        self.body, self.table, self.head = (
            model.model,
            model.model.embed_tokens.weight,
            model.lm_head.weight.detach().t(),
        )
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = config.head_dim or config.hidden_size // self.heads
        self.inner, self.eps = config.intermediate_size, config.rms_norm_eps
        self.layers = [_layer(layer, self.heads + self.kv_heads, self.width) for layer in model.model.layers]
        self.turns_PC = self._turns(0)

    @torch.inference_mode()
    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        device, longest = self.table.device, max(len(p) for p in prompts)
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = prompt  # prompts end together
        self.pads_B = torch.tensor([longest - len(p) for p in prompts], device=device)
        self.cache = Cache(len(self.layers), len(prompts), self.kv_heads, self.width, longest, self.table)
        self.turns_PC = self._turns(longest)
        places_T = torch.arange(longest, device=device)
        real_BT = places_T >= self.pads_B[:, None]
        hidden_BG1T = torch.zeros(real_BT.shape, device=device).masked_fill(~real_BT, -torch.inf)[:, None, None]
        self.padded = not bool(real_BT.all())
        self.bias = hidden_BG1T.expand(-1, self.kv_heads, -1, -1) if self.padded else hidden_BG1T[:1, :, :, :1]
        self.buffers = _Buffers(len(prompts), self)
        own = torch.eye(longest, dtype=torch.bool, device=device)  # padding sees itself: no empty row
        seen_B1TT = (real_BT[:, None] & (places_T <= places_T[:, None]) | own)[:, None]
        x_BND = self._read(torch.from_numpy(ids).to(device), seen_B1TT)
        return self._last(x_BND[:, -1])

    @torch.inference_mode()
    def several(self, tokens_N: Tensor) -> Tensor:
        """Take N tokens of the only row at once: the logits [N,V] after each of them."""
        if len(self.pads_B) != 1:
            raise ValueError(f"several tokens at once are taken for one row, not for {len(self.pads_B)}")
        at, n = self.cache.length, len(tokens_N)
        self.cache.make_room(n)
        if at + n > len(self.turns_PC):
            self.turns_PC = self._turns(at + n)
        places_T = torch.arange(at + n, device=tokens_N.device)
        seen_NT = places_T <= places_T[at:, None]
        return self._last(self._read(tokens_N[None], seen_NT[None, None], at)[0])

    def back(self, positions: int) -> None:
        """Forget the last so many positions."""
        self.cache.length -= positions

    def _last(self, x_BD: Tensor) -> Tensor:
        with torch.autocast(x_BD.device.type, enabled=False):
            return F.rms_norm(x_BD, x_BD.shape[-1:], self.body.norm.weight, self.eps) @ self.head

    def _read(self, ids_BN: Tensor, seen_B1NT: Tensor, at: int = 0) -> Tensor:
        """The states [B,N,D] behind the last layer of N tokens that follow on `at` others."""
        with torch.autocast(ids_BN.device.type, enabled=False):
            return self._through(ids_BN, seen_B1NT, at)

    def _through(self, ids_BN: Tensor, seen_B1NT: Tensor, at: int) -> Tensor:
        places_N = torch.arange(at, at + ids_BN.shape[1], device=ids_BN.device)
        places_BN = (places_N - self.pads_B[:, None]).clamp(min=0)
        turns_BN1C = self.turns_PC[places_BN][:, :, None]
        qk = self.heads + self.kv_heads
        x_BND = F.embedding(ids_BN, self.table)
        for number, layer in enumerate(self.layers):
            inner_BND = F.rms_norm(x_BND, x_BND.shape[-1:], layer.norm, self.eps)
            qkv = F.linear(inner_BND, layer.qkv.t(), layer.qkv_bias).unflatten(-1, (-1, self.width))
            pairs = torch.view_as_complex(qkv[:, :, :qk].unflatten(-1, (-1, 2)))
            query, keys = (
                torch.view_as_real(pairs * turns_BN1C).flatten(3).transpose(1, 2).split([self.heads, self.kv_heads], 1)
            )
            values = qkv[:, :, qk:].transpose(1, 2)
            self.cache.fill(number, keys, values, at)
            if at:
                keys, values = self.cache.first(number, at + ids_BN.shape[1])
            grouped = self.heads != self.kv_heads
            mixed = F.scaled_dot_product_attention(query, keys, values, seen_B1NT, enable_gqa=grouped)
            x_BND = x_BND + F.linear(mixed.transpose(1, 2).flatten(2), layer.out.t(), layer.out_bias)
            inner_BND = F.rms_norm(x_BND, x_BND.shape[-1:], layer.mlp_norm, self.eps)
            gate, up = F.linear(inner_BND, layer.gate_up.t(), layer.gate_up_bias).chunk(2, -1)
            x_BND = x_BND + F.linear(F.silu(gate) * up, layer.down.t(), layer.down_bias)
        self.cache.length = at + ids_BN.shape[1]
        return x_BND

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> Tensor:
        b, now = self.buffers, self.cache.length
        slots, keys, values = self.cache.open()
        slots = torch.view_as_complex(slots.unflatten(-1, (-1, 2)))
        if now >= len(self.turns_PC):
            self.turns_PC = self._turns(now)
        turn = self.turns_PC[now - self.pads_B, None] if self.padded else self.turns_PC[now, None]
        b.turn[0].copy_(turn)  # keys turn, values do not
        bias = self._bias(now + 1)
        torch.index_select(self.table, 0, tokens_B, out=b.x)
        for layer, slot, key, value in zip(self.layers, slots.unbind(0), keys.unbind(0), values.unbind(0), strict=True):
            self._norm(layer.norm)
            project(b.normed, layer.qkv, layer.qkv_bias, b.qkv)
            torch.mul(b.query_pairs, turn, out=b.turned)
            torch.mul(b.kv_pairs, b.turn, out=slot)
            attend(b.query, key, value, bias, self.width**-0.5, b.mixed)
            add_projected(b.x, b.mixed_BD, layer.out, layer.out_bias)
            self._norm(layer.mlp_norm)
            project(b.normed, layer.gate_up, layer.gate_up_bias, b.gate_up)
            F.silu(b.gate, inplace=True).mul_(b.up)
            add_projected(b.x, b.gate, layer.down, layer.down_bias)
        self._norm(self.body.norm.weight)
        logits_BV = b.x.new_empty((len(tokens_B), self.head.shape[1]))
        return torch.mm(b.normed, self.head, out=logits_BV)

    def _norm(self, weight: Tensor) -> None:
        """x / sqrt(mean x^2 + eps) * weight. The mean is a product of the row with itself: one operation in place of three."""
        b = self.buffers
        torch.baddbmm(b.eps, b.x_row, b.x_column, alpha=1 / b.x.shape[1], out=b.scale)
        torch.mul(b.x, b.scale_B1.rsqrt_(), out=b.normed).mul_(weight)

    def _bias(self, positions: int) -> Tensor:
        if not self.padded:
            return self.bias[0]
        if positions > self.bias.shape[3]:
            self.bias = F.pad(self.bias, (0, max(GROW, positions // 4)))  # what is written is seen
        return self.bias[..., :positions].flatten(0, 1)

    def _turns(self, positions: int) -> Tensor:
        """e^(i place frequency) [P,C] of rotary positions, for some more places than asked for."""
        frequency_C = self.body.rotary_emb.inv_freq.float()
        angle_PC = torch.arange(positions + max(GROW, positions // 4), device=frequency_C.device)[:, None] * frequency_C
        return torch.polar(torch.ones_like(angle_PC), angle_PC)

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)
        self.pads_B = self.pads_B[rows]
        self.bias = self.bias[rows] if self.padded else self.bias
        if len(rows) != len(self.buffers.x):
            self.buffers = _Buffers(len(rows), self)


class _Buffers:
    """What a step writes into, and views of it."""

    def __init__(self, rows: int, of: LlamaSteps):
        new, groups = of.table.new_empty, of.kv_heads
        self.x, self.normed = new((rows, of.table.shape[1])), new((rows, of.table.shape[1]))
        self.x_row, self.x_column = self.x[:, None], self.x[:, :, None]
        self.eps, self.scale = of.table.new_full((rows, 1, 1), of.eps), new((rows, 1, 1))
        self.scale_B1 = self.scale[:, 0]
        self.qkv = new((rows, (of.heads + 2 * groups) * of.width))
        pairs = torch.view_as_complex(self.qkv.view(rows, -1, of.width // 2, 2))
        self.query_pairs = pairs[:, : of.heads]
        self.kv_pairs = pairs[:, of.heads :].view(rows, 2, groups, -1).transpose(0, 1)
        self.turn = torch.ones((2, rows if of.padded else 1, 1, of.width // 2), dtype=pairs.dtype, device=pairs.device)
        self.turned = torch.empty_like(self.query_pairs, memory_format=torch.contiguous_format)
        self.query = torch.view_as_real(self.turned).view(rows * groups, -1, of.width)
        self.mixed = torch.empty_like(self.query)
        self.mixed_BD = self.mixed.view(rows, -1)
        self.gate_up = new((rows, 2 * of.inner))
        self.gate, self.up = self.gate_up.chunk(2, -1)


class _Layer(NamedTuple):
    """Weights are [in,out]."""

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def _layer(layer: Any, turned: int, width: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = fused(attention.q_proj, attention.k_proj, attention.v_proj)
    order = torch.arange(qkv.shape[1], device=qkv.device)
    pairs = order[: turned * width].view(turned, 2, -1).transpose(1, 2).flatten()  # rows i and i + E/2 side by side
    order = torch.cat([pairs, order[len(pairs) :]])
    qkv, qkv_bias = qkv.t()[order].t(), None if qkv_bias is None else qkv_bias[order]
    return _Layer(
        layer.input_layernorm.weight, qkv, qkv_bias, *fused(attention.o_proj), layer.post_attention_layernorm.weight,
        *fused(mlp.gate_proj, mlp.up_proj), *fused(mlp.down_proj),
    )  # fmt: skip
