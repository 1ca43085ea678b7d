"""Any nn.Module: bring it with its data, get it back trained, and read why."""

from __future__ import annotations

import torch
from torch import nn

import multistep


def spirals(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on two spiral arms that wind around each other, and which arm."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(0, 2, (n,), generator=generator)
    turn = 3 * torch.pi * torch.rand(n, generator=generator)
    noise = 0.1 * torch.randn(n, 2, generator=generator)
    return torch.stack(
        [turn * torch.cos(turn + torch.pi * arm), turn * torch.sin(turn + torch.pi * arm)], 1
    ) / 5 + noise, arm


def main() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    result = multistep.optimize(
        module,
        objective="cross_entropy",
        train=spirals(2000, seed=1),
        validation=spirals(500, seed=2),
        test=spirals(500, seed=3),
        metric="accuracy",
        budget="3000 updates",
    )
    print(result.explain())
    print(f"accuracy {result.best.value:.3f} ± {result.best.stderr:.3f} on validation")


if __name__ == "__main__":
    main()
