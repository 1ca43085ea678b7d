"""Convex losses of a linear model: value, gradient, Hessian-vector products and the Hessian's diagonal, in closed form.

    f(W, b) = 1/sum(c) sum_n c_n loss(y_n, x_n (S * W) + b) + l2/2 |W|^2        the bias b is not penalized

    softmax   loss = logsumexp(z) - z[y]           Hessian in z: diag(p) - p p^T
    sigmoid   loss = sum_k log(1+e^z_k) - y_k z_k  Hessian in z: diag(p (1-p))
    squared   loss = 1/2 |z - y|^2                 Hessian in z: identity

The convention is scikit-learn's: LogisticRegression(C) has l2 = 1/(C N), Ridge(alpha) has l2 = alpha/N. The scale S (optional)
weighs every feature for every output, as naive-Bayes log-count ratios do; it changes what the penalty asks for, not the model.
Weights and bias are one tensor with the bias as its last row. Values and gradients are float64; Hessian products are float32,
which is enough for a direction: every Newton step corrects the error of the one before it.
Sources: Lin, Weng, Keerthi 2008, "Trust region Newton method for large-scale logistic regression" (Hessian products).
Shapes: N rows, D features, K outputs.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

Loss = Literal["softmax", "sigmoid", "squared"]


class Features(Protocol):
    """What a problem needs of its features: products with them, in the precision of the argument."""

    shape: tuple[int, int]
    device: torch.device

    def times(self, w_DK: Tensor) -> Tensor: ...
    def transposed_times(self, r_NK: Tensor) -> Tensor: ...
    def squares_transposed_times(self, r_NK: Tensor) -> Tensor: ...


class Dense:
    """Features as a matrix, kept in both precisions; on a GPU when the tensor is there."""

    def __init__(self, x_ND: Tensor) -> None:
        self.x32, self.x64 = x_ND.float(), x_ND.double()
        self.shape = (x_ND.shape[0], x_ND.shape[1])
        self.device = x_ND.device

    def _x(self, other: Tensor) -> Tensor:
        return self.x64 if other.dtype == torch.float64 else self.x32

    def times(self, w_DK: Tensor) -> Tensor:
        return self._x(w_DK) @ w_DK

    def transposed_times(self, r_NK: Tensor) -> Tensor:
        return self._x(r_NK).T @ r_NK

    def squares_transposed_times(self, r_NK: Tensor) -> Tensor:
        return (self.x32**2).T @ r_NK.float()


class Sparse:
    """Features as csr matrices on the CPU, X and its transpose, each cut into as many bands of rows as there are threads."""

    def __init__(self, x_ND: sparse.csr_matrix) -> None:
        n_rows, n_features = x_ND.get_shape()
        self.shape = (n_rows, n_features)
        self.device = torch.device("cpu")
        x_ND = sparse.csr_matrix(x_ND, dtype=np.float32)
        x_DN = sparse.csr_matrix(x_ND.T)
        self._x = {torch.float32: _Bands(x_ND), torch.float64: _Bands(x_ND, np.float64)}
        self._t = {torch.float32: _Bands(x_DN), torch.float64: _Bands(x_DN, np.float64)}
        self._squares = _Bands(sparse.csr_matrix(x_DN.multiply(x_DN)))

    def times(self, w_DK: Tensor) -> Tensor:
        return self._x[w_DK.dtype].times(w_DK)

    def transposed_times(self, r_NK: Tensor) -> Tensor:
        return self._t[r_NK.dtype].times(r_NK)

    def squares_transposed_times(self, r_NK: Tensor) -> Tensor:
        return self._squares.times(r_NK.float())


class _Bands:
    """A csr matrix in bands of about equal numbers of entries; scipy's products leave the interpreter, so threads help."""

    def __init__(self, x: sparse.csr_matrix, dtype: type = np.float32) -> None:
        x = sparse.csr_matrix(x, dtype=dtype)
        parts = max(1, torch.get_num_threads()) if x.nnz > _THREADED_ENTRIES else 1
        edges = np.searchsorted(x.indptr, np.linspace(0, x.nnz, parts + 1)[1:-1])
        cuts = [0, *(int(e) for e in edges), x.get_shape()[0]]
        self.bands = [x[a:b] for a, b in itertools.pairwise(cuts)]
        self.pool = ThreadPoolExecutor(parts) if parts > 1 else None

    def times(self, other: Tensor) -> Tensor:
        dense = other.numpy()
        found = self.pool.map(lambda x: x @ dense, self.bands) if self.pool else (x @ dense for x in self.bands)
        return torch.from_numpy(np.concatenate(list(found)))


_THREADED_ENTRIES = 50_000  # below this a thread costs more than it saves


class Point(NamedTuple):
    """The problem at some weights. `mean_NK` are the predicted means: probabilities, or the values of a squared loss."""

    w: Tensor
    logits_NK: Tensor
    mean_NK: Tensor
    value: float
    gradient: Tensor


class ConvexProblem:
    """One linear model's training problem at one strength of l2. `with_l2` shares everything else."""

    def __init__(
        self,
        features: Features,
        targets: np.ndarray | Tensor,
        loss: Loss,
        n_outputs: int,
        l2: float,
        sample_weight: np.ndarray | None = None,
        scale_DK: np.ndarray | None = None,
    ) -> None:
        self.features, self.loss, self.l2 = features, loss, l2
        device = features.device
        n_rows = features.shape[0]
        y = torch.as_tensor(np.asarray(targets), device=device)
        if loss == "softmax":
            y = torch.nn.functional.one_hot(y.long(), n_outputs)
        self.y_NK = y.reshape(n_rows, n_outputs).double()
        weight_N = torch.ones(n_rows) if sample_weight is None else torch.as_tensor(sample_weight)
        weight_N = weight_N.double().to(device)
        self.share_N1 = (weight_N / weight_N.sum())[:, None]  # what each row weighs in the mean
        self.share32_N1 = self.share_N1.float()
        self.scale_DK = None if scale_DK is None else torch.as_tensor(scale_DK, dtype=torch.float64, device=device)
        self.scale32_DK = None if self.scale_DK is None else self.scale_DK.float()

    def with_l2(self, l2: float) -> ConvexProblem:
        """The same problem at another strength; nothing is copied."""
        other = object.__new__(ConvexProblem)
        other.__dict__.update(self.__dict__)
        other.l2 = l2
        return other

    def zeros(self) -> Tensor:
        """The start: no weights, no bias."""
        shape = (self.features.shape[1] + 1, self.y_NK.shape[1])
        return torch.zeros(shape, dtype=torch.float64, device=self.features.device)

    def effective(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Weights that apply to the raw features (the scale folded in) and the bias."""
        scale = self.scale_DK if w.dtype == torch.float64 else self.scale32_DK
        return (w[:-1] if scale is None else w[:-1] * scale), w[-1]

    def logits(self, w: Tensor) -> Tensor:
        """Linear in `w`, so logits along a search line cost one product for the whole line."""
        w_DK, b_K = self.effective(w)
        return self.features.times(w_DK).add_(b_K)

    def value(self, w: Tensor, logits_NK: Tensor) -> float:
        """The objective, from logits already at hand."""
        z, y = logits_NK, self.y_NK
        if self.loss == "softmax":
            loss_N = torch.logsumexp(z, 1) - (z * y).sum(1)
        elif self.loss == "sigmoid":
            loss_N = (torch.nn.functional.softplus(z) - z * y).sum(1)
        else:
            loss_N = 0.5 * ((z - y) ** 2).sum(1)
        return float(loss_N @ self.share_N1[:, 0]) + 0.5 * self.l2 * float((w[:-1] ** 2).sum())

    def at(self, w: Tensor, logits_NK: Tensor | None = None) -> Point:
        """Value and gradient at `w`, both float64, with what the Hessian products there need."""
        z = self.logits(w) if logits_NK is None else logits_NK
        mean = z
        if self.loss != "squared":
            mean = torch.softmax(z, 1) if self.loss == "softmax" else torch.sigmoid(z)
        gradient = self._transposed((mean - self.y_NK).mul_(self.share_N1))
        gradient[:-1] += self.l2 * w[:-1]
        return Point(w, z, mean.float(), self.value(w, z), gradient)

    def value_gradient(self, w: Tensor) -> tuple[float, Tensor]:
        """For solvers that want only these."""
        point = self.at(w)
        return point.value, point.gradient

    def hvp(self, point: Point, v: Tensor) -> Tensor:
        """The Hessian at `point` times `v`, float32."""
        v = v.float()
        u = self.logits(v)
        p = point.mean_NK
        if self.loss == "softmax":
            u.sub_((p * u).sum(1, keepdim=True)).mul_(p)
        elif self.loss == "sigmoid":
            u = u.mul_(p).mul_(1 - p)
        product = self._transposed(u.mul_(self.share32_N1))
        product[:-1] += self.l2 * v[:-1]
        return product

    def hessian_diagonal(self, point: Point) -> Tensor:
        """The diagonal of the Hessian at `point`, float32, all positive."""
        p = point.mean_NK
        curvature = torch.ones_like(p) if self.loss == "squared" else p * (1 - p)
        curvature = curvature * self.share32_N1
        top = self.features.squares_transposed_times(curvature)
        if self.scale32_DK is not None:
            top = top * self.scale32_DK**2
        diagonal = torch.cat([top + self.l2, curvature.sum(0, keepdim=True)])
        return diagonal.clamp_min(1e-12 * float(diagonal.max()))

    def _transposed(self, r_NK: Tensor) -> Tensor:
        top = self.features.transposed_times(r_NK)
        scale = self.scale_DK if top.dtype == torch.float64 else self.scale32_DK
        if scale is not None:
            top = top * scale
        return torch.cat([top, r_NK.sum(0, keepdim=True)])
