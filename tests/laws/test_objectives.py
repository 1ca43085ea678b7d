"""Laws of the objectives: closed form, finite differences, smoothing, the mean over examples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from multistep.objectives import OBJECTIVES, BinaryCrossEntropy, CrossEntropy, MeanSquaredError

pytestmark = pytest.mark.usefixtures("torch_seeded")
B, K = 6, 4
SMOOTHINGS = (0.0, 0.1, 0.3)


def case(objective: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (float64) and targets of one batch."""
    generator = torch.Generator().manual_seed(4)
    if isinstance(objective, MeanSquaredError):
        return torch.randn(B, 1, generator=generator).double(), torch.randn(B, generator=generator).double()
    logits = 2 * torch.randn(B, K, generator=generator).double()
    if isinstance(objective, BinaryCrossEntropy):
        return logits, torch.rand(B, K, generator=generator) > 0.5
    return logits, torch.randint(0, K, (B,), generator=generator)


def members() -> list[Any]:
    return [CrossEntropy(label_smoothing=s) for s in SMOOTHINGS] + [
        BinaryCrossEntropy(label_smoothing=s) for s in SMOOTHINGS
    ] + [MeanSquaredError()]  # fmt: skip


ALL = pytest.mark.parametrize("objective", members(), ids=lambda o: f"{o.kind}-{getattr(o, 'label_smoothing', 0)}")


def by_hand(objective: Any, outputs: np.ndarray, targets: np.ndarray) -> float:
    if isinstance(objective, MeanSquaredError):
        return float(np.mean((outputs[:, 0] - targets) ** 2))
    e = objective.label_smoothing
    if isinstance(objective, CrossEntropy):
        wanted = (1 - e) * np.eye(K)[targets] + e / K
        return float(-(wanted * log_softmax(outputs, axis=1)).sum(1).mean())
    wanted = (1 - e) * targets + e / 2
    return float(-(wanted * -np.logaddexp(0, -outputs) + (1 - wanted) * -np.logaddexp(0, outputs)).mean())


def test_every_member_is_here() -> None:
    assert {type(o) for o in members()} == set(OBJECTIVES)


@ALL
def test_closed_form(objective: Any) -> None:
    outputs, targets = case(objective)
    assert float(objective.loss(outputs, targets)) == pytest.approx(
        by_hand(objective, outputs.numpy(), targets.numpy()), rel=2e-6
    )


@ALL
def test_gradient_against_finite_differences(objective: Any) -> None:
    outputs, targets = case(objective)
    outputs.requires_grad_()
    objective.loss(outputs, targets).backward()
    assert outputs.grad is not None
    base, found, h = outputs.detach().numpy(), outputs.grad.numpy(), 1e-5
    for index in np.ndindex(*base.shape):
        up, down = base.copy(), base.copy()
        up[index] += h
        down[index] -= h
        slope = (by_hand(objective, up, targets.numpy()) - by_hand(objective, down, targets.numpy())) / (2 * h)
        assert found[index] == pytest.approx(slope, abs=2e-6)


@ALL
def test_the_loss_is_the_mean_over_examples(objective: Any) -> None:
    outputs, targets = case(objective)
    single = [float(objective.loss(outputs[i : i + 1], targets[i : i + 1])) for i in range(B)]
    assert float(objective.loss(outputs, targets)) == pytest.approx(np.mean(single), rel=1e-5)


@ALL
def test_half_precision_outputs_are_summed_in_float32(objective: Any) -> None:
    outputs, targets = case(objective)
    assert objective.loss(outputs.bfloat16(), targets).dtype == torch.float32


def test_smoothing_bounds_the_best_logit() -> None:
    """The smoothed loss is least where the probability is the smoothed target, and not lower for a surer answer."""
    e, k = 0.1, 4
    objective, target = CrossEntropy(label_smoothing=e), torch.tensor([0])
    p = 1 - e + e / k
    best = torch.tensor([[math.log(p), *[math.log((1 - p) / (k - 1))] * (k - 1)]])
    surer = best + torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    less = best - torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    lowest = float(objective.loss(best, target))
    assert lowest < float(objective.loss(surer, target)) and lowest < float(objective.loss(less, target))
    plain = CrossEntropy()
    assert float(plain.loss(surer, target)) < float(plain.loss(best, target))


def test_a_sure_wrong_answer_stays_finite() -> None:
    assert float(CrossEntropy().loss(torch.tensor([[1e4, 0.0]]), torch.tensor([1]))) == 1e4
    assert float(BinaryCrossEntropy().loss(torch.tensor([[1e4]]), torch.tensor([[False]]))) == 1e4
