"""On a GPU: what is promised for a CPU. Everything here is skipped where torch sees no GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from test_modules import blobs
from test_modules import run as optimize
from test_recovery import events
from test_state import assert_same, begun
from test_state import run as train_on
from test_transaction import CHANGES, TRIED, WHOLE, network, strategy
from torch import nn

from multistep.api import resume
from multistep.evaluate import encode
from multistep.loader import rows_of
from multistep.optimizers import GRADIENT_OPTIMIZERS, SOAP, GradientOptimizer
from multistep.precision import mixed, training_in
from multistep.state import TrainState
from multistep.strategy import FineTune
from multistep.train import train
from multistep.transaction import Transaction

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU: nothing to check here"),
    pytest.mark.usefixtures("torch_seeded"),
]
ALL = pytest.mark.parametrize("member", GRADIENT_OPTIMIZERS, ids=lambda m: m.model_fields["kind"].default)
LITTLE = 512 * 2**20  # bytes that are left free


@pytest.fixture
def short_memory() -> Iterator[None]:
    """Beyond what is used now, and one piece of torch's cache, the GPU has a few bytes left."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + LITTLE) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


class Wide(nn.Module):
    """Little to keep, much to compute: half a megabyte of activations a row and layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 2**17), nn.Linear(2**17, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def trained(updates: int) -> TrainState:
    state = begun(network().cuda(), strategy(), WHOLE)
    go_on(state, updates)
    return state


def go_on(state: TrainState, updates: int | None = None) -> list[Any]:
    rows: Any = rows_of(blobs(50, 0), "train", "cuda")
    found = train(state, rows)
    return [measure for measure, _ in zip(found, range(updates), strict=False)] if updates is not None else list(found)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_taken_back_leaves_no_bit(change: str) -> None:
    straight, tried = trained(7), trained(7)
    whole = go_on(straight)
    transaction = Transaction(tried)
    transaction.attempt(strategy(change), TRIED)
    assert len(go_on(tried, 9)) == 9
    transaction.restore()
    assert_same(tried, trained(7))
    torch.rand(5, device="cuda")
    assert go_on(tried) == whole
    assert_same(tried, straight)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_run_that_is_saved_goes_on_as_if_it_had_not_stopped(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, tmp_path: Path, dropout: float
) -> None:
    """An encoder with attention, where torch adds gradients in no fixed order unless it is told to."""
    rows, chosen = on_gpu(make_rows()), make_strategy(dropout=dropout)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        straight = begun(make_encoder().cuda(), chosen)
        whole = train_on(straight, rows)
        state = begun(make_encoder().cuda(), chosen)
        measures = train_on(state, rows, 6)
        state.save(tmp_path / "state")
        again = begun(make_encoder().cuda(), chosen, seed=77)
        again.load(tmp_path / "state")
        torch.rand(11, device="cuda")
        assert measures + train_on(again, rows) == whole
        assert_same(again, straight)
    finally:
        torch.use_deterministic_algorithms(False)


@ALL
def test_an_optimizer_does_there_what_it_does_on_a_cpu(
    member: type[GradientOptimizer], make_encoder: Callable, make_rows: Callable
) -> None:
    """Ten updates of a tiny encoder from the same weights: as far as they go, they go the same way."""
    chosen = FineTune(optimizer=member(), trains="all", batch_size=8, clip=1.0)
    start = make_encoder()
    ends = []
    for device in ("cpu", "cuda"):
        rows = make_rows()
        state = begun(copy.deepcopy(start).to(device), chosen)
        measures = train_on(state, rows if device == "cpu" else on_gpu(rows), 10)
        assert not any(m.event for m in measures) and {p.device.type for p in state.model.parameters()} == {device}
        ends.append(torch.cat([p.detach().cpu().flatten() for p in state.model.parameters()]))
    begin = torch.cat([p.detach().flatten() for p in start.parameters()])
    moved, difference = (ends[0] - begin).norm(), (ends[1] - ends[0]).norm()
    free = (
        member is SOAP
    )  # where a gradient's statistics have no rank, their basis is free and each library picks another: 0.7 seen
    assert moved > 0 and difference < (1.0 if free else 0.05) * moved, float(difference / moved)


def test_memory_that_ends_is_a_smaller_micro_batch(short_memory: None) -> None:
    settings: dict[str, Any] = {"budget": "12 updates", "train": blobs(4096, 0), "batch_size": 2048}
    settings |= {"validation": blobs(16, 1), "optimizer": {"kind": "sgd", "lr": 1e-4}}
    torch.manual_seed(0)
    wide = Wide().cuda()
    twin = copy.deepcopy(wide)
    short = optimize(wide, **settings)
    found = events(short, "out of memory")
    assert [e["micro_batch_before"] for e in found] == [2048 >> n for n in range(len(found))] and found
    assert found[-1]["micro_batch"] < 2048 and short.records()[-1]["clock"]["updates"] == 12
    small = optimize(twin, micro_batch=found[-1]["micro_batch"], **settings)
    assert not events(small, "out of memory")
    for mine, theirs in zip(short.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_texts_are_encoded_in_halves_where_memory_is_short(make_rows: Callable, request: Any) -> None:
    from multistep.models.encoder import Encoder, new_backbone

    model = Encoder(new_backbone(100, 0, 256, 2, max_length=64, seed=1), 3).cuda()
    rows = on_gpu(make_rows(4000))
    whole = encode(model, rows)
    request.getfixturevalue("short_memory")
    few = []
    halves = model.features

    def watched(x: Any, mask: Any) -> Any:
        few.append(len(x))
        held = torch.empty(len(x) * 2**21, dtype=torch.uint8, device="cuda")  # a model that needs 2 MiB a text
        del held
        return halves(x, mask)

    model.features = watched  # pyright: ignore[reportAttributeAccessIssue]
    assert np.abs(encode(model, rows) - whole).max() < 1e-4
    assert max(few) > 256 >= few[-1]


def test_a_run_takes_the_gpu_and_its_folder_serves_on_a_cpu(tmp_path: Path) -> None:
    """Trained there in bf16, stopped in the middle, resumed, loaded: the same decisions as without the stop are not asked for."""
    rows, encoder = runs.write_rows(tmp_path / "rows.csv"), runs.tiny_encoder(tmp_path / "encoder")
    done = runs.run(runs.config(rows, tmp_path / "run", encoder, precision="bf16"))
    profiled = next(r for r in done.records() if r.get("what") == "profiled")
    assert profiled["facts"]["device"] == "cuda" and profiled["facts"]["precision"] == "bf16"
    journal = tmp_path / "run" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))
    again = resume(tmp_path / "run")
    assert again.records()[-1]["kind"] == "Finished"
    found = again.predict(["river up stone", "cloud left glass"])
    assert [f.value for f in found] == ["north", "west"]


def test_under_a_budget_of_time_its_training_is_measured(tmp_path: Path) -> None:
    rows, encoder = runs.write_rows(tmp_path / "rows.csv"), runs.tiny_encoder(tmp_path / "encoder")
    done = runs.run(runs.config(rows, tmp_path / "run", encoder, budget="20s"))
    facts = next(r["facts"] for r in done.records() if r.get("what") == "profiled")
    speeds = facts["trained_tokens_s"]
    assert set(speeds) == {"fp32", "bf16"} and facts["train_tokens_s"] == pytest.approx(max(speeds.values()), abs=1)
    assert facts["precision"] == max(speeds, key=lambda k: speeds[k])


@pytest.mark.parametrize("context", [mixed, training_in])
def test_attention_is_not_planned_anew_for_every_shape(context: Any) -> None:
    backends = torch.backends.cuda
    before = backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled()
    with context(True, "cuda"):
        assert not backends.cudnn_sdp_enabled() and backends.flash_sdp_enabled()
        assert nn.Linear(8, 8, device="cuda")(torch.ones(1, 8, device="cuda")).dtype == torch.bfloat16
    assert before == (backends.cudnn_sdp_enabled(), backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled())


def test_more_texts_are_encoded_at_once_than_on_a_cpu(make_encoder: Callable) -> None:
    on_cpu = make_encoder().tokens_at_once()
    assert make_encoder().cuda().tokens_at_once() == 16 * on_cpu > 0


def on_gpu(rows: Any) -> Any:
    rows.device = "cuda"
    return rows
