"""Controllers: what to try next. `ask` gives a trial, a skip (with its reason) or a reservation; `tell` brings what came of a trial.

A controller holds no clock and touches no file: it is deterministic given the problem and what it was told, so a journal replays it.
To add one: write a script (see `fixed`, the shortest), add it to CONTROLLERS."""

from collections.abc import Mapping

from multistep.controllers.fixed import fixed
from multistep.controllers.race import race
from multistep.controllers.script import Controller, Problem, Reserve, Script, Scripted, Skip
from multistep.controllers.staged import staged

CONTROLLERS: Mapping[str, Script] = {"staged": staged, "race": race, "fixed": fixed}

__all__ = ["CONTROLLERS", "Controller", "Problem", "Reserve", "Script", "Scripted", "Skip"]
