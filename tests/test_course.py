"""benchmarks/course.py: the paired comparison, ranks, what is missing, and that no peer is given the test."""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


import course
import course_ours
import course_rows
import course_table
import course_worker
from _common import Ran
from _paired import compared, holm, pack_nats, pack_right, unpack_nats, unpack_right
from _peers import Fitted, Given
from course_rows import HERO, TEXT, Cell

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CELL = Cell("sst2", "60s", (0, 1))


def row(system: str, seed: int, right: list[int], cell: Cell = CELL, **more: Any) -> dict[str, Any]:
    kept = np.array(right, bool)
    made = {"ok": True, "accuracy": float(kept.mean()), "right": pack_right(kept), "wall_s": 58.0, "process_s": 70.0}
    return {"dataset": cell.dataset, "budget": cell.budget, "system": system, "seed": seed} | made | more


# ---------------------------------------------------------------------------------------------- the comparison


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1821])
def test_packed_answers_come_back(count: int) -> None:
    right = np.random.default_rng(count).random(count) < 0.5
    assert np.array_equal(unpack_right(pack_right(right)), right.astype(float))
    nats = np.random.default_rng(count).random(count) * 40
    np.testing.assert_allclose(unpack_nats(pack_nats(nats)), nats, rtol=1e-6)


def test_one_seed_is_the_exact_mcnemar_test() -> None:
    ours = np.array([1.0] * 10 + [0.0] * 10)
    theirs = ours.copy()
    theirs[[0]] = 0.0
    theirs[[10, 11, 12, 13, 14]] = 1.0  # five won, one lost: two tails of six tosses
    found = compared({0: theirs}, {0: ours})
    assert found is not None
    assert found.value == pytest.approx(4 / 20)
    assert found.p == pytest.approx(2 * (math.comb(6, 5) + math.comb(6, 6)) / 2**6)
    back = compared({0: ours}, {0: theirs})
    assert back is not None
    assert (back.value, back.p) == (pytest.approx(-found.value), pytest.approx(found.p))


def test_seeds_are_no_new_examples() -> None:
    """The same answers from three seeds say no more than from one; and the t is scipy's."""
    rng = np.random.default_rng(0)
    ours = {seed: (rng.random(200) < 0.8).astype(float) for seed in range(3)}
    theirs = {seed: (rng.random(200) < 0.9).astype(float) for seed in range(3)}
    found = compared(theirs, ours)
    assert found is not None
    gain_N = np.mean([theirs[s] - ours[s] for s in range(3)], axis=0)
    t, p = np.asarray(ttest_1samp(gain_N, 0.0), np.float64)
    assert found.p == pytest.approx(p) and found.value / found.stderr == pytest.approx(t)
    once = compared(dict.fromkeys([0, 1], theirs[0]), dict.fromkeys([0, 1], ours[0]))
    thrice = compared(dict.fromkeys(range(3), theirs[0]), dict.fromkeys(range(3), ours[0]))
    assert once is not None and thrice is not None
    assert thrice.stderr == pytest.approx(once.stderr)
    assert compared({0: ours[0]}, {1: ours[0]}) is None
    with pytest.raises(ValueError, match="different test examples"):
        compared({0: np.ones(3)}, {0: np.ones(4)})


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == {
        "d": pytest.approx(0.02), "a": pytest.approx(0.03), "c": pytest.approx(0.06), "b": pytest.approx(0.06),
    }  # fmt: skip
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


# ---------------------------------------------------------------------------------------------- the table


def test_ranks_errors_and_who_is_worse() -> None:
    ours = [1] * 80 + [0] * 20
    better = [1] * 100
    rows = [row(HERO, 0, ours), row("sklearn-grid", 0, better), row("keras-lstm", 0, ours), row("ours-fixed", 0, ours)]
    found = course_table.standings(rows, CELL)
    assert [(s.system, s.rank) for s in found] == [
        ("sklearn-grid", 1.0), ("keras-lstm", 3.0), ("ours-fixed", 3.0), (HERO, 3.0),
    ]  # fmt: skip
    assert course_table.best_peer(found, own=False) is found[0]
    text = course_table.table(rows)
    assert "| sklearn-grid | 1.00 | 1 |" in text and "| SIGNIFICANTLY WORSE (p = " in text


def test_a_text_is_judged_by_nats_and_lower_is_better() -> None:
    cell = Cell(TEXT, "120s", (0,))
    nats = np.array([10.0, 20.0, 30.0, 41.0])
    rows = []
    for system, scale in ((HERO, 1.0), ("gpt-trainer", 1.5), ("nanogpt-recipe", 0.9)):
        kept = {"nats": pack_nats(scale * nats), "characters": 50, "nats_a_character": scale * nats.sum() / 50}
        base = {"dataset": cell.dataset, "budget": cell.budget, "system": system, "seed": 0, "wall_s": 118.0}
        rows.append(base | kept | {"ok": True})
        assert course_table.per_example(rows[-1]).mean() == pytest.approx(-kept["nats_a_character"])
    found = {s.system: s for s in course_table.standings(rows, cell)}
    assert found["nanogpt-recipe"].rank == 1 and found["gpt-trainer"].rank == 3
    against = found["gpt-trainer"].against
    assert against is not None and against.value < 0
    assert "| tinyshakespeare 120s |" in course_table.table(rows)


# ---------------------------------------------------------------------------------------------- what is run


def test_the_plan_is_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = course.jobs([CELL], [0, 1, 2], None, ["staged", "nobody-2x"])
    assert {job.seed for job in wanted} == {0, 1}  # the cell has two seeds
    assert "skipped: ours-nobody-2x" in capsys.readouterr().out
    assert [job.system for job in wanted[:2]] == [HERO, "sklearn-grid"]
    assert course.reckoned(wanted[0], []) == 60 + course.START_S + course.TEST_GUESS_S
    assert course.reckoned(wanted[0], [row(HERO, 1, [1])]) == 70.0
    assert "| sst2 | 60s | 16 | 22 |" in course.plan(wanted, [])


def test_the_test_is_loaded_when_the_peer_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    splits = {
        "train": (["a", "b"], ["x", "y"]), "validation": (["c"], ["x"]), "test": (["a", "b", "c"], ["x", "x", "y"]),
    }  # fmt: skip

    def load(name: str, split: str) -> tuple[list[str], list[str]]:
        order.append(split)
        return splits[split]

    def learn(given: Given) -> Fitted:
        order.append("learnt")
        assert given.texts == ["a", "b"] and given.texts_v == ["c"] and given.names == ["x", "y"]
        return Fitted(lambda texts: ["x"] * len(texts), {"note": 1})

    monkeypatch.setattr(course_worker, "load", load)
    monkeypatch.setattr(course_rows, "load", load)
    monkeypatch.setattr(course_worker, "labelled", lambda system: learn)
    found = course_worker.peer("anyone", "sst2", 5.0, 0, 100)
    assert order.index("learnt") < order.index("test") and order[:2] == ["train", "validation"]
    assert found["accuracy"] == pytest.approx(2 / 3) and found["facts"] == {"note": 1}
    assert unpack_right(found["right"]).tolist() == [1.0, 1.0, 0.0]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)  # nothing is left that would end this process


def test_a_peer_that_does_not_end_is_ended() -> None:
    script = """
import time, course_worker
course_worker.limit = lambda budget_s: 0.3
course_worker.load = lambda name, split: (["a"], ["x"])
course_worker.labelled = lambda system: lambda given: time.sleep(60)
course_worker.peer("anyone", "sst2", 5.0, 0, 100)
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=BENCHMARKS, check=False)
    assert done.returncode == -signal.SIGALRM and time.monotonic() - begun < 50


def test_a_long_test_is_the_same_sample_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course_rows, "load", lambda name, split: ([""] * 90, [""] * 90))
    take = course_rows.test_rows("imdb", 40)
    assert len(set(take.tolist())) == 40 and (np.diff(take) > 0).all()
    assert np.array_equal(take, course_rows.test_rows("imdb", 40))
    assert np.array_equal(course_rows.test_rows("imdb", 90), np.arange(90))


def test_nats_of_rows_are_those_of_every_character_once() -> None:
    """With a table of pairs, which needs no context, sliding windows must give what the pairs give; a new character costs 21 bits."""
    import torch

    from peer_gpt import characters, nats_of

    rng = np.random.default_rng(0)
    found = characters("\nabc" * 30)
    log_VV = np.log(rng.dirichlet(np.ones(4), 4))
    rows = ["".join(rng.choice(list("abc\n"), size)) for size in (1, 40, 17, 100, 3)] + ["aé"]
    text = "\n" + "".join(rows)
    each = [
        21 * math.log(2) if c == "é" else -log_VV[found.known[b], found.known[c]] for b, c in itertools.pairwise(text)
    ]
    ends = np.cumsum([0, *map(len, rows)])
    wanted = [sum(each[a:b]) for a, b in itertools.pairwise(ends)]
    table = torch.from_numpy(log_VV)
    for context in (8, 16, 500):
        np.testing.assert_allclose(nats_of(lambda ids_BT: table[ids_BT], found, rows, context), wanted, rtol=1e-5)


def test_our_row_is_what_predict_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    labels = ["x"] * 10
    answers = {"predictions": [{"value": v} for v in ["x"] * 6 + ["y"] * 4]}
    monkeypatch.setattr(course_ours, "load", lambda name, split: ([""] * 10, labels))
    monkeypatch.setattr(course_ours, "multistep", lambda *words, limit_s: Ran(answers, 0, 1.0, ""))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "multistep.json").write_text('{"predictor": {"kind": "single", "model": "encoder"}}')
    row = course_ours._right(tmp_path, tmp_path / "held.jsonl.gz", "sst2", np.arange(10))
    assert row["accuracy"] == 0.6 and row["facts"] == {"stands": "single of encoder"}
    monkeypatch.setattr(course_ours, "multistep", lambda *words, limit_s: Ran({}, 2, 1.0, "no such file"))
    failed = course_ours._right(tmp_path, tmp_path / "held.jsonl.gz", "sst2", np.arange(10))
    assert failed == {"ok": False, "status": 2, "error": "predict: no such file"}


def test_a_process_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job = course.Job(CELL, "no-such-peer", 0)
    found = course.run(job, 10, tmp_path)
    assert found["ok"] is False and "no peer 'no-such-peer'" in found["error"] and found["process_s"] > 0
    json.dumps(found)


def test_arguments_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["course.py", "--systems", "trainer-comptent", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        course.main()
    assert stop.value.code == 2 and "no system trainer-comptent" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
