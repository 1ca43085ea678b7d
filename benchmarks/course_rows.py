"""The cells of course.py, its systems, and what a row keeps of a test."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from _common import EXTRA_TESTS, Row, load
from _paired import pack_nats, pack_right

BENCH = "course"
TEXT = "tinyshakespeare"
OURS, DOUBLE = "ours-", "-2x"  # how a system of ours begins; how one ends that has twice the minutes
HERO = f"{OURS}staged"


class Cell(NamedTuple):
    dataset: str
    budget: str
    seeds: tuple[int, ...]


CELLS = (
    Cell("banking77", "60s", (0, 1, 2)),
    Cell("imdb", "60s", (0, 1, 2)),
    Cell("sst2", "60s", (0, 1, 2)),
    Cell("chnsenticorp", "60s", (0, 1, 2)),
    Cell(TEXT, "120s", (0, 1, 2)),
    Cell("banking77", "300s", (0, 1)),
    Cell("sst2", "300s", (0, 1)),
)
LABEL_PEERS = (
    "sklearn-grid", "frozen-grid", "trainer-defaults", "trainer-competent", "trainer-optuna", "trainer-asha", "keras-lstm",
)  # fmt: skip
TEXT_PEERS = ("nanogpt-recipe", "gpt-trainer", "gpt-optuna")
CONTROLLERS = ("staged", "fixed", "race", f"random{DOUBLE}")


def limit(budget_s: float) -> float:
    """Seconds after which a system that has not ended is killed, its reading of the test not counted."""
    return 2 * budget_s + 120


def test_rows(dataset: str, most: int) -> np.ndarray:
    """Which rows of the test are read, in order: all, or `most` of them drawn by a fixed seed, the same for every system."""
    count = len(load(dataset, "test")[1])
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


def right_row(dataset: str, found: list[str], take: np.ndarray, texts: list[str], labels: list[str]) -> Row:
    """Accuracy and which examples are right; on extra tests too, which are some of the same texts."""
    right_N = np.array([value == labels[i] for value, i in zip(found, take, strict=True)])
    row: Row = {"ok": True, "accuracy": float(right_N.mean()), "right": pack_right(right_N)}
    for extra in EXTRA_TESTS.get(dataset, ()):
        among = set(load(dataset, extra)[0])
        row[f"accuracy_{extra}"] = float(right_N[[texts[i] in among for i in take]].mean())
    return row


def nats_row(nats_N: np.ndarray, rows: list[str]) -> Row:
    characters = sum(map(len, rows))
    per_character = float(nats_N.sum()) / characters
    return {"ok": True, "nats_a_character": per_character, "characters": characters, "nats": pack_nats(nats_N)}
