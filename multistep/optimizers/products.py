"""Products of a module's curvature with a vector, by automatic differentiation, and parameters as one vector.

    hessian        H v = d/dw (g . v)                 g with its graph, differentiated once more
    gauss_newton   G v = J^T (H_L (J v))              J outputs by parameters, H_L the loss's Hessian in the outputs

J v comes from two backward passes: J^T u is linear in u, so its derivative in u along v is J v. Nothing here needs forward mode,
which many layers lack. G is H without the outputs' own curvature: positive semidefinite where the loss is convex in the outputs.
A batch in one part keeps its graph from product to product. In micro-batches every product reads them anew, one after the other, and
adds them up: memory is that of two of them at most, and a product costs a pass forward more.
Some fused kernels (attention, recurrent layers) have no second derivative: the batch is then read again with the plain ones.
Sources: Pearlmutter 1994 (Hessian products); Schraudolph 2002 (Gauss-Newton products); the double-backward J v: Townsend 2017,
"A new trick for calculating Jacobian vector products"; the diagonal: Chapelle and Erhan 2011, "Improved preconditioner for
Hessian free optimization", here without what H_L has beside its diagonal.
Shapes: D parameters in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from multistep.types import UserError

if TYPE_CHECKING:
    from multistep.optimizers.base import StepPart, StepProblem

Curvature = Literal["gauss_newton", "hessian"]


class Flat:
    """Parameters as one vector [D]: float64 if one of them is, else float32."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.size = sum(p.numel() for p in parameters)
        devices = {str(p.device) for p in parameters}
        if len(devices) > 1:
            raise UserError(
                f"the parameters lie on {', '.join(sorted(devices))}: a second-order step wants one device."
            )
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        self.device = self.parameters[0].device

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor a parameter as a vector (a copy)."""
        return torch.cat([t.detach().reshape(-1).to(self.dtype) for t in tensors])

    def split(self, v_D: Tensor) -> list[Tensor]:
        """The vector as tensors like the parameters."""
        parts = v_D.split([p.numel() for p in self.parameters])
        return [part.view_as(p).to(p.dtype) for part, p in zip(parts, self.parameters, strict=True)]

    def values(self) -> Tensor:
        return self.join(self.parameters)

    def gradient(self) -> Tensor:
        """What the last evaluation left in `.grad`; zero where it left nothing."""
        if any(p.grad is not None and p.grad.is_sparse for p in self.parameters):
            raise UserError(
                "a gradient is sparse: make its nn.Embedding with sparse=False for a second-order optimizer."
            )
        return self.join([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters])

    def set(self, w_D: Tensor) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.split(w_D), strict=True):
                parameter.copy_(value)


class Products:
    """The loss's curvature at the parameters as they are when it is first asked for. Holds the graph of a batch in one part."""

    def __init__(self, problem: StepProblem, flat: Flat, curvature: Curvature, plain: bool = False) -> None:
        self.problem, self.flat = problem, flat
        self.curvature: Curvature = curvature
        self.plain = plain  # whether fused kernels are avoided
        self.count = 0
        self._read: _Read | None = None

    def __call__(self, v_D: Tensor) -> Tensor:
        """The curvature times `v_D`. Raises UserError where a layer has no second derivative at all."""
        self.count += 1
        return self._twice(lambda: self._times(v_D))

    def diagonal(self, draws: int, seed: int) -> Tensor:
        """An unbiased guess of the diagonal of J^T diag(H_L) J, by `draws` backward passes: never negative, and its noise is in
        proportion, which is not so for v * Bv with random v where parameters differ in scale."""
        return self._twice(lambda: self._diagonal(draws, torch.Generator().manual_seed(seed)))

    def _twice(self, work: Callable[[], Tensor]) -> Tensor:
        """What `work` gives: with torch's choice of kernels, or else with the plain ones, now and from here on."""
        try:
            with torch.enable_grad(), _kernels(self.plain):
                return work()
        except RuntimeError as error:  # torch's NotImplementedError is one
            if not any(sign in str(error) for sign in _NO_SECOND_DERIVATIVE):
                raise
            if self.plain:
                raise UserError(
                    f"{str(error).splitlines()[0]} Newton's methods differentiate the model twice: take 'lbfgs' or a "
                    "first-order optimizer, or another layer."
                ) from None
        self.plain, self._read = True, None
        return self._twice(work)

    def _parts(self) -> Iterator[_Read]:
        """The parts of the batch, each with its graph: read anew unless there is one only."""
        if self._read is not None:
            yield self._read
            return
        parts = self.problem.parts()
        for part in parts:
            read = _Read(part, part.outputs(), self.flat.parameters, self.curvature)
            if len(parts) == 1:
                self._read = read
            yield read

    def _times(self, v_D: Tensor) -> Tensor:
        v = self.flat.split(v_D)
        return _sum(self.flat.join(read.product(v)) for read in self._parts())

    def _diagonal(self, draws: int, generator: torch.Generator) -> Tensor:
        return _sum(self._diagonal_of(read, draws, generator) for read in self._parts())

    def _diagonal_of(self, read: _Read, draws: int, generator: torch.Generator) -> Tensor:
        outputs = read.outputs
        cut, pull = _pull(read.part, outputs)
        total_D = torch.zeros(self.flat.size, dtype=self.flat.dtype, device=self.flat.device)
        for _ in range(draws if pull.requires_grad else 0):
            signs, others = _signs(outputs, generator), _signs(outputs, generator)
            inner = (signs * _gradients(pull, [cut], signs)[0]).clamp_min(0)  # the diagonal of H_L, about
            total_D += self.flat.join(_gradients(outputs, self.flat.parameters, inner.sqrt() * others)).square_()
        return total_D.div_(draws)


class _Read:
    """A part that was read: its outputs with their graph, and the product made of them."""

    def __init__(self, part: StepPart, outputs: Tensor, parameters: Sequence[Tensor], curvature: Curvature) -> None:
        self.part, self.outputs, self._parameters = part, outputs, parameters
        self._make = hessian_product if curvature == "hessian" else gauss_newton_product
        self._product: Callable[[list[Tensor]], Sequence[Tensor]] | None = None

    def product(self, v: list[Tensor]) -> Sequence[Tensor]:
        """The curvature of this part times v, one tensor a parameter."""
        if self._product is None:
            self._product = self._make(self.part, self.outputs, self._parameters)
        return self._product(v)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total += term
    return total


# how torch says that a kernel cannot be differentiated twice
_NO_SECOND_DERIVATIVE = ("is not implemented", "ouble backward", "differentiate twice", "@once_differentiable")


@contextmanager
def _kernels(plain: bool) -> Iterator[None]:
    """Leave torch its choice of kernels, or (`plain`) only those that can be differentiated twice."""
    if not plain:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def _check(gradients: Sequence[Tensor]) -> None:
    """Raises RuntimeError where the graph of first derivatives has a dead end: torch would leave its share out and not say so."""
    ahead = [g.grad_fn for g in gradients if g.grad_fn is not None]
    seen = set(ahead)
    while ahead:
        node = ahead.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a function of the model is marked @once_differentiable.")
        further = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(further)
        ahead.extend(further)


def hessian_product(
    part: StepPart, outputs: Tensor, parameters: Sequence[Tensor]
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """v -> H v for the loss of the outputs."""
    gradients = _gradients(part.loss_of(outputs), parameters, create_graph=True)
    _check(gradients)

    def product(v: list[Tensor]) -> Sequence[Tensor]:
        curved = [(g, x) for g, x in zip(gradients, v, strict=True) if g.requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in parameters]
        return _gradients([g for g, _ in curved], parameters, [x for _, x in curved])

    return product


def gauss_newton_product(
    part: StepPart, outputs: Tensor, parameters: Sequence[Tensor]
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """v -> J^T H_L J v."""
    cut, pull = _pull(part, outputs)
    probe = torch.zeros_like(outputs, requires_grad=True)
    pulled = _gradients(outputs, parameters, probe, create_graph=True)  # J^T probe, linear in the probe
    _check([*pulled, pull])

    def product(v: list[Tensor]) -> Sequence[Tensor]:
        linear = [(p, x) for p, x in zip(pulled, v, strict=True) if p.requires_grad]
        if not linear or not pull.requires_grad:  # a loss that is linear in the outputs has no curvature
            return [torch.zeros_like(p) for p in parameters]
        (pushed,) = _gradients([p for p, _ in linear], [probe], [x for _, x in linear])
        (bent,) = _gradients(pull, [cut], pushed)
        return _gradients(outputs, parameters, bent)

    return product


def _pull(part: StepPart, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs cut from the model, and the loss's gradient in them, with its graph."""
    cut = outputs.detach().requires_grad_()
    return cut, _gradients(part.loss_of(cut), [cut], create_graph=True)[0]


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs, drawn on the CPU so that every device sees the same."""
    signs = torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1)
    return signs.to(like.device, like.dtype)


def _gradients(
    of: Tensor | Sequence[Tensor],
    to: Sequence[Tensor],
    along: Tensor | Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients whose graph is kept; zeros where nothing depends."""
    return torch.autograd.grad(
        of, to, along, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
