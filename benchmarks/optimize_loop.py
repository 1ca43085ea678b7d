"""What `optimize` costs above a loop written by hand: same module, same data, same order, in turns; equal to the last bit or it stops.

Both loops run in threads of one process, neither in the main one, where memory is had otherwise (a loop by hand was 1.5 % slower
there than the same loop elsewhere). They hand each other the machine every few updates, so that a change of its mood meets both; an
update is timed from one forward pass to the next, so that all that lies between (averages, snapshots, writing them to disk, the
journal) counts. At the end both have the same weights, bit for bit, and so had the same losses.
"""

from __future__ import annotations

import copy
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multistep
from _common import Results, Row, load_average, markdown, mean_sd, parser, select, values
from gpt import GPT, GPTSize, characters, windows
from multistep.loader import rows_of
from multistep.objectives import CrossEntropy, NextToken
from multistep.optimizers import AdamW
from multistep.schedules import Linear

BENCH = "optimize_loop"
TURN_UPDATES = 10
WARM_TURNS = 2
LR, CLIP = 1e-3, 1.0

Data = tuple[Tensor, Tensor]


class Case(NamedTuple):
    module: nn.Module
    objective: CrossEntropy | NextToken
    train: Data
    validation: Data
    batch_size: int


def small_gpt() -> Case:
    """The GPT of gpt.py at 12 windows of 64 characters: updates of some 25 ms, the smallest that anyone would train for long."""
    some = tuple(t[:512] for t in windows("validation", stride=64))
    return Case(GPT(GPTSize(len(characters()))), NextToken(), windows("train", stride=64), (some[0], some[1]), 12)


class Pooled(nn.Module):
    """Three layers of a small encoder (width 384) over hidden states [B,T,C] that are there already: class logits [B,K]."""

    def __init__(self, width: int = 384, classes: int = 77):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(width, 12, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
            self.head = nn.Linear(width, classes)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.head(self.layers(x_BTC).mean(1))


def upper_layers() -> Case:
    """What fine-tuning the upper half of a small encoder on kept hidden states is: 32 texts of 14 tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 14, 384, generator=generator)
    y = torch.randint(0, 77, (4000,), generator=generator)
    return Case(Pooled(), CrossEntropy(), (x, y), (x[:200], y[:200]), 32)


CASES: dict[str, Callable[[], Case]] = {"gpt-12x64": small_gpt, "upper-layers-32x14": upper_layers}


# ---------------------------------------------------------------------------------------------- turns


class Turns:
    """Hands the machine from one thread to the other every TURN_UPDATES updates, and adds up what each turn took."""

    def __init__(self, names: tuple[str, str]):
        self._condition, self._now = threading.Condition(), names[0]
        self._other = dict(zip(names, reversed(names), strict=True))
        self._count, self._start = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
        self._over: set[str] = set()
        self.seconds: dict[str, list[float]] = {name: [] for name in names}  # an update, of every whole turn

    def update(self, name: str) -> None:
        """Called by `name` at the beginning of every update: times the turn that this ends, waits until the next one."""
        if self._count[name] % TURN_UPDATES == 0:
            if self._count[name]:
                self.seconds[name].append((time.perf_counter() - self._start[name]) / TURN_UPDATES)
                self._give(name)
            self.take(name)
            self._start[name] = time.perf_counter()
        self._count[name] += 1

    def take(self, name: str) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._now == name or self._other[name] in self._over)

    def over(self, name: str) -> None:
        """`name` makes no more updates."""
        self._over.add(name)
        self._give(name)

    def _give(self, name: str) -> None:
        with self._condition:
            self._now = self._other[name]
            self._condition.notify_all()


def by_hand(case: Case, model: nn.Module, updates: int, seed: int) -> None:
    """The loop that anyone would write: batches, loss, clip, fused AdamW, a rate that decays to zero."""
    rows = rows_of(case.train, "train", "cpu")
    order, spec, schedule = rows.order(case.batch_size, seed), AdamW(lr=LR), Linear()
    parameters = list(model.parameters())
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and n not in tables(model)]
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or n in tables(model)]
    groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(spec.beta1, spec.beta2), eps=spec.eps, fused=True)
    x, y = case.train
    model.train()
    for update in range(updates):
        take = torch.from_numpy(order.at(update))
        outputs, targets = model(x[take]), y[take]
        if outputs.ndim == 3:
            loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum") / targets.numel()
        else:
            loss = F.cross_entropy(outputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(update / updates)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def tables(model: nn.Module) -> set[str]:
    """The names of tables of embeddings, which are not decayed."""
    found = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {n for n, p in model.named_parameters() if id(p) in found}


def measure(case: Case, updates: int, seed: int) -> Row:
    """Milliseconds an update of both loops, and what ours costs above the other. Raises AssertionError where their weights differ."""
    turns = Turns(("optimize", "by hand"))
    hand = copy.deepcopy(case.module)
    case.module.register_forward_pre_hook(_Hook(turns, "optimize"))
    hand.register_forward_pre_hook(_Hook(turns, "by hand"))
    failed: list[BaseException] = []
    found: list[Any] = []

    def in_turn(name: str, loop: Callable[[], None]) -> None:
        try:
            turns.take(name)
            loop()
        except BaseException as error:
            failed.append(error)
            raise
        finally:
            turns.over(name)

    def ours() -> None:
        found.append(multistep.optimize(
            case.module, objective=case.objective, train=case.train, validation=case.validation, metric="loss",
            budget=f"{updates} updates", optimizer=AdamW(lr=LR), schedule=Linear(), controller="fixed",
            batch_size=case.batch_size, clip=CLIP, seed=seed,
        ))  # fmt: skip

    loops = {"optimize": ours, "by hand": lambda: by_hand(case, hand, updates, seed)}
    threads = [threading.Thread(target=in_turn, args=both) for both in loops.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    (result,) = found
    events = [r for r in result.records() if r["kind"] == "Event"]
    assert not events, f"the run was not a plain one: {events}"
    for (name, w), wanted in zip(result.model.named_parameters(), hand.parameters(), strict=True):
        assert torch.equal(w, wanted), f"{name} differs"
    pairs = list(zip(turns.seconds["optimize"], turns.seconds["by hand"], strict=False))[WARM_TURNS:]
    mine, theirs = [sum(p[i] for p in pairs) / len(pairs) for i in (0, 1)]
    middle = statistics.median(a / b - 1 for a, b in pairs)
    return {
        "ok": True, "updates": updates, "update_ms": round(1e3 * mine, 3), "by_hand_ms": round(1e3 * theirs, 3),
        "overhead_percent": round(100 * (mine / theirs - 1), 2), "median_turn_percent": round(100 * middle, 2),
    }  # fmt: skip


class _Hook:
    """Before every forward pass in training: an update begins. Copies of a module share it."""

    def __init__(self, turns: Turns, name: str):
        self._turns, self._name = turns, name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self._turns.update(self._name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self


def table(rows: list[Row]) -> str:
    head = ["module and batch", "rounds", "by hand, ms an update", "optimize, ms", "overhead, %", "median turn, %"]
    body = []
    for name in [n for n in CASES if select(rows, dataset=n)]:
        mine = select(rows, dataset=name)
        columns = [("by_hand_ms", 2), ("update_ms", 2), ("overhead_percent", 2), ("median_turn_percent", 2)]
        body.append([name, len(mine), *(mean_sd(values(mine, column), digits) for column, digits in columns)])
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__)
    options.description = f"{options.description} A seed is a round here."
    options.add_argument("--updates", type=int, default=600, help="of each loop, in each round")
    options.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    for round_ in given.seeds:
        for name in given.cases:
            budget = f"{given.updates} updates"
            if results.has(name, budget, "optimize", round_):
                continue
            before = load_average()
            results.add(name, budget, "optimize", round_, measure(CASES[name](), given.updates, round_), before)


if __name__ == "__main__":
    main()
