"""Behaviour of `optimize`: any module, tensors or loaders; journal, decisions, resume; a bare loop to the last bit; bad input."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

import multistep
from multistep import journal
from multistep.loader import rows_of
from multistep.types import Interrupted, UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")
Data = tuple[Tensor, Tensor]


def blobs(n: int, seed: int, noise: float = 2.0, features: int = 8, classes: int = 3) -> Data:
    """Points around `classes` centres, and which."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    y = torch.randint(0, classes, (n,), generator=generator)
    return centres[y] + noise * torch.randn(n, features, generator=generator), y


def network(outputs: int = 3, hidden: int = 16, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))


def run(module: nn.Module | None = None, **more: Any) -> Any:
    given: dict[str, Any] = {
        "objective": "cross_entropy", "train": blobs(300, 0), "validation": blobs(200, 1), "metric": "accuracy",
        "budget": "200 updates", "controller": "fixed",
    }  # fmt: skip
    return multistep.optimize(module or network(), **{**given, **more})


def test_its_journal_replays_and_is_a_page(tmp_path: Path) -> None:
    result = run(controller="staged", budget="600 updates")
    (replayed,) = result.replay()
    assert replayed.ok and replayed.derived["decisions"] >= 2
    assert "</html>" in result.explain_page(tmp_path / "run.html").read_text(encoding="utf-8")


def test_few_examples_decide_only_for_large_gains() -> None:
    """The same training is worth its gain on 200 examples, and too little of one on 10."""
    few = run(metric="loss", validation=blobs(10, 1), budget="12 updates", optimizer={"kind": "adamw", "lr": 1e-3})
    (verdict,) = [r["outcome"]["verdict"] for r in few.records() if r["kind"] == "Told" and r["stage"] == "trunk"]
    assert verdict["by"]["least"] > 0 and "on 10 rows" in verdict["rule"]


def test_trains_and_says_what_it_did() -> None:
    module = network()
    result = run(module, test=blobs(100, 2))
    assert result.model is module and not module.training
    x, y = blobs(200, 1)
    with torch.no_grad():
        right = float((module(x).argmax(1) == y).float().mean())
    assert result.best.value == pytest.approx(right) and right > 0.7 and result.best.stderr > 0
    assert result.test is not None and result.test["accuracy"].value > 0.7
    kinds = [r["kind"] for r in result.records()]
    assert kinds[0] == "Started" and kinds[-1] == "Finished" and kinds.count("TestRead") == 1
    page = result.explain()
    assert "as_given" in page and "train_module" in page and "accuracy" in page
    assert (result.out / "model" / "model.safetensors").exists()


def test_a_bare_loop_to_the_last_bit() -> None:
    x, y = blobs(256, 0)
    loader = DataLoader(TensorDataset(x, y), batch_size=32)  # in its own order
    ours = run(
        train=loader, validation=(x, y), budget="40 updates", clip=0.0, schedule={"kind": "constant", "warmup": 0.0},
        optimizer={"kind": "adamw", "lr": 0.01},
    )  # fmt: skip
    model = network().train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), fused=True)
    for _ in range(5):
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(ours.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["sgd", "adam", "lion", "muon", "schedule_free", "lbfgs", "newton_cg"])
def test_any_optimizer_learns(kind: str) -> None:
    batch = 300 if kind in ("lbfgs", "newton_cg") else 32
    updates = 8 if batch == 300 else 400
    result = run(optimizer=kind, batch_size=batch, budget=f"{updates} updates")
    assert result.best.value > 0.7, kind


def test_staged_races_from_the_same_start_and_journals_why() -> None:
    result = run(controller="staged", budget="2500 updates")
    asked = [r["trial"] for r in result.records() if r["kind"] == "Asked"]
    probes = [t for t in asked if t["stage"] == "race"]
    assert len(probes) >= 2 and all(t["start"] is None and not t["commit"] for t in probes)
    rates = [t["action"]["optimizer"]["lr"] for t in probes]
    assert rates[1] == pytest.approx(3 * rates[0])
    assert any("calibrated default" in json.dumps(r) for r in result.records() if r["kind"] == "Noted")


def test_overfitting_is_named_and_the_best_state_comes_back() -> None:
    x, y = blobs(60, 0, noise=3.0)
    y = torch.where(torch.rand(60, generator=torch.Generator().manual_seed(3)) < 0.3, (y + 1) % 3, y)
    result = run(
        network(hidden=256), train=(x, y), validation=blobs(400, 1, noise=3.0), metric="loss", controller="staged",
        optimizer={"kind": "adamw", "lr": 0.01}, budget="1200 updates",
    )  # fmt: skip
    said = [r for r in result.records() if r["kind"] == "Diagnosed" and r.get("at") != "end"]
    assert [s["name"] for s in said] == ["overfitting"]
    numbers = said[0]["numbers"]
    assert numbers["now"]["validation_loss"] > numbers["best"]["validation_loss"]
    assert numbers["now"]["train_loss"] < numbers["best"]["train_loss"]
    stages = [r["trial"]["stage"] for r in result.records() if r["kind"] == "Asked"]
    assert "cool-down" in stages and "overfitting" in result.explain()
    assert result.best.value < numbers["now"]["validation_loss"]


def test_distillation_from_batches_as_they_are() -> None:
    """Targets of two parts: classes and a teacher's logits; as tensors, and as a Dataset that gives (x, (y, logits))."""
    x, y = blobs(300, 0)
    teacher = 4.0 * nn.functional.one_hot(y, 3).float() + torch.randn(
        300, 3, generator=torch.Generator().manual_seed(1)
    )
    pairs: Any = [(x[i], (y[i], teacher[i])) for i in range(300)]

    class Pairs(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(pairs)

        def __getitem__(self, row: int) -> Any:
            return pairs[row]

    found = [
        run(objective="distill", train=train, validation=validation, budget="60 updates")
        for train, validation in (
            ((x, (y, teacher)), blobs(200, 1)),
            (Pairs(), blobs(200, 1)),
            ((x, (y, teacher)), None),
        )
    ]
    assert found[0].best.value > 0.7 and "accuracy" in found[0].validation
    for mine, theirs in zip(found[0].model.parameters(), found[1].model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert found[2].validation["accuracy"].value > 0.6  # a tenth held out, with its teacher


def test_a_useless_training_rolls_back_to_what_was_given() -> None:
    good = run(budget="300 updates").model
    before = copy.deepcopy(good.state_dict())
    result = run(good, optimizer={"kind": "sgd", "lr": 300.0}, schedule="constant", budget="40 updates", clip=0.0)
    assert all(torch.equal(v, before[k]) for k, v in result.model.state_dict().items())
    assert "RolledBack" in [r["kind"] for r in result.records()]


def test_buffers_travel_with_their_state() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    result = run(module, budget="300 updates")
    assert float(module[1].running_mean.abs().sum()) > 0 and result.best.value > 0.7


@pytest.mark.parametrize(
    "objective, targets, outputs, metric",
    [
        ("binary_cross_entropy", lambda y: (y == 0).float(), 1, "accuracy"),
        ("mse", lambda y: y.float(), 1, "r2"),
        ("huber", lambda y: y.float(), 1, "loss"),
        ({"kind": "cross_entropy", "focal_gamma": 2.0}, lambda y: y, 3, "f1_macro"),
        ({"kind": "r_drop", "inner": {"kind": "cross_entropy"}}, lambda y: y, 3, "accuracy"),
    ],
)
def test_objectives_and_their_metrics(objective: Any, targets: Callable, outputs: int, metric: str) -> None:
    (x, y), (u, v) = blobs(300, 0), blobs(200, 1)
    result = run(
        network(outputs, dropout=0.1), objective=objective, train=(x, targets(y)), validation=(u, targets(v)), metric=metric,
        budget="300 updates",
    )  # fmt: skip
    given = next(r for r in result.records() if r["kind"] == "Told" and r["stage"] == "incumbent")
    before = given["outcome"]["metrics"][metric][0]
    assert result.best.value < before if metric == "loss" else result.best.value > before + 0.1


def test_one_linear_layer_is_solved_by_newton() -> None:
    torch.manual_seed(0)
    result = run(nn.Linear(8, 3), budget="12 updates", optimizer="auto", metric="loss")
    trials = [r["trial"] for r in result.records() if r["kind"] == "Asked" and r["trial"]["stage"] == "trunk"]
    assert trials[0]["action"]["optimizer"]["kind"] == "newton_cg" and trials[0]["action"]["batch_size"] == 300


# ---------------------------------------------------------------------------------------------- resume


class _Stops:
    """Raises SIGINT at the n-th time a row is loaded."""

    def __init__(self, data: Data, at: int):
        self.inner, self.at, self.count = TensorDataset(*data), at, 0

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, row: int) -> Any:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.inner[row]


class _Rows(torch.utils.data.Dataset):
    def __init__(self, stops: _Stops):
        self.stops = stops

    def __len__(self) -> int:
        return len(self.stops)

    def __getitem__(self, row: int) -> Any:
        return self.stops[row]


@pytest.mark.parametrize("at", [40, 2000, 9000])
def test_stopped_and_gone_on_is_the_straight_run(tmp_path: Path, at: int) -> None:
    def go(out: Path, stop: int) -> Any:
        return run(
            network(dropout=0.2), train=_Rows(_Stops(blobs(200, 0), stop)), controller="staged", budget="400 updates", out=out,
            optimizer={"kind": "adamw", "lr": 0.003},
        )  # fmt: skip

    straight = go(tmp_path / "straight", 10**9)
    with pytest.raises(Interrupted):
        go(tmp_path / "stopped", at)
    again = go(tmp_path / "stopped", 10**9)
    for mine, theirs in zip(again.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert again.validation == straight.validation
    kinds = [r["kind"] for r in again.records()]
    assert "Interrupted" in kinds and "Resumed" in kinds and kinds[-1] == "Finished"


def test_a_finished_run_comes_back_as_it_was(tmp_path: Path) -> None:
    first = run(out=tmp_path / "r")
    records = len(journal.read(tmp_path / "r" / "journal.jsonl"))
    again = run(out=tmp_path / "r")
    assert again.validation == first.validation and len(again.records()) == records


def test_a_batch_that_is_not_finite_is_left_out() -> None:
    x, y = blobs(300, 0)
    x[7] = float("nan")
    result = run(train=(x, y), budget="60 updates")
    events = [r for r in result.records() if r["kind"] == "Event"]
    assert events and events[0]["event"] == "nonfinite" and 7 in events[0]["rows"]
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


# ---------------------------------------------------------------------------------------------- data


def test_a_loaders_sampler_is_kept_and_repeats() -> None:
    x, y = blobs(64, 0)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    rows = rows_of(loader, "train", "cpu")
    one, two = rows.order(16, 5), rows.order(16, 5)
    far = [two.at(n) for n in (9, 3, 6)]
    assert [a.tolist() for a in far] == [one.at(n).tolist() for n in (9, 3, 6)]
    epoch = np.concatenate([one.at(n) for n in range(4)])
    assert sorted(epoch) == list(range(64)) and epoch.tolist() != list(range(64))
    assert epoch.tolist() != np.concatenate([one.at(n) for n in range(4, 8)]).tolist()


class _Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield torch.zeros(8), 0


class _Named(nn.Module):
    """Keyword inputs and a dictionary with logits, as transformers models have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(features)}


def test_dictionaries_and_custom_splits() -> None:
    rows = [{"features": a, "labels": b} for a, b in zip(*blobs(200, 0), strict=True)]
    loader = DataLoader(rows, batch_size=20, shuffle=True)  # pyright: ignore[reportArgumentType]
    assert run(_Named(), train=loader, validation=loader, budget="150 updates").best.value > 0.7
    triples = DataLoader(TensorDataset(*blobs(200, 0)), batch_size=20)
    found = run(train=triples, validation=triples, split=lambda batch: (batch[0], batch[1]), budget="150 updates")
    assert found.best.value > 0.7


def _drawn() -> DataLoader:
    """A loader that has no batch size: its batch sampler says what a batch is."""
    data = TensorDataset(*blobs(300, 0))
    return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 20, drop_last=False))


def test_batches_that_a_loader_draws_are_not_solved_as_one() -> None:
    result = run(nn.Linear(8, 3), train=_drawn(), budget="30 updates")
    rule = next(r["facts"]["rule"] for r in result.records() if r["kind"] == "Noted" and r["what"] == "optimizer")
    assert rule.startswith("auto: adamw")


def test_auto_keeps_from_solvers_what_they_have_no_use_for() -> None:
    x, y = blobs(300, 0)
    data = (x, y.float())
    small = run(
        network(outputs=1),
        objective="mse",
        train=data,
        validation=data,
        metric="loss",
        layer_decay=0.9,
        budget="20 updates",
    )
    rules = [r["facts"]["rule"] for r in small.records() if r["kind"] == "Noted" and r["what"] == "optimizer"]
    assert rules and rules[0].startswith("auto: adamw")
    chance = run(nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3)), budget="20 updates")
    assert "auto: adamw" in chance.explain()


def test_a_look_an_epoch_also_when_batches_grow() -> None:
    result = run(looks="epoch", batch_growth=(0.5,), budget="100 updates", batch_size=30)
    looked = [r["facts"]["epoch"] for r in result.records() if r["kind"] == "Noted" and r["what"] == "looked"]
    assert looked == list(range(1, 16))  # 50 batches of 30, then 50 twice as large, ten batches of 30 an epoch


@pytest.mark.parametrize(
    "more, words",
    [
        ({"objective": "cross_entropi"}, ("objective", "cross_entropy")),
        ({"objective": {"kind": "huber", "delt": 1}}, ("delt", "delta")),
        ({"optimizer": "adamv"}, ("optimizer", "adam")),
        ({"optimizer": {"kind": "adamw", "beta3": 1}}, ("beta3", "beta")),
        ({"schedule": "cosin"}, ("schedule", "cosine")),
        ({"metric": "f2"}, ("metric", "f2")),
        ({"metric": "mse"}, ("metric", "mse")),
        ({"budget": "5 parsecs"}, ("budget", "parsecs")),
        ({"controller": "magic"}, ("controller", "magic")),
        ({"regime": "scratchy"}, ("regime", "scratch")),
        ({"batch_size": 0}, ("batch_size",)),
        ({"train": [1, 2, 3]}, ("train",)),
        ({"train": 5}, ("train", "int")),
        ({"train": (torch.zeros(3, 8), torch.zeros(2))}, ("train", "rows")),
        ({"train": (torch.zeros(0, 8), torch.zeros(0))}, ("train", "no rows")),
        ({"train": DataLoader(_Stream())}, ("train", "stream")),
        ({"train": (torch.zeros(30, 5), torch.zeros(30).long())}, ("module", "cannot read")),
        ({"validation": None, "train": blobs(10, 0)}, ("train", "too few")),
        ({"validation": None, "train": _drawn()}, ("validation", "DataLoader")),
        ({"split": lambda batch: (batch["x"], batch["y"])}, ("module", "cannot read")),
    ],
)
def test_bad_input_is_named(more: dict[str, Any], words: tuple[str, ...]) -> None:
    if "validation" not in more and "train" in more and words == ("module", "cannot read"):
        more = {**more, "validation": more["train"]}
    with pytest.raises(UserError) as caught:
        run(**more)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_frozen_module_is_refused() -> None:
    module = network()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="requires a gradient"):
        run(module)


def test_another_run_in_the_folder_is_kept(tmp_path: Path) -> None:
    run(out=tmp_path / "r")
    with pytest.raises(UserError, match="another run"):
        run(out=tmp_path / "r", optimizer="sgd")
