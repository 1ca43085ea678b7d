"""An LSTM layer for a CPU: oneDNN's kernel through torch, and on several threads a part of the rows on each.

    i, f, o = sigmoid(x W + h U + b);  g = tanh(x W + h U + b);  c <- f c + i g;  h <- o tanh(c)

The kernel's own threads meet at every step; parts of a batch meet once. Measured in LOG.md, as is a hand-written backward pass of
whole-tensor operations, which was slower than the kernel.

Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000; the cell of Keras (gates in the order
i, f, g, o; one bias).
Differs from the source: nothing known. Same inputs and `threads`, same bits; no second derivative.
Shapes: B rows, T steps, D inputs, H units, G = 4 H gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_ROWS = 8  # of a part: a smaller one is hardly faster


def lstm(
    inputs_BTD: Tensor, kernel_DG: Tensor, recurrent_HG: Tensor, bias_G: Tensor | None = None,
    h_BH: Tensor | None = None, c_BH: Tensor | None = None, threads: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(outputs of every step [B,T,H], the last output [B,H], the last cell [B,H]), from zeros or from h and c.

    `threads`: of its own, besides torch's. Differentiable in all six tensors. Raises ValueError where shapes do not fit.
    """
    rows, steps, units = len(inputs_BTD), inputs_BTD.shape[1], len(recurrent_HG)
    if kernel_DG.shape != (inputs_BTD.shape[2], 4 * units) or recurrent_HG.shape[1] != 4 * units or not steps:
        shapes = ", ".join(str(tuple(t.shape)) for t in (inputs_BTD, kernel_DG, recurrent_HG))
        raise ValueError(f"lstm needs inputs [B,T,D] with T > 0, kernel [D,4H] and recurrent [H,4H], got {shapes}")
    dtype = kernel_DG.dtype
    bias_G = kernel_DG.new_zeros(4 * units) if bias_G is None else bias_G
    h_BH = kernel_DG.new_zeros(rows, units) if h_BH is None else h_BH.to(dtype)
    c_BH = kernel_DG.new_zeros(rows, units) if c_BH is None else c_BH.to(dtype)
    given = (inputs_BTD.to(dtype), h_BH, c_BH, kernel_DG, recurrent_HG, bias_G)
    parts = min(threads, rows // LEAST_ROWS)
    if parts > 1 and inputs_BTD.device.type == "cpu":
        return _Parts.apply(parts, torch.is_grad_enabled(), *given)  # pyright: ignore
    return _layer(*given)


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
    """One call on each of as many threads, in which torch computes alone."""
    threads = torch.get_num_threads()

    def alone(argument: Any) -> Any:
        if threads > 1:
            torch.set_num_threads(1)  # of this thread, and in passing of the process
        return work(argument)

    try:
        return list(_pool(len(arguments)).map(alone, arguments))
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lstm")
