"""Laws of the optimizers that look at a batch several times: they solve, they descend, and what goes wrong leaves no model broken."""

from __future__ import annotations

import itertools
import json
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from second_order import HESSIAN, MEMBERS, TRUST, Problem, build, half_squares, logistic, mlp
from torch import Tensor, nn

from multistep.optimizers.base import GradientOptimizer
from multistep.optimizers.newton_module import conjugate_gradients
from multistep.optimizers.products import Curvature
from multistep.optimizers.second_order import DampedNewton, ModuleLBFGS, ModuleNewtonCG

pytestmark = pytest.mark.usefixtures("torch_seeded")


class Point(nn.Module):
    """Two numbers to be moved; the outputs are the residuals of Rosenbrock's valley, or the numbers themselves."""

    def __init__(self, start: tuple[float, float], rosenbrock: bool = True):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.rosenbrock = rosenbrock

    def forward(self, x: None) -> Tensor:
        return torch.stack([10 * (self.w[1] - self.w[0] ** 2), 1 - self.w[0]]) if self.rosenbrock else self.w * 1.0


def gradient_norm(problem: Problem, spec: GradientOptimizer) -> float:
    """Of the loss with L2 on the matrices."""
    problem()
    named = [(p, p.grad) for p in problem.module.parameters()]
    parts = [g + (spec.weight_decay * p if p.ndim >= 2 else 0) for p, g in named if g is not None]
    return float(torch.cat([p.detach().reshape(-1) for p in parts]).norm())


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
