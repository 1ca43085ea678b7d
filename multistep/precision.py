"""Mixed precision: products in bfloat16, sums in float32, as torch's autocast has it; without its slowest parts.

Up to 256 positions torch's attention for CPUs goes backward in bf16 two to five times slower than in fp32, which is more than all other
products save (LOG.md, 2026-11-25). So its core is computed in float32 there, as long as it is trained.
On a GPU cuDNN's attention plans anew for every shape, and batches of texts have hundreds of shapes (LOG.md, 2026-11-27). So another one
is taken there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_POSITIONS = 256  # with more, bf16 is no slower


@contextmanager
def mixed(bf16: bool, device: str) -> Iterator[None]:
    """Products of what is computed inside are in bf16 where asked for. `device`: "cpu" or "cuda"."""
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        if not bf16 or device == "cpu":
            yield
            return
        from torch.nn.attention import SDPBackend, sdpa_kernel

        all_but_cudnn = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel(all_but_cudnn):
            yield


@contextmanager
def training_in(bf16: bool, device: str) -> Iterator[None]:
    """What is computed inside is computed for training, in bf16 where asked for and faster. `device`: "cpu" or "cuda"."""
    if not bf16:
        yield
        return
    with mixed(bf16, device):
        if device != "cpu":
            yield
            return
        with _AttentionInFloat():
            yield


class _AttentionInFloat(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        given = dict(kwargs or {})
        query = args[0] if args else given.get("query")
        if func is not F.scaled_dot_product_attention or query is None or query.shape[-2] > _POSITIONS:
            return func(*args, **given)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_float, args), **{k: _float(v) for k, v in given.items()})


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
