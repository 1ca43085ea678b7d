"""Texts of many requests written together, token by token, by one thread.

Requests with the same settings are one group: their rows take every step together. Groups take turns, so a request that comes while
others are written begins at once and waits for nobody's end; what has ended leaves its group. Between two steps a row whose client
left or whose time is up is written no further. A beam search is one step, which ends early when nobody waits for it any more.
What a request gets does not depend on its company, up to the rounding of sums in batches of other shapes (`multistep.generate`).
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multistep.generate import BEAMS, OneByOne, Written, beam_search, held
from multistep.models.step import Stepper, stepper_of
from multistep.predictors.decoding import Beam, Decoding, Greedy, Sample
from multistep.serve.limits import Refused
from multistep.serve.numbers import Numbers

GROUPS = 3  # that take turns; each has a stepper, which may hold a copy of the weights
_WAIT_S = 0.002  # for requests on their way, where nobody is written for


@dataclass(frozen=True)
class Asking:
    """One text to write. `request`: whose random numbers it draws; `stops`: texts that end it and are cut off; `strip`: without white
    space around it."""

    prompt: np.ndarray
    decoding: Decoding
    ends: tuple[int, ...]
    request: int = 0
    stops: tuple[str, ...] = ()
    strip: bool = False


@dataclass(frozen=True)
class Said:
    """`finish`: "stop" by an end token or a stop text, "length" by the number of tokens. `written`: with its mean score."""

    text: str
    finish: str
    written: Written


class Shown:
    """What of a text may be shown while it is written: whole characters, nothing that could become a stop text or white space that
    will be cut off."""

    def __init__(self, stops: Sequence[str], strip: bool):
        self._stops, self._strip = tuple(s for s in stops if s), strip
        self._given = ""

    def cut(self, text: str) -> tuple[str, bool]:
        """The text up to the first stop text; whether there was one."""
        places = [at for s in self._stops if (at := text.find(s)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def piece(self, text: str) -> str:
        """What is new in a text that goes on."""
        text = text.rstrip("\ufffd")  # the beginning of a character
        text = text[: len(text) - held(text, self._stops)]
        return self._new(text.strip() if self._strip else text)

    def last(self, text: str) -> str:
        """What is new in a text that is whole."""
        return self._new(text)

    def _new(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""
        new, self._given = text[len(self._given) :], text
        return new


@dataclass(eq=False)
class _Line:
    """A text that is being written, for `owner`."""

    asking: Asking
    number: int
    owner: Writing
    shown: Shown = field(init=False)

    def __post_init__(self) -> None:
        self.shown = Shown(self.asking.stops, self.asking.strip)


class Writing:
    """The texts of a request. `future`: all of them, when they are whole. `pieces`: (number, new text, Said at its end), where
    `streams`. Belongs to the event loop's thread, but for `left`, which the writing thread reads."""

    def __init__(self, askings: Sequence[Asking], streams: bool):
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[Said]] = self.loop.create_future()
        self.pieces: asyncio.Queue[tuple[int, str, Said | None] | Exception] = asyncio.Queue()
        self.streams, self.left, self.begun = streams, False, False
        self.said: list[Said | None] = [None for _ in askings]
        self.lines = [_Line(a, n, self) for n, a in enumerate(askings)]

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self.left = True
        self.future.cancel()

    def take(self, number: int, new: str, said: Said | None) -> None:
        if self.streams and (new or said is not None):
            self.pieces.put_nowait((number, new, said))
        if said is not None:
            self.said[number] = said
            if all(s is not None for s in self.said) and not self.future.done():
                self.future.set_result([s for s in self.said if s is not None])

    def fail(self, error: Exception) -> None:
        if self.streams:
            self.pieces.put_nowait(error)
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # it is seen, whether or not somebody still waits


class Writer:
    """`model`: what `stepper_of` takes; `text`: token ids to text; `most`: rows at once; `room`: texts that may wait."""

    def __init__(
        self, model: Any, text: Callable[[Sequence[int]], str], most: int, room: int, numbers: Numbers,
    ):  # fmt: skip
        self._model, self._text, self._most, self._room, self._numbers = model, text, most, room, numbers
        self._inbox: queue.SimpleQueue[_Line | None] = queue.SimpleQueue()
        self._queued: set[_Line] = set()  # put by the event loop, taken away by the thread
        self._idle: list[Stepper] = []
        self._line_s = 0.0
        self.arriving = 0
        self._thread = threading.Thread(target=self._work, name="write", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._queued)

    def ask(self, askings: Sequence[Asking], streams: bool = False) -> Writing:
        """Begin to write. Raises Refused (429) where the queue is full."""
        if self._queued and len(self._queued) + len(askings) > self._room:
            after = len(self._queued) * self._line_s
            raise Refused(429, f"{len(self._queued)} texts are waiting; try again later.", after_s=after)
        writing = Writing(askings, streams)
        for line in writing.lines:
            self._queued.add(line)
            self._inbox.put(line)
        return writing

    def close(self) -> None:
        self._inbox.put(None)

    # ------------------------------------------------------------------ the thread

    def _work(self) -> None:
        waiting: list[_Line] = []
        groups: list[_Group] = []
        while True:
            fresh = not groups and not waiting
            try:
                while True:
                    line = self._inbox.get(block=not groups and not waiting)
                    if line is None:
                        return
                    waiting.append(line)
                    if fresh and self.arriving and len(waiting) < self._most:
                        time.sleep(_WAIT_S)
                        fresh = False
                    if self._inbox.empty():
                        break
            except queue.Empty:
                pass
            self._queued.difference_update(gone := [line for line in waiting if line.owner.left])
            waiting = [line for line in waiting if line not in gone]
            while waiting and len(groups) < GROUPS and (room := self._most - sum(len(g.live) for g in groups)) > 0:
                lines = self._same(waiting, room)
                waiting = [line for line in waiting if line not in lines]
                self._queued.difference_update(lines)
                try:
                    groups.append(
                        _Group(self._idle.pop() if self._idle else stepper_of(self._model), lines, self._text)
                    )
                except Exception as error:  # no memory for another stepper
                    self._fail(lines, error)
            for group in list(groups):
                if not self._step(group):
                    groups.remove(group)
                    self._idle.append(group.stepper)

    def _same(self, waiting: Sequence[_Line], room: int) -> list[_Line]:
        """The oldest line and those that can be written with it."""
        key = _key(waiting[0].asking)
        if isinstance(key[0], Beam):
            room = max(1, min(room, BEAMS // key[0].beams))
        return [line for line in waiting if _key(line.asking) == key][:room]

    def _step(self, group: _Group) -> bool:
        """One step of a group; False when it is at its end."""
        try:
            going = group.step()
        except Exception as error:
            self._fail(list(group.live.values()), error)
            return False
        told: dict[asyncio.AbstractEventLoop, list[tuple[_Line, str, Said | None]]] = {}
        for line, new, said in group.out:
            told.setdefault(line.owner.loop, []).append((line, new, said))
        for loop, out in told.items():
            _call(loop, _tell, out)
        group.out.clear()
        if not going:
            took = time.perf_counter() - group.begun
            self._numbers.batch(len(group.lines), took)
            self._line_s = took / len(group.lines)
        return going

    def _fail(self, lines: Sequence[_Line], error: Exception) -> None:
        for line in lines:
            _call(line.owner.loop, line.owner.fail, error)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop was closed: the server is gone
        pass


def _tell(out: Sequence[tuple[_Line, str, Said | None]]) -> None:
    for line, new, said in out:
        line.owner.take(line.number, new, said)


def _key(asking: Asking) -> tuple[Decoding, tuple[int, ...]]:
    """What lines of one group have in common. How long each may become is its own, but for beams, whose search it changes."""
    decoding = asking.decoding
    return (decoding if isinstance(decoding, Beam) else decoding.with_(max_new_tokens=1)), asking.ends


class _Group:
    def __init__(self, stepper: Stepper, lines: list[_Line], text: Callable[[Sequence[int]], str]):
        self.stepper, self.lines, self.text = stepper, lines, text
        self.live = dict(enumerate(lines))
        self.out: list[tuple[_Line, str, Said | None]] = []
        self.begun = time.perf_counter()
        for line in lines:
            line.owner.begun = True
        first = lines[0].asking
        prompts = [line.asking.prompt for line in lines]
        self._writing: OneByOne | None = None
        if isinstance(first.decoding, Greedy | Sample):
            longest = max(line.asking.decoding.max_new_tokens for line in lines)
            decoding = first.decoding.with_(max_new_tokens=longest)
            requests = [line.asking.request for line in lines]
            self._writing = OneByOne(stepper, prompts, decoding, first.ends, self.text, requests)
            self._steps: Iterator[dict[int, int]] = iter(self._writing)

    def step(self) -> bool:
        """One token of every row; `out` gets what is new. False when all have ended."""
        if self._writing is None:
            return self._search()
        new = next(self._steps, None)
        for row, line in list(self.live.items()):
            written = self._writing.written[row]
            if new is None:
                self._end(row, written, written.score)
                continue
            mean = written.score / max(1, len(written.ids) + written.ended)
            if row not in new:
                self._end(row, written, mean)
            elif line.owner.left:
                self._drop(row)
            else:
                self._show(row, written, mean)
        return new is not None and bool(self.live)

    def _show(self, row: int, written: Written, mean: float) -> None:
        line = self.live[row]
        full = len(written.ids) >= line.asking.decoding.max_new_tokens
        if not (line.owner.streams or line.asking.stops or full):
            return
        text, stopped = line.shown.cut(self.text(written.ids))
        if stopped or full:
            self._end(row, written, mean, stopped)
        elif line.owner.streams and (piece := line.shown.piece(text)):
            self.out.append((line, piece, None))

    def _end(self, row: int, written: Written, mean: float, stopped: bool = False) -> None:
        line = self.live[row]
        text, found = line.shown.cut(self.text(written.ids))
        text = text.strip() if line.asking.strip else text
        finish = "stop" if written.ended or stopped or found else "length"
        said = Said(text, finish, Written(list(written.ids), mean, written.ended))
        self.out.append((line, line.shown.last(text), said))
        self._drop(row)

    def _drop(self, row: int) -> None:
        del self.live[row]
        if self._writing is not None:
            self._writing.leaving.add(row)

    def _search(self) -> bool:
        first = self.lines[0].asking
        assert isinstance(first.decoding, Beam)
        prompts = [line.asking.prompt for line in self.lines]
        try:
            found = beam_search(_Watched(self.stepper, self.lines), prompts, first.decoding, first.ends, self.text)
        except _NobodyWaits:
            return False
        for row, (written, *_) in enumerate(found):
            self._end(row, written, written.score)
        return False


class _NobodyWaits(Exception):
    pass


@dataclass
class _Watched:
    """A stepper that ends when nobody waits for its lines."""

    inner: Stepper
    lines: Sequence[_Line]

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        return self.inner.start(prompts)

    def step(self, tokens_B: Tensor) -> Tensor:
        if all(line.owner.left for line in self.lines):
            raise _NobodyWaits
        return self.inner.step(tokens_B)

    def keep(self, rows: torch.Tensor) -> None:
        self.inner.keep(rows)
