"""The loss that makes its logits piece by piece is the loss on whole logits: value and gradients, whatever the pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multistep.objectives import NextToken, pieces
from multistep.objectives.shapes import IGNORED, Hidden


@settings(deadline=None)
@given(
    tokens=st.integers(1, 40), piece=st.integers(1, 50), smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    z_loss=st.sampled_from([0.0, 1e-2]), ignored=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_pieces_add_up_to_whole_logits(
    tokens: int, piece: int, smoothing: float, z_loss: float, ignored: float, seed: int
) -> None:
    torch.manual_seed(seed)
    states = torch.randn(1, tokens, 6, dtype=torch.float64)
    weight = torch.randn(30, 6, dtype=torch.float64)
    ids = torch.randint(30, (1, tokens)).masked_fill(torch.rand(1, tokens) < ignored, IGNORED)
    objective = NextToken(label_smoothing=smoothing, z_loss=z_loss)
    found = []
    for whole in (True, False):
        h, w = states.float().requires_grad_(), weight.float().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "CPU_TOKENS", piece)
            loss = 3 * objective.loss(h @ w.T if whole else Hidden(h, w), ids)
        loss.backward()
        assert h.grad is not None and w.grad is not None
        found.append((loss.detach(), h.grad, w.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_autocast_multiplies_in_its_precision_and_sums_in_float32() -> None:
    torch.manual_seed(0)
    h, w = torch.randn(1, 700, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    ids = torch.randint(50, (1, 700))
    with torch.autocast("cpu", torch.bfloat16):
        loss = NextToken().loss(Hidden(h, w), ids)
        whole = NextToken().loss(torch.nn.functional.linear(h, w), ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole, rtol=1e-3, atol=1e-3)
    loss.backward()
    assert h.grad is not None and w.grad is not None and h.grad.dtype == w.grad.dtype == torch.float32


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    h, w = torch.randn(1, 4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = NextToken().loss(Hidden(h, w), torch.randint(5, (1, 4)))
    (grad,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), w)
