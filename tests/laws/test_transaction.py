"""Laws of the transaction: what was tried and taken back leaves no bit behind; what is kept is a run that began with the change.

In memory for every kind of change, with averages, dropout, running statistics and random numbers; and at the level of trials, where
states on disk never change: a trial from a state is the same whatever else was tried from it before.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from test_modules import blobs
from test_state import assert_same, begun, moments
from torch import nn

from multistep import optimizers
from multistep.budget import Budget, Clock, parse_budget
from multistep.loader import rows_of
from multistep.state import TrainState, read_folder
from multistep.strategy import FineTune, TrainModule, Trial
from multistep.train import train
from multistep.transaction import Transaction
from multistep.tune.training import run_training
from multistep.types import UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")
WHOLE, TRIED = Budget(amount=30, unit="updates"), Budget(amount=11, unit="updates")
BASE: dict[str, Any] = {
    "optimizer": {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.01},
    "batch_size": 8,
    "dropout": 0.2,
}
CHANGES: dict[str, dict[str, Any]] = {
    "lr up": {"optimizer": {"kind": "adamw", "lr": 5e-2, "weight_decay": 0.01}},
    "lr down": {"optimizer": {"kind": "adamw", "lr": 1e-4, "weight_decay": 0.01}},
    "weight decay": {"optimizer": {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.5}},
    "dropout": {"dropout": 0.5},
    "dropout of the model": {"dropout": None},
    "label smoothing": {"objective": {"kind": "cross_entropy", "label_smoothing": 0.1}},
    "clip": {"clip": 0.05},
    "batch size": {"batch_size": 12},
    "frozen layers": {"freeze": ("0", "1")},
    "optimizer": {"optimizer": {"kind": "nesterov", "lr": 0.05}},
    "averaging optimizer": {"optimizer": {"kind": "schedule_free", "lr": 1e-2}},
    "solver": {"optimizer": {"kind": "lbfgs"}, "schedule": {"kind": "constant", "warmup": 0.0}},
    "objective": {"objective": {"kind": "cross_entropy", "focal_gamma": 2.0}},
    "data order": {"reshuffle": 1},
    "cool-down": {"schedule": {"kind": "linear", "warmup": 0.0}},
    "rates by layer": {"layer_decay": 0.5},
}
LIVE = ("lr up", "lr down", "weight decay", "dropout", "dropout of the model", "label smoothing", "clip", "cool-down")
KEPT = (*LIVE, "batch size", "objective", "data order")  # the moments go on


def network() -> nn.Module:
    """Running statistics and dropout of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def strategy(name: str = "") -> TrainModule:
    return TrainModule.parse({**BASE, "schedule": {"kind": "constant"}, **(CHANGES[name] if name else {})})


def trained(updates: int, freeze: tuple[str, ...] = ()) -> TrainState:
    state = begun(network(), strategy().with_(freeze=freeze), WHOLE)
    go(state, updates)
    return state


def go(state: TrainState, updates: int | None = None) -> list[Any]:
    return list(islice(train(state, ROWS), updates))


ROWS: Any = rows_of(blobs(50, 0), "train", "cpu")


def test_the_changes_are_of_every_kind_and_what_keeps_moments_does() -> None:
    assert {n for n in CHANGES if strategy(n).same_but_live(strategy())} == set(LIVE)
    assert {n for n in CHANGES if strategy(n).keeps_moments(strategy())} == set(KEPT)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_taken_back_leaves_no_bit(change: str) -> None:
    straight, tried = trained(7), trained(7)
    whole = go(straight)
    optimizer, flags = tried.optimizer, [p.requires_grad for p in tried.model.parameters()]
    transaction = Transaction(tried)
    transaction.attempt(strategy(change), TRIED)
    assert len(go(tried, 9)) == 9 and not torch.equal(tried.model[4].weight, trained(7).model[4].weight)
    transaction.restore()
    assert not transaction.is_open
    assert tried.optimizer is optimizer and [p.requires_grad for p in tried.model.parameters()] == flags
    assert_same(tried, trained(7))
    torch.rand(5)
    assert go(tried) == whole
    assert_same(tried, straight)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_kept_is_a_run_that_began_with_it(change: str) -> None:
    tried, other = trained(7), trained(7).fork()
    transaction = Transaction(tried)
    transaction.attempt(strategy("lr up"), TRIED)
    go(tried, 3)
    transaction.restore()
    transaction.attempt(strategy(change), TRIED)
    one = go(tried, 5)
    transaction.commit()
    one += go(tried)
    other.begin(strategy(change), TRIED)
    assert one == go(other) and len(one) == 11
    assert_same(tried, other)


@pytest.mark.parametrize("change", CHANGES)
def test_moments_and_place_in_the_data_go_on(change: str) -> None:
    state = trained(9)
    before, examples = moments(state), state.counters.examples
    Transaction(state).attempt(strategy(change), TRIED)
    now = moments(state)
    assert before
    if change in KEPT:
        assert all(torch.equal(v, now[k]) for k, v in before.items())
    else:  # new ones, at zero where there are any
        assert not any(v.any() for v in now.values())
    assert state.counters.examples == examples
    assert state.counters.position == (round(examples / 12) if change == "batch size" else 9)


@pytest.mark.parametrize("change", LIVE)
def test_inside_of_a_segment(change: str) -> None:
    straight, tried = trained(7), trained(7)
    whole = go(straight)
    transaction = Transaction(tried)
    transaction.attempt(strategy(change))
    assert tried.segment.updates == 7 and tried.strategy == strategy(change)
    go(tried, 6)
    assert tried.segment.updates == 13
    transaction.restore()
    assert go(tried) == whole
    assert_same(tried, straight)


def test_layers_that_were_frozen_are_tried_and_stand_still_again() -> None:
    frozen = ("0", "1")
    straight, tried = trained(7, frozen), trained(7, frozen)
    go(straight)
    first = tried.model[0].weight.detach().clone()
    transaction = Transaction(tried)
    transaction.attempt(strategy(), TRIED)
    go(tried)
    assert not torch.equal(tried.model[0].weight, first)
    transaction.restore()
    assert torch.equal(tried.model[0].weight, first) and not tried.model[0].weight.requires_grad
    go(tried)
    assert_same(tried, straight)


def test_a_change_that_cannot_begin_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained(7)
    transaction = Transaction(state)
    with pytest.raises(UserError, match="only live fields"):
        transaction.attempt(strategy("batch size"))

    def broken(*_: Any) -> None:
        raise RuntimeError("no such optimizer here")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no such"):
        patch.setattr(optimizers.Nesterov, "build", broken)
        transaction.attempt(strategy("optimizer"), TRIED)
    assert not transaction.is_open
    assert_same(state, trained(7))


def test_memory_that_ends_while_an_attempt_begins_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its last copies: of the layers that were frozen."""
    frozen = ("0", "1")
    state = trained(7, frozen)
    transaction, begin, clone = Transaction(state), TrainState.begin, torch.Tensor.clone

    def short(tensor: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        monkeypatch.setattr(torch.Tensor, "clone", clone)  # once
        raise MemoryError

    def begins(self: TrainState, *given: Any) -> None:
        begin(self, *given)
        monkeypatch.setattr(torch.Tensor, "clone", short)

    monkeypatch.setattr(TrainState, "begin", begins)
    with pytest.raises(MemoryError):
        transaction.attempt(strategy(), TRIED)
    monkeypatch.setattr(TrainState, "begin", begin)
    assert torch.Tensor.clone is clone and not transaction.is_open
    assert_same(state, trained(7, frozen))
    assert not state.model[0].weight.requires_grad
    transaction.attempt(strategy(), TRIED)


def test_out_of_turn_is_one_line() -> None:
    with pytest.raises(UserError, match="has not begun"):
        Transaction(TrainState(network())).attempt(strategy(), TRIED)
    transaction = Transaction(trained(2))
    for wrong in (transaction.commit, transaction.restore):
        with pytest.raises(UserError, match="nothing was tried"):
            wrong()
    transaction.attempt(strategy("clip"), TRIED)
    with pytest.raises(UserError, match="is open"):
        transaction.attempt(strategy("clip"), TRIED)


# ---------------------------------------------------------------------------------------------- trials


def trial(states: Path, name: str, action: TrainModule, start: str | None, updates: float = 12) -> dict[str, Any]:
    """Run one trial of a module as a bench does; its facts."""
    state = TrainState(network())
    if start is not None:
        values = read_folder(states / start)[1]
        kept = {k.partition(".")[2]: v for k, v in values.items() if k.startswith(("model.", "buffer."))}
        state.model.load_state_dict(kept, strict=False)
    state.counters.seed = 3
    asked = Trial(id=name, stage="trunk", action=action, start=start, share=updates)
    clock = Clock(parse_budget("1000 updates"))
    running = run_training(asked, action, state, ROWS, None, states, clock, lambda: 0, {"family": "module"})
    try:
        while True:
            next(running)
    except StopIteration as end:
        return end.value[0]


def bits(states: Path, name: str) -> dict[str, torch.Tensor]:
    return read_folder(states / name)[1]


@pytest.mark.parametrize("change", CHANGES)
def test_a_trial_is_the_same_whatever_was_tried_before(tmp_path: Path, change: str) -> None:
    for folder in ("plain", "probed"):
        trial(tmp_path / folder, "01", strategy(), None)
    trial(tmp_path / "probed", "02", strategy(change), "01", 7)
    for folder in ("plain", "probed"):
        trial(tmp_path / folder, "03", strategy("lr down"), "01")
    one, two = (bits(tmp_path / folder, "03") for folder in ("plain", "probed"))
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.mark.parametrize("change", CHANGES)
def test_a_trial_is_the_transaction_in_memory(tmp_path: Path, change: str) -> None:
    trial(tmp_path, "01", strategy(), None)
    trial(tmp_path, "02", strategy(change), "01")
    state = begun(network(), strategy(), Budget(amount=12, unit="updates"))
    go(state)
    state.settle(training=False)
    transaction = Transaction(state)
    transaction.attempt(strategy(change), Budget(amount=12, unit="updates"))
    go(state)
    transaction.commit()
    state.settle(training=False)
    one, two = state.snapshot()["tensors"], bits(tmp_path, "02")
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    runs.write_rows(root / "rows.csv")
    runs.tiny_encoder(root / "encoder")
    return root


def bench_of(texts: Path, out: Path) -> Any:
    from multistep.labels import data_of, task_for
    from multistep.tune.actions import Bench
    from multistep.tune.workbench import Workbench

    config = runs.config(texts / "rows.csv", out, texts / "encoder")
    dataset = data_of(config)
    work = Workbench(config, dataset, task_for(dataset), out)
    (out / "states").mkdir(parents=True)
    work.find_encoder()
    return Bench(work, Clock(parse_budget("1000 updates")), lambda: 0, "accuracy")


def tuned(bench: Any, name: str, action: FineTune, start: str | None, updates: float = 12) -> Any:
    from multistep.tune.fine_tune import run_fine_tune

    running = run_fine_tune(bench, Trial(id=name, stage="trunk", action=action, start=start, share=updates), action)
    try:
        while True:
            next(running)
    except StopIteration as end:
        return end.value


def changes_of_texts(make: Callable[..., FineTune]) -> dict[str, FineTune]:
    return {
        "lr": make(lr=1e-2), "batch size": make(batch_size=12), "all": make(trains="all"), "one layer": make(trains="top", layers=1),
        "optimizer": make().with_(optimizer={"kind": "sgd", "lr": 0.05}), "data order": make(reshuffle=2), "dropout": make(dropout=0.3),
    }  # fmt: skip


def test_texts_too_are_the_same_whatever_was_tried_before(
    texts: Path, tmp_path: Path, make_strategy: Callable[..., FineTune]
) -> None:
    base = make_strategy(trains="top", layers=2, dropout=0.1)
    plain, probed = (bench_of(texts, tmp_path / name) for name in ("plain", "probed"))
    for bench in (plain, probed):
        tuned(bench, "01", base, None)
    for n, action in enumerate(changes_of_texts(make_strategy).values()):
        tuned(probed, f"02-{n}", action, "01", 5)
    outcomes = [tuned(bench, "03", base.with_(dropout=0.2), "01") for bench in (plain, probed)]
    one, two = (bits(tmp_path / name / "states", "03") for name in ("plain", "probed"))
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
    assert outcomes[0].metrics == outcomes[1].metrics
    meta = read_folder(tmp_path / "plain" / "states" / "03")[0]
    assert meta["counters"]["update"] == 24  # moments and place in the data went on from the end of 01
