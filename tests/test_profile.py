"""What a profile measures of training, where forward passes say little of it: on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch

from multistep import data
from multistep.budget import Clock, parse_budget
from multistep.config import OptimizerConfig
from multistep.labels import task_for
from multistep.tune import profile
from multistep.tune.actions import Bench
from multistep.tune.workbench import Workbench
from multistep.types import UserError

SETTINGS = OptimizerConfig(kind="adamw")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    rows, encoder = runs.write_rows(tmp_path / "rows.csv", 120), runs.tiny_encoder(tmp_path / "encoder")
    config = runs.config(rows, tmp_path / "run", encoder, budget="60s")
    dataset = data.load(config.data, task=config.task, text=config.text, label=config.label, seed=config.seed)
    work = Workbench(config, dataset, task_for(dataset), tmp_path / "run")
    assert work.find_encoder() == ""
    return Bench(work, Clock(parse_budget("60s")), lambda: 0, "accuracy")


@pytest.mark.parametrize("bf16", [False, True])
def test_a_few_updates_are_timed_and_leave_nothing(bench: Bench, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    was = profile.train

    def watched(state: Any, rows: Any, bf16: bool) -> Any:
        for measure in was(state, rows, bf16=bf16):
            made.append(len(measure.rows) or state.strategy.batch_size)
            assert state.strategy.trains == "all" and state.strategy.bf16 == bf16 and not measure.event
            yield measure

    monkeypatch.setattr(profile, "train", watched)
    before = {k: v.clone() for k, v in bench.work.encoder().state_dict().items()}
    assert profile._training(bench.work, bf16, SETTINGS, 32) > 0
    assert made == [bench.work.config.batch_size] * profile._UPDATES
    for name, values in bench.work.encoder().state_dict().items():
        assert torch.equal(values, before[name]), name


def test_no_update_is_begun_once_they_have_taken_long(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_TRAINED_S", 0.0)
    made: list[Any] = []
    was = profile.train
    monkeypatch.setattr(profile, "train", lambda *a, **k: (made.append(m) or m for m in was(*a, **k)))
    assert profile._training(bench.work, False, SETTINGS, 32) > 0 and len(made) == profile._WARM + 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), UserError("out of memory with one example at once")]
)
def test_where_training_all_layers_does_not_fit_the_profile_goes_on(
    bench: Bench, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(profile, "train", short)
    assert profile._training(bench.work, False, SETTINGS, 32) == 0.0
    for error in (ValueError("another one"), UserError("another one"), RuntimeError("another one")):
        with pytest.raises(type(error), match="another one"):
            profile._training(bench.work, False, SETTINGS, 32)


@pytest.mark.parametrize(
    ("forward", "training", "apart", "chosen"),
    [
        ({"fp32": 1.0, "bf16": 2.0}, {"fp32": 20_000.0, "bf16": 15_000.0}, 0.0, "fp32"),
        ({"fp32": 2.0, "bf16": 1.0}, {"fp32": 20_000.0, "bf16": 30_000.0}, 0.0, "bf16"),
        ({"fp32": 1.0, "bf16": 2.0}, {"fp32": 20_000.0, "bf16": 30_000.0}, 0.5, "fp32"),  # features that differ
        ({"fp32": 1.0, "bf16": 2.0}, {"fp32": 0.0, "bf16": 15_000.0}, 0.0, "bf16"),  # no memory for fp32
        ({"fp32": 1.0, "bf16": 2.0}, {"fp32": 0.0, "bf16": 0.0}, 0.0, "bf16"),  # for none of them
    ],
)
def test_on_a_gpu_training_decides_the_precision(
    forward: dict[str, float], training: dict[str, float], apart: float, chosen: str, bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    now = [0.0]

    def encode(model: object, rows: Any, *, bf16: bool) -> np.ndarray:
        now[0] += float(rows.lengths_N.sum()) / forward["bf16" if bf16 else "fp32"]
        return np.tile([1.0, apart if bf16 else 0.0], (len(rows.ids), 1))

    model = bench.work.encoder()
    bench.work.device = "cuda"
    monkeypatch.setattr(bench.work, "encoder", lambda: model)
    monkeypatch.setattr(profile, "encode", encode)
    monkeypatch.setattr(profile.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(profile, "_training", lambda _, bf16, *__: training["bf16" if bf16 else "fp32"])
    monkeypatch.setattr(bench, "timed", lambda: True)
    found = profile._throughput(bench, np.array([10, 12]), 32, SETTINGS, 32)
    assert found["precision"] == chosen and found.get("train_tokens_s", 0.0) == training[chosen]
    assert found["forward_tokens_s"] == pytest.approx(forward[chosen])
    assert set(found["trained_tokens_s"]) == ({"fp32"} if apart else {"fp32", "bf16"})
