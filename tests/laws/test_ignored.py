"""Targets of -100 do not count: a batch in parts is the whole, whatever of it is ignored. And an example's own move in `fgm`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multistep.objectives import FGM, CrossEntropy, NextToken

SETTINGS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"class_weights": (1.0, 4.0, 0.5)},
    {"focal_gamma": 2.0},
    {"focal_gamma": 1.0, "class_weights": (1.0, 4.0, 0.5), "label_smoothing": 0.1},
]


def dense() -> tuple[Tensor, Tensor]:
    """Logits [6,3,4] and classes [6,4]; of the third example nothing counts, of the others a part."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (6, 4), generator=generator)
    targets[torch.rand(6, 4, generator=generator) < 0.4] = -100
    targets[2] = -100
    return torch.randn(6, 3, 4, generator=generator), targets


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 2, 3, 6), (0, 1, 2, 3, 4, 5, 6)])
def test_ignored_classes_count_nothing(settings: dict[str, Any], cuts: tuple[int, ...]) -> None:
    objective, (outputs, targets) = CrossEntropy(**settings), dense()

    def gradient(parts: list[slice]) -> Tensor:
        leaf = outputs.clone().requires_grad_()
        whole = objective.count(targets)
        for part in parts:
            share = objective.count(targets[part]) / whole
            (objective.loss(leaf[part], targets[part]) * share).backward()
        assert leaf.grad is not None
        return leaf.grad

    wanted = gradient([slice(0, 6)])
    found = gradient([slice(a, b) for a, b in itertools.pairwise(cuts)])
    assert torch.isfinite(wanted).all() and wanted.abs().max() > 1e-3
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert not wanted[2].any() and not wanted.movedim(1, -1)[targets == -100].any()


def test_what_counts_is_the_mean_that_torch_has() -> None:
    outputs, targets = dense()
    for weights in (None, (1.0, 4.0, 0.5)):
        w_K = None if weights is None else torch.tensor(weights)
        wanted = nn.functional.cross_entropy(outputs, targets, w_K, label_smoothing=0.1)
        found = CrossEntropy(class_weights=weights, label_smoothing=0.1).loss(outputs, targets)
        assert float(found) == pytest.approx(float(wanted), rel=1e-6)
        assert CrossEntropy(class_weights=weights).count(targets) == pytest.approx(
            float((targets != -100).sum()) if w_K is None else float(w_K[targets[targets != -100]].sum())
        )


class Words(nn.Module):
    """Rows of words whose next word is asked for, packed into one row of targets as in sequences.py."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.seen: list[Tensor] = []
        self.table.register_forward_hook(lambda _m, _i, out: self.seen.append(out.detach().clone()))

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.out(self.table(ids_BT)).flatten(0, 1)[None]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_example_is_moved_by_epsilon_however_many_there_are(rows: int) -> None:
    torch.manual_seed(0)
    model, ids_BT = Words(), torch.randint(0, 50, (rows, 5))
    moved: list[Tensor] = []
    objective = FGM(inner=NextToken(), epsilon=0.5)
    objective.of(lambda: model(ids_BT), ids_BT.roll(-1, 1).flatten()[None], model)
    still = model.table(ids_BT)
    model.out.register_forward_pre_hook(lambda _m, inputs: moved.append(inputs[0].detach()))
    objective.of(lambda: model(ids_BT), ids_BT.roll(-1, 1).flatten()[None], model)
    assert len(moved) == 2
    norms = (moved[1] - still).flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.full((rows,), 0.5), atol=1e-4)
