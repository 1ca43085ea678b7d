"""Two processes of gloo train one model: the same bits in both, the single process's numbers, the same decisions."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
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
from multistep.tune import segment
from multistep.tune.segment import Keeper, run_segment
from multistep.types import Interrupted, UserError

UPDATES = 40


class Moving(nn.Module):
    """A network with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network(hidden=8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.norm(x))


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
    if case in ("nan", "statistics") and rank == 1:
        Broken.at = 30
    if case == "memory" and rank == 1:
        Broken.room = 5
    return rows


def strategy(case: str) -> TrainModule:
    found = TrainModule.parse({"optimizer": {"kind": "adamw", "lr": 1e-2}, "batch_size": 3 if case == "few" else 32})
    match case:
        case "solver" | "solver's step":
            return found.with_(
                optimizer={"kind": "lbfgs", "max_iterations": 4},
                schedule={"kind": "constant", "warmup": 0.0},
                batch_size=320,
            )
        case "dropout":
            return found.with_(dropout=0.3)
    return found


def budget(case: str) -> Budget:
    match case:
        case "seconds":
            return Budget(amount=0.5, unit="seconds")
        case "solver" | "solver's step":
            return Budget(amount=1 if case == "solver" else 3, unit="updates")
    return Budget(amount=UPDATES, unit="updates")


def short_in_a_step(state: TrainState, at: int, looks: int = 0) -> None:
    """Memory runs out in this process's `at`-th step, after so many looks at the loss."""
    assert state.optimizer is not None
    step, calls = state.optimizer.step, [0]

    def short(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            for _ in range(looks):
                given[0]()
            raise MemoryError
        return step(*given)

    state.optimizer.step = short  # pyright: ignore[reportAttributeAccessIssue]


def trained(rank: int, case: str, folder: Path) -> tuple[TrainState, list[tuple[str, dict[str, Any]]]]:
    """One process's training, under watch."""
    torch.set_num_threads(1)
    state, action = TrainState(Moving() if case == "statistics" else network(hidden=8)), strategy(case)
    if case == "statistics":
        state.model.norm.running_mean += rank  # the caller did not see to it
    state.begin(action, budget(case))
    if rank == 1 and "step" in case:
        short_in_a_step(state, 30 if case == "step" else 2, 0 if case == "step" else 2)
    keeper = Keeper(folder / f"rank{rank}", "01", Clock(parse_budget("1h")), None)
    records = [("Event", {"event": "resumed", "update": state.counters.update})] if keeper.load(state) else []
    signals = iter([0] * 24 + [15] * UPDATES if case == "stopped" and rank == 1 and not records else [])
    trial = Trial(id="01", stage="trunk", action=action)
    try:
        records += run_segment(trial, state, rows_for(rank, case), keeper, None, lambda: next(signals, 0))
    except Interrupted as error:
        records.append(("Event", {"event": f"signal {error.signal}", "update": state.counters.update}))
    return state, records


def stopped(rank: int, folder: Path) -> tuple[TrainState, list[tuple[str, dict[str, Any]]]]:
    """A training that one process's signal stops, gone on with where one process was killed before it had written its last snapshot."""
    save_share, segment._SAVE_SHARE = segment._SAVE_SHARE, 1e9
    every, segment.SNAPSHOT_UPDATES = segment.SNAPSHOT_UPDATES, 10
    _, records = trained(rank, "stopped", folder)
    kept = sorted(p.name for p in (folder / f"rank{rank}").iterdir())
    records.append(("Event", {"event": " ".join(kept)}))
    if rank == 0:
        shutil.rmtree(folder / "rank0" / kept[-1])
    state, more = trained(rank, "stopped", folder)
    segment._SAVE_SHARE, segment.SNAPSHOT_UPDATES = save_share, every
    return state, [*records, *more]


def work(rank: int, folder: Path, cases: tuple[str, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    meeting = f"file://{folder / 'meeting'}"  # who waits for one that does not come gives up
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for case in cases:
        Broken.calls, Broken.at, Broken.room = 0, -1, 10**9
        state, records = stopped(rank, folder / case) if case == "stopped" else trained(rank, case, folder / case)
        said = [f"{kind} {fields.get('event')} {fields.get('update')} {fields.get('lr_scale')} {fields.get('micro_batch')}"
                for kind, fields in records if kind != "Measured"]  # fmt: skip
        snapshot = state.snapshot()
        meta = {k: v for k, v in snapshot["meta"].items() if k != "optimizer"}
        save_file(
            snapshot["tensors"], folder / f"{case}.{rank}.safetensors", {"said": "|".join(said), "meta": repr(meta)}
        )
    (folder / f"room.{rank}").write_text(without_room(rank, folder))
    if rank == 0:
        try:
            next(train(begun_newton(), rows_for(0, "")))
        except UserError as error:
            (folder / "newton").write_text(str(error))
    dist.destroy_process_group()


def without_room(rank: int, folder: Path) -> str:
    """What each of two processes says when one has no memory for the sums."""
    room = processes.room

    def narrow(parameters: Any) -> Any:
        raise MemoryError

    processes.room = narrow if rank == 1 else room
    try:
        trained(rank, "no room", folder / "no room")
    except UserError as error:
        return str(error)
    finally:
        processes.room = room
    return ""


def begun_newton() -> TrainState:
    state = TrainState(network())
    state.begin(TrainModule.parse({"optimizer": {"kind": "newton_cg"}}), Budget(amount=2, unit="updates"))
    return state


CASES = (
    "plain",
    "dropout",
    "nan",
    "memory",
    "few",
    "solver",
    "seconds",
    "step",
    "solver's step",
    "statistics",
    "stopped",
)


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


@pytest.mark.parametrize("case", ["plain", "few", "solver", "step", "memory", "stopped"])
def test_the_numbers_are_those_of_one_process(ran: Path, tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    Broken.calls = 0
    alone, _ = trained(0, "plain" if case in ("step", "memory", "stopped") else case, tmp_path)
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


def test_memory_that_ends_in_one_process_in_the_middle_of_a_step_sends_all_of_them_back(ran: Path) -> None:
    assert of(ran, "step", 0)[1] == "Event out of memory 25 None 8"  # 16 rows each
    assert (
        of(ran, "solver's step", 0)[1] == "Event out of memory 0 None 80"
    )  # 160, and the other one looked at the loss again
    assert {(ran / f"room.{rank}").read_text() for rank in (0, 1)} == {
        "out of memory: several processes need room for the gradients once more. Train fewer layers or take a smaller model."
    }


def test_running_statistics_are_the_first_processes(ran: Path) -> None:
    found = of(ran, "statistics", 1)[0]
    assert of(ran, "statistics", 1)[1] == "Event nonfinite 29 0.5 None"
    assert found["buffer.norm.num_batches_tracked"] == UPDATES - 30 + 25  # back to 25 after 30 batches
    x, _ = blobs(320, 0)
    assert torch.allclose(found["buffer.norm.running_mean"], 0.97 * x.mean(0), atol=0.5)


def test_a_signal_stops_all_of_them_and_they_go_on_from_what_all_have(ran: Path) -> None:
    said = of(ran, "stopped", 0)[1].split("|")
    assert [s.split(" None")[0] for s in said] == [
        "Event signal 15 25", "Event 01.live.10 01.live.20", "Event resumed 10",
    ]  # fmt: skip
    plain, found = of(ran, "plain", 0)[0], of(ran, "stopped", 0)[0]
    assert plain.keys() == found.keys() and all(torch.equal(v, found[k]) for k, v in plain.items())


def test_a_solver_that_asks_for_curvature_works_alone(ran: Path) -> None:
    assert "newton_cg works in one process" in (ran / "newton").read_text()


def test_alone_nothing_is_shared() -> None:
    rows = np.arange(5)
    assert processes.count() == 1 and processes.part(rows) is rows
    weight = nn.Parameter(torch.ones(3))
    first, failed = processes.agreed(weight.device)
    assert first <= processes.agreed(weight.device, True)[0] and not failed and processes.agreed(weight.device, True)[1]
    assert processes.most(weight.device, 3, -1) == [3, -1] and processes.room([weight]) is None
    processes.share([weight])
    with pytest.raises(MemoryError):
        processes.fell_short(MemoryError())
