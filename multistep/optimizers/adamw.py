"""AdamW: Adam with decoupled weight decay, fused into one kernel.

    m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  w <- (1 - lr wd) w - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization"; torch.optim.AdamW does the work.
Differs from the source: biases, norms and embeddings are not decayed (`decays`), as is usual for transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from multistep.types import Spec, Tunable

if TYPE_CHECKING:
    import torch


class AdamW(Spec):
    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=1), Tunable(1e-6, 1e-1, log=True, live=True)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0, le=10), Tunable(1e-4, 1.0, log=True, live=True)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    eps: Annotated[float, Field(gt=0)] = 1e-8

    def build(
        self, parameters: Sequence[tuple[str, torch.nn.Parameter]], head_lr: float = 1.0
    ) -> torch.optim.Optimizer:
        """An optimizer over named parameters: matrices decay, vectors and embeddings do not; the head's learning rate is `lr`
        times `head_lr`. Every group says so (`decays`, `lr_scale`), for those who set rates later."""
        import torch

        groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
        for name, parameter in parameters:
            key = decays(name, parameter.ndim), head_lr if name.startswith("head.") else 1.0
            groups.setdefault(key, []).append(parameter)
        return torch.optim.AdamW(
            [
                {
                    "params": members,
                    "decays": decayed,
                    "lr_scale": scale,
                    "weight_decay": self.weight_decay if decayed else 0.0,
                }
                for (decayed, scale), members in groups.items()
            ],
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay applies: matrices only, and not the embedding tables."""
    return ndim >= 2 and "embeddings" not in name
