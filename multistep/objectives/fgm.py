"""FGM (fast gradient method): training on inputs moved to where they hurt most, in the space of the embeddings.

    r = epsilon g / |g|,  g = gradient of the loss in the embeddings of an example;  loss = (L(x) + L(x + r)) / 2

Costs a second pass and, before it, a backward pass to the embeddings: 7 matrix products where the inner objective has 3.
Source: Miyato, Dai, Goodfellow 2017, arXiv 1605.07725.
Differs from the source: the mean of the two losses, not their sum, so that the loss keeps its size; the tables are not normalized, so
epsilon is in the units of the table (5 there, on normalized ones); outputs of the table are moved, one example at a time, never the
table itself: a word that occurs twice is moved twice, and no other example is touched.
Which table: the largest that has the batch as the first dimension of its output, and so not a table of positions.
Shapes: B examples, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from multistep.objectives.wrapper import Wrapper
from multistep.types import Tunable, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


class FGM(Wrapper):
    good_for: ClassVar[str] = "text models that overfit, when there is time for more than twice the passes"

    kind: Literal["fgm"] = "fgm"
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False), Tunable(0.05, 5.0, log=True)] = 1.0

    def reads_tables(self) -> bool:
        """It moves their outputs."""
        return True

    def of(self, forward: Callable[[], Tensor], targets: Any, model: nn.Module) -> Tensor:
        """The mean of the loss as it is and of the loss where the embeddings are moved. Needs gradients to be on."""
        from torch import autograd, nn

        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        seen: list[tuple[nn.Embedding, Tensor]] = []

        def keep(table: Any, _inputs: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:  # a frozen table: its outputs can be moved all the same
                output = output.detach().requires_grad_().clone()  # the clone may be changed in place
            seen.append((table, output))
            return output

        with _hooked(tables, keep):
            loss = self.inner.of(forward, targets, model)
        n_rows = len(targets[0] if isinstance(targets, tuple | list) else targets)
        if n_rows == 1:  # the targets of many rows may be packed into one (sequences.py)
            n_rows = max((len(output) for _, output in seen if output.ndim > 2), default=1)
        table, outputs = _largest(seen, n_rows)
        gradients = autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True)
        moves = iter([_unit(g, n_rows) * self.epsilon for g in gradients])  # one for each time that the table is asked

        def move(_table: Any, _inputs: Any, output: Tensor) -> Tensor:
            return output + next(moves)

        with _hooked([table], move):
            return (loss + self.inner.of(forward, targets, model)) / 2


@contextmanager
def _hooked(tables: Sequence[nn.Embedding], hook: Callable[[Any, Any, Tensor], Tensor]) -> Iterator[None]:
    handles = [table.register_forward_hook(hook) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _largest(seen: Sequence[tuple[nn.Embedding, Tensor]], n_rows: int) -> tuple[nn.Embedding, list[Tensor]]:
    """The largest table that ran, of those with a row for each example if there are such; its outputs in their order."""
    usable = [(table, output) for table, output in seen if output.requires_grad]
    if not usable:
        raise UserError(
            "fgm: the model runs no torch.nn.Embedding that a gradient reaches. "
            "Choose another objective, or look the token ids up with torch.nn.Embedding."
        )
    rowwise = [(table, output) for table, output in usable if len(output) == n_rows]
    table = max((table for table, _ in rowwise or usable), key=lambda t: t.weight.numel())
    return table, [output for other, output in usable if other is table]


def _unit(g: Tensor, n_rows: int) -> Tensor:
    """The gradient of each example over its norm; zero where there is none."""
    rows = g.float().reshape(n_rows if len(g) == n_rows else 1, -1)
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(1e-30)  # squares of small numbers would vanish
    return (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)).reshape(g.shape).to(g.dtype)
