"""Every gradient optimizer against a NumPy float64 reference that was written from its paper's formulas.

A reference takes the weights by name, a list of gradients by name, the learning rates and the decays, and returns the weights at
the end. Parameters are float64, so that the two agree to rounding; a last test holds float32 to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from multistep.optimizers import (
    GRADIENT_OPTIMIZERS,
    SGD,
    SOAP,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    AdEMAMix,
    GradientDescent,
    GradientOptimizer,
    Lion,
    Momentum,
    Muon,
    NAdam,
    Nesterov,
    Prodigy,
    RAdam,
    RMSprop,
    ScheduleFree,
)
from multistep.optimizers.muon import newton_schulz
from multistep.optimizers.polar import quintics

Array = np.ndarray
Weights = dict[str, Array]
SHAPES = {"hidden.weight": (5, 5), "hidden.bias": (5,), "tall.weight": (6, 3), "head.weight": (5, 5)}
UPDATES, WD, EPS = 10, 0.1, 1e-8
LRS = [0.05 * (1 - t / 20) for t in range(UPDATES)]  # the loop changes it at every update
PRODIGY = 20.0  # times that: a multiplier of about 1


def each(rule: Callable[[Array, Iterator[tuple[int, float, Array]], float], Array]) -> Callable[..., Weights]:
    """A reference of one parameter, for all: it sees (t from 1, lr, gradient) and its weight decay."""

    def reference(start: Weights, gradients: list[Weights], wd: Weights) -> Weights:
        return {
            name: rule(w.copy(), ((t + 1, LRS[t], g[name]) for t, g in enumerate(gradients)), float(wd[name]))
            for name, w in start.items()
        }

    return reference


@each
def sgd(w: Array, seen: Any, wd: float) -> Array:
    for _, lr, g in seen:
        w = w - lr * (g + wd * w)
    return w


@each
def momentum(w: Array, seen: Any, wd: float) -> Array:
    velocity = np.zeros_like(w)
    for _, lr, g in seen:
        velocity = 0.8 * velocity + g + wd * w
        w = w - lr * velocity
    return w


@each
def nesterov(w: Array, seen: Any, wd: float) -> Array:
    velocity = np.zeros_like(w)
    for _, lr, g in seen:
        g = g + wd * w
        velocity = 0.8 * velocity + g
        w = w - lr * (g + 0.8 * velocity)
    return w


@each
def adagrad(w: Array, seen: Any, wd: float) -> Array:
    total = np.zeros_like(w)
    for _, lr, g in seen:
        g = g + wd * w
        total = total + g * g
        w = w - lr * g / (np.sqrt(total) + 1e-10)
    return w


@each
def rmsprop(w: Array, seen: Any, wd: float) -> Array:
    square = np.zeros_like(w)
    for _, lr, g in seen:
        g = g + wd * w
        square = 0.9 * square + 0.1 * g * g
        w = w - lr * g / (np.sqrt(square) + EPS)
    return w


@each
def adam(w: Array, seen: Any, wd: float) -> Array:
    m = v = np.zeros_like(w)
    for t, lr, g in seen:
        g = g + wd * w
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + EPS)
    return w


def adamw_rule(w: Array, seen: Any, wd: float) -> Array:
    m = v = np.zeros_like(w)
    for t, lr, g in seen:
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        w = w - lr * wd * w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + EPS)
    return w


adamw = each(adamw_rule)


@each
def nadam(w: Array, seen: Any, wd: float) -> Array:
    m = v = np.zeros_like(w)
    product = 1.0
    for t, lr, g in seen:
        now, then = (0.9 * (1 - 0.5 * 0.96 ** (s * 4e-3)) for s in (t, t + 1))
        product *= now
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        ahead = then * m / (1 - product * then) + (1 - now) * g / (1 - product)
        w = w - lr * wd * w - lr * ahead / (np.sqrt(v / (1 - 0.95**t)) + EPS)
    return w


@each
def radam(w: Array, seen: Any, wd: float) -> Array:
    m = v = np.zeros_like(w)
    longest = 2 / (1 - 0.95) - 1
    for t, lr, g in seen:
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        length = longest - 2 * t * 0.95**t / (1 - 0.95**t)
        scale: Any = 1.0
        if length > 5:
            r = ((length - 4) * (length - 2) * longest) / ((longest - 4) * (longest - 2) * length)
            scale = np.sqrt(r) * np.sqrt(1 - 0.95**t) / (np.sqrt(v) + EPS)
        w = w - lr * wd * w - lr * scale * m / (1 - 0.9**t)
    return w


@each
def adafactor(w: Array, seen: Any, wd: float) -> Array:
    row, column, full = np.zeros((len(w), 1)), np.zeros((1, w.shape[-1])), np.zeros_like(w)
    for t, lr, g in seen:
        b = 1 - t**-0.8
        size = max(1e-3, np.sqrt(np.mean(w**2)))
        w = w - lr * wd * w
        if w.ndim == 2:
            row = b * row + (1 - b) * (g**2).mean(1, keepdims=True)
            column = b * column + (1 - b) * (g**2).mean(0, keepdims=True)
            u = g / np.sqrt(row @ column / row.mean())
        else:
            full = b * full + (1 - b) * g**2
            u = g / np.sqrt(full)
        w = w - min(lr, 1 / np.sqrt(t)) * size * u / max(1.0, np.sqrt(np.mean(u**2)))
    return w


@each
def lion(w: Array, seen: Any, wd: float) -> Array:
    m = np.zeros_like(w)
    for _, lr, g in seen:
        w = w - lr * (np.sign(0.9 * m + 0.1 * g) + wd * w)
        m = 0.99 * m + 0.01 * g
    return w


PUBLISHED = [  # Amsel et al. 2025, algorithm 1; the first four made safe by 1.01
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]
EXPRESS = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in PUBLISHED[:4]] + PUBLISHED[4:]


def orthogonal(g: Array) -> Array:
    """The quintics applied to the singular values themselves."""
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    s = s / (np.linalg.norm(s) + 1e-7)
    for a, b, c in EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return u @ np.diag(s) @ vt


def muon(start: Weights, gradients: list[Weights], wd: Weights) -> Weights:
    found = adamw(start, gradients, wd)
    for name in ("hidden.weight", "tall.weight"):
        w, m = start[name], np.zeros_like(start[name])
        for lr, g in zip(LRS, gradients, strict=True):
            m = 0.95 * m + 0.05 * g[name]
            u = orthogonal(0.05 * g[name] + 0.95 * m)
            w = w - lr * wd[name] * w - lr * 0.2 * np.sqrt(max(w.shape)) * u
        found[name] = w
    return found


def soap(start: Weights, gradients: list[Weights], wd: Weights) -> Weights:
    """Renews its bases every 3 updates; sides longer than 5 have none (tall.weight: one side only)."""
    found = adamw(start, gradients, wd)
    for name in ("hidden.weight", "tall.weight", "head.weight"):
        w, g = start[name], gradients[0][name]
        left, right = 0.05 * g @ g.T, 0.05 * g.T @ g
        p, q = np.linalg.eigh(left)[1][:, ::-1], np.linalg.eigh(right)[1][:, ::-1]
        if len(w) > 5:
            p = np.eye(len(w))
        m = v = np.zeros_like(w)
        for t, g in enumerate((g[name] for g in gradients[1:]), 1):
            lr = LRS[t]
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * (p.T @ g @ q) ** 2
            u = (p.T @ m @ q / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + EPS)
            w = w - lr * wd[name] * w - lr * p @ u @ q.T
            left, right = 0.95 * left + 0.05 * g @ g.T, 0.95 * right + 0.05 * g.T @ g
            if t % 3 == 0:
                if len(w) <= 5:
                    order = np.argsort(-np.diag(p.T @ left @ p))
                    p, v = np.linalg.qr(left @ p[:, order])[0], v[order]
                order = np.argsort(-np.diag(q.T @ right @ q))
                q, v = np.linalg.qr(right @ q[:, order])[0], v[:, order]
        found[name] = w
    return found


@each
def schedule_free(w: Array, seen: Any, wd: float) -> Array:
    """Returns x, from the paper's three sequences."""
    x = z = w
    v, total = np.zeros_like(w), 0.0
    for t, lr, g in seen:
        y = 0.1 * z + 0.9 * x
        v = 0.95 * v + 0.05 * g**2
        size = lr * np.sqrt(1 - 0.95**t)
        z = z - size * g / (np.sqrt(v) + EPS) - size * wd * y
        total += size**2
        c = size**2 / total
        x = (1 - c) * x + c * z
    return x


@each
def ademamix(w: Array, seen: Any, wd: float) -> Array:
    m = n = v = np.zeros_like(w)
    for t, lr, g in seen:
        done = min(1.0, t / 6)
        a, b = np.log(0.9), np.log(0.99)
        slow = min(np.exp(a * b / ((1 - done) * b + done * a)), 0.99)
        m, n, v = 0.9 * m + 0.1 * g, slow * n + (1 - slow) * g, 0.95 * v + 0.05 * g**2
        u = (m / (1 - 0.9**t) + min(4.0, 4.0 * t / 6) * n) / (np.sqrt(v / (1 - 0.95**t)) + EPS)
        w = w - lr * wd * w - lr * u
    return w


def prodigy(start: Weights, gradients: list[Weights], wd: Weights) -> Weights:
    """Over all parameters as one vector, as the paper has it."""

    def flat(values: Weights) -> Array:
        return np.concatenate([np.broadcast_to(values[n], s).ravel() for n, s in SHAPES.items()])

    first, decay = flat(start), flat(wd)
    w, d, r, b = first, 1e-3, 0.0, np.sqrt(0.95)
    m = v = s = np.zeros_like(w)
    for lr, g in zip((PRODIGY * lr for lr in LRS), map(flat, gradients), strict=True):
        m, v = 0.9 * m + 0.1 * d * g, 0.95 * v + 0.05 * d**2 * g**2
        r = b * r + (1 - b) * lr * d**2 * g @ (first - w)
        s = b * s + (1 - b) * lr * d**2 * g
        w = w - lr * d * decay * w - lr * d * m / (np.sqrt(v) + d * EPS)
        d = max(d, r / np.abs(s).sum())
    assert d > 1e-3, "the estimate must have moved for this to be a test"
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in SHAPES.values())])
    return {n: w[i:j].reshape(shape) for (n, shape), i, j in zip(SHAPES.items(), ends, ends[1:], strict=False)}


B = {"beta1": 0.9, "beta2": 0.95}
CASES: list[tuple[GradientOptimizer, Callable[..., Weights]]] = [
    (GradientDescent(weight_decay=WD), sgd),
    (SGD(weight_decay=WD), sgd),
    (Momentum(momentum=0.8, weight_decay=WD), momentum),
    (Nesterov(momentum=0.8, weight_decay=WD), nesterov),
    (Adagrad(weight_decay=WD), adagrad),
    (RMSprop(alpha=0.9, weight_decay=WD), rmsprop),
    (Adam(weight_decay=WD, **B), adam),
    (AdamW(weight_decay=WD, **B), adamw),
    (NAdam(weight_decay=WD, **B), nadam),
    (RAdam(weight_decay=WD, **B), radam),
    (Adafactor(weight_decay=WD), adafactor),
    (Lion(weight_decay=WD, beta1=0.9, beta2=0.99), lion),
    (Muon(weight_decay=WD, momentum=0.95, **B), muon),
    (SOAP(weight_decay=WD, every=3, max_side=5, **B), soap),
    (ScheduleFree(weight_decay=WD, **B), schedule_free),
    (AdEMAMix(weight_decay=WD, beta3=0.99, alpha=4.0, ramp=6, **B), ademamix),
    (Prodigy(weight_decay=WD, first_d=1e-3, **B), prodigy),
]
EACH = pytest.mark.parametrize("spec, reference", CASES, ids=[spec.kind for spec, _ in CASES])  # pyright: ignore[reportAttributeAccessIssue]


def problem() -> tuple[Weights, list[Weights], Weights]:
    """Weights, gradients with a common direction (so that Prodigy has a way to estimate) and the decay of each parameter."""
    generator = np.random.default_rng(7)
    start = {n: generator.normal(size=shape) for n, shape in SHAPES.items()}
    common = {n: generator.normal(size=shape) for n, shape in SHAPES.items()}
    gradients = [{n: c + 0.7 * generator.normal(size=c.shape) for n, c in common.items()} for _ in range(UPDATES)]
    return start, gradients, {n: np.array(WD if len(s) > 1 else 0.0) for n, s in SHAPES.items()}


def follow(spec: GradientOptimizer, start: Weights, gradients: list[Weights], dtype: torch.dtype) -> Weights:
    parameters = [(n, nn.Parameter(torch.tensor(w, dtype=dtype))) for n, w in start.items()]
    optimizer = spec.build(parameters)
    for lr, given in zip(LRS, gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * (PRODIGY if isinstance(spec, Prodigy) else 1.0)
        for name, parameter in parameters:
            parameter.grad = torch.tensor(given[name], dtype=dtype)
        optimizer.step()
    spec.settle(optimizer, training=False)
    return {n: p.detach().double().numpy() for n, p in parameters}


def test_every_member_is_here() -> None:
    assert {type(spec) for spec, _ in CASES} == set(GRADIENT_OPTIMIZERS)


@EACH
def test_float64_to_rounding(spec: GradientOptimizer, reference: Callable[..., Weights]) -> None:
    start, gradients, wd = problem()
    wanted, found = reference(start, gradients, wd), follow(spec, start, gradients, torch.float64)
    for name in SHAPES:
        assert np.abs(wanted[name] - start[name]).max() > 1e-4
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-7, atol=1e-9, err_msg=name)


@EACH
def test_float32(spec: GradientOptimizer, reference: Callable[..., Weights]) -> None:
    start, gradients, wd = problem()
    wanted, found = reference(start, gradients, wd), follow(spec, start, gradients, torch.float32)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_the_polar_express_is_the_published_one() -> None:
    for found, wanted in zip(quintics(5), EXPRESS, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_newton_schulz_is_torchs_to_bfloat16() -> None:
    """torch.optim.Muon repeats one quintic, in bfloat16."""
    jordan = (3.4445, -4.7750, 2.0315)
    start, gradients, _ = problem()
    w = nn.Parameter(torch.tensor(start["tall.weight"], dtype=torch.float32))
    g = torch.tensor(gradients[0]["tall.weight"], dtype=torch.float32)
    theirs = torch.optim.Muon(
        [w], lr=1.0, weight_decay=0.0, momentum=0.0, ns_coefficients=jordan, adjust_lr_fn="match_rms_adamw"
    )
    w.grad = g
    theirs.step()
    ours = start["tall.weight"] - 0.2 * max(g.shape) ** 0.5 * newton_schulz(g, [jordan] * 5).numpy()
    np.testing.assert_allclose(ours, w.detach().numpy(), atol=0.03)
    assert np.abs(ours - start["tall.weight"]).max() > 0.1
