"""What is going on, on standard error: a status line on a terminal, sparse plain lines elsewhere, nothing when quiet.

Standard output is never touched, so `--json` stays one object. A reader that goes away (closed pipe) never stops a run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from multistep.report.words import plus_minus

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

EVERY_S = 5.0  # without a terminal: at most one line in this many seconds about how far a stage is


class Progress:
    """Tells a person how far a run is. Not thread-safe: one loop calls it."""

    def __init__(
        self, quiet: bool = False, stream: TextIO | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._now = now
        self._stage = ""
        self._doing = ""
        self._best = ""
        self._left = ""
        self._last_tick_s = -EVERY_S
        self._console: Console | None = None
        self._status: Status | None = None
        if not quiet and self._stream.isatty():
            self._open_terminal()

    def _open_terminal(self) -> None:
        from rich.console import Console
        from rich.status import Status

        self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        if not self._console.is_dumb_terminal:
            self._status = Status("", console=self._console)
            self._status.start()

    def stage(self, name: str, why: str = "") -> None:
        """A new stage begins."""
        self._stage, self._doing, self._last_tick_s = name, "", -EVERY_S
        self._say(f"{name}: {why}" if why else name)
        self._refresh()

    def note(self, line: str) -> None:
        """Something worth keeping on the screen."""
        self._say(f"  {line}")

    def best(self, metric: str, value: float, stderr: float) -> None:
        """The incumbent's score on validation data."""
        best = f"best {metric} {plus_minus(value, stderr)}"
        if best != self._best:
            self._best = best
            if self._status is None:
                self._say(f"  {best}")
        self._refresh()

    def tick(self, done_fraction: float | None = None, text: str = "") -> None:
        """How far the stage is (0..1, None when unknown) and what it does now. Cheap: call it at every update."""
        if self._quiet:
            return
        now_s = self._now()
        pause_s = EVERY_S if self._status is None else 0.1
        if now_s - self._last_tick_s < pause_s:
            return
        self._last_tick_s = now_s
        share = "" if done_fraction is None else f"{100 * min(1.0, max(0.0, done_fraction)):.0f} %"
        self._doing = " ".join(p for p in (share, text) if p)
        if self._status is None and self._doing:
            self._say("  " + ", ".join(p for p in (self._doing, self._left) if p))
        self._refresh()

    def remaining(self, text: str) -> None:
        """What is left of the budget, in words ('1 min 12 s', '300 updates')."""
        self._left = f"{text} left" if text else ""
        self._refresh()

    def close(self) -> None:
        """Take the status line away. May be called twice."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _refresh(self) -> None:
        if self._status is not None:
            from rich.text import Text

            parts = [p for p in (self._stage, self._doing, self._best, self._left) if p]
            self._status.update(Text(" · ".join(parts), no_wrap=True, overflow="ellipsis"))

    def _say(self, line: str) -> None:
        if self._quiet:
            return
        try:
            if self._console is not None:
                self._console.print(line, soft_wrap=True)
            else:
                self._stream.write(line + "\n")
                self._stream.flush()
        except (OSError, ValueError):  # nobody reads any more
            self._quiet = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
