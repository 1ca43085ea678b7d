"""The house's rules for the optimizers that look at a batch several times: the loss before, the rate, resume, facts, state size, groups."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from second_order import MEMBERS, TRUST, Problem, build, logistic, mlp
from torch import Tensor, nn

from multistep.optimizers.base import REGIMES, GradientOptimizer
from multistep.optimizers.second_order import DampedNewton, ModuleLBFGS, ModuleNewtonCG
from multistep.types import UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")


@pytest.mark.parametrize("spec", MEMBERS)
def test_the_loss_before_the_step_comes_back_without_l2(spec: GradientOptimizer) -> None:
    problem = logistic()
    wanted = float(problem())
    returned = build(spec.with_(weight_decay=1.0), problem.module).step(problem)
    assert isinstance(returned, Tensor) and returned.is_floating_point() and not returned.requires_grad
    assert float(returned) == wanted


@pytest.mark.parametrize("spec", MEMBERS)
def test_the_rate_multiplies_the_step_whatever_the_scale_of_the_first_group(spec: GradientOptimizer) -> None:
    moves = []
    for lr, scale in ((1e-3, 1.0), (1e-3, 4.0), (2e-3, 1.0)):
        torch.manual_seed(1)
        problem = logistic()
        optimizer = build(spec, problem.module)
        for group in optimizer.param_groups:
            group["lr_scale"], group["lr"] = scale, lr * scale
        before = torch.cat([p.detach().reshape(-1) for p in problem.module.parameters()])
        if isinstance(spec, ModuleLBFGS):  # later iterations have steps of their own
            optimizer._inner.param_groups[0].update(max_iter=1, max_eval=1)
        optimizer.step(problem)
        moves.append(torch.cat([p.detach().reshape(-1) for p in problem.module.parameters()]) - before)
    torch.testing.assert_close(moves[0], moves[1])
    if not isinstance(spec, ModuleLBFGS):  # its line search may lengthen a step
        torch.testing.assert_close(2 * moves[0], moves[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spec", MEMBERS)
def test_resume_is_bit_for_bit(spec: GradientOptimizer, dtype: torch.dtype) -> None:
    whole = mlp(width=4, dtype=dtype)
    parts = [
        Problem(whole.module, whole.x[i : i + 30], whole.y[i : i + 30], F.cross_entropy) for i in (0, 0, 30, 15, 15, 0)
    ]

    def run(optimizer: Any, batches: list[Problem]) -> None:
        for batch in batches:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.01 if group["decays"] else 0.0
            optimizer.step(batch)

    start = deepcopy(whole.module.state_dict())
    straight = build(spec, whole.module)
    saved = []
    for batch in parts:
        saved.append((deepcopy(whole.module.state_dict()), deepcopy(straight.state_dict())))
        run(straight, [batch])
    end, facts = deepcopy(whole.module.state_dict()), dict(straight.facts)
    assert any(not torch.equal(end[name], start[name]) for name in end)
    for stop in (0, 1, 3, 5):
        weights, kept = saved[stop]
        untouched = deepcopy(kept)
        whole.module.load_state_dict(weights)
        again = build(spec, whole.module)
        again.load_state_dict(kept)
        run(again, parts[stop:])
        assert all(torch.equal(value, end[name]) for name, value in whole.module.state_dict().items()), stop
        assert again.facts == facts
        assert _same(kept, untouched), "a step changed the snapshot it was loaded from"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("spec", MEMBERS)
def test_facts_are_json_and_state_is_plain_and_as_large_as_said(spec: GradientOptimizer) -> None:
    width = 8 if isinstance(spec, DampedNewton) else 64
    module = nn.Linear(width, width)
    problem = Problem(module, torch.randn(80, width), torch.randn(80, width).argmax(1), F.cross_entropy)
    optimizer = build(spec, module)
    for _ in range(3):
        optimizer.step(problem)
    assert optimizer.facts["evaluations"] >= 2
    assert json.loads(json.dumps(optimizer.facts, allow_nan=False)) == optimizer.facts
    tensors: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                walk(inner)
        else:
            assert value is None or isinstance(value, bool | int | float)

    walk(optimizer.state_dict()["state"])
    size = sum(t.numel() * t.element_size() for t in tensors) / sum(p.numel() for p in module.parameters())
    assert size <= spec.bytes_a_parameter + 0.1
    if spec != TRUST:  # keeps no last step
        assert size >= spec.bytes_a_parameter - 0.1


@pytest.mark.parametrize("spec", MEMBERS)
def test_groups_and_rates(spec: GradientOptimizer) -> None:
    problem = mlp()
    optimizer = build(spec.with_(weight_decay=0.5), problem.module)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in problem.module.parameters())
    assert {(g["decays"], g["weight_decay"]) for g in optimizer.param_groups} == {(True, 0.5), (False, 0.0)}
    assert all(g["lr"] == 1.0 and g["lr_scale"] == 1.0 for g in optimizer.param_groups)
    assert spec.closure and set(spec.rates) == set(REGIMES)
    assert spec.cost > 1 and spec.gradients >= 2 and (spec.products > 0) == (not isinstance(spec, ModuleLBFGS))
    assert all(r.low < r.prior < r.high and r.source for r in spec.rates.values())
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


def test_too_many_parameters_for_a_matrix() -> None:
    with pytest.raises(UserError, match=r"5050 x 5050.*max_parameters is 5000.*newton_cg"):
        build(DampedNewton(), nn.Linear(100, 50))
    build(DampedNewton(max_parameters=5050), nn.Linear(100, 50))


def test_sparse_gradients_are_refused_with_the_mend() -> None:
    module = nn.Embedding(10, 3, sparse=True)
    problem = Problem(module, torch.arange(5), torch.zeros(5, dtype=torch.long), F.cross_entropy)
    with pytest.raises(UserError, match="sparse=False"):
        build(ModuleNewtonCG(), module).step(problem)


def test_a_parameter_the_loss_does_not_see_stays() -> None:
    problem = mlp()
    problem.module.register_parameter("idle", nn.Parameter(torch.ones(3)))
    for spec in MEMBERS:
        build(spec, problem.module).step(problem)
    assert torch.equal(problem.module.get_parameter("idle").detach(), torch.ones(3))
