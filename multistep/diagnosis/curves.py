"""A law fitted to losses: what more of the same would bring, with an interval.

    L(t) = E + A (t / T)^-a,   E, A >= 0,   0.05 <= a <= 3,   T the largest t;   gain of f times as much: A (1 - f^-a)

t counts updates of one training, or rows of train. Least squares with bounds, from the best of a grid of powers (for a given power
the law is linear in E and A).
Sources: Hestness et al. 2017, arXiv 1712.00409 (a power law in rows); Hoffmann et al. 2022, arXiv 2203.15556, section 3.3 (the form
with a limit). The interval resamples residuals (Efron 1979) or, where there is one, the judged rows.
Differs from the sources: a handful of points of one run, so the interval is Student's with the degrees of freedom that are left. Where
the learning rate decays, the curve falls faster at its end than a law does; what it promises is then what such a curve would bring if
it went on.
Shapes: S points, P powers, N judged rows.
"""

from __future__ import annotations

import numpy as np

from multistep.types import Spec

LEAST_POINTS = 4  # three parameters and one degree of freedom
POWERS = (0.05, 3.0)
RESAMPLES = 60
SURE = 0.95  # one-sided
TINY = 1e-6  # of the loss: what the solver leaves of nothing
CLOSE = 0.05  # of the residuals: how near two fits of the same points are


class Law(Spec):
    """L(t) = limit + scale (t / at)^-power."""

    limit: float
    scale: float
    power: float
    at: float

    def loss(self, t: float) -> float:
        return self.limit + self.scale * (t / self.at) ** -self.power

    def gain(self, factor: float) -> float:
        """How much lower the loss is at `factor` times `at`."""
        return self.scale * (1 - factor**-self.power)


class Gain(Spec):
    """What `factor` times as much would bring: the fall of the loss, its standard error, and the fall that is at least there with a
    chance of 95 %. `now`: the loss that the law has today."""

    value: float
    stderr: float
    low: float
    now: float
    factor: float
    points: int

    @property
    def beyond_noise(self) -> bool:
        return self.low > TINY * self.now


def fit_law(t_S: np.ndarray, loss_S: np.ndarray) -> Law:
    """The least-squares law. Raises ValueError with fewer than three points, or where t is not above zero."""
    t_S, loss_S = np.asarray(t_S, np.float64), np.asarray(loss_S, np.float64)
    if len(t_S) < 3 or len(t_S) != len(loss_S) or not (t_S > 0).all():
        raise ValueError(f"fit_law needs three points or more with t above 0, got t = {t_S.tolist()}")
    from scipy.optimize import least_squares

    at = float(t_S.max())
    x_S, scale = t_S / at, float(np.abs(loss_S).max()) or 1.0
    y_S = loss_S / scale
    limit, height, power = _start(x_S, y_S)
    found = least_squares(
        lambda p: p[0] + p[1] * x_S ** -p[2] - y_S,
        (limit, height, min(max(power, POWERS[0] + 1e-6), POWERS[1] - 1e-6)),
        jac=lambda p: np.stack([np.ones_like(x_S), x_S ** -p[2], -p[1] * np.log(x_S) * x_S ** -p[2]], axis=1),  # pyright: ignore[reportArgumentType]
        bounds=([0.0, 0.0, POWERS[0]], [np.inf, np.inf, POWERS[1]]),
        max_nfev=60,
    )
    limit, height, power = found.x.tolist()
    return Law(limit=scale * limit, scale=scale * height, power=power, at=at)


def _start(x_S: np.ndarray, y_S: np.ndarray) -> tuple[float, float, float]:
    """(limit, scale, power) of the best power on a grid: two numbers in closed form, neither below zero."""
    power_P = np.geomspace(*POWERS, 24)
    base_PS = x_S[None, :] ** -power_P[:, None]
    centred_PS = base_PS - base_PS.mean(1, keepdims=True)
    height_P = (centred_PS @ y_S) / np.maximum((centred_PS**2).sum(1), 1e-30)
    limit_P = y_S.mean() - height_P * base_PS.mean(1)
    below = limit_P < 0
    height_P = np.where(below, (base_PS @ y_S) / (base_PS**2).sum(1), height_P)
    limit_P = np.where(below, 0.0, limit_P)
    rising = height_P < 0
    height_P, limit_P = np.where(rising, 0.0, height_P), np.where(rising, y_S.mean(), limit_P)
    error_P = ((limit_P[:, None] + height_P[:, None] * base_PS - y_S) ** 2).sum(1)
    best = int(error_P.argmin())
    return float(max(0.0, limit_P[best])), float(max(0.0, height_P[best])), float(power_P[best])


def doubled(t_S: np.ndarray, loss_S: np.ndarray, seed: int = 0, factor: float = 2.0) -> Gain | None:
    """What `factor` times the largest t would bring, by resampling residuals. None with fewer than four points."""
    t_S, loss_S = np.asarray(t_S, np.float64), np.asarray(loss_S, np.float64)
    if len(t_S) < LEAST_POINTS or not np.isfinite(loss_S).all():
        return None
    law, free = fit_law(t_S, loss_S), len(t_S) - 3
    fitted_S = np.array([law.loss(t) for t in t_S])
    residual_S = (loss_S - fitted_S) * (len(t_S) / free) ** 0.5
    rng = np.random.default_rng(seed)
    gains = [fit_law(t_S, fitted_S + rng.choice(residual_S, len(t_S))).gain(factor) for _ in range(RESAMPLES)]
    return gain_of(law, float(np.std(gains, ddof=1)), len(t_S), factor)


def gain_of(law: Law, stderr: float, points: int, factor: float = 2.0) -> Gain:
    """The gain of a law that was fitted to so many points, whose standard error is known; Student's t with what is left of them."""
    from scipy.special import stdtrit

    return _gain(law, stderr, factor, points, float(stdtrit(points - 3, SURE)))


def is_fit(law: Law, t_S: np.ndarray, loss_S: np.ndarray) -> bool:
    """Whether this is the least-squares law of these points. Another machine may end elsewhere where many laws are as good, so they are
    compared at the points; one that fits them otherwise is another's."""
    best = fit_law(t_S, loss_S)
    if law.at != best.at:
        return False
    at_S, best_S = (np.array([of.loss(t) for t in t_S]) for of in (law, best))
    spread = float(np.sqrt(np.mean((np.asarray(loss_S, np.float64) - best_S) ** 2)))
    far = CLOSE * spread + TINY * float(np.abs(loss_S).max())
    return bool((np.abs(at_S - best_S) <= far).all())


def doubled_rows(rows_S: np.ndarray, error_SN: np.ndarray, seed: int = 0, factor: float = 2.0) -> Gain:
    """The same for models trained on so many rows and judged on the same N others, by resampling those. `error_SN`: of each of them."""
    law = fit_law(rows_S, error_SN.mean(1))
    rng, n = np.random.default_rng(seed), error_SN.shape[1]
    gains = [fit_law(rows_S, error_SN[:, rng.integers(n, size=n)].mean(1)).gain(factor) for _ in range(RESAMPLES)]
    return _gain(law, float(np.std(gains, ddof=1)), factor, len(rows_S), 1.645)


def _gain(law: Law, stderr: float, factor: float, points: int, width: float) -> Gain:
    value = law.gain(factor)
    return Gain(
        value=value, stderr=stderr, low=value - width * stderr, now=law.loss(law.at), factor=factor, points=points
    )
