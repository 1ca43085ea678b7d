"""Controllers: what to try next. `ask` gives a trial, a skip (with its reason) or a reservation; `tell` brings what came of a trial.

A controller holds no clock and touches no file: it is deterministic given the problem and what it was told, so a journal replays it.
Searches over strategies are written against `members.Ground`, so that one text serves runs on labelled texts, on any module and on
models that write. To add one: copy the shortest (`random.py`), add it to `searches.SEARCHES`.
"""

from collections.abc import Mapping

from multistep.controllers.fixed import fixed
from multistep.controllers.race import race
from multistep.controllers.script import Controller, Problem, Reserve, Script, Scripted, Skip, Target, Wait
from multistep.controllers.searches import SEARCHES
from multistep.controllers.staged import searching, staged

CONTROLLERS: Mapping[str, Script] = {
    "staged": staged, "race": race, "fixed": fixed,
    **{name: searching(search, what) for name, (search, what) in SEARCHES.items()},
}  # fmt: skip

__all__ = ["CONTROLLERS", "Controller", "Problem", "Reserve", "Script", "Scripted", "Skip", "Target", "Wait"]
