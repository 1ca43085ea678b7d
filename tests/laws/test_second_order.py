"""Laws of the optimizers that look at a batch several times: they solve, they descend, they resume, they say what they cannot do.

Over 400 lines: one matrix of laws over all members, on cases and helpers that they share.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from multistep.budget import Budget
from multistep.loader import rows_of
from multistep.objectives import FGM, CrossEntropy, Penalized
from multistep.optimizers.base import REGIMES, GradientOptimizer
from multistep.optimizers.newton_module import conjugate_gradients
from multistep.optimizers.products import Curvature, Flat, Products
from multistep.optimizers.second_order import DampedNewton, ModuleLBFGS, ModuleNewtonCG
from multistep.schedules import Constant
from multistep.state import TrainState
from multistep.strategy import TrainModule
from multistep.train import Batch, train
from multistep.types import UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")

TRUST = ModuleNewtonCG(globalization="trust_region")
HESSIAN = ModuleNewtonCG(curvature="hessian")
MEMBERS = [ModuleNewtonCG(), TRUST, HESSIAN, DampedNewton(), ModuleLBFGS()]


class Problem:
    """A module, a batch and a loss of outputs, as the loop poses it."""

    def __init__(self, module: nn.Module, x: Any, y: Any, loss: Callable[[Tensor, Any], Tensor]):
        self.module, self.x, self.y, self.loss = module, x, y, loss
        self.calls = 0

    def outputs(self) -> Tensor:
        return self.module(self.x)

    def loss_of(self, outputs: Tensor) -> Tensor:
        return self.loss(outputs, self.y)

    def parts(self) -> list[Problem]:
        return [self]

    def ridge(self, parameter: Tensor) -> float:
        return 0.0

    def __call__(self) -> Tensor:
        self.calls += 1
        self.module.zero_grad(set_to_none=True)
        loss = self.loss_of(self.outputs())
        loss.backward()
        return loss.detach()


class Point(nn.Module):
    """Two numbers to be moved; the outputs are the residuals of Rosenbrock's valley, or the numbers themselves."""

    def __init__(self, start: tuple[float, float], rosenbrock: bool = True):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.rosenbrock = rosenbrock

    def forward(self, x: None) -> Tensor:
        return torch.stack([10 * (self.w[1] - self.w[0] ** 2), 1 - self.w[0]]) if self.rosenbrock else self.w * 1.0


def half_squares(outputs: Tensor, targets: Any) -> Tensor:
    return 0.5 * outputs.square().sum()


def build(spec: GradientOptimizer, module: nn.Module) -> Any:
    return spec.build(list(module.named_parameters()))


def logistic(seed: int = 0, dtype: torch.dtype = torch.float64) -> Problem:
    """120 rows of 6 features whose scales lie between 0.1 and 10, three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(120, 6, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 6, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator).double() / 5 + torch.randn(120, 3, generator=generator)).argmax(1)
    return Problem(nn.Linear(6, 3).to(dtype), x.to(dtype), y, F.cross_entropy)


def mlp(width: int = 8, dtype: torch.dtype = torch.float64, rows: int = 60) -> Problem:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    y = ((x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()).clamp_max(2)
    module = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).to(dtype)
    return Problem(module, x.to(dtype), y, F.cross_entropy)


def gradient_norm(problem: Problem, spec: GradientOptimizer) -> float:
    """Of the loss with L2 on the matrices."""
    problem()
    named = [(p, p.grad) for p in problem.module.parameters()]
    parts = [g + (spec.weight_decay * p if p.ndim >= 2 else 0) for p, g in named if g is not None]
    return float(torch.cat([p.detach().reshape(-1) for p in parts]).norm())


# ---------------------------------------------------------------------------------------------- products


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


# ---------------------------------------------------------------------------------------------- solving


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        (ModuleNewtonCG(weight_decay=1e-2), 10),
        (ModuleNewtonCG(weight_decay=1e-2, preconditioner="none"), 10),
        (TRUST.with_(weight_decay=1e-2), 12),
        (HESSIAN.with_(weight_decay=1e-2, warm_start=0.0), 10),
        (DampedNewton(weight_decay=1e-2), 8),
        (ModuleLBFGS(weight_decay=1e-2), 9),
    ],
)
def test_a_convex_model_is_solved_in_few_steps(spec: GradientOptimizer, steps: int) -> None:
    problem = logistic()
    optimizer = build(spec, problem.module)
    first = gradient_norm(problem, spec)
    for _ in range(steps):
        optimizer.step(problem)
    assert gradient_norm(problem, spec) <= 1e-5 * first


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_newton_solves_a_quadratic_in_one_step(curvature: Curvature) -> None:
    problem = logistic()
    problem.loss, problem.y = F.mse_loss, torch.randn(120, 3, dtype=torch.float64)
    spec = DampedNewton(curvature=curvature, weight_decay=0.1)
    first = gradient_norm(problem, spec)
    optimizer = build(spec, problem.module)
    optimizer.step(problem)
    assert gradient_norm(problem, spec) <= 1e-6 * first
    assert optimizer.facts["rho"] == pytest.approx(1.0, abs=1e-6) and optimizer.facts["length"] == 1.0


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        (DampedNewton(curvature="hessian"), 30),
        (DampedNewton(curvature="gauss_newton"), 30),
        (HESSIAN, 60),
        (ModuleNewtonCG(), 60),
        (ModuleNewtonCG(globalization="trust_region", curvature="hessian"), 60),
        (ModuleLBFGS(), 4),
    ],
)
def test_rosenbrock(spec: GradientOptimizer, steps: int) -> None:
    module = Point((-1.2, 1.0))
    problem = Problem(module, None, None, half_squares)
    optimizer = build(spec, module)
    for _ in range(steps):
        optimizer.step(problem)
    torch.testing.assert_close(module.w.detach(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", MEMBERS)
def test_a_deep_model_descends_at_every_step(spec: GradientOptimizer, dtype: torch.dtype) -> None:
    problem = mlp(dtype=dtype)
    optimizer = build(spec, problem.module)
    losses = [float(optimizer.step(problem)) for _ in range(15)]
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.3 * losses[0]


class Autocast(Problem):
    """As the loop poses it in bfloat16: the model reads in half precision, parameters and loss are float32."""

    def outputs(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().outputs()

    def loss_of(self, outputs: Tensor) -> Tensor:
        return super().loss_of(outputs.float())


@pytest.mark.parametrize("spec", MEMBERS)
def test_a_model_in_half_precision_descends(spec: GradientOptimizer) -> None:
    plain = mlp(dtype=torch.float32)
    problem = Autocast(plain.module, plain.x, plain.y, plain.loss)
    optimizer = build(spec, problem.module)
    first = float(problem())
    for _ in range(15):
        optimizer.step(problem)
    assert float(problem()) < 0.5 * first


# ---------------------------------------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize(
    "spec", [HESSIAN, ModuleNewtonCG(curvature="hessian", globalization="trust_region"), DampedNewton(), ModuleLBFGS()]
)
def test_negative_curvature_is_left_downhill(spec: GradientOptimizer) -> None:
    module = Point((0.01, 0.5), rosenbrock=False)  # beside the saddle of (a^2 - 1)^2 + b^2
    problem = Problem(module, None, None, lambda w, _: (w[0] ** 2 - 1) ** 2 + w[1] ** 2)
    optimizer = build(spec, module)
    seen = []
    for _ in range(40):
        optimizer.step(problem)
        seen.append(optimizer.facts.get("negative_curvature", False))
    torch.testing.assert_close(module.w.detach(), torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-4)
    assert any(seen) == isinstance(spec, ModuleNewtonCG)


@pytest.mark.parametrize("radius", [float("inf"), 0.5])
@pytest.mark.parametrize("inverse", [None, torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)])
def test_conjugate_gradients_on_an_indefinite_matrix(radius: float, inverse: Tensor | None) -> None:
    matrix = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, -1.0]], dtype=torch.float64)
    gradient = torch.tensor([1.0, -2.0, 0.1], dtype=torch.float64)
    found = conjugate_gradients(lambda v: matrix @ v, gradient, 0.0, inverse, None, 1e-8, 10, radius)
    assert float(gradient @ found.d_D) < 0 and found.curvature == pytest.approx(float(found.d_D @ matrix @ found.d_D))
    assert found.negative or found.boundary
    if radius == 0.5:
        assert float(found.d_D.norm()) == pytest.approx(0.5)


@pytest.mark.parametrize("spec", [ModuleNewtonCG(damping=1.0), TRUST])
def test_small_batches_do_not_diverge(spec: GradientOptimizer) -> None:
    whole = mlp(rows=256, dtype=torch.float32)
    optimizer = build(spec, whole.module)
    first, worst = float(whole()), 0.0
    for rows in np.random.default_rng(0).integers(0, 256, (40, 16)):
        optimizer.step(Problem(whole.module, whole.x[rows], whole.y[rows], F.cross_entropy))
        worst = max(worst, float(whole()))
    assert float(whole()) < 0.8 * first and worst < 2 * first


def test_lbfgs_forgets_when_the_batch_changes() -> None:
    whole = mlp()
    optimizer = build(ModuleLBFGS(max_iterations=4), whole.module)
    one = Problem(whole.module, whole.x[:30], whole.y[:30], F.cross_entropy)
    other = Problem(whole.module, whole.x[30:], whole.y[30:], F.cross_entropy)
    remembered = []
    for problem in (one, one, other):
        optimizer.step(problem)
        remembered.append(optimizer.state_dict()["state"][0]["n_iter"])
    assert remembered == [4, 8, 4]


@pytest.mark.parametrize("spec", MEMBERS)
@pytest.mark.parametrize("bad", ["nan", "lr"])
def test_nothing_moves_on_a_loss_that_is_no_number_or_without_a_rate(spec: GradientOptimizer, bad: str) -> None:
    problem = logistic()
    optimizer = build(spec, problem.module)
    optimizer.step(problem)
    before = deepcopy(problem.module.state_dict())
    if bad == "nan":
        problem.x = problem.x * float("nan")
    else:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    optimizer.step(problem)
    assert all(torch.equal(value, before[name]) for name, value in problem.module.state_dict().items())
    assert optimizer.facts["length"] == 0.0


@pytest.mark.parametrize("spec", MEMBERS)
def test_a_model_that_breaks_down_beyond_a_wall_is_not_left_broken(spec: GradientOptimizer) -> None:
    module = Point((0.5, 0.5), rosenbrock=False)
    problem = Problem(module, None, None, lambda w, _: w.sum() - 1e-2 * w.log().sum())  # NaN where w < 0
    optimizer = build(spec.with_(lr=100.0), module)
    before = float(problem())
    for _ in range(3):
        optimizer.step(problem)
    assert float(problem()) <= before


@pytest.mark.parametrize("spec", MEMBERS)
def test_a_curvature_that_is_no_number_does_not_spoil_the_state(spec: GradientOptimizer) -> None:
    module = Point((0.0, 0.5), rosenbrock=False)  # |w|^1.5 has a slope at 0 and no second derivative
    problem = Problem(module, None, None, lambda w, _: w.abs().pow(1.5).sum() - 0.1 * w[0])
    optimizer = build(spec, module)
    losses = [float(optimizer.step(problem)) for _ in range(25)]
    assert json.dumps(optimizer.facts, allow_nan=False) and losses[-1] < losses[0] - 0.3


# ---------------------------------------------------------------------------------------------- the house's rules


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
