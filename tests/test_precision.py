"""Mixed precision on a CPU: bf16 products, attention that is trained in float32 up to the length where that no longer pays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multistep.precision import training_in

pytestmark = pytest.mark.usefixtures("torch_seeded")


def qkv(positions: int) -> list[Tensor]:
    return [torch.randn(2, 2, positions, 8).bfloat16().requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(("positions", "dtype"), [(16, torch.float32), (256, torch.float32), (257, torch.bfloat16)])
def test_attention_is_in_float32_where_that_is_faster(positions: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(positions)
    with training_in(True, "cpu"):
        assert F.scaled_dot_product_attention(q, k, v, is_causal=True).dtype == dtype
        assert F.scaled_dot_product_attention(query=q, key=k, value=v).dtype == dtype
    assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16


def test_masks_keep_their_kind_and_all_else_is_in_bf16() -> None:
    q, k, v = qkv(16)
    seen = torch.ones(16, 16, dtype=torch.bool).tril()
    with training_in(True, "cpu"):
        by_mask = F.scaled_dot_product_attention(q, k, v, seen)
        by_number = F.scaled_dot_product_attention(q, k, v, torch.zeros(16, 16).masked_fill(~seen, -1e9).bfloat16())
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert nn.Linear(8, 8)(by_mask).dtype == torch.bfloat16
    assert torch.allclose(by_mask, causal, atol=1e-5) and torch.allclose(by_number, causal, atol=1e-5)
    wanted = F.scaled_dot_product_attention(*(t.float() for t in (q, k, v)), is_causal=True)
    assert torch.allclose(causal, wanted, atol=1e-6)


def test_without_bf16_nothing_changes() -> None:
    with training_in(False, "cpu"):
        assert nn.Linear(8, 8)(torch.ones(1, 8)).dtype == torch.float32
        assert F.scaled_dot_product_attention(*qkv(16)).dtype == torch.bfloat16
