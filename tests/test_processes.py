"""Two processes of gloo train one model: the same bits in both, the single process's numbers, the same decisions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from test_modules import blobs, network
from torch import nn

from multistep import processes
from multistep.budget import Budget, Clock, parse_budget
from multistep.loader import ModuleRows
from multistep.state import TrainState
from multistep.strategy import TrainModule, Trial
from multistep.train import train
from multistep.tune.segment import Keeper, run_segment
from multistep.types import UserError

UPDATES = 40


class Broken(ModuleRows):
    """Rows that come back as NaN to one process at one batch, or do not fit into its memory."""

    calls, at, room = 0, -1, 10**9

    def load(self, rows: np.ndarray) -> tuple[Any, Any]:
        (x,), y = super().load(rows)
        type(self).calls += 1
        if len(rows) > self.room:
            raise MemoryError
        return (x * float("nan") if self.calls == self.at else x,), y


def rows_for(rank: int, case: str) -> ModuleRows:
    x, y = blobs(320, 0)
    rows = Broken(torch.utils.data.TensorDataset(x, y), "cpu", None)
    if case == "nan" and rank == 1:
        Broken.at = 30
    if case == "memory" and rank == 1:
        Broken.room = 5
    return rows


def strategy(case: str) -> TrainModule:
    found = TrainModule.parse({"optimizer": {"kind": "adamw", "lr": 1e-2}, "batch_size": 3 if case == "few" else 32})
    match case:
        case "solver":
            return found.with_(
                optimizer={"kind": "lbfgs", "max_iterations": 4},
                schedule={"kind": "constant", "warmup": 0.0},
                batch_size=320,
            )
        case "dropout":
            return found.with_(dropout=0.3)
    return found


def trained(rank: int, case: str, folder: Path) -> tuple[TrainState, list[tuple[str, dict[str, Any]]]]:
    """One process's training, under watch."""
    torch.set_num_threads(1)
    budget = (
        Budget(amount=0.5, unit="seconds")
        if case == "seconds"
        else Budget(amount=1 if case == "solver" else UPDATES, unit="updates")
    )
    state, action = TrainState(network(hidden=8)), strategy(case)
    state.begin(action, budget)
    keeper = Keeper(folder / f"rank{rank}", "01", Clock(parse_budget("1h")), None)
    keeper.load(state)
    trial = Trial(id="01", stage="trunk", action=action)
    return state, list(run_segment(trial, state, rows_for(rank, case), keeper, None, lambda: 0))


def work(rank: int, folder: Path, cases: tuple[str, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    for case in cases:
        Broken.calls, Broken.at, Broken.room = 0, -1, 10**9
        state, records = trained(rank, case, folder / case)
        said = [f"{kind} {fields.get('event')} {fields.get('update')} {fields.get('lr_scale')} {fields.get('micro_batch')}"
                for kind, fields in records if kind != "Measured"]  # fmt: skip
        snapshot = state.snapshot()
        meta = {k: v for k, v in snapshot["meta"].items() if k != "optimizer"}
        save_file(
            snapshot["tensors"], folder / f"{case}.{rank}.safetensors", {"said": "|".join(said), "meta": repr(meta)}
        )
    if rank == 0:
        try:
            next(train(begun_newton(), rows_for(0, "")))
        except UserError as error:
            (folder / "newton").write_text(str(error))
    dist.destroy_process_group()


def begun_newton() -> TrainState:
    state = TrainState(network())
    state.begin(TrainModule.parse({"optimizer": {"kind": "newton_cg"}}), Budget(amount=2, unit="updates"))
    return state


CASES = ("plain", "dropout", "nan", "memory", "few", "solver", "seconds")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one pair of processes: starting them is what costs."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(work, (folder, CASES), nprocs=2, start_method="spawn")  # pyright: ignore[reportPrivateImportUsage]
    return folder


def of(folder: Path, case: str, rank: int) -> tuple[dict[str, torch.Tensor], str, str]:
    from safetensors import safe_open

    path = folder / f"{case}.{rank}.safetensors"
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    return load_file(path), meta["said"], meta["meta"]


@pytest.mark.parametrize("case", CASES)
def test_all_processes_are_left_with_the_same_bits(ran: Path, case: str) -> None:
    (one, said, meta), (two, said_too, meta_too) = (of(ran, case, rank) for rank in (0, 1))
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())
    assert said == said_too and meta == meta_too  # the seconds too: they are the first process's


@pytest.mark.parametrize("case", ["plain", "few", "solver"])
def test_the_numbers_are_those_of_one_process(ran: Path, tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    Broken.calls = 0
    alone, _ = trained(0, case, tmp_path)
    found = of(ran, case, 0)[0]
    for name, parameter in alone.trained:
        assert torch.allclose(parameter, found[f"model.{name}"], atol=2e-4), name
    assert not torch.allclose(alone.model[0].weight, network(hidden=8)[0].weight, atol=1e-2)


def test_what_one_process_sees_all_of_them_do(ran: Path) -> None:
    assert of(ran, "nan", 0)[1] == "Event nonfinite 29 0.5 None"
    said = of(ran, "memory", 0)[1].split("|")
    assert [s.split()[-1] for s in said] == ["8", "4"] and all(
        "out of memory" in s for s in said
    )  # 16 rows each at first
    assert of(ran, "plain", 0)[1] == of(ran, "dropout", 0)[1] == ""
    assert not torch.equal(of(ran, "plain", 0)[0]["model.0.weight"], of(ran, "dropout", 0)[0]["model.0.weight"])


def test_a_solver_that_asks_for_curvature_works_alone(ran: Path) -> None:
    assert "newton_cg works in one process" in (ran / "newton").read_text()


def test_alone_nothing_is_shared() -> None:
    rows = np.arange(5)
    assert processes.count() == 1 and processes.part(rows) is rows
    weight = nn.Parameter(torch.ones(3))
    assert processes.shared_now_s(weight.device) <= processes.shared_now_s(weight.device)
