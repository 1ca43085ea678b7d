"""What an update costs with each optimizer: time as a multiple of AdamW's in the same run, and bytes of state a parameter.

First-order members step on fixed gradients over the parameters of a small transformer (12 layers of width 256 and a table: 10.5
million numbers), float32, so nothing but the rule is timed. The three that take a closure train a small classifier on one
batch: there a whole update is timed, gradients and all, against a whole update of AdamW, and its evaluations of loss and gradient
and its products with the curvature are counted. Times are CPU time of one thread, so a busy machine hardly shows; AdamW is measured anew right
before every member. Members take turns; a seed is a round; the table has medians over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from _common import Results, Row, load_average, markdown, parser, select, values
from multistep.optimizers import GRADIENT_OPTIMIZERS, SECOND_ORDER, AdamW, GradientOptimizer

BENCH = "optimizers"
LAYERS, WIDTH, TABLE = 12, 256, 4000
WARM_UPDATES = 2
UPDATES = 10  # timed in a row: as many as SOAP has between renewals of its bases
CLOSURE_ROWS, CLOSURE_SIZES, CLOSURE_UPDATES = 2000, (20, 30, 10), 5

Named = list[tuple[str, nn.Parameter]]


def kind_of(member: type[GradientOptimizer]) -> str:
    return member.model_fields["kind"].default


def stack() -> Named:
    """The matrices and vectors of a small transformer, with gradients of the size that training has."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embeddings.weight": (TABLE, WIDTH)}
    for i in range(LAYERS):
        for name in ("query", "key", "value", "output"):
            shapes |= {f"layer.{i}.{name}.weight": (WIDTH, WIDTH), f"layer.{i}.{name}.bias": (WIDTH,)}
        shapes |= {f"layer.{i}.up.weight": (4 * WIDTH, WIDTH), f"layer.{i}.up.bias": (4 * WIDTH,)}
        shapes |= {f"layer.{i}.down.weight": (WIDTH, 4 * WIDTH), f"layer.{i}.down.bias": (WIDTH,)}
        for norm in ("first", "second"):
            shapes |= {f"layer.{i}.{norm}_norm.weight": (WIDTH,), f"layer.{i}.{norm}_norm.bias": (WIDTH,)}
    shapes["head.weight"] = (16, WIDTH)
    made = [(n, nn.Parameter(0.02 * torch.randn(shape, generator=generator))) for n, shape in shapes.items()]
    for _, parameter in made:
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
    return made


def first_order(member: type[GradientOptimizer]) -> Row:
    """Milliseconds of a step, and what `state_dict` holds afterwards."""
    parameters = stack()
    optimizer = member(lr=member.rates["scratch"].prior).build(parameters)
    for _ in range(WARM_UPDATES):
        optimizer.step()
    start = time.process_time()
    for _ in range(UPDATES):
        optimizer.step()
    step_ms = 1e3 * (time.process_time() - start) / UPDATES
    return {"step_ms": round(step_ms, 3), "state_bytes": per_parameter(optimizer, [p for _, p in parameters])}


def per_parameter(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float:
    """Bytes of the tensors in `state_dict()`, a parameter."""
    total = sum(t.numel() * t.element_size() for t in tensors(optimizer.state_dict()["state"]))
    return round(total / sum(p.numel() for p in parameters), 4)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for part in inner for t in tensors(part)]


class Batch:
    """A small network on one batch, as the loop poses it, with its evaluations counted."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs, hidden, classes = CLOSURE_SIZES
        self.x = torch.randn(CLOSURE_ROWS, inputs, generator=generator)
        truth = torch.tanh(self.x @ torch.randn(inputs, classes, generator=generator))
        self.y = (truth + torch.randn(CLOSURE_ROWS, classes, generator=generator)).argmax(1)
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))
        self.evaluations = 0

    def outputs(self) -> Tensor:
        return self.module(self.x)

    def loss_of(self, outputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, self.y)

    def parts(self) -> list[Batch]:
        return [self]

    def ridge(self, parameter: Tensor) -> float:
        return 0.0

    def __call__(self) -> Tensor:
        self.evaluations += 1
        self.module.zero_grad(set_to_none=True)
        loss = self.loss_of(self.outputs())
        loss.backward()
        return loss.detach()


def closure(member: type[GradientOptimizer]) -> Row:
    """Milliseconds of an update with all its looks at the batch, and how many those were."""
    batch = Batch()
    named = list(batch.module.named_parameters())
    spec = member(lr=member.rates["scratch"].prior)
    optimizer: Any = spec.build(named)
    products, start = 0, time.process_time()
    first = last = 0.0
    for update in range(CLOSURE_UPDATES):
        if member.closure:
            last = float(optimizer.step(batch))
            products += optimizer.facts.get("products", 0)
        else:
            last = float(batch())
            optimizer.step()
        first = first if update else last
    step_ms = 1e3 * (time.process_time() - start) / CLOSURE_UPDATES
    return {
        "step_ms": round(step_ms, 3), "state_bytes": per_parameter(optimizer, [p for _, p in named]),
        "gradients": batch.evaluations / CLOSURE_UPDATES, "products": products / CLOSURE_UPDATES,
        "loss_first": round(first, 4), "loss_last": round(last, 4),
    }  # fmt: skip


# By workload: the members measured on it, AdamW first.
WORKLOADS: dict[str, tuple[tuple[type[GradientOptimizer], ...], Callable[[type[GradientOptimizer]], Row]]] = {
    "stack": ((AdamW, *(m for m in GRADIENT_OPTIMIZERS if m is not AdamW)), first_order),
    "batch": ((AdamW, *SECOND_ORDER), closure),
}


def table(rows: list[Row]) -> str:
    head = ["optimizer", "rounds", "ms", "times AdamW", "of", "bytes of state a parameter", "gradients", "products"]
    body = []
    for workload, (members, _) in WORKLOADS.items():
        for kind in map(kind_of, members):
            mine = select(rows, dataset=workload, system=kind)
            if not mine:
                continue
            ratios = [row["step_ms"] / row["adamw_ms"] for row in mine]
            ratio, last = statistics.median(ratios), mine[-1]
            step_ms = f"{statistics.median(values(mine, 'step_ms')):.2f}"
            of = "a step" if workload == "stack" else "a whole update"
            counts = [f"{last['gradients']:.1f}", f"{last['products']:.1f}"] if "gradients" in last else ["1", "0"]
            body.append(
                [
                    kind,
                    len(mine),
                    step_ms,
                    f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                    of,
                    f"{last['state_bytes']:.4g}",
                    *counts,
                ]
            )
    size = sum(p.numel() for _, p in stack())
    words = (
        f"A step: {size:,} parameters, fixed gradients. A whole update: one batch of {CLOSURE_ROWS} rows, a network of "
        f"{'-'.join(map(str, CLOSURE_SIZES))}, the mean of the first {CLOSURE_UPDATES} updates. float32, one thread."
    )
    return f"{markdown(head, body)}\n\n{words}"


def main() -> None:
    options = parser(__doc__)
    given = options.parse_args()
    torch.set_num_threads(1)  # threads would wait for each other where the machine is not idle
    results = Results(BENCH, given.out, table)
    for round_ in given.seeds:
        for workload, (members, measure) in WORKLOADS.items():
            for member in members:
                if results.has(workload, "-", kind_of(member), round_):
                    continue
                before, beside = load_average(), measure(AdamW)
                measured = {"ok": True, "adamw_ms": beside["step_ms"], **measure(member)}
                results.add(workload, "-", kind_of(member), round_, measured, before)


if __name__ == "__main__":
    main()
