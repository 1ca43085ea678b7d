"""Memory that runs out, simulated: nothing of the batch is applied, it comes again in smaller parts, and that is remembered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import test_spans
import torch
from test_engines import writer
from test_modules import blobs, network
from test_modules import run as optimize
from test_recovery import events
from test_state import begun
from torch import nn

from multistep import cli, generate
from multistep.allocation import in_halves, out_of_memory, room
from multistep.api import load
from multistep.budget import Budget
from multistep.bundle import Bundle
from multistep.data.cells import Record
from multistep.evaluate import Rows, encode
from multistep.loader import ModuleRows, rows_of
from multistep.objectives import CrossEntropy
from multistep.predictors.decoding import Beam, Greedy, Sample
from multistep.schedules import Constant
from multistep.spans import SpanRows
from multistep.strategy import TrainModule
from multistep.subwords import load_tokenizer, train_tokenizer
from multistep.train import train
from multistep.tune.module import judge_rows
from multistep.tune.workbench import Workbench
from multistep.types import UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")
SHORT = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
         RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
         RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")]  # fmt: skip


class Narrow(nn.Module):
    """A network in whose memory there is room for a few rows; it moves its running statistics before it finds out."""

    def __init__(self, room: int, error: Exception = SHORT[0]):
        super().__init__()
        self.inner, self.room, self.error = network(dropout=0.2), room, error
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        if self.training and len(x) > self.room:
            raise self.error
        return self.inner(x)


@pytest.mark.parametrize("error", SHORT, ids=["cuda", "python", "cpu", "cpu, older"])
def test_short_memory_is_the_small_micro_batch_from_the_start(error: Exception) -> None:
    settings: dict[str, Any] = {"budget": "60 updates", "train": blobs(320, 0), "batch_size": 32}
    small = optimize(Narrow(8), micro_batch=8, **settings)
    short = optimize(Narrow(8, error), **settings)
    found = events(short, "out of memory")
    assert [(e["micro_batch_before"], e["micro_batch"]) for e in found] == [(32, 16), (16, 8)]
    assert all(len(e["rows"]) == 32 and "8 examples" in found[-1]["action"] for e in found) and not events(
        small, "out of memory"
    )
    for mine, theirs in zip(short.model.parameters(), small.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(short.model.calls, small.model.calls) and short.validation == small.validation


def test_the_micro_batch_that_fits_is_remembered_by_later_trials_and_a_resumed_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "controller": "staged",
        "budget": "1100 updates",
        "train": blobs(320, 0),
        "batch_size": 32,
        "out": tmp_path / "run",
    }
    whole = optimize(Narrow(8), **settings)
    assert len(events(whole, "out of memory")) == 2
    trained = [
        r["outcome"]["facts"] for r in whole.records() if r["kind"] == "Told" and "train_loss" in r["outcome"]["facts"]
    ]
    assert len(trained) > 2 and all(f["micro_batch"] == 8 for f in trained)
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines(keepends=True)
    second = next(n for n, line in enumerate(lines) if '"Asked"' in line and '"race"' in line and n > 8)
    (tmp_path / "run" / "journal.jsonl").write_text("".join(lines[: second + 1]))
    for later in (json.loads(line) for line in lines[second:]):  # and what these trials left
        if later["kind"] == "Asked":
            shutil.rmtree(tmp_path / "run" / "states" / later["trial"]["id"], ignore_errors=True)
    again = optimize(Narrow(8), **settings)
    assert len(events(again, "out of memory")) == 2 and again.validation == whole.validation


def test_texts_on_short_memory_are_those_with_the_small_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, encoder = runs.write_rows(tmp_path / "rows.csv"), runs.tiny_encoder(tmp_path / "encoder")
    small = runs.run(runs.config(rows, tmp_path / "small", encoder, micro_batch=4, budget="80 updates"))
    load = Rows.load

    def narrow(self: Rows, few: np.ndarray) -> Any:
        if len(few) > 5:
            raise SHORT[2]
        return load(self, few)

    monkeypatch.setattr(Rows, "load", narrow)
    short = runs.run(runs.config(rows, tmp_path / "short", encoder, budget="80 updates"))
    assert [e["micro_batch"] for e in events(short, "out of memory")] == [4]
    assert runs.committed(short) == runs.committed(small)
    runs.same_states(tmp_path / "small", tmp_path / "short")


def test_one_row_too_many_is_one_clear_line() -> None:
    with pytest.raises(UserError, match=r"one example at once.*max_length"):
        optimize(Narrow(0), budget="10 updates")


def test_memory_that_ends_in_the_middle_of_a_step_goes_back_to_the_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    from multistep.optimizers.lbfgs_module import LBFGSOptimizer

    step, calls = LBFGSOptimizer.step, [0]

    def short(self: LBFGSOptimizer, closure: Any) -> Any:
        calls[0] += 1
        found = step(self, closure)
        if calls[0] == 4:
            raise SHORT[1]
        return found

    settings: dict[str, Any] = {"optimizer": "lbfgs", "batch_size": 300, "budget": "8 updates"}
    with monkeypatch.context() as patch:
        patch.setattr(LBFGSOptimizer, "step", short)
        result = optimize(network(), **settings)
    (event,) = events(result, "out of memory")
    assert event["back_to"] == 0 and event["micro_batch"] == 150
    small = optimize(network(), micro_batch=150, **settings)
    for mine, theirs in zip(result.model.parameters(), small.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_texts_are_encoded_in_halves_where_memory_is_short(
    make_encoder: Callable, make_rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, model = make_rows(), make_encoder()
    whole = encode(model, rows)
    inputs = Rows.inputs

    def narrow(self: Rows, few: np.ndarray) -> Any:
        if len(few) > 5:
            raise SHORT[2]
        return inputs(self, few)

    monkeypatch.setattr(Rows, "inputs", narrow)
    assert np.abs(encode(model, rows) - whole).max() < 1e-5
    with pytest.raises(UserError, match="one example at once"):
        in_halves(np.arange(3), lambda few: (_ for _ in ()).throw(SHORT[1]))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not out_of_memory(
        ValueError()
    )
    with pytest.raises(ZeroDivisionError):
        in_halves(np.arange(3), lambda few: 1 / 0)  # pyright: ignore[reportArgumentType]


def test_a_measure_of_short_memory_says_how_many_there_were() -> None:
    state = begun(Narrow(4), TrainModule(batch_size=8, schedule=Constant()), Budget(amount=3, unit="updates"))
    rows: Any = rows_of(blobs(40, 0), "train", "cpu")
    measures = list(train(state, rows))
    assert [(m.event, m.micro_batch, m.update) for m in measures] == [
        ("out of memory", 8, 0),
        ("", 0, 1),
        ("", 0, 2),
        ("", 0, 3),
    ]
    assert state.counters.micro_batch == 4 and measures[0].examples == 0 and len(measures[0].rows) == 8


# ---------------------------------------------------------------------------------------------- what is only read


def narrow(patch: pytest.MonkeyPatch, owner: Any, name: str, rows: Callable[..., int], most: int = 2) -> list[int]:
    """`owner.name` runs out of memory with more than `most` rows; how many there were each time."""
    whole, seen = getattr(owner, name), []

    def short(*args: Any, **kwargs: Any) -> Any:
        seen.append(rows(*args))
        if seen[-1] > most:
            raise SHORT[0]
        return whole(*args, **kwargs)

    patch.setattr(owner, name, short)
    return seen


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_texts_are_judged_in_halves_where_memory_is_short(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    neural = writer(tmp_path, kind)
    records = [Record(f"the {n} of", (f"sea {n} {'and sand ' * n}",)) for n in range(8)]
    whole = neural.losses(records, False)
    seen = narrow(monkeypatch, type(neural.rows(records)), "load", lambda self, part: len(part))
    np.testing.assert_allclose(neural.losses(records, False), whole, rtol=1e-5)
    assert max(seen) > 2 >= min(seen)


@pytest.mark.parametrize("way", [Greedy(max_new_tokens=6), Sample(max_new_tokens=6), Beam(max_new_tokens=6, beams=2)])
def test_texts_are_written_in_halves_where_memory_is_short(
    tmp_path: Path, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    neural = writer(tmp_path, "decoder")
    records = [Record(f"the {n} of the {'sea ' * n}", ("",)) for n in range(7)]
    whole = neural.candidates(records, way, 1)
    if isinstance(way, Beam):
        seen = narrow(monkeypatch, generate, "beam_search", lambda stepper, prompts, *_: len(prompts))
    else:
        seen = narrow(monkeypatch, generate, "OneByOne", lambda stepper, prompts, *_: len(prompts))
    assert [[w.ids for w in row] for row in neural.candidates(records, way, 1)] == [
        [w.ids for w in row] for row in whole
    ]
    assert max(seen) > 2 >= min(seen)


def test_spans_are_found_in_halves_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train_tokenizer(["after", *test_spans.WORDS] * 3, 400, tmp_path / "tokenizer.json")
    tokenizer, rng = load_tokenizer(str(tmp_path)), np.random.default_rng(0)
    rows = SpanRows([test_spans.record(rng) for _ in range(9)], tokenizer, 40, 0, "cpu")
    model = test_spans.model_for(tokenizer)
    whole = [found.value for found in rows.answers(model)]
    seen = narrow(monkeypatch, SpanRows, "_inputs", lambda self, part: len(part))
    assert [found.value for found in rows.answers(model)] == whole and max(seen) > 2 >= min(seen)


def test_examples_of_a_module_are_judged_in_halves_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, module, objective = rows_of(blobs(50, 0), "train", "cpu"), network(), CrossEntropy()
    whole = judge_rows(module, rows, objective, None, False).losses_N
    seen = narrow(monkeypatch, ModuleRows, "load", lambda self, part: len(part), most=13)
    np.testing.assert_allclose(judge_rows(module, rows, objective, None, False).losses_N, whole, rtol=1e-6)
    assert seen == [50, 25, 13, 12, 25, 13, 12]


def test_hidden_states_are_kept_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def full(shape: Any, device: str = "cpu") -> torch.Tensor:
        if device == "cuda":
            raise SHORT[0]
        return empty(shape, device=device)

    monkeypatch.setattr(torch, "empty", full)
    assert room((3, 2), "cuda").device.type == "cpu" and room((3, 2), "cpu").shape == (3, 2)
    monkeypatch.setattr(torch, "empty", lambda shape, device: (_ for _ in ()).throw(SHORT[2]))
    with pytest.raises(RuntimeError, match="can't allocate"):
        room((3, 2), "cpu")


@pytest.mark.parametrize("error", SHORT[:3], ids=["cuda", "python", "cpu"])
def test_a_model_that_does_not_fit_is_one_line_and_what_stood_stays(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, encoder = runs.write_rows(tmp_path / "rows.csv"), runs.tiny_encoder(tmp_path / "encoder")
    arguments = ["fit", str(rows), "--model", str(encoder), "--budget", "80 updates", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "encoder", lambda self: (_ for _ in ()).throw(error))
        assert cli.run([*arguments, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "02-profile: out of memory" in said and "device=cpu" in said and "Traceback" not in said
    assert load(tmp_path / "run").predict(["river up stone"])[0].value in runs.LABELS  # what stood serves
    assert cli.run(["resume", str(tmp_path / "run"), "--quiet"]) == 0  # once there is memory again
    monkeypatch.setattr(Bundle, "predict", lambda *_: (_ for _ in ()).throw(error))
    assert (
        cli.run(["predict", str(tmp_path / "run"), "river"]) == 2 and "error: out of memory" in capsys.readouterr().err
    )
