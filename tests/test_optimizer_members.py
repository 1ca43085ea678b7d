"""What single optimizers promise: Muon's matrices and quintics, the averages of schedule-free, Prodigy's rate, SOAP's tiny gradients."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from optimizer_cases import named, run
from torch import nn

from multistep.optimizers import SOAP, AdamW, AdEMAMix, Muon, Prodigy, ScheduleFree
from multistep.optimizers.muon import hidden_matrices, newton_schulz
from multistep.optimizers.polar import LEAST, best_quintic, quintics


def test_muon_takes_hidden_matrices_only() -> None:
    parameters = named()
    groups = Muon().build(parameters).param_groups
    names = {id(p): n for n, p in parameters}
    muon = {names[id(p)] for g in groups if g["rule"] == "muon" for p in g["params"]}
    assert muon == {"first.weight", "second.weight"}
    assert hidden_matrices([("0.weight", 2), ("0.bias", 1), ("2.weight", 2), ("4.weight", 2)]) == {
        "0.weight",
        "2.weight",
    }
    assert hidden_matrices([("transformer.wte.weight", 2), ("h.0.attn.weight", 2), ("lm_head.weight", 2)]) == {
        "h.0.attn.weight"
    }


def test_newton_schulz_flattens_the_singular_values() -> None:
    g = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    for matrix in (g, g.T.contiguous(), torch.stack([g, 2 * g])):
        values = torch.linalg.svdvals(newton_schulz(matrix, quintics(5)))
        assert float(values.min()) > 0.85 and float(values.max()) < 1.15
    with pytest.raises(ValueError, match=r"newton_schulz needs a matrix, got shape \(3,\)"):
        newton_schulz(torch.ones(3), quintics(5))


@pytest.mark.parametrize(("low", "high"), [(0.024, 1.0), (0.1, 1.9), (0.6, 1.4)])
def test_the_best_quintic_errs_alike_four_times(low: float, high: float) -> None:
    a, b, c = best_quintic(low, high)
    s = np.linspace(low, high, 200_001)
    error = 1 - (a * s + b * s**3 + c * s**5)
    worst = float(np.abs(error).max())
    turns = [error[0], *error[1:-1][np.diff(np.sign(np.diff(error))) != 0], error[-1]]
    assert len(turns) == 4
    assert np.allclose(np.abs(turns), worst, rtol=1e-6) and np.array_equal(np.sign(turns), [1, -1, 1, -1])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_more_steps_bring_singular_values_nearer_to_one(steps: int) -> None:
    s = np.geomspace(LEAST, 1.0, 10_001)
    for a, b, c in quintics(steps):
        s = a * s + b * s**3 + c * s**5
    bound = {1: 1.0, 2: 0.98, 3: 0.9, 4: 0.6, 5: 0.16, 8: 2e-3}[steps]
    assert np.abs(1 - s).max() < bound


def test_schedule_free_ships_the_average_of_its_iterates() -> None:
    """With a constant rate and beta2 = 0 the shares are 1/t: x is the plain mean of z."""
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    spec = ScheduleFree(lr=0.1, beta2=0.0, weight_decay=0.0)
    optimizer = spec.build([("w", w)])
    iterates = []
    for update in range(12):
        w.grad = torch.randn(4, generator=torch.Generator().manual_seed(update), dtype=torch.float64)
        optimizer.step()
        iterates.append(optimizer.state[w]["z"].clone())
    spec.settle(optimizer, training=False)
    torch.testing.assert_close(w.detach(), torch.stack(iterates).mean(0), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="settled for judging"):
        optimizer.step()


def test_ademamix_without_its_slow_part_is_adamw() -> None:
    one, two = named(torch.float64), named(torch.float64)
    run(AdEMAMix(alpha=0.0, beta2=0.98, weight_decay=0.1).build(one), one, 0, 9)
    run(AdamW(beta2=0.98, weight_decay=0.1).build(two), two, 0, 9)
    for (_, p), (_, q) in zip(one, two, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_prodigy_finds_its_rate_whatever_the_scale() -> None:
    """The estimate grows from a millionth to the order of the distance, for near and far aims."""
    for distance in (0.1, 10.0):
        w = nn.Parameter(torch.zeros(5))
        spec = Prodigy(weight_decay=0.0)
        optimizer = spec.build([("w", w)])
        for _ in range(200):
            optimizer.zero_grad()
            ((w - distance) ** 2).sum().backward()
            optimizer.step()
        assert 0.01 * distance < optimizer.param_groups[0]["d"] < 2 * distance


def test_soap_stands_tiny_gradients_of_low_rank() -> None:
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(100, 32))
    optimizer = SOAP(every=2).build([("embeddings.weight", table)])
    rows = torch.randint(0, 100, (40,))
    for _ in range(6):
        table.grad = torch.zeros_like(table)
        table.grad[rows] = 1e-4 * torch.randn(40, 32)
        optimizer.step()
        assert bool(torch.isfinite(table).all())
        assert all(bool(torch.isfinite(v).all()) for v in optimizer.state[table].values() if torch.is_tensor(v))


def test_our_rules_do_not_load_torchs_compiler() -> None:
    code = (
        "import sys, torch; from multistep.optimizers import Muon; m = torch.nn.Linear(3, 3);"
        "o = Muon().build(list(m.named_parameters())); m(torch.ones(1, 3)).sum().backward(); o.step(); o.zero_grad();"
        "o.load_state_dict(o.state_dict()); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
