"""Laws of the loop: it descends, sees bad batches before the update, and is the loop one would write by hand, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from multistep.budget import Budget
from multistep.data.batches import Batches
from multistep.detect import Detector
from multistep.objectives import (
    FGM,
    BinaryCrossEntropy,
    CrossEntropy,
    Huber,
    MeanAbsoluteError,
    MeanSquaredError,
    Penalized,
    RDrop,
)
from multistep.optimizers import GRADIENT_OPTIMIZERS
from multistep.schedules import SCHEDULES, Constant, Linear
from multistep.state import TrainState
from multistep.train import train

pytestmark = pytest.mark.usefixtures("torch_seeded")


def begun(model: Any, strategy: Any, updates: int, seed: int = 3) -> TrainState:
    state = TrainState(model)
    state.counters.seed = seed
    state.begin(strategy, Budget(amount=updates, unit="updates"))
    return state


def parameters(state: TrainState) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in state.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---------------------------------------------------------------------------------------------- descend


@pytest.mark.parametrize("schedule", [s() for s in SCHEDULES], ids=lambda s: s.kind)
@pytest.mark.parametrize("trains", ["all", "top"])
def test_the_loss_falls(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, schedule: Any, trains: str
) -> None:
    strategy = make_strategy(trains=trains, layers=1, schedule=schedule, weight_decay=0.0, lr=3e-3)
    measures = list(train(begun(make_encoder(), strategy, 60), make_rows(48)))
    first, last = (np.mean([m.loss_nats for m in part]) for part in (measures[:5], measures[-5:]))
    assert first > 0.8 and last < 0.5 * first and not any(m.event for m in measures)


@pytest.mark.parametrize("optimizer", GRADIENT_OPTIMIZERS, ids=lambda o: o.__name__)
def test_every_optimizer_descends(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, optimizer: Any
) -> None:
    strategy = make_strategy(trains="all").with_(optimizer=optimizer(lr=optimizer.rates["scratch"].prior))
    measures = list(train(begun(make_encoder(), strategy, 120), make_rows(48)))
    first, last = (np.mean([m.loss_nats for m in part]) for part in (measures[:5], measures[-5:]))
    assert last < 0.9 * first and not any(m.event for m in measures)


WHOLE = [CrossEntropy(), CrossEntropy(focal_gamma=2.0), BinaryCrossEntropy(), MeanSquaredError(), MeanAbsoluteError(), Huber(),
         RDrop(), FGM(epsilon=0.05), Penalized()]  # fmt: skip


@pytest.mark.parametrize("objective", WHOLE, ids=lambda o: o.kind)
def test_every_objective_of_whole_texts_descends(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, objective: Any
) -> None:
    rows = make_rows(48)
    outputs = 3
    if isinstance(objective, BinaryCrossEntropy):
        rows.targets = torch.nn.functional.one_hot(rows.targets, 3).bool()
    if isinstance(objective, MeanSquaredError | MeanAbsoluteError | Huber):
        rows.targets, outputs = rows.targets.double() - 1.0, 1
    model = make_encoder(n_outputs=outputs)
    measures = list(train(begun(model, make_strategy(lr=3e-3, objective=objective, dropout=0.1), 60), rows))
    first, last = (np.mean([m.loss_nats for m in part]) for part in (measures[:5], measures[-5:]))
    assert last < 0.3 * first


def test_a_measure_says_what_was_done(make_encoder: Callable, make_rows: Callable, make_strategy: Callable) -> None:
    rows, strategy = make_rows(20), make_strategy(lr=1e-3)
    measures = list(train(begun(make_encoder(), strategy, 7), rows))
    batches = Batches(rows.lengths_N, 8, seed=3)
    tokens = np.cumsum([rows.lengths_N[batches.at(i)].sum() for i in range(7)])
    assert [m.update for m in measures] == list(range(1, 8))
    assert [m.tokens for m in measures] == tokens.tolist()
    assert [m.examples for m in measures] == np.cumsum([len(batches.at(i)) for i in range(7)]).tolist()
    assert [m.lr for m in measures] == [1e-3 * Linear()(i / 7) for i in range(7)]
    assert all(m.grad_norm > 0 and m.rows == () for m in measures)


# ---------------------------------------------------------------------------------------------- bad batches


@dataclass
class Tampered:
    """Rows whose batch number `at` comes back changed by `how`."""

    rows: Any
    at: int
    how: Callable[[torch.Tensor], torch.Tensor]
    count: int = 0

    def load(self, rows: np.ndarray) -> tuple[Any, torch.Tensor]:
        inputs, targets = self.rows.load(rows)
        self.count += 1
        return inputs, self.how(targets) if self.count == self.at + 1 else targets

    def order(self, batch_size: int, seed: int) -> Any:
        return self.rows.order(batch_size, seed)

    def outputs(self, model: Any, inputs: Any) -> torch.Tensor:
        return self.rows.outputs(model, inputs)

    def tokens(self, rows: np.ndarray) -> int:
        return self.rows.tokens(rows)


def regression(make_rows: Callable) -> Any:
    rows = make_rows(64)
    rows.targets = torch.randn(64, generator=torch.Generator().manual_seed(5)).double()
    return rows


@pytest.mark.parametrize(
    "event, at, how",
    [
        ("nonfinite", 0, lambda t: t * float("nan")),
        ("nonfinite", 9, lambda t: t * float("nan")),
        ("nonfinite", 9, lambda t: t + float("inf")),
        ("spike", 25, lambda t: t + 10.0),  # a squared error of about 1 becomes about 100
    ],
)
def test_a_bad_batch_is_seen_before_the_update(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, event: str, at: int, how: Callable
) -> None:
    strategy = make_strategy(lr=1e-4, objective=MeanSquaredError(), dropout=0.1)
    data = Tampered(regression(make_rows), at, how)
    state = begun(make_encoder(n_outputs=1), strategy, 40)
    loop = train(state, data)
    good = list(islice(loop, at))
    assert not any(m.event for m in good)
    before, averages, detector = parameters(state), [t.clone() for t in state.ema], Detector(**vars(state.detector))
    bad = next(loop)
    assert bad.event == event and bad.update == at and state.counters.position == at + 1
    assert bad.rows == tuple(data.order(8, seed=3).at(at))
    assert same(parameters(state), before) and state.detector == detector
    assert all(torch.equal(a, b) for a, b in zip(state.ema, averages, strict=True))
    assert state.optimizer is not None
    for _, parameter in state.trained:
        assert parameter.grad is None
        assert all(bool(torch.isfinite(v).all()) for v in state.optimizer.state.get(parameter, {}).values())
    rest = list(loop)  # the loop goes on, and ends in spite of what was left out
    assert not any(m.event for m in rest) and len(good) + 1 + len(rest) == 40 and rest[-1].update == 39
    assert not same(parameters(state), before)


def test_every_batch_bad_still_ends(make_encoder: Callable, make_rows: Callable, make_strategy: Callable) -> None:
    rows = regression(make_rows)
    rows.targets *= float("nan")
    state = begun(make_encoder(n_outputs=1), make_strategy(objective=MeanSquaredError()), 5)
    before = parameters(state)
    assert [m.event for m in train(state, rows)] == ["nonfinite"] * 5
    assert same(parameters(state), before) and state.counters.update == 0


def test_gradients_that_are_not_finite_count_too() -> None:
    assert Detector().see(0.5, float("nan")) == "nonfinite"
    assert Detector().see(0.5, float("inf")) == "nonfinite"


def test_heavy_tailed_small_losses_are_no_spikes() -> None:
    detector = Detector()
    rng = np.random.default_rng(0)
    for loss in rng.normal(1.2, 0.1, 20):
        assert detector.see(float(loss), 1.0) == ""
    for loss in np.minimum(2.0, 0.01 * rng.lognormal(0.0, 2.0, 2000)):  # 200 times the median now and then
        assert detector.see(float(loss), 1.0) == ""
    assert detector.see(120.0, 1.0) == "spike"


def test_a_spike_is_not_remembered_and_the_first_losses_are_no_spikes() -> None:
    detector = Detector()
    assert [detector.see(x, 1.0) for x in (1.0, 100.0, 1.0)] == ["", "", ""]
    detector = Detector()
    for loss in np.random.default_rng(0).normal(1.0, 0.1, 50):
        detector.see(float(loss), 1.0)
    assert [detector.see(100.0, 1.0) for _ in range(5)] == ["spike"] * 5
    assert detector.see(1.1, 1.0) == ""


# ---------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("clip, weight_decay", [(1.0, 0.01), (0.0, 0.1)])
def test_the_loop_is_the_one_written_by_hand(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, clip: float, weight_decay: float
) -> None:
    rows, updates = make_rows(40), 12
    strategy = make_strategy(lr=2e-3, clip=clip, weight_decay=weight_decay)
    state = begun(make_encoder(), strategy, updates)
    measured = [m.loss_nats for m in train(state, rows)]

    model = make_encoder().train()
    decay = [p for n, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embeddings" not in n)]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98), fused=True)
    batches, losses = Batches(rows.lengths_N, 8, seed=3), []
    for update in range(updates):
        (ids_BT, mask_BT), targets_B = rows.load(batches.at(update))
        loss = torch.nn.functional.cross_entropy(model(ids_BT, mask_BT), targets_B)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        progress = update / updates
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (progress / 0.06 if progress < 0.06 else (1 - progress) / (1 - 0.06))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert measured == losses
    assert same(parameters(state), {n: p.detach() for n, p in model.named_parameters()})


def test_a_constant_rate_is_scaled_by_what_roll_backs_left(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable
) -> None:
    state = begun(make_encoder(), make_strategy(lr=1e-3, schedule=Constant(warmup=0.0)), 3)
    state.counters.lr_scale = 0.25
    assert [m.lr for m in train(state, make_rows())] == [2.5e-4] * 3
