"""Newton-CG, L-BFGS and the convex problems against scikit-learn and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression, Ridge

from multistep.models.head import pose, principal_axes, solve_head, unpose
from multistep.objectives.convex import ConvexProblem, Dense, Features, Loss, Sparse
from multistep.optimizers.lbfgs import LBFGS
from multistep.optimizers.newton_cg import NewtonCG
from multistep.optimizers.path import solve_path
from multistep.types import TaskKind

N, D, K = 200, 7, 4


def features(dense: bool, seed: int = 0) -> tuple[np.ndarray, Features]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(N, D)).astype(np.float32) * (generator.random((N, D)) < 0.6)
    return x, Dense(torch.from_numpy(x)) if dense else Sparse(sparse.csr_matrix(x))


def targets(loss: Loss, x: np.ndarray, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    z = x @ generator.normal(size=(D, K)) + generator.normal(size=(N, K))
    return {"softmax": z.argmax(1), "sigmoid": z > 0, "squared": z}[loss]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "squared"])
@pytest.mark.parametrize("extras", [True, False])
def test_gradient_and_hessian_by_finite_differences(loss: Loss, dense: bool, extras: bool) -> None:
    x, held = features(dense)
    generator = np.random.default_rng(2)
    weight = generator.random(N) + 0.1 if extras else None
    scale = generator.normal(size=(D, K)) if extras else None
    problem = ConvexProblem(held, targets(loss, x), loss, K, 0.03, sample_weight=weight, scale_DK=scale)
    w = torch.from_numpy(generator.normal(size=(D + 1, K)))
    v = torch.from_numpy(generator.normal(size=(D + 1, K)))
    h = 1e-5
    above, below, here = problem.at(w + h * v), problem.at(w - h * v), problem.at(w)
    assert float((here.gradient * v).sum()) == pytest.approx((above.value - below.value) / (2 * h), rel=1e-6)
    curved = (above.gradient - below.gradient) / (2 * h)
    torch.testing.assert_close(problem.hvp(here, v).double(), curved, rtol=1e-4, atol=1e-5)
    diagonal = torch.zeros_like(w)
    for i in range(w.numel()):
        unit = torch.zeros(w.numel(), dtype=torch.float64)
        unit[i] = 1.0
        diagonal.view(-1)[i] = problem.hvp(here, unit.view_as(w)).view(-1)[i]
    torch.testing.assert_close(problem.hessian_diagonal(here).double(), diagonal, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("solver", [NewtonCG(tolerance=1e-8), LBFGS(tolerance=1e-8)])
@pytest.mark.parametrize("c", [0.1, 10.0])
def test_softmax_equals_scikit_learn(solver: NewtonCG | LBFGS, dense: bool, c: float) -> None:
    x, held = features(dense)
    y = targets("softmax", x)
    found = solver.minimize(ConvexProblem(held, y, "softmax", K, 1 / (c * N)))
    golden = LogisticRegression(C=c, tol=1e-12, max_iter=10_000, solver="newton-cg").fit(x.astype(np.float64), y)
    assert found.converged and found.relative_gradient <= 1e-8
    np.testing.assert_allclose(found.weights[:-1].numpy(), golden.coef_.T, atol=2e-6)
    bias = found.weights[-1].numpy()
    np.testing.assert_allclose(bias - bias.mean(), golden.intercept_ - golden.intercept_.mean(), atol=2e-6)


def test_squared_equals_ridge() -> None:
    x, held = features(True)
    y = targets("squared", x)
    found = NewtonCG(tolerance=1e-9).minimize(ConvexProblem(held, y, "squared", K, 0.5 / N))
    golden = Ridge(alpha=0.5).fit(x.astype(np.float64), y)
    np.testing.assert_allclose(found.weights[:-1].numpy(), golden.coef_.T, atol=1e-6)
    np.testing.assert_allclose(found.weights[-1].numpy(), golden.intercept_, atol=1e-6)


def test_two_classes_as_one_sigmoid_equal_softmax() -> None:
    x, held = features(True)
    y = (targets("softmax", x) > 1).astype(np.int64)
    question = pose("classify", 2, y)
    solver = NewtonCG(tolerance=1e-9)
    one = solver.minimize(ConvexProblem(held, question.targets, "sigmoid", 1, 0.01 * question.l2_share)).weights
    two = solver.minimize(ConvexProblem(held, y, "softmax", 2, 0.01)).weights
    weights, bias = unpose(question, "classify", one[:-1].numpy(), one[-1].numpy())
    np.testing.assert_allclose(weights, two[:-1].numpy(), atol=1e-6)
    np.testing.assert_allclose(bias[1] - bias[0], float(two[-1, 1] - two[-1, 0]), atol=1e-6)


def test_sample_weight_equals_repetition() -> None:
    x, _ = features(True)
    y = targets("softmax", x)
    times = np.random.default_rng(3).integers(1, 4, N)
    again = np.repeat(np.arange(N), times)
    solver = NewtonCG(tolerance=1e-9)
    weighed = ConvexProblem(Dense(torch.from_numpy(x)), y, "softmax", K, 0.01, sample_weight=times)
    repeated = ConvexProblem(Dense(torch.from_numpy(x[again])), y[again], "softmax", K, 0.01)
    torch.testing.assert_close(
        solver.minimize(weighed).weights, solver.minimize(repeated).weights, rtol=1e-5, atol=1e-6
    )


def test_turning_does_not_move_the_optimum() -> None:
    x, held = features(True)
    y = targets("softmax", x)
    axes = principal_axes(torch.from_numpy(x), standardise=False)
    solver = NewtonCG(tolerance=1e-9)
    turned = solver.minimize(ConvexProblem(Dense(axes.apply(torch.from_numpy(x))), y, "softmax", K, 0.01))
    plain = solver.minimize(ConvexProblem(held, y, "softmax", K, 0.01))
    weights, bias = axes.fold(turned.weights)
    torch.testing.assert_close(weights, plain.weights[:-1], rtol=1e-4, atol=1e-5)
    wanted = plain.weights[-1]  # a softmax bias is determined up to a constant
    torch.testing.assert_close(bias - bias.mean(), wanted - wanted.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["classify", "multilabel", "regress"])
def test_head_learns_and_folds_back(kind: TaskKind) -> None:
    x, _ = features(True)
    x = x * 5 + 100  # a large offset is what standardising is for
    x[:, 2] = 3.0  # a constant feature
    z = (x - 100) @ np.random.default_rng(5).normal(size=(D, K))
    y = {"classify": z.argmax(1), "multilabel": z > 0, "regress": 50 + 20 * z[:, 0]}[kind]
    outputs = 1 if kind == "regress" else K
    weights, bias, facts = solve_head(x, y, kind, outputs, x[:50], y[:50], l2s=(1e-1, 1e-3, 1e-4))
    logits = x @ weights + bias
    assert weights.shape == (D, outputs) and bias.shape == (outputs,) and len(facts["path"]) == 3
    if kind == "regress":
        assert np.abs(logits[:, 0] - y).mean() < 0.1 * y.std()
    else:
        assert ((logits.argmax(1) if kind == "classify" else logits > 0) == y).mean() > 0.93


def test_path_stops_after_two_worse_and_at_the_deadline() -> None:
    x, held = features(True)
    problem = ConvexProblem(held, targets("softmax", x), "softmax", K, 1.0)
    strengths = (1.0, 0.1, 0.01, 1e-3, 1e-4)
    scores = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    _, facts = solve_path(problem, strengths, NewtonCG(), lambda w: next(scores))
    assert facts["l2"] == 0.1 and len(facts["path"]) == 4
    weights, facts = solve_path(problem, strengths, NewtonCG(), lambda w: 0.0, deadline=lambda: True)
    assert len(facts["path"]) == 1 and bool(torch.isfinite(weights).all())


@pytest.mark.parametrize("solver", [NewtonCG(), LBFGS()])
def test_start_at_the_optimum_takes_no_step(solver: NewtonCG | LBFGS) -> None:
    x, held = features(True)
    problem = ConvexProblem(held, targets("softmax", x), "softmax", K, 0.01)
    optimum = NewtonCG(tolerance=1e-9).minimize(problem).weights
    assert solver.minimize(problem, optimum).iterations == 0


def test_perfectly_separable_data_stay_finite() -> None:
    x = np.concatenate([np.full((20, 1), -1.0), np.full((20, 1), 1.0)]).astype(np.float32)
    y = np.repeat([0, 1], 20)
    found = NewtonCG().minimize(ConvexProblem(Dense(torch.from_numpy(x)), y, "softmax", 2, 1e-9))
    assert bool(torch.isfinite(found.weights).all()) and found.value < 1e-3
