"""Laws that every gradient optimizer keeps: cover, descend, resume, fork, half precision, weight decay, state size, rates, settle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_cases import SHAPES, Named, named, run
from pydantic import TypeAdapter
from torch import Tensor, nn

from multistep.optimizers import GRADIENT_OPTIMIZERS, REGIMES, GradientOptimizer, NAdam, Optimizer, ScheduleFree

ALL = pytest.mark.parametrize("member", GRADIENT_OPTIMIZERS, ids=lambda m: m.model_fields["kind"].default)
DECAYED = {"first.weight", "second.weight", "convolution.weight", "head.weight"}


def copies(parameters: Named) -> Named:
    return [(n, nn.Parameter(p.detach().clone())) for n, p in parameters]


def assert_same(a: Named, b: Named) -> None:
    for (name, p), (_, q) in zip(a, b, strict=True):
        assert torch.equal(p, q), name


def moved(a: Named, b: Named) -> set[str]:
    return {name for (name, p), (_, q) in zip(a, b, strict=True) if not torch.equal(p, q)}


# ---------------------------------------------------------------------------------------------- cover


@ALL
def test_every_parameter_is_in_one_group_and_only_matrices_decay(member: type[GradientOptimizer]) -> None:
    parameters = named()
    optimizer = member(lr=0.1, weight_decay=0.3).build(parameters, head_lr=0.5)
    names = {id(p): n for n, p in parameters}
    covered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(covered) == sorted(SHAPES)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["decays"] == (name in DECAYED) and group["weight_decay"] == (0.3 if name in DECAYED else 0)
            assert group["lr_scale"] == (0.5 if name.startswith("head.") else 1.0)
        assert group["lr"] == 0.1


@ALL
def test_every_parameter_moves(member: type[GradientOptimizer]) -> None:
    parameters = named()
    before = copies(parameters)
    run(member().build(parameters), parameters, 1, 3)
    assert moved(before, parameters) == set(SHAPES)


# ---------------------------------------------------------------------------------------------- descend


def descend(
    spec: GradientOptimizer, parameters: Named, loss: Callable[[], Tensor], updates: int, last: float = 0.0
) -> tuple[float, float]:
    """The loss at the start and after `updates` whose learning rate falls linearly to `last` times the first."""
    optimizer = spec.build(parameters)
    first = float(loss().detach())
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * (1 - (1 - last) * update / updates) * group["lr_scale"]
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    spec.settle(optimizer, training=False)
    return first, float(loss().detach())


# The learning rate for functions whose weights and curvatures are of order one.
RATES = {
    "gradient_descent": 0.1, "sgd": 0.1, "momentum": 0.02, "nesterov": 0.02, "adagrad": 0.5, "rmsprop": 0.02, "adam": 0.05,
    "adamw": 0.05, "nadam": 0.05, "radam": 0.05, "adafactor": 0.1, "lion": 0.02, "muon": 0.05, "soap": 0.05,
    "schedule_free": 0.1, "ademamix": 0.02, "prodigy": 1.0,
}  # fmt: skip


@ALL
def test_descends_a_quadratic(member: type[GradientOptimizer]) -> None:
    parameters, aims = named(), named(seed=1)
    scales = [torch.linspace(0.3, 2.0, p.numel()).view(p.shape) for _, p in parameters]

    def loss() -> Tensor:
        terms = [(s * (p - a.detach()) ** 2).sum() for s, (_, p), (_, a) in zip(scales, parameters, aims, strict=True)]
        return torch.stack(terms).sum()

    spec = member(lr=RATES[member.model_fields["kind"].default], weight_decay=0.0)
    first, last = descend(spec, parameters, loss, 300)
    assert last < 0.01 * first


@ALL
def test_descends_rosenbrock(member: type[GradientOptimizer]) -> None:
    w = nn.Parameter(torch.tensor([-1.2, 1.0]))

    def loss() -> Tensor:
        return (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2

    kind = member.model_fields["kind"].default
    narrow = {"gradient_descent": 1e-3, "sgd": 1e-3, "momentum": 1e-4, "nesterov": 1e-4, "radam": 5e-3}
    first, last = descend(member(lr=narrow.get(kind, RATES[kind]), weight_decay=0.0), [("w", w)], loss, 3000)
    assert first > 24 and last < 1.0


@ALL
def test_descends_a_logistic_regression_at_its_prior(member: type[GradientOptimizer]) -> None:
    generator = torch.Generator().manual_seed(2)
    x, truth = torch.randn(96, 8, generator=generator), torch.randn(8, 3, generator=generator)
    y = (x @ truth).argmax(1)
    weight = nn.Parameter(0.1 * torch.randn(3, 8, generator=generator))
    bias = nn.Parameter(torch.zeros(3))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(x @ weight.T + bias, y)

    spec = member(lr=member.rates["scratch"].prior)
    first, last = descend(spec, [("head.weight", weight), ("head.bias", bias)], loss, 300)
    assert last < 0.98 * first


# ---------------------------------------------------------------------------------------------- the state is all there is


@ALL
def test_a_learning_rate_of_zero_moves_nothing(member: type[GradientOptimizer]) -> None:
    parameters = named()
    optimizer = member(weight_decay=0.1).build(parameters)
    for start in (1, 6):  # at the start, and with some momentum gathered
        before = copies(parameters)
        run(optimizer, parameters, start, start + 3, lr=0.0)
        assert_same(before, parameters)
        run(optimizer, parameters, start + 3, start + 5)


@ALL
@pytest.mark.parametrize("stop, dtype", [*((s, torch.float32) for s in (0, 1, 2, 11, 20)), (11, torch.bfloat16)])
def test_resume_is_the_straight_run(member: type[GradientOptimizer], stop: int, dtype: torch.dtype) -> None:
    """Also when it was saved while settled."""
    if member is NAdam and dtype == torch.bfloat16:
        pytest.skip("torch rounds the product of NAdam's momenta to the parameters' type when it loads them")
    spec = member(weight_decay=0.1)
    straight = named(dtype)
    optimizer = spec.build(straight, head_lr=0.5)
    run(optimizer, straight, 0, stop)
    resumed = copies(straight)
    fresh = spec.build(resumed, head_lr=0.5)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    spec.settle(optimizer, training=False)
    settled = copies(straight)
    from_settled = spec.build(settled, head_lr=0.5)
    from_settled.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    spec.settle(optimizer, training=True)
    spec.settle(from_settled, training=True)
    for one, those in ((optimizer, straight), (fresh, resumed), (from_settled, settled)):
        run(one, those, stop, 26)
    assert_same(straight, resumed)
    assert_same(straight, settled)


@ALL
def test_the_state_survives_a_copy_of_tensors_and_numbers(member: type[GradientOptimizer]) -> None:
    """Snapshots copy tensors, lists, dicts and plain values, and no more."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        assert value is None or isinstance(value, bool | int | float | str), type(value)
        return value

    straight = named()
    optimizer = member().build(straight)
    run(optimizer, straight, 0, 12)
    resumed = copies(straight)
    fresh = member().build(resumed)
    fresh.load_state_dict(plain(optimizer.state_dict()))
    run(optimizer, straight, 12, 24)
    run(fresh, resumed, 12, 24)
    assert_same(straight, resumed)


@ALL
def test_a_fork_has_the_same_future(member: type[GradientOptimizer]) -> None:
    parameters = named()
    optimizer = member().build(parameters)
    run(optimizer, parameters, 0, 7)
    twins, twin = copy.deepcopy((parameters, optimizer))
    before = copies(parameters)
    run(twin, twins, 7, 22)
    assert_same(before, parameters)  # the parent does not move
    run(optimizer, parameters, 7, 22)
    assert_same(parameters, twins)


@ALL
def test_half_precision_parameters(member: type[GradientOptimizer]) -> None:
    parameters = named(torch.bfloat16)
    before = copies(parameters)
    optimizer = member(lr=member.rates["scratch"].high).build(parameters)
    run(optimizer, parameters, 1, 4, lr=member.rates["scratch"].high)
    for name, parameter in parameters:
        assert parameter.dtype == torch.bfloat16 and bool(parameter.isfinite().all()), name
    if member.model_fields["kind"].default != "prodigy":  # its first steps are a millionth
        assert {"first.weight", "head.bias"} <= moved(before, parameters)


@ALL
def test_weight_decay_shrinks_matrices_and_leaves_the_rest(member: type[GradientOptimizer]) -> None:
    parameters = named(torch.float64)
    before = copies(parameters)
    spec = member(weight_decay=0.1)
    optimizer = spec.build(parameters)
    for _ in range(3):
        for _, parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    spec.settle(optimizer, training=False)
    assert moved(before, parameters) == DECAYED
    for (name, p), (_, q) in zip(before, parameters, strict=True):
        assert name not in DECAYED or float(q.detach().norm()) < float(p.detach().norm()), name


@ALL
def test_state_size(member: type[GradientOptimizer]) -> None:
    matrix, head = nn.Parameter(torch.randn(512, 512)), nn.Parameter(torch.randn(2, 512))
    optimizer = member().build([("hidden.weight", matrix), ("head.weight", head)])
    matrix.grad = torch.randn(512, 512)
    optimizer.step()
    used = sum(v.numel() * v.element_size() for v in optimizer.state[matrix].values() if isinstance(v, Tensor))
    assert used / matrix.numel() == pytest.approx(member.bytes_a_parameter, rel=0.05)


# ---------------------------------------------------------------------------------------------- facts


@ALL
def test_facts(member: type[GradientOptimizer]) -> None:
    assert set(member.rates) == set(REGIMES)
    for rate in member.rates.values():
        assert 0 < rate.low <= rate.prior <= rate.high and rate.source
        assert member(lr=rate.low).lr < member(lr=rate.high).lr  # both are within the field's bounds
    for fact in (member.good_for, member.wrong_for):
        assert 10 < len(fact) < 130 and not fact.endswith(".") and "\n" not in fact
    assert 0 < member.cost < 1000 and (member.gradients, member.products) == (
        1.0,
        0.0,
    )  # measured: benchmarks/optimizers.py
    assert member().lr >= min(rate.low for rate in member.rates.values())


def test_the_union_knows_every_member() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Optimizer)
    kinds = [member.model_fields["kind"].default for member in GRADIENT_OPTIMIZERS]
    assert len(set(kinds)) == len(kinds)
    for member, kind in zip(GRADIENT_OPTIMIZERS, kinds, strict=True):
        assert type(adapter.validate_python({"kind": kind, "lr": 0.01})) is member


# ---------------------------------------------------------------------------------------------- settle


@ALL
@pytest.mark.parametrize("updates", [0, 1, 9])
def test_settle_there_and_back(member: type[GradientOptimizer], updates: int) -> None:
    parameters, spec = named(), member()
    optimizer = spec.build(parameters)
    run(optimizer, parameters, 1, 1 + updates)
    training = copies(parameters)
    spec.settle(optimizer, training=True)  # it is so already
    assert_same(training, parameters)
    spec.settle(optimizer, training=False)
    judged = copies(parameters)
    spec.settle(optimizer, training=False)
    assert_same(judged, parameters)
    assert bool(moved(training, judged)) == (isinstance(spec, ScheduleFree) and updates > 1)
    spec.settle(optimizer, training=True)
    assert_same(training, parameters)
