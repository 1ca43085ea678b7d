"""Micro-batches across requests: texts of many requests are answered together, in their order, by one thread.

A batch goes as soon as the thread is free. It waits, a few milliseconds at most, only while it is not full and other requests are on
their way (their heads are here, their bodies are not): a lone request never waits. What has waited too long or whose client left is
dropped before it costs anything; a request of many texts is cut into batches, so it can be dropped between them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from multistep.serve.limits import Refused
from multistep.serve.numbers import Numbers

WAIT_S = 0.002  # for others on their way
_SLOW = 0.9  # weight of the past in the mean time of a text

T = TypeVar("T")
R = TypeVar("R")
Waits = Callable[
    [asyncio.Future[Any]], Awaitable[Any]
]  # how a request waits for its answer; raises where its client left


async def plainly(future: asyncio.Future[Any]) -> Any:
    return await future


class _Job(Generic[T, R]):
    """The texts of a request. `taken`: how many of them were given to the thread."""

    __slots__ = ("answers", "future", "items", "taken")

    def __init__(self, items: Sequence[T], future: asyncio.Future[list[R]]):
        self.items, self.future = items, future
        self.answers: list[R] = []
        self.taken = 0


class Batcher(Generic[T, R]):
    """`work` maps texts to as many answers; it runs in one thread and need not be thread-safe. `most`: texts of a batch; `room`: texts
    that may wait. All methods belong to the event loop's thread."""

    def __init__(self, work: Callable[[list[T]], Sequence[R]], most: int, room: int, numbers: Numbers):
        self._work, self._most, self._room, self._numbers = work, most, room, numbers
        self._jobs: deque[_Job[T, R]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="predict")
        self._running = False
        self._text_s = 0.0  # mean seconds a text, lately
        self.waiting = 0  # texts in the queue
        self.arriving = 0  # requests whose bodies are being read
        self._came = asyncio.Event()

    async def ask(self, items: Sequence[T], seconds: float, waits: Waits = plainly) -> list[R]:
        """The answers to `items`, in order. Raises Refused: 429 where the queue is full, 503 where the time ran out in it, 504 where
        it ran out while the answer was made. Cancelling it drops what is still queued."""
        if self.waiting and self.waiting + len(items) > self._room:
            raise Refused(429, f"{self.waiting} texts are waiting; try again later.", after_s=self._backlog_s())
        loop = asyncio.get_running_loop()
        job: _Job[T, R] = _Job(items, loop.create_future())
        self._jobs.append(job)
        self.waiting += len(items)
        self._came.set()
        if not self._running:
            self._running = True
            self._task = loop.create_task(self._run())
        timer = loop.call_later(seconds, self._late, job, seconds)
        try:
            return await waits(job.future)
        finally:
            timer.cancel()
            job.future.cancel()
            self._forget(job)

    def _late(self, job: _Job[T, R], seconds: float) -> None:
        if not job.future.done():
            queued = job.taken == 0
            words = "waited in the queue" if queued else "was being answered"
            status = 503 if queued else 504
            job.future.set_exception(
                Refused(status, f"the request {words} for {seconds:g} s.", after_s=self._backlog_s())
            )

    def _forget(self, job: _Job[T, R]) -> None:
        """Drop what of a job is still queued."""
        if job.taken < len(job.items):
            self.waiting -= len(job.items) - job.taken
            job.taken = len(job.items)
            self._jobs.remove(job)

    def _backlog_s(self) -> float:
        return self.waiting * self._text_s

    # ------------------------------------------------------------------ the loop that makes batches

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._jobs:
                if self.waiting < self._most and self.arriving:
                    await self._others()
                parts = self._take()
                if not parts:
                    continue
                items = [item for job, start, end in parts for item in job.items[start:end]]
                begun = time.perf_counter()
                try:
                    answers = await loop.run_in_executor(self._thread, self._work, items)
                except Exception as error:
                    await self._one_by_one(parts, error)
                else:
                    took = time.perf_counter() - begun
                    self._numbers.batch(len(items), took)
                    self._text_s = (
                        _SLOW * self._text_s + (1 - _SLOW) * took / len(items) if self._text_s else took / len(items)
                    )
                    place = 0
                    for job, start, end in parts:
                        self._give(job, answers[place : place + end - start])
                        place += end - start
        finally:
            self._running = False

    async def _others(self) -> None:
        """Wait for requests on their way, until the batch is full or the time is up."""
        until = time.perf_counter() + WAIT_S
        while self.arriving and 0 < self.waiting < self._most and (left := until - time.perf_counter()) > 0:
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), left)
            except TimeoutError:
                return

    def _take(self) -> list[tuple[_Job[T, R], int, int]]:
        """Texts for one batch: (job, from, to)."""
        parts: list[tuple[_Job[T, R], int, int]] = []
        free = self._most
        while self._jobs and free:
            job = self._jobs[0]
            end = min(len(job.items), job.taken + free)
            parts.append((job, job.taken, end))
            free -= end - job.taken
            self.waiting -= end - job.taken
            job.taken = end
            if end == len(job.items):
                self._jobs.popleft()
        return parts

    async def _one_by_one(self, parts: Sequence[tuple[_Job[T, R], int, int]], error: Exception) -> None:
        """A batch failed: who is to blame? Each request alone, so that one bad text fails its own request only."""
        for job, start, end in parts:
            if job.future.done():
                continue
            if len(parts) > 1:
                try:
                    answers = await asyncio.get_running_loop().run_in_executor(
                        self._thread, self._work, list(job.items[start:end])
                    )
                    self._give(job, answers)
                    continue
                except Exception as own:
                    error = own
            self._forget(job)
            if not job.future.done():  # its client may have left while it was asked alone
                job.future.set_exception(error)

    def _give(self, job: _Job[T, R], answers: Sequence[R]) -> None:
        job.answers += answers
        if len(job.answers) == len(job.items) and not job.future.done():
            job.future.set_result(job.answers)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
