"""Laws of a state's folder: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from multistep import state as state_module
from multistep.state import read_folder, replace_folder, write_folder
from multistep.types import UserError


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), value)}


def test_folder_round_trip_and_overwrite(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "01-trunk"
    for value in (1.0, 2.0):
        write_folder(folder, {"value": value, "none": None}, tensors(value))
        meta, found = read_folder(folder)
        assert meta == {"value": value, "none": None} and torch.equal(found["w"], tensors(value)["w"])
    assert os.listdir(folder.parent) == ["01-trunk"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("I/O error: os error 28")])
def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    folder = tmp_path / "state"
    write_folder(folder, {"value": 1.0}, tensors(1.0))

    def full(data: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half of ")
        raise failure

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(OSError, match=r"No space|os error 28"):
        write_folder(folder, {"value": 2.0}, tensors(2.0))
    meta, found = read_folder(folder)
    assert meta["value"] == 1.0 and torch.equal(found["w"], tensors(1.0)["w"])
    assert os.listdir(tmp_path) == ["state"]


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path: Path) -> None:
    left = tmp_path / f".state.{os.getpid()}.tmp"
    left.mkdir()
    (left / "rubbish").write_text("x")
    write_folder(tmp_path / "state", {}, tensors(1.0))
    assert sorted(os.listdir(tmp_path / "state")) == ["state.json", "tensors.safetensors"]
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replace_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(state_module, "_exchange", lambda a, b: False)
    target = tmp_path / "model"
    for number in range(3):
        new = tmp_path / "new"
        (new / "inner").mkdir(parents=True)
        (new / f"file{number}").write_text(str(number))
        (new / "inner" / "same").write_text(str(number))
        replace_folder(new, target)
        assert sorted(os.listdir(target)) == [f"file{number}", "inner"]
        assert (target / "inner" / "same").read_text() == str(number)
        assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("missing", ["state.json", "tensors.safetensors", ""])
def test_a_missing_state_is_named(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "03-trunk"
    if missing:
        write_folder(folder, {}, tensors(1.0))
        (folder / missing).unlink()
    with pytest.raises(UserError, match="state '03-trunk' is missing"):
        read_folder(folder)
