"""What `optimize` judges on and goes on with: the rows that a loader picks, outputs of any shape, and a folder's own data and module."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_modules import blobs, network, run
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)
from torch.utils.data.distributed import DistributedSampler

from multistep.budget import Clock, parse_budget
from multistep.diagnosed import Known, _small_validation, diagnoses
from multistep.loader import ModuleRows, rows_of
from multistep.objectives import BinaryCrossEntropy, CrossEntropy
from multistep.report.progress import Progress
from multistep.session import show
from multistep.tune import diagnose
from multistep.tune.diagnose import advice_of_module
from multistep.tune.module import task_of
from multistep.types import Comparison, MetricValue, Outcome, UserError, Verdict

pytestmark = pytest.mark.usefixtures("torch_seeded")
X, Y = blobs(60, 0)
DATA = TensorDataset(X, Y)
PICKED = [3, 8, 9, 20, 41]


def judged(loader: DataLoader) -> ModuleRows:
    return rows_of(loader, "validation", "cpu").judged()


def rows_in(rows: ModuleRows) -> list[int]:
    found = torch.cat([rows.load(part)[0][0] for part in rows.parts(7)])
    return [int((row == X).all(1).nonzero()[0, 0]) for row in found]


def test_the_rows_that_a_loader_picks_are_judged() -> None:
    assert rows_in(judged(DataLoader(DATA, 2, sampler=SubsetRandomSampler(PICKED)))) == PICKED
    assert rows_in(judged(DataLoader(DATA, batch_sampler=BatchSampler(PICKED, 2, False)))) == PICKED
    assert rows_in(judged(DataLoader(DATA, 32, shuffle=True, drop_last=True))) == list(range(60))
    assert rows_in(judged(DataLoader(Subset(DATA, PICKED), 2, shuffle=True))) == PICKED
    drawn = RandomSampler(DATA, num_samples=12, generator=torch.Generator())
    assert len(judged(DataLoader(DATA, 4, sampler=drawn))) == 12
    some = list(range(30))
    rest = SubsetRandomSampler(range(30, 60))
    train = DataLoader(DATA, 10, sampler=SubsetRandomSampler(some))
    result = run(train=train, validation=DataLoader(DATA, 10, sampler=rest), budget="20 updates")
    data = next(r for r in result.records() if r["kind"] == "Data")
    assert data["report"]["rows"] == {"train": 30, "validation": 30}


class Endless(Sampler[int]):
    """Without a length, as torch allows it."""

    def __init__(self) -> None: ...

    def __iter__(self) -> Iterator[int]:
        return iter(PICKED)


def test_loaders_that_only_judge_may_be_odd() -> None:
    assert rows_in(judged(DataLoader(DATA, 64, drop_last=True))) == list(range(60))
    assert rows_in(judged(DataLoader(DATA, 2, sampler=Endless()))) == PICKED
    shared_out = DistributedSampler(DATA, num_replicas=2, rank=1)
    assert rows_in(judged(DataLoader(DATA, 4, sampler=shared_out))) == list(range(60))
    with pytest.raises(UserError, match="gives no row"):
        judged(DataLoader(DATA, 4, sampler=SubsetRandomSampler([])))
    with pytest.raises(UserError, match="has no length"):
        run(train=DataLoader(DATA, 2, sampler=Endless()))
    x = X.clone().requires_grad_()
    assert run(train=(x, Y), validation=(X, Y), budget="9 updates").records()[-1]["kind"] == "Finished"


def test_a_sampler_with_a_generator_of_its_own_repeats() -> None:
    def first() -> list[list[int]]:
        sampler = RandomSampler(DATA, generator=generator)
        order = rows_of(DataLoader(DATA, 16, sampler=sampler), "train", "cpu").order(16, 5)
        return [order.at(n).tolist() for n in range(6)]

    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    once = first()
    assert torch.equal(generator.get_state(), state)
    generator.manual_seed(4)
    assert first() == once


def test_a_loader_without_a_batch_is_named() -> None:
    with pytest.raises(UserError, match=r"train: this DataLoader gives no batch.*drop_last"):
        run(train=DataLoader(DATA, 64, drop_last=True))


def test_a_folder_goes_on_with_its_own_data_and_module_alone(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"out": tmp_path / "run", "budget": "20 updates"}
    first = run(**settings)
    assert run(**settings).best == first.best
    longer = nn.Sequential(network(), nn.Linear(3, 3))
    for other in ({"train": blobs(300, 7)}, {"validation": blobs(200, 8)}, {"module": longer}):
        with pytest.raises(UserError, match="other data or another module"):
            run(**{**settings, **other})


def test_tasks_of_dense_outputs_have_a_loss_alone() -> None:
    assert task_of(BinaryCrossEntropy(), torch.zeros(2, 1, 4, 4)) is None
    assert task_of(BinaryCrossEntropy(), torch.zeros(2, 5, 3)) is None
    several = task_of(BinaryCrossEntropy(), torch.zeros(2, 5))
    assert several is not None and several.kind == "multilabel"
    pixels = (torch.randn(40, 3, 4, 4), torch.randint(0, 2, (40, 1, 4, 4)).float())
    done = run(
        nn.Conv2d(3, 1, 1),
        objective="binary_cross_entropy",
        metric=None,
        train=pixels,
        validation=pixels,
        budget="9 updates",
    )
    assert done.metric == "loss" and math.isfinite(done.best.value)


def test_each_of_dense_classes_is_a_mean_without_what_is_ignored() -> None:
    logits, targets = torch.randn(3, 4, 2, 2), torch.randint(0, 4, (3, 2, 2))
    targets[1, 0], targets[2] = -100, -100
    found = CrossEntropy().each(logits, targets)
    one = torch.nn.functional.cross_entropy(logits[1:2], targets[1:2])
    assert found.shape == (3,) and found[1] == pytest.approx(one.item()) and found[2] == 0
    assert found[0] == pytest.approx(torch.nn.functional.cross_entropy(logits[:1], targets[:1]).item())


class Masked(nn.Module):
    """Rules the last of four classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).masked_fill(torch.tensor([False, False, False, True]), -math.inf)


def test_a_class_that_is_ruled_out_does_not_stop_a_training_from_being_taken() -> None:
    result = run(Masked())
    trunk = next(r for r in result.records() if r["kind"] == "Told" and r["stage"] == "trunk")
    assert trunk["outcome"]["verdict"]["accept"] and result.best.value > 0.7


def test_a_look_that_is_not_finite_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"epoch": 1, "train_loss": 0.5, "validation_loss": "nan"}
    with Progress() as progress:
        show(progress, {"kind": "Noted", "what": "looked", "facts": facts}, Clock(parse_budget("9 updates")), "loss")
    assert "validation loss nan" in capsys.readouterr().err
    x, y = blobs(200, 1)
    x[3] = math.nan
    assert run(validation=(x, y), looks="epoch", budget="30 updates").records()[-1]["kind"] == "Finished"


@pytest.mark.parametrize(("budget", "twice"), [("30 updates", "60 updates"), ("1s", "2s")])
def test_what_is_advised_can_be_asked_for(budget: str, twice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(past: Any, known: Any) -> Any:
        advised.append(known.advice.more_time)
        return diagnoses(past, known)

    advised: list[str] = []
    monkeypatch.setattr(diagnose, "diagnoses", seen)
    run(budget=budget)
    (asked,) = re.findall(r"budget='(.*)'", advised[0])
    assert parse_budget(asked) == parse_budget(twice)


def test_validation_is_as_large_as_the_loss_that_stands_asks_for() -> None:
    """A loss that fell to a ten thousandth: its error is that much smaller too."""
    compared = Comparison(metric="loss", candidate=1.0, incumbent=1.1, difference=0.1, stderr=0.05, p=0.02, n=200)
    outcome = Outcome(verdict=Verdict(accept=True, rule="", evidence=(compared,)))
    past: Any = [(SimpleNamespace(stage="trunk"), outcome)]

    def said(value: float) -> Any:
        advice = advice_of_module("adamw", "9s")
        known = Known(metric="loss", value=MetricValue(value, 0.0), rows=200, advice=advice, higher_is_better=False)
        return _small_validation(past, known)

    assert said(1e-4).found == said(1.0).found and said(1e-4).numbers["detectable"] < 1e-4
    assert said(math.nan) is None and said(0.0) is None


class Bucketed:
    """A batch sampler that draws as most that people write do: from `random` and from numpy's old generator."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = [list(range(n, n + 8)) for n in range(0, 64, 8)]
        random.shuffle(batches)
        yield from (batches[n] for n in np.random.permutation(len(batches)))

    def __len__(self) -> int:
        return 8


def test_a_sampler_that_draws_from_random_and_numpy_repeats() -> None:
    data = TensorDataset(torch.randn(64, 2), torch.zeros(64, dtype=torch.long))

    def drawn() -> list[list[int]]:
        loader = DataLoader(data, batch_sampler=Bucketed())  # pyright: ignore[reportArgumentType]
        order = rows_of(loader, "train", "cpu").order(8, 5)
        return [order.at(n).tolist() for n in range(20)]

    random.seed(1)
    np.random.seed(2)
    before = random.getstate(), np.random.get_state()[1].tolist()
    once = drawn()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before, "as it was"
    random.seed(3)
    np.random.seed(4)
    assert drawn() == once
