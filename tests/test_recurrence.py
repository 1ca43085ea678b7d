"""The LSTM kernel against torch.nn.LSTM: values and gradients; finite differences; the start, the end, bits, bad shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from multistep.models.recurrence import has_bf16, lstm

pytestmark = pytest.mark.usefixtures("torch_seeded")
B, T, D, H = 17, 9, 4, 6  # rows enough for two threads


def weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Inputs, kernel, recurrent kernel, bias, h, c."""
    shapes = [(B, T, D), (D, 4 * H), (H, 4 * H), (4 * H,), (B, H), (B, H)]
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def reference(kernel: Tensor, recurrent: Tensor, bias: Tensor) -> nn.LSTM:
    """torch's layer with these weights: it transposes them, and has two biases."""
    layer = nn.LSTM(len(kernel), len(recurrent), batch_first=True, dtype=kernel.dtype)
    with torch.no_grad():
        values = (kernel.T, recurrent.T, bias, torch.zeros_like(bias))
        for parameter, value in zip(layer.parameters(), values, strict=True):
            parameter.copy_(value)
    return layer


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("used", ["outputs", "last", "cell", "all"])
def test_values_and_gradients_are_those_of_torch(dtype: torch.dtype, tolerance: float, used: str, threads: int) -> None:
    x, kernel, recurrent, bias, h, c = weights(dtype)
    layer = reference(kernel, recurrent, bias)
    with torch.backends.mkldnn.flags(enabled=False):
        outputs, (last, cell) = layer(x, (h[None], c[None]))
        theirs = {"outputs": outputs, "last": last[0], "cell": cell[0]}
    ours = dict(zip(theirs, lstm(x, kernel, recurrent, bias, h, c, threads), strict=True))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance)
    names = list(theirs) if used == "all" else [used]
    factors = {n: torch.randn_like(theirs[n]) for n in names}
    given = [x, h, c, *list(layer.parameters())[:3]]
    wanted = list(torch.autograd.grad(sum((theirs[n] * factors[n]).sum() for n in names), given))  # pyright: ignore
    wanted[3], wanted[4] = wanted[3].T, wanted[4].T
    found = torch.autograd.grad(sum((ours[n] * factors[n]).sum() for n in names), [x, h, c, kernel, recurrent, bias])  # pyright: ignore
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    yield request.param
    assert torch.get_num_threads() == before  # what the parts did is undone


def test_gradients_are_finite_differences(threads: int) -> None:
    x, *others = weights()
    short = x[:, :3].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: lstm(*t, threads=threads), [short, *others])


def test_no_gradient_where_none_is_wanted(threads: int) -> None:
    x, kernel, recurrent, bias, h, c = weights()
    with torch.no_grad():
        assert not lstm(x, kernel, recurrent, bias, threads=threads)[1].requires_grad
    last = lstm(x.detach(), kernel, recurrent.detach(), bias, h, c, threads)[1]
    (found,) = torch.autograd.grad(last.sum(), [kernel])
    torch.testing.assert_close(found, torch.autograd.grad(lstm(x, kernel, recurrent, bias, h, c)[1].sum(), [kernel])[0])


@pytest.mark.parametrize("used", ["outputs", "last", "cell", "all"])
def test_bf16_costs_about_what_rounding_the_factors_costs(used: str, threads: int) -> None:
    """And ids are looked up in the table, with its gradient."""
    if not has_bf16():
        pytest.skip("no fast bf16 here")
    _, *given = weights(torch.float32)
    table, ids = torch.randn(30, D).requires_grad_(), torch.randint(0, 30, (B, T))
    given = [table, *given]

    def everything(rounded: bool, bf16: bool) -> list[Tensor]:
        t, kernel, recurrent, bias, h, c = (
            v.bfloat16().float() if rounded and n not in (3, 5) else v for n, v in enumerate(given)
        )
        out = lstm(
            ids if bf16 else t[ids], kernel, recurrent, bias, h, c, threads, bf16=bf16, table_VD=t if bf16 else None
        )
        loss = sum(
            v.square().sum() for k, v in zip(("outputs", "last", "cell"), out, strict=True) if used in (k, "all")
        )
        return [*out, *torch.autograd.grad(loss, given)]  # pyright: ignore

    runs = [everything(False, False), everything(True, False), everything(False, True)]
    for exact, rounded, found in zip(*runs, strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).norm() <= 2.5 * (rounded - exact).norm() + 2e-3 * exact.norm()


def test_the_last_step_alone_has_the_same_gradients(threads: int) -> None:
    given = weights(torch.float32)
    whole, alone = lstm(*given, threads), lstm(*given, threads, every=False)
    assert torch.equal(alone[0][:, 0], whole[1]) and torch.equal(alone[1], whole[1])
    wanted = torch.autograd.grad(whole[0][:, -1].sum() + 2 * whole[1].sum(), given)
    for one, other in zip(torch.autograd.grad(alone[0].sum() + 2 * alone[1].sum(), given), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_starts_from_zeros_without_a_bias() -> None:
    x, kernel, recurrent, bias, h, c = weights()
    without = lstm(x, kernel, recurrent)
    zeros = lstm(x, kernel, recurrent, torch.zeros_like(bias), torch.zeros_like(h), torch.zeros_like(c))
    assert all(torch.equal(a, b) for a, b in zip(without, zeros, strict=True))
    assert torch.equal(without[0][:, -1], without[1])


def test_goes_on_where_it_stopped() -> None:
    x, kernel, recurrent, bias, h, c = weights()
    whole = lstm(x, kernel, recurrent, bias, h, c)
    first = lstm(x[:, :4], kernel, recurrent, bias, h, c)
    then = lstm(x[:, 4:], kernel, recurrent, bias, first[1], first[2])
    torch.testing.assert_close(torch.cat((first[0], then[0]), 1), whole[0])
    torch.testing.assert_close(then[2], whole[2])


def test_repeats_to_the_last_bit(threads: int) -> None:
    given = weights(torch.float32)
    runs = []
    for _ in range(2):
        outputs = lstm(*given, threads=threads)
        runs.append([*outputs, *torch.autograd.grad(outputs[0].square().sum() + outputs[2].sum(), given)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_reads_what_autocast_made() -> None:
    x, kernel, recurrent, bias, _, _ = weights(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = lstm(x.bfloat16(), kernel, recurrent, bias)[0]
    outputs.sum().backward()
    assert outputs.dtype == torch.float32 and x.grad is not None and x.grad.dtype == torch.float32


def test_shapes_that_do_not_fit_are_named() -> None:
    x, kernel, recurrent, *_ = weights()
    for bad in ((x, kernel.T, recurrent), (x, kernel, recurrent.T), (x[:, :0], kernel, recurrent)):
        with pytest.raises(ValueError, match="lstm needs"):
            lstm(*bad)
