"""The optimizers that look at a batch several times, against scikit-learn, scipy, torch and multistep's convex solver."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize
from scipy.sparse import linalg
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

from multistep.objectives.convex import ConvexProblem, Dense
from multistep.optimizers.base import GradientOptimizer
from multistep.optimizers.newton_cg import NewtonCG
from multistep.optimizers.newton_module import conjugate_gradients
from multistep.optimizers.second_order import DampedNewton, ModuleLBFGS, ModuleNewtonCG

pytestmark = pytest.mark.usefixtures("torch_seeded")

N, D, K, L2 = 150, 5, 3, 0.02


class Batch:
    def __init__(self, module: nn.Module, x: Tensor, y: Tensor, squared: bool = False):
        self.module, self.x, self.y, self.squared = module, x, y, squared

    def outputs(self) -> Tensor:
        return self.module(self.x)

    def loss_of(self, outputs: Tensor) -> Tensor:
        if self.squared:
            return 0.5 * (outputs - self.y).square().sum(1).mean()
        return F.cross_entropy(outputs, self.y)

    def parts(self) -> list[Batch]:
        return [self]

    def ridge(self, parameter: Tensor) -> float:
        return 0.0

    def __call__(self) -> Tensor:
        self.module.zero_grad(set_to_none=True)
        loss = self.loss_of(self.outputs())
        loss.backward()
        return loss.detach()


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(N, D)) * np.logspace(-0.5, 0.5, D)
    return x.astype(np.float32), (x @ generator.normal(size=(D, K)) + generator.normal(size=(N, K))).argmax(1)


def solve(spec: GradientOptimizer, module: nn.Module, batch: Batch, steps: int) -> Any:
    optimizer: Any = spec.with_(weight_decay=L2).build(list(module.named_parameters()))
    for _ in range(steps):
        optimizer.step(batch)
    return optimizer


MEMBERS = [
    (ModuleNewtonCG(), 14),
    (ModuleNewtonCG(globalization="trust_region"), 14),
    (ModuleNewtonCG(curvature="hessian", preconditioner="none"), 14),
    (DampedNewton(), 8),
    (ModuleLBFGS(), 8),
]


@pytest.mark.parametrize(("spec", "steps"), MEMBERS)
def test_a_linear_softmax_equals_scikit_learn_and_the_convex_solver(spec: GradientOptimizer, steps: int) -> None:
    x, y = data()
    module = nn.Linear(D, K).double()
    solve(spec, module, Batch(module, torch.from_numpy(x).double(), torch.from_numpy(y)), steps)
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    golden = LogisticRegression(C=1 / (L2 * N), tol=1e-12, max_iter=10_000, solver="newton-cg")
    golden.fit(x.astype(np.float64), y)
    np.testing.assert_allclose(weight, golden.coef_, atol=1e-6)
    wanted = np.asarray(golden.intercept_)  # a softmax bias is determined up to a constant
    np.testing.assert_allclose(bias - bias.mean(), wanted - wanted.mean(), atol=1e-6)
    convex = NewtonCG(tolerance=1e-9).minimize(ConvexProblem(Dense(torch.from_numpy(x)), y, "softmax", K, L2)).weights
    np.testing.assert_allclose(weight.T, convex[:-1].numpy(), atol=1e-6)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_one_newton_step_equals_ridge(curvature: Any) -> None:
    x, _ = data()
    y = np.random.default_rng(1).normal(size=(N, K))
    module = nn.Linear(D, K).double()
    batch = Batch(module, torch.from_numpy(x).double(), torch.from_numpy(y), squared=True)
    solve(DampedNewton(curvature=curvature), module, batch, 1)
    golden = Ridge(alpha=L2 * N).fit(x.astype(np.float64), y)
    np.testing.assert_allclose(module.weight.detach().numpy(), golden.coef_, atol=1e-6)
    np.testing.assert_allclose(module.bias.detach().numpy(), golden.intercept_, atol=1e-6)


def test_lbfgs_equals_torch_to_the_last_bit() -> None:
    x, y = (torch.from_numpy(part) for part in data())
    mine = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, K))
    theirs = deepcopy(mine)
    batch, other = Batch(mine, x, y), Batch(theirs, x, y)
    optimizer = ModuleLBFGS(memory=7, max_iterations=5).build(list(mine.named_parameters()))
    order = [p for group in optimizer.param_groups for p in group["params"]]  # matrices first: sums are in this order
    names = {id(p): name for name, p in mine.named_parameters()}
    golden = torch.optim.LBFGS(
        [theirs.get_parameter(names[id(p)]) for p in order],
        max_iter=5,
        max_eval=15,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        history_size=7,
        line_search_fn="strong_wolfe",
    )
    for _ in range(4):
        assert float(optimizer.step(batch)) == float(golden.step(other))  # pyright: ignore
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("jacobi", [False, True])
def test_conjugate_gradients_equal_scipy_at_every_length(jacobi: bool) -> None:
    generator = np.random.default_rng(2)
    half = generator.normal(size=(12, 12))
    matrix = half @ half.T + np.diag(np.logspace(-1, 2, 12))
    gradient = generator.normal(size=12)
    damped = matrix + 0.3 * np.eye(12)
    inverse = 1 / damped.diagonal() if jacobi else np.ones(12)
    held = torch.from_numpy(matrix)
    for limit in (1, 3, 7):
        found = conjugate_gradients(
            lambda v: held @ v, torch.from_numpy(gradient), 0.3, torch.from_numpy(inverse), None, 1e-14, limit
        )
        golden, _ = linalg.cg(damped, -gradient, rtol=1e-14, maxiter=limit, M=np.diag(inverse))
        np.testing.assert_allclose(found.d_D.numpy(), golden, rtol=1e-8, atol=1e-10)
        assert found.iterations == limit and found.curvature == pytest.approx(float(golden @ matrix @ golden))


def test_a_deep_model_ends_where_scipy_ends() -> None:
    x, y = (torch.from_numpy(part) for part in data())
    module = nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, K)).double()
    start, batch = deepcopy(module.state_dict()), Batch(module, x.double(), y)
    sizes = [p.numel() for p in module.parameters()]

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.no_grad():
            for p, part in zip(module.parameters(), torch.from_numpy(w).split(sizes), strict=True):
                p.copy_(part.view_as(p))
        value = float(batch())
        for p in module.parameters():
            if p.ndim == 2:
                assert p.grad is not None
                value += 0.5 * L2 * float(p.detach().square().sum())
                p.grad += L2 * p.detach()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        return value, torch.cat([g.reshape(-1) for g in gradients]).numpy()

    def vector() -> np.ndarray:
        return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).numpy().copy()

    golden = optimize.minimize(objective, vector(), jac=True, method="BFGS", options={"gtol": 1e-9})
    values = []
    for spec, steps, tolerance in (
        (ModuleNewtonCG(), 60, 1e-4),  # Gauss-Newton is of first order where the residuals are large
        (ModuleNewtonCG(curvature="hessian", globalization="trust_region"), 60, 1e-7),
        (DampedNewton(), 25, 1e-7),
        (ModuleLBFGS(), 20, 1e-5),
    ):
        module.load_state_dict(start)
        solve(spec, module, batch, steps)
        value, gradient = objective(vector())
        assert float(np.linalg.norm(gradient)) < tolerance, spec
        values.append(value)
    assert min(values) <= golden.fun + 1e-6  # other ways may end in other valleys
