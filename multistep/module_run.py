"""The folder of a run of `optimize`: begun, gone on with where it was stopped, given more budget when it is finished.

The same call with the same folder does all of it. What was chosen by rule is chosen by the budget that the run began with, so it stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from multistep import __version__, journal, team
from multistep.budget import Budget, Clock
from multistep.controllers.module_plan import ModuleProblem
from multistep.files import check_new
from multistep.journal import Journal
from multistep.session import budget_so_far, clock_then, machine_facts, resumed
from multistep.state import sweep
from multistep.types import UserError

Records = list[dict[str, Any]]


def first_budget(out: str | Path | None, asked: Budget) -> Budget:
    """That of the run in this folder when it began; of a run that begins here what is asked for."""
    path = None if out is None else Path(out) / "journal.jsonl"
    past = [] if path is None or not path.exists() else journal.read(path)
    return next((Budget.parse(r["budget"], "budget") for r in past if r["kind"] == "Started"), asked)


def open_run(
    folder: Path, asked: Mapping[str, Any], fingerprint: str, metric: str, clock: Clock, total: Budget, device: str
) -> tuple[Journal, Records]:
    """The journal and its records so far: begun here, or that of a run which was stopped and now goes on, or is finished. The clock's
    budget is what that run has; `total`: what is asked for now. Raises UserError where it is not the same run, or not more of it."""
    path = folder / "journal.jsonl"
    problem: ModuleProblem = asked["problem"]
    if not path.exists():
        check_new(folder)
        book = Journal(path)
        first = book.append(
            "Started", clock=clock.save(), config=asked, budget=clock.budget, metric=metric,
            versions={"multistep": __version__, "torch": torch.__version__}, machine=machine_facts(device),
        )  # fmt: skip
        (folder / "states").mkdir(exist_ok=True)
        data = book.append("Data", clock=clock.save(), report={"rows": problem.rows}, fingerprint=fingerprint)
        return book, [first, data]
    sweep(folder / "states")
    team.sweep(folder / "states")
    past = journal.read(path)
    then = next((r["config"] for r in past if r["kind"] == "Started"), None)
    now = TypeAdapter(dict[str, Any]).dump_python(dict(asked), mode="json")
    if then != now:
        raise UserError(f"{folder}: there is another run already (its settings differ). Choose another out=.")
    with_what = next((r["fingerprint"] for r in past if r["kind"] == "Data"), "")
    if with_what not in ("", fingerprint):
        raise UserError(f"{folder}: the run there has other data or another module. Choose another out=.")
    so_far = budget_so_far(next(r for r in past if r["kind"] == "Started"), past)
    if total.unit != so_far.unit:
        raise UserError(f"budget: the run in {folder} has {so_far}, {total} is another unit. Give it in {so_far.unit}.")
    if total.amount < so_far.amount:
        raise UserError(f"budget: the run in {folder} has {so_far} already, {total} is less. Give that, or more.")
    clock.budget = so_far
    clock.restore(clock_then(past))
    book = Journal(path)
    if past[-1]["kind"] != "Finished":
        past.append(resumed(book, clock, extended=False))
    return book, past


def given_more(folder: Path, book: Journal, clock: Clock, total: Budget) -> Records:
    """The records of a run that is finished, and goes on with a larger budget. Raises UserError where that is spent already."""
    clock.budget = total
    if clock.remaining() <= 0:
        raise UserError(f"budget: {total} is already spent by the run in {folder}. Give it more.")
    return [*journal.read(folder / "journal.jsonl"), resumed(book, clock, extended=True)]
