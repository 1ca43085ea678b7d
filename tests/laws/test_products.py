"""Laws of products with the curvature: they are the explicit matrix, add up over micro-batches, and name the layer they cannot pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from second_order import HESSIAN, Problem, build, half_squares, logistic, mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from multistep.budget import Budget
from multistep.loader import rows_of
from multistep.objectives import FGM, CrossEntropy, Penalized
from multistep.optimizers.base import GradientOptimizer
from multistep.optimizers.products import Curvature, Flat, Products
from multistep.optimizers.second_order import DampedNewton, ModuleLBFGS, ModuleNewtonCG
from multistep.schedules import Constant
from multistep.state import TrainState
from multistep.strategy import TrainModule
from multistep.train import Batch, train
from multistep.types import UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")


def explicit(problem: Problem, curvature: Curvature) -> Tensor:
    """The matrix [D,D] by torch.autograd.functional, which differentiates differently."""
    named = dict(problem.module.named_parameters())
    sizes, shapes = [p.numel() for p in named.values()], [p.shape for p in named.values()]

    def outputs(w_D: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(w_D.split(sizes), shapes, strict=True)]
        return torch.func.functional_call(problem.module, dict(zip(named, parts, strict=True)), (problem.x,))

    w_D = torch.cat([p.detach().reshape(-1) for p in named.values()])
    if curvature == "hessian":
        return torch.autograd.functional.hessian(lambda w: problem.loss_of(outputs(w)), w_D)  # pyright: ignore
    jacobian = torch.autograd.functional.jacobian(lambda w: outputs(w).reshape(-1), w_D)
    z = outputs(w_D).detach()
    inner = torch.autograd.functional.hessian(lambda o: problem.loss_of(o.view_as(z)), z.reshape(-1))
    return jacobian.T @ inner @ jacobian  # pyright: ignore


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize(
    "make", [logistic, lambda: mlp(3), lambda: Problem(mlp(3).module, mlp().x, None, half_squares)]
)
def test_products_equal_the_explicit_matrix(make: Callable[[], Problem], curvature: Curvature) -> None:
    problem = make()
    matrix = explicit(problem, curvature)
    products = Products(problem, Flat(list(problem.module.parameters())), curvature)
    found = torch.stack([products(unit) for unit in torch.eye(len(matrix), dtype=torch.float64)])
    torch.testing.assert_close(found, matrix, rtol=1e-9, atol=1e-12)
    assert float(matrix.abs().max()) > 1e-3 and products.count == len(matrix)


def posed(micro: int, objective: Any = None, dropout: float = 0.0, optimizer: Any = None) -> Batch:
    """A batch of 30 rows as the loop poses it, in micro-batches. Classes weigh differently, so that parts do too."""
    problem = mlp(3)
    module = nn.Sequential(problem.module, nn.Dropout(dropout)).train()
    strategy = TrainModule(
        objective=objective or CrossEntropy(class_weights=(1.0, 2.0, 3.0)), optimizer=optimizer or ModuleNewtonCG(),
        batch_size=30, micro_batch=micro, clip=0.01,
    )  # fmt: skip
    state = TrainState(module)
    state.begin(strategy, Budget(amount=1, unit="updates"))
    return Batch(state, rows_of((problem.x, problem.y), "train", "cpu"), np.arange(30), False, False)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_products_of_micro_batches_add_up_to_the_whole(curvature: Curvature) -> None:
    found, diagonals = [], []
    for micro in (0, 7):
        torch.manual_seed(5)
        batch = posed(micro)
        flat = Flat(batch.parameters)
        products = Products(batch, flat, curvature)
        found.append(torch.stack([products(unit) for unit in torch.eye(flat.size, dtype=torch.float64)]))
        diagonals.append(products.diagonal(400, 0))
        assert len(batch.parts()) == (1 if micro == 0 else 5)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)  # the loss is computed in float32
    assert float(found[0].abs().max()) > 1e-3
    torch.testing.assert_close(diagonals[0].sum(), diagonals[1].sum(), rtol=0.2, atol=0)  # other draws


def test_micro_batches_hold_the_graph_of_one_at_a_time() -> None:
    """What is saved for the backward pass of one product: of a part, not of the batch."""
    held = []
    for micro in (0, 5):
        batch = posed(micro)
        alive, most = 0, 0

        class Saved:
            def __init__(self, tensor: Tensor):
                nonlocal alive, most
                self.tensor, self.size = tensor, tensor.numel()
                alive += self.size
                most = max(most, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            products = Products(batch, flat := Flat(batch.parameters), "gauss_newton")
            for _ in range(2):
                products(torch.ones(flat.size, dtype=torch.float64))
        held.append(most)
    assert held[1] < 0.5 * held[0]


@pytest.mark.parametrize("micro", [0, 7])
def test_products_see_the_dropout_that_the_gradient_saw(micro: int) -> None:
    batch = posed(micro, dropout=0.5)
    batch()
    gradient_D = Flat(batch.parameters).gradient()
    again_D = torch.zeros_like(gradient_D)
    for part in batch.parts():
        grads = torch.autograd.grad(part.loss_of(part.outputs()), batch.parameters)
        again_D += torch.cat([g.reshape(-1) for g in grads])
    torch.testing.assert_close(again_D, gradient_D)


@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: FGM(inner=inner)])
def test_the_l2_of_penalties_is_curvature(wrap: Callable[[Any], Any]) -> None:
    """The product that Newton's methods use, against differences of the gradient of the whole objective."""
    objective = wrap(Penalized(l1=0.0, l2=0.7))
    batch = posed(0, objective)
    for parameter in batch.parameters:
        assert batch.ridge(parameter) == (0.7 if parameter.ndim >= 2 else 0.0)
    assert Penalized(l1=0.5, l2=0.0).ridge(batch.parameters[0]) == 0.0  # |w| has no curvature
    if isinstance(objective, FGM):
        return  # needs a table of embeddings to be run
    problem = logistic()
    optimizer = build(ModuleNewtonCG(damping=1e-9, max_cg=200), problem.module)
    strategy = TrainModule(objective=objective, optimizer=ModuleNewtonCG(), batch_size=120, clip=0.0)
    state = TrainState(problem.module)
    state.begin(strategy, Budget(amount=1, unit="updates"))
    whole = Batch(state, rows_of((problem.x, problem.y), "train", "cpu"), np.arange(120), False, False)
    rho = []
    for _ in range(12):
        optimizer.step(whole)
        rho.append(optimizer.facts["rho"])
    whole()
    assert float(Flat(whole.parameters).gradient().norm()) < 1e-5 and rho[3] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("spec", [ModuleNewtonCG(), ModuleLBFGS()])
def test_the_loop_evaluates_a_batch_once_before_the_step(spec: GradientOptimizer) -> None:
    """The evaluation that looks for bad batches is the step's first; clipping does not reach it."""
    problem = mlp()
    strategy = TrainModule(optimizer=spec, batch_size=60, clip=1e-3, schedule=Constant(warmup=0.0))
    state = TrainState(problem.module)
    state.begin(strategy, Budget(amount=3, unit="updates"))
    rows, forwards, wanted = rows_of((problem.x, problem.y), "train", "cpu"), [], 0
    problem.module.register_forward_hook(lambda *_: forwards.append(1))
    optimizer: Any = state.optimizer
    first = float(problem())
    forwards.clear()
    for measure in train(state, rows):
        wanted += optimizer.facts["evaluations"] + (
            1 if isinstance(spec, ModuleNewtonCG) else 0
        )  # the products read once
        assert len(forwards) == wanted
        if measure.update == 1:  # a gradient clipped to 1e-3 would hardly move
            assert measure.loss_nats == pytest.approx(first) and float(problem()) < 0.97 * first
            forwards.pop()


def test_gauss_newton_is_the_hessian_for_a_linear_model_only() -> None:
    convex, deep = logistic(), mlp(3)
    torch.testing.assert_close(explicit(convex, "gauss_newton"), explicit(convex, "hessian"))
    assert float((explicit(deep, "gauss_newton") - explicit(deep, "hessian")).abs().max()) > 1e-3


class Reader(nn.Module):
    """A recurrent or an attention layer, and a linear output."""

    def __init__(self, layer: str):
        super().__init__()
        self.layer = (
            nn.LSTM(4, 5, batch_first=True) if layer == "lstm" else nn.MultiheadAttention(4, 2, batch_first=True)
        )
        self.out = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.LSTM):
            return self.out(self.layer(x)[0][:, -1])
        return self.out(self.layer(x, x, x, need_weights=False)[0][:, -1])


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("layer", ["lstm", "attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_go_through_recurrent_and_attention_layers(
    layer: str, curvature: Curvature, dtype: torch.dtype
) -> None:
    x = torch.randn(6, 7, 4)
    module = Reader(layer)
    module(x)  # the lazy layer learns its width
    problem = Problem(module.to(dtype), x.to(dtype), torch.randint(0, 3, (6,)), F.cross_entropy)
    flat = Flat(list(module.parameters()))
    products = Products(problem, flat, curvature)
    u, v = torch.randn(2, flat.size, dtype=dtype)
    torch.testing.assert_close(u @ products(v), v @ products(u), rtol=1e-3, atol=1e-5)  # symmetric
    if curvature == "hessian" and dtype == torch.float64:
        w, h, found = flat.values(), 1e-5, products(v)
        gradients = []
        for sign in (1, -1):
            flat.set(w + sign * h * v)
            problem()
            gradients.append(flat.gradient())
        flat.set(w)
        torch.testing.assert_close(found, (gradients[0] - gradients[1]) / (2 * h), rtol=1e-5, atol=1e-8)
    else:
        assert curvature == "hessian" or float(v @ products(v)) > 0
    build(ModuleNewtonCG(curvature=curvature), module).step(problem)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class OnceOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(self.linear(x))  # pyright: ignore


@pytest.mark.parametrize("spec", [ModuleNewtonCG(), HESSIAN, DampedNewton()])
def test_a_layer_without_a_second_derivative_is_named(spec: GradientOptimizer) -> None:
    problem = logistic()
    problem.module = OnceOnly()
    with pytest.raises(UserError, match="lbfgs"):
        build(spec, problem.module).step(problem)
    build(ModuleLBFGS(), problem.module).step(problem)  # needs none


def test_an_error_of_the_model_stays_what_it_is() -> None:
    problem = logistic()
    flat = Flat(list(problem.module.parameters()))
    problem.x = problem.x[:, :5]
    with pytest.raises(RuntimeError, match="shapes"):
        Products(problem, flat, "hessian")(torch.ones(flat.size, dtype=torch.float64))
