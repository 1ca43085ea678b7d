"""One clock that pays for everything, in seconds, updates or tokens.

The clock can be saved and restored: a resumed run goes on with what was left. Under budgets in updates or tokens nothing
here depends on the wall, so a run can be repeated bit for bit.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

from multistep.types import Spec, Unit, UserError

_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_COUNTS: dict[str, Unit] = {"update": "updates", "updates": "updates", "token": "tokens", "tokens": "tokens"}


class Budget(Spec):
    """An amount in one unit. `str(budget)` parses back to it."""

    amount: float
    unit: Unit = "seconds"

    def __str__(self) -> str:
        amount = repr(self.amount).removesuffix(".0")
        return f"{amount}s" if self.unit == "seconds" else f"{amount} {self.unit}"

    def plus(self, other: Budget) -> Budget:
        """The sum; raises UserError when the units differ."""
        if other.unit != self.unit:
            raise UserError(
                f"budget: cannot add {other.unit} to a run budgeted in {self.unit}. Give +N in {self.unit}."
            )
        return Budget(amount=self.amount + other.amount, unit=self.unit)


def parse_budget(text: str | float | Budget) -> Budget:
    """'30s', '10m', '2h', '1h30m', '5000 updates', '2e6 tokens' -> Budget. A bare number is seconds.

    Raises UserError naming the value when it is not one of these or not positive.
    """
    if isinstance(text, Budget):
        return text
    raw = str(text).strip().lower()
    mend = "Write 30s, 10m, 2h, '5000 updates' or '2e6 tokens'."
    number = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
    if match := re.fullmatch(rf"{number}\s*(updates?|tokens?)", raw):
        budget = Budget(amount=float(match[1]), unit=_COUNTS[match[2]])
    elif re.fullmatch(number, raw):
        budget = Budget(amount=float(raw))
    elif re.fullmatch(rf"(?:{number}\s*(?:s|sec|m|min|h|d)\s*)+", raw):
        parts = re.findall(rf"{number}\s*(sec|min|s|m|h|d)", raw)
        budget = Budget(amount=sum(float(n) * _SECONDS[u] for n, u in parts))
    else:
        raise UserError(f"budget: {str(text)!r} is not a budget. {mend}")
    if not (math.isfinite(budget.amount) and budget.amount > 0):
        raise UserError(f"budget: {str(text)!r} must be above zero. {mend}")
    return budget


class Clock:
    """Counts what a run has spent. Wall time always runs; updates and tokens are told with `spend`."""

    def __init__(self, budget: Budget, now: Callable[[], float] = time.monotonic, started: float | None = None):
        self.budget = budget
        self.updates = 0
        self.tokens = 0
        self._now = now
        self._before_s = 0.0  # wall seconds of earlier processes of this run
        self._start = now() if started is None else started
        self._reserved: dict[str, float] = {}

    def spend(self, updates: int = 0, tokens: int = 0) -> None:
        self.updates += updates
        self.tokens += tokens

    @property
    def wall_s(self) -> float:
        return self._before_s + self._now() - self._start

    def spent(self) -> float:
        """In the budget's unit."""
        return {"seconds": self.wall_s, "updates": float(self.updates), "tokens": float(self.tokens)}[self.budget.unit]

    def reserve(self, name: str, amount: float) -> None:
        """Set aside `amount` (in the budget's unit) for the stage `name`; replaces what it had. 0 releases it."""
        self._reserved[name] = max(0.0, amount)

    def remaining(self) -> float:
        """What is left after all reservations. Never negative."""
        return max(0.0, self.budget.amount - self.spent() - sum(self._reserved.values()))

    def save(self) -> dict[str, Any]:
        return {"wall_s": round(self.wall_s, 3), "updates": self.updates, "tokens": self.tokens}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what earlier processes of the run had spent."""
        self._before_s = float(saved["wall_s"])
        self.updates = int(saved["updates"])
        self.tokens = int(saved["tokens"])
