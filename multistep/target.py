"""A score at which training ends, from what a user writes: `--until f1=0.93`. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from multistep.controllers.script import Target
from multistep.types import UserError


def read_target(
    text: str | None, metric: str, measured: Sequence[str], check: Callable[[str], str], higher: Callable[[str], bool]
) -> Target | None:
    """The target that `text` names: "f1=0.93", or "0.93" of the metric that decides. None where nothing is asked for.

    `measured`: the metrics that every trial has; `check`: a metric's full name; `higher`: whether more of it is better. Raises UserError.
    """
    if text is None:
        return None
    name, equals, number = text.rpartition("=")
    found = check(name.strip()) if equals else metric
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"until: {text!r} is not METRIC=VALUE. Write it like f1=0.93.")
    if found not in measured:
        raise UserError(f"until: {found} is not measured in this run. Known: {', '.join(measured)}.")
    return Target(metric=found, value=value, higher_is_better=higher(found))
