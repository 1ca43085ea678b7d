"""What the peers of course.py share: what they are given, their clock, what they give back.

A peer is a function: Given -> Fitted (texts and labels), or GivenText -> FittedText (a running text). The test is in neither, so a
peer cannot look at it; course_worker.py loads it when the peer has returned, and asks once. No torch here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from _common import Row


class Clock:
    """Wall seconds since it was made, of a limit."""

    def __init__(self, limit_s: float):
        self.limit_s, self._start = limit_s, time.monotonic()

    @property
    def used_s(self) -> float:
        return time.monotonic() - self._start

    def give_back(self, seconds: float) -> None:
        """Seconds that were used and do not count."""
        self._start += seconds

    @property
    def left_s(self) -> float:
        return self.limit_s - self.used_s


class Given(NamedTuple):
    """Labelled texts to learn from, and those of the validation split to choose with."""

    dataset: str
    texts: list[str]
    labels: list[str]
    texts_v: list[str]
    labels_v: list[str]
    seed: int
    clock: Clock

    @property
    def names(self) -> list[str]:
        """The classes, sorted; a label's number is its place."""
        return sorted(set(self.labels))


class Fitted(NamedTuple):
    """Texts to labels; and what is worth keeping in the row: settings, counts, seconds of parts."""

    predict: Callable[[list[str]], list[str]]
    facts: Row


class GivenText(NamedTuple):
    """A running text, in order. What a peer chooses with it takes from the end of it."""

    text: str
    seed: int
    clock: Clock


class FittedText(NamedTuple):
    """Rows of a text that goes on from row to row -> the nats of each row's characters [N]."""

    nats: Callable[[list[str]], np.ndarray]
    facts: Row


def best_of(scores: dict[int, float]) -> int:
    """The number with the highest score; a tie goes to the earlier."""
    return min(scores, key=lambda number: (-scores[number], number))
