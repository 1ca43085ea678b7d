"""Laws of the state: fork, resume, accumulate, cover, live changes. Its folder: test_state_folders.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multistep.budget import Budget
from multistep.detect import Detector, Norms
from multistep.evaluate import encode
from multistep.objectives import CrossEntropy
from multistep.optimizers import SGD
from multistep.optimizers.adamw import decays
from multistep.state import Segment, TrainState
from multistep.strategy import FineTune, TrainModule
from multistep.train import train
from multistep.types import Measure

pytestmark = pytest.mark.usefixtures("torch_seeded")
UPDATES = 14
BUDGETS = {"updates": Budget(amount=UPDATES, unit="updates"), "tokens": Budget(amount=800, unit="tokens")}


def begun(model: Any, strategy: FineTune, budget: Budget = BUDGETS["updates"], seed: int = 3) -> TrainState:
    state = TrainState(model)
    state.counters.seed = seed
    state.begin(strategy, budget)
    return state


def run(state: TrainState, rows: Any, updates: int | None = None) -> list[Measure]:
    return list(islice(train(state, rows), updates))


def assert_same(a: TrainState, b: TrainState) -> None:
    """Bitwise, but for the seconds."""
    one, two = a.snapshot(), b.snapshot()
    for snapshot in (one, two):
        snapshot["meta"]["segment"].pop("wall_s")
    assert one["meta"] == two["meta"]
    assert one["tensors"].keys() == two["tensors"].keys()
    for name, value in one["tensors"].items():
        assert torch.equal(value, two["tensors"][name]), name
    for (name, p), (_, q) in zip(a.model.named_parameters(), b.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


# ---------------------------------------------------------------------------------------------- fork


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("begun_for", [0, 5])
def test_two_forks_have_the_same_future_and_the_parent_does_not_move(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, dropout: float, begun_for: int
) -> None:
    rows = make_rows()
    parent = begun(make_encoder(), make_strategy(dropout=dropout))
    run(parent, rows, begun_for)
    before = parent.fork()
    first, second = parent.fork(), parent.fork()
    torch.rand(7)  # what others draw in between does not matter
    one = run(first, rows)
    np.random.default_rng(0).random(3)
    torch.manual_seed(99)
    two = run(second, rows)
    assert one == two and len(one) == UPDATES - begun_for
    assert_same(first, second)
    assert_same(parent, before)
    assert one == run(parent, rows)  # and the parent's own future is that of its forks
    assert_same(parent, first)


def test_fork_of_a_state_before_its_first_segment(make_encoder: Callable) -> None:
    parent = TrainState(make_encoder())
    parent.counters.seed = 5
    twin = parent.fork()
    assert twin.counters.seed == 5 and twin.model is not parent.model and twin.strategy is None


def test_restore_leaves_the_snapshot_usable(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable
) -> None:
    rows, state = make_rows(), begun(make_encoder(), make_strategy(dropout=0.1))
    run(state, rows, 4)
    snapshot = state.snapshot()
    futures = []
    for _ in range(2):
        state.restore(snapshot)
        futures.append(run(state, rows, 5))
    assert futures[0] == futures[1]


# ---------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("unit", list(BUDGETS))
@pytest.mark.parametrize("trains", ["all", "top"])
def test_stopped_anywhere_saved_and_loaded_is_the_straight_run(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, tmp_path: Path, unit: str, trains: str
) -> None:
    strategy = make_strategy(dropout=0.1, trains=trains, layers=1)
    rows, budget = make_rows(), BUDGETS[unit]
    straight = begun(make_encoder(), strategy, budget)
    whole = run(straight, rows)
    assert len(whole) > 10 and straight.segment.progress() == 1.0 and straight.counters.tail_count > 0
    for stop in (0, 1, 6, len(whole) - 2, len(whole)):
        state = begun(make_encoder(), strategy, budget)
        measures = run(state, rows, stop)
        state.save(tmp_path / f"state{stop}")
        again = begun(make_encoder(), strategy, budget, seed=77)  # all that counts comes from the folder
        again.load(tmp_path / f"state{stop}")
        torch.rand(11)
        measures += run(again, rows)
        assert measures == whole, f"stopped after {stop}"
        assert_same(again, straight)


def test_the_averages_are_not_the_weights(make_encoder: Callable, make_rows: Callable, make_strategy: Callable) -> None:
    rows, state = make_rows(), begun(make_encoder(), make_strategy())
    run(state, rows)
    i = [name for name, _ in state.trained].index("head.weight")
    raw, ema, tail = state.trained[i][1].detach(), state.ema[i], state.tail[i]
    assert not torch.equal(raw, ema) and 0 < float((raw - tail).abs().max()) < 0.05


def test_a_restored_optimizer_lives_where_its_parameters_do(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, tmp_path: Path
) -> None:
    state = begun(make_encoder(), make_strategy())
    run(state, make_rows(), 2)
    state.save(tmp_path / "s")
    state.load(tmp_path / "s")
    assert state.optimizer is not None
    for _, parameter in state.trained:
        assert {v.device for v in state.optimizer.state[parameter].values()} == {parameter.device}


# ---------------------------------------------------------------------------------------------- accumulate


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_small_batches_add_up_to_the_big_one(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, micro: int
) -> None:
    rows = make_rows(40)
    whole = begun(make_encoder(), make_strategy())
    parts = begun(make_encoder(), make_strategy(micro_batch=micro))
    one, two = run(whole, rows, 6), run(parts, rows, 6)
    for a, b in zip(one, two, strict=True):
        assert a.tokens == b.tokens and a.examples == b.examples and a.lr == b.lr
        assert a.loss_nats == pytest.approx(b.loss_nats, abs=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, abs=1e-4)


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_gradients_of_small_batches_add_up(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, micro: int
) -> None:
    from multistep.train import Batch

    rows = make_rows(40)
    gradients = []
    for strategy in (make_strategy(), make_strategy(micro_batch=micro)):
        state = begun(make_encoder(), strategy)
        Batch(state, rows, np.arange(8), bf16=False, cuda=False)()
        gradients.append([p.grad for _, p in state.trained])
    for a, b in zip(*gradients, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            assert float((a - b).norm()) <= 1e-6 * float(a.norm()) + 1e-6


# ---------------------------------------------------------------------------------------------- cover


@pytest.mark.parametrize("trains, layers", [("all", 3), ("top", 0), ("top", 1), ("top", 2), ("top", 3), ("top", 4)])
def test_every_trained_parameter_is_in_one_group_and_no_other_changes(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, trains: str, layers: int
) -> None:
    model = make_encoder(layers=3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = begun(model, make_strategy(trains=trains, layers=layers))
    assert state.optimizer is not None
    grouped = [id(p) for group in state.optimizer.param_groups for p in group["params"]]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sorted(grouped) == sorted(id(p) for p in trained.values()) and len(set(grouped)) == len(grouped)
    run(state, make_rows(), 3)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= trained.keys()
    if trains == "all":
        wanted = set(before)
    else:
        last = tuple(f"backbone.encoder.layer.{i}." for i in range(max(0, 3 - layers), 3))
        wanted = {n for n in before if n.startswith((*last, "head."))}
    assert trained.keys() == wanted
    # Softmax does not see the bias of the keys, position and type embeddings may not be reached: all others move.
    still = {n for n in wanted - changed if not n.endswith("key.bias") and "embeddings" not in n}
    assert not still


def test_only_matrices_that_are_no_embeddings_decay(make_encoder: Callable, make_strategy: Callable) -> None:
    state = begun(make_encoder(), make_strategy(weight_decay=0.3))
    assert state.optimizer is not None
    decay = {id(p): g["weight_decay"] for g in state.optimizer.param_groups for p in g["params"]}
    for name, parameter in state.trained:
        assert decay[id(parameter)] == (0.3 if decays(name, parameter.ndim) else 0.0), name
    assert not decays("backbone.embeddings.word_embeddings.weight", 2) and not decays("head.bias", 1)


# ---------------------------------------------------------------------------------------------- live fields


def moments(state: TrainState) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.snapshot()["tensors"].items() if k.startswith("optimizer.")}


@pytest.mark.parametrize(
    "change", [{"lr": 5e-4}, {"weight_decay": 0.5}, {"weight_decay": 0.0}, {"dropout": 0.3}, {"clip": 0.5}]
)
def test_a_live_change_keeps_the_optimizer(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, change: dict[str, float]
) -> None:
    rows, state = make_rows(), begun(make_encoder(), make_strategy())
    run(state, rows)
    kept, position = moments(state), state.counters.position
    state.begin(make_strategy(**change), BUDGETS["updates"])
    assert state.segment.updates == 0 and state.counters.position == position and state.counters.tail_count == 0
    now = moments(state)
    assert kept.keys() == now.keys() and all(torch.equal(v, now[k]) for k, v in kept.items()) and kept
    assert len(run(state, rows)) == UPDATES and state.counters.update == 2 * UPDATES


def test_weight_decay_goes_live_from_zero_and_back(make_encoder: Callable, make_strategy: Callable) -> None:
    state = begun(make_encoder(), make_strategy(weight_decay=0.0))
    assert state.optimizer is not None
    for weight_decay in (0.2, 0.0, 0.1):
        state.adjust(make_strategy(weight_decay=weight_decay))
        found = {g["decays"]: g["weight_decay"] for g in state.optimizer.param_groups}
        assert found == {True: weight_decay, False: 0.0}


def test_adjust_keeps_the_segment_and_acts_inside_the_loop(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable
) -> None:
    state = begun(make_encoder(), make_strategy())
    rows, rates = make_rows(), []
    for measure in train(state, rows):
        rates.append(measure.lr)
        if measure.update == 7:
            segment = state.segment
            state.adjust(make_strategy(lr=1e-6, dropout=0.4))
            assert state.segment is segment
        if measure.update == 8:
            assert {m.p for m in state.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.4}
    assert len(rates) == UPDATES and min(rates[1:7]) > 1e-4 and max(rates[7:]) <= 1e-6


@pytest.mark.parametrize(
    "change, keeps",
    [({"batch_size": 4}, True), ({"max_length": 64}, True), ({"reshuffle": 1}, True), ({"objective": CrossEntropy(focal_gamma=2.0)}, True),
     ({"trains": "top", "layers": 1}, False), ({"layer_decay": 0.9}, False), ({"optimizer": SGD(lr=0.1)}, False)],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)  # fmt: skip
def test_a_structural_change_goes_on_in_the_data_with_the_moments_that_fit(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, change: dict[str, Any], keeps: bool
) -> None:
    state, rows = begun(make_encoder(), make_strategy(), seed=11), make_rows()
    run(state, rows, 5)
    weights = {n: p.detach().clone() for n, p in state.model.named_parameters()}
    kept, counters = moments(state), asdict(state.counters)
    state.begin(make_strategy().with_(**{k: v.model_dump() if k in ("optimizer", "objective") else v for k, v in change.items()}),
                BUDGETS["updates"])  # fmt: skip
    now = moments(state)
    assert kept and (not now if not keeps else all(torch.equal(v, now[k]) for k, v in kept.items()))
    assert state.detector == Detector() and state.norms == state.steps == Norms()
    position = 10 if "batch_size" in change else 5  # 40 examples were seen
    assert asdict(state.counters) == {**counters, "position": position, "lr_scale": 1.0}
    assert all(torch.equal(p, weights[n]) for n, p in state.model.named_parameters())
    assert all(torch.equal(a, p) for a, (_, p) in zip(state.ema, state.trained, strict=True))
    with pytest.raises(AssertionError, match="live"):
        state.adjust(make_strategy(trains="top", layers=2))
    assert len(run(state, rows)) == UPDATES


def test_what_a_strategy_froze_or_dropped_is_the_models_own_again(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable
) -> None:
    model = make_encoder()
    own = {m: m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    first = TrainModule(freeze=("backbone.embeddings",), dropout=0.3, batch_size=8)
    state = begun(model, first)
    run(state, make_rows(), 2)
    assert {m.p for m in own} == {0.3} and len(state.trained) < len(names)
    state.begin(first.with_(freeze=(), dropout=None), BUDGETS["updates"])
    run(state, make_rows(), 2)
    assert all(m.p == p for m, p in own.items()) and [n for n, _ in state.trained] == names


def test_encoding_between_updates_changes_nothing(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable
) -> None:
    rows = make_rows()
    straight, watched = (begun(make_encoder(), make_strategy(dropout=0.2)) for _ in range(2))
    seen = []
    for measure in train(watched, rows):
        seen.append(measure)
        encode(watched.model, rows)  # leaves the model in evaluation mode
        torch.rand(3)
    assert seen == run(straight, rows)
    assert_same(straight, watched)


# ---------------------------------------------------------------------------------------------- segments


def test_progress_is_counted_in_the_budgets_unit() -> None:
    segment = Segment(total=Budget(amount=10, unit="tokens"), updates=9, wall_s=9.0, tokens=5)
    assert segment.progress() == 0.5
    segment.tokens = 25
    assert segment.progress() == 1.0
