"""An LSTM layer for a CPU: oneDNN's kernel through torch, and on several threads a part of the rows on each.

    i, f, o = sigmoid(x W + h U + b);  g = tanh(x W + h U + b);  c <- f c + i g;  h <- o tanh(c)

The kernel's own threads meet at every step; parts of a batch meet once. In bf16 the factors of its products are rounded, and h between
steps; the cell, sums and gradients are float32. Measured in LOG.md, as is a hand-written backward pass of whole-tensor operations,
which was slower than the kernel.

Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000; the cell of Keras (gates in the order
i, f, g, o; one bias).
Differs from the source: nothing known. Same inputs and `threads`, same bits; no second derivative.
Shapes: B rows, T steps, D inputs, H units, G = 4 H gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_ROWS = 8  # of a part: a smaller one is hardly faster


def lstm(
    inputs_BTD: Tensor, kernel_DG: Tensor, recurrent_HG: Tensor, bias_G: Tensor | None = None,
    h_BH: Tensor | None = None, c_BH: Tensor | None = None, threads: int = 1, bf16: bool = False, every: bool = True,
    table_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(outputs of every step [B,T,H], the last output [B,H], the last cell [B,H]), from zeros or from h and c.

    `threads`: of its own, besides torch's. `bf16`: float32 products are made of bfloat16 factors, on a CPU that can (`has_bf16`).
    `every=False`: the first of the three is that of the last step alone [B,1,H]. `table_VD`: embeddings, and the inputs are ids
    [B,T]. Differentiable in all tensors of numbers. Raises ValueError where shapes do not fit.
    """
    rows, steps, units = len(inputs_BTD), inputs_BTD.shape[1], len(recurrent_HG)
    width = inputs_BTD.shape[2] if table_VD is None else table_VD.shape[1]
    if kernel_DG.shape != (width, 4 * units) or recurrent_HG.shape[1] != 4 * units or not steps:
        shapes = ", ".join(str(tuple(t.shape)) for t in (inputs_BTD, kernel_DG, recurrent_HG))
        raise ValueError(f"lstm needs inputs [B,T,D] with T > 0, kernel [D,4H] and recurrent [H,4H], got {shapes}")
    dtype = kernel_DG.dtype
    bias_G = kernel_DG.new_zeros(4 * units) if bias_G is None else bias_G
    h_BH = kernel_DG.new_zeros(rows, units) if h_BH is None else h_BH.to(dtype)
    c_BH = kernel_DG.new_zeros(rows, units) if c_BH is None else c_BH.to(dtype)
    inputs_BTD = inputs_BTD.to(dtype) if table_VD is None else inputs_BTD
    given = (h_BH, c_BH, kernel_DG, recurrent_HG, bias_G)
    on_cpu = inputs_BTD.device.type == "cpu"
    parts = max(1, min(threads, rows // LEAST_ROWS)) if on_cpu else 1
    if on_cpu and dtype == torch.float32 and torch.backends.mkldnn.is_available() and rows:
        asked = _Asked(parts, torch.is_grad_enabled(), bf16, every)
        return _Kernel.apply(asked, table_VD, inputs_BTD, *given)  # pyright: ignore
    x_BTD = inputs_BTD if table_VD is None else torch.nn.functional.embedding(inputs_BTD, table_VD)
    if parts > 1:
        return _Parts.apply(parts, torch.is_grad_enabled(), x_BTD, *given)  # pyright: ignore
    return _layer(x_BTD, *given)


class _Asked(NamedTuple):
    parts: int
    graph: bool  # whether gradients may be asked for: a Function does not know of no_grad()
    bf16: bool
    every: bool


class _Kernel(torch.autograd.Function):
    """oneDNN's layer and its backward pass, called by hand: a part of the rows on each thread, without a graph. State and sums
    are float32, in bfloat16 too; there the factors of products and the outputs are rounded."""

    @staticmethod
    def forward(
        ctx: Any, asked: _Asked, table_VD: Tensor | None, x_BTD: Tensor, h_BH: Tensor, c_BH: Tensor, w_DG: Tensor,
        u_HG: Tensor, b_G: Tensor,
    ) -> Any:  # fmt: skip
        dtype = torch.bfloat16 if asked.bf16 else torch.float32
        weights = [w_DG.T.to(dtype).contiguous(), u_HG.T.to(dtype).contiguous(), b_G, torch.zeros_like(b_G)]
        train, units = asked.graph and any(ctx.needs_input_grad), len(u_HG)

        rounded_VD = None if table_VD is None else table_VD.to(dtype)

        def part(rows: tuple[Tensor, ...]) -> list[Tensor]:
            if rounded_VD is None:
                x_TBD = rows[0].new_empty((x_BTD.shape[1], len(rows[0]), x_BTD.shape[2]), dtype=dtype)
                x_TBD.copy_(rows[0].transpose(0, 1))
            else:
                x_TBD = torch.nn.functional.embedding(rows[0].T.contiguous(), rounded_VD)
            given = [x_TBD, *weights, rows[1][None].to(dtype).contiguous(), rows[2][None].contiguous()]
            with torch.set_grad_enabled(train):  # without it the kernel keeps nothing for its backward pass
                found = _FORWARD(*given, False, [], _LSTM, units, 1, True, False, False, train)
            return [*given, *(t.detach() for t in found if t is not None)]

        split = list(zip(*(t.tensor_split(asked.parts) for t in (x_BTD, h_BH, c_BH)), strict=True))
        parts = _at_once(part, split)
        ctx.asked, ctx.parts = asked, parts if train else []
        ctx.ids, ctx.words = (x_BTD, len(table_VD)) if table_VD is not None else (None, 0)
        ctx.set_materialize_grads(False)
        y, h, c = ([p[n] for p in parts] for n in (7, 8, 9))
        last_BH = _joined(h, 1)[0].float()
        outputs_BTH = _joined(y, 1).transpose(0, 1).float() if asked.every else last_BH[:, None].clone()
        return outputs_BTH, last_BH, _joined(c, 1)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_BTH: Tensor | None, h_BH: Tensor | None, c_BH: Tensor | None) -> Any:
        asked: _Asked = ctx.asked
        if y_BTH is None and h_BH is None and c_BH is None:
            return (None,) * len(ctx.needs_input_grad)
        if not asked.every and y_BTH is not None:
            h_BH = y_BTH[:, 0] if h_BH is None else h_BH + y_BTH[:, 0]
            y_BTH = None

        def part(number: int) -> list[Tensor]:
            *given, y, h, c, workspace = ctx.parts[number]
            slopes = [None if t is None else t.tensor_split(asked.parts)[number] for t in (y_BTH, h_BH, c_BH)]
            y_TBH = None if slopes[0] is None else slopes[0].transpose(0, 1).contiguous()
            ends = [None if t is None else t[None].contiguous() for t in slopes[1:]]
            found = list(_BACKWARD(
                *given, y, h, c, y_TBH, *ends, False, _LSTM, h.shape[2], 1, True, True, False, [], False, workspace
            ))  # fmt: skip
            if ctx.ids is not None:
                ids_TB = ctx.ids.tensor_split(asked.parts)[number].T.contiguous()
                found[0] = torch.ops.aten.embedding_dense_backward(found[0], ids_TB, ctx.words, -1, False)
            return found

        x, w, u, b, _, h, c = zip(*_at_once(part, range(asked.parts)), strict=True)
        table_VD = None if ctx.ids is None else _added(x)
        x_BTD = _joined([t.transpose(0, 1) for t in x], 0) if ctx.ids is None else None
        return None, table_VD, x_BTD, _joined(h, 1)[0], _joined(c, 1)[0], _added(w).T, _added(u).T, _added(b)


_FORWARD, _BACKWARD = torch.ops.aten.mkldnn_rnn_layer.default, torch.ops.aten.mkldnn_rnn_layer_backward.default
_LSTM = 2  # torch's number of this kind of cell


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _added(parts: Sequence[Tensor]) -> Tensor:
    """In order, so that the same bits come of it."""
    total = parts[0]
    for part in parts[1:]:
        total = total.add_(part)
    return total


def _layer(x_BTD: Tensor, h_BH: Tensor, c_BH: Tensor, w_DG: Tensor, u_HG: Tensor, b_G: Tensor) -> Any:
    """All steps by torch, which has the weights the other way round, and two biases."""
    with torch.autocast(x_BTD.device.type, enabled=False):
        weights = [w_DG.T.contiguous(), u_HG.T.contiguous(), b_G, torch.zeros_like(b_G)]
        start = (h_BH[None].contiguous(), c_BH[None].contiguous())
        training = torch.is_grad_enabled()
        outputs, h, c = torch._VF.lstm(x_BTD, start, weights, True, 1, 0.0, training, False, True)  # pyright: ignore
    return outputs, h[0], c[0]


class _Parts(torch.autograd.Function):
    """A graph for every part of the rows, each built and run backwards by a thread; the weights' gradients are added in order."""

    @staticmethod
    def forward(ctx: Any, count: int, graph: bool, x_BTD: Tensor, h_BH: Tensor, c_BH: Tensor, *weights: Tensor) -> Any:
        needed = [graph and n for n in ctx.needs_input_grad[2:]]  # those do not know of no_grad()

        def part(rows: tuple[Tensor, ...]) -> tuple[list[Tensor], Any]:
            given = [t.detach().requires_grad_(n) for t, n in zip((*rows, *weights), needed, strict=True)]
            with torch.set_grad_enabled(any(needed)):
                return given, _layer(*given)

        split = zip(*(t.tensor_split(count) for t in (x_BTD, h_BH, c_BH)), strict=True)
        ctx.parts = _at_once(part, list(split))
        ctx.set_materialize_grads(False)
        return tuple(torch.cat([o.detach() for o in same]) for same in zip(*(o for _, o in ctx.parts), strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if all(g is None for g in gradients):
            return tuple(found)
        needed = [n for n, wanted in enumerate(ctx.needs_input_grad) if wanted]
        count = len(ctx.parts)

        def part(number: int) -> list[Tensor]:
            given, outputs = ctx.parts[number]
            used = [
                (o, g.tensor_split(count)[number]) for o, g in zip(outputs, gradients, strict=True) if g is not None
            ]
            ends, slopes = [o for o, _ in used], [g for _, g in used]
            return list(torch.autograd.grad(ends, [given[n - 2] for n in needed], slopes, retain_graph=True))

        for n, *same in zip(needed, *_at_once(part, range(count)), strict=True):
            found[n] = (
                torch.cat(same) if n <= 4 else torch.stack(same).sum(0)
            )  # x, h, c by rows; the weights are shared
        return tuple(found)


def _at_once(work: Callable[[Any], Any], arguments: Sequence[Any]) -> list[Any]:
    """One call on each of as many threads, this one among them, in which torch computes alone."""
    threads = torch.get_num_threads()

    def alone(argument: Any) -> Any:
        if threads > 1:
            torch.set_num_threads(1)  # of this thread, and in passing of the process
        with torch.autocast("cpu", enabled=False):
            return work(argument)

    try:
        others = [_pool(len(arguments)).submit(alone, a) for a in arguments[1:]]
        return [alone(arguments[0]), *(o.result() for o in others)]
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


@cache
def has_bf16() -> bool:
    """Whether products of bfloat16 are faster than those of float32 on this CPU: by its name, never by a measurement, so that a run
    repeats. AMX, or AVX-512 on an EPYC (2.2 times); on a Xeon without AMX they take twice as long. See LOG.md."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            facts = file.read(20_000)
    except OSError:
        return False
    flags = set(facts.partition("\nflags")[2].partition("\n")[0].split())
    known = "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in facts)
    return known and torch.backends.mkldnn.is_available()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lstm")
