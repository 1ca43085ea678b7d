"""Changed words: off by default, the same for the same seed, epoch and row, whatever was asked before; and through `fit`, resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch

from multistep import api
from multistep.augment import Augment
from multistep.evaluate import Rows
from multistep.tune import segment
from multistep.tune.augmented import AugmentedRows
from multistep.types import Interrupted, UserError

TEXT = "the quick  brown fox\njumps over the lazy dog"


def test_off_by_default_and_a_function_of_seed_epoch_and_row() -> None:
    assert Augment().text(TEXT, 0, 0, 0) == TEXT and not Augment().on
    change = Augment(word_dropout=0.3, swap=0.2)
    seen = {change.text(TEXT, s, e, r) for s in (0, 1) for e in (0, 1) for r in (0, 1, 2)}
    assert len(seen) > 8 and change.text(TEXT, 1, 2, 3) == change.text(TEXT, 1, 2, 3)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.95])
def test_so_many_words_are_left_out_and_one_stays(p: float) -> None:
    words = " ".join(map(str, range(20)))
    kept = [Augment(word_dropout=p).text(words, 0, 0, row).split() for row in range(500)]
    assert all(k and list(map(int, k)) == sorted(map(int, k)) for k in kept)  # in their order
    least = 0.95**20 / 20 if p == 0.95 else 0.0  # where none was left, one was put back
    assert np.mean([len(k) for k in kept]) / 20 == pytest.approx(1 - p + least, abs=0.02)


def test_swaps_keep_the_words_and_what_stands_between_them() -> None:
    changed = [Augment(swap=0.3).text(TEXT, 0, 0, row) for row in range(50)]
    assert all(sorted(c.split()) == sorted(TEXT.split()) for c in changed)
    assert all(c.count("  ") == 1 and c.count("\n") == 1 for c in changed)
    assert sum(c != TEXT for c in changed) > 40


def test_every_ideograph_is_a_word_and_a_single_word_stays() -> None:
    kept = Augment(word_dropout=0.5).text("房间很好早餐也不错 ok", 0, 0, 1)
    assert 0 < len(kept) < 12 and set(kept) <= set("房间很好早餐也不错 ok")
    assert (
        Augment(word_dropout=0.99, swap=1.0).text("alone", 0, 0, 0) == "alone"
        and Augment(swap=1.0).text("", 0, 0, 0) == ""
    )


def rows_and_texts(n: int = 40) -> tuple[Rows, list[str]]:
    texts = [" ".join(str(1 + (i + k) % 9) for k in range(3 + i % 5)) for i in range(n)]
    ids = [np.array(t.split(), dtype=np.int32) for t in texts]
    return Rows(ids, 0, "cpu", torch.arange(n)), texts


def test_rows_change_every_epoch_and_do_not_depend_on_what_came_before() -> None:
    rows, texts = rows_and_texts()

    def made() -> AugmentedRows:
        change = Augment(word_dropout=0.3, swap=0.3)
        return AugmentedRows(rows, texts, change, lambda ts: [np.array(t.split(), dtype=np.int32) for t in ts])

    def batches(data: AugmentedRows, positions: range) -> list[Any]:
        order, found = data.order(8, 3), []
        for position in positions:
            few = order.at(position)
            tokens = data.tokens(few)
            (ids_BT, mask_BT), targets_B = data.load(few)
            assert int(mask_BT.sum()) == tokens and targets_B.tolist() == few.tolist()
            found.append((few.tolist(), ids_BT.tolist()))
        return found

    straight = batches(made(), range(10))
    assert batches(made(), range(4, 10)) == straight[4:]  # as a resumed run asks
    first, second = (
        dict(i for few, ids in part for i in zip(few, map(tuple, ids), strict=True))
        for part in (straight[:5], straight[5:])
    )
    assert sorted(first) == sorted(second) == list(range(40))
    assert sum(tuple(filter(None, first[r])) != tuple(filter(None, second[r])) for r in first) > 20


def test_a_run_with_changed_words_resumes_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "SNAPSHOT_UPDATES", 7)
    rows, encoder = runs.write_rows(tmp_path / "rows.csv"), runs.tiny_encoder(tmp_path / "encoder")
    settings = {
        "augment": {"word_dropout": 0.2, "swap": 0.1},
        "budget": "90 updates",
        "layers": 1,
        "layer_decay": 0.9,
        "clip_z": 3.0,
    }
    straight = runs.run(runs.config(rows, tmp_path / "straight", encoder, **settings))
    trunk = next(r["trial"] for r in runs.of_kind(straight, "Asked") if r["trial"]["stage"] == "trunk")
    assert trunk["action"]["augment"] == {"word_dropout": 0.2, "swap": 0.1} and "read as token ids" in trunk["why"]
    head = next(r["trial"]["action"] for r in runs.of_kind(straight, "Asked") if r["trial"]["stage"] == "head")
    assert head["cut"] == 0
    load, calls = AugmentedRows.load, [0]

    def signalled(self: AugmentedRows, few: np.ndarray) -> Any:
        calls[0] += 1
        if calls[0] == 50:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(self, few)

    with monkeypatch.context() as patch:
        patch.setattr(AugmentedRows, "load", signalled)
        with pytest.raises(Interrupted):
            runs.run(runs.config(rows, tmp_path / "run", encoder, **settings))
    api.resume(tmp_path / "run")
    runs.same_states(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize("wrong", [{"word_dropout": 1.0}, {"swap": -0.1}, {"word_drop": 0.1}])
def test_what_is_wrong_is_named(wrong: dict[str, float]) -> None:
    from multistep.config import FitConfig

    with pytest.raises(UserError, match=f"augment.{next(iter(wrong))}"):
        FitConfig.parse({"data": "x.csv", "augment": wrong})
