"""What every run shares, whatever it learns: signals, what is shown of a record, the clock and budget of a run that goes on."""

from __future__ import annotations

import os
import platform
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from multistep import __version__, team
from multistep.budget import Budget, Clock, parse_budget
from multistep.controllers import Controller
from multistep.controllers.begin import AnyProblem, begin, is_problem, noted
from multistep.journal import Journal
from multistep.report.progress import Progress
from multistep.types import UserError


@contextmanager
def signals() -> Iterator[Any]:
    """SIGINT and SIGTERM become a number that long work asks for; a second one of them acts as usual."""
    seen = [0]
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def note(number: int, frame: object) -> None:
        if seen[0]:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        seen[0] = number

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: seen[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show(progress: Progress, record: Mapping[str, Any], clock: Clock, metric: str) -> None:
    progress.remaining(left(clock))
    match record["kind"]:
        case "Asked":
            progress.stage(record["trial"]["stage"], record["trial"]["why"])
        case "Skipped":
            progress.note(f"{record['stage']} skipped: {record['why']}")
        case "Measured":
            loss, lr = float(record["loss_nats"]), float(record["lr"])  # what is not finite is a word in a record
            progress.tick(record["progress"], f"update {record['update']}, loss {loss:.3f}, lr {lr:.2g}")
        case "Event" if "action" in record:
            progress.note(f"{record['event']} at update {record['update']}: {record['action']}")
        case "Noted" if record["what"] == "looked":
            facts = record["facts"]
            train, validation = float(facts["train_loss"]), float(facts["validation_loss"])
            progress.note(f"epoch {facts['epoch']}: training loss {train:.4f}, validation loss {validation:.4f}")
        case "Diagnosed":
            best, now = record["numbers"].get("best"), record["numbers"].get("now")
            if best and now:
                here, there = float(now["validation_loss"]), float(best["validation_loss"])
                progress.note(f"{record['name']}: validation loss {here:.4f}, at its best {there:.4f}")
            elif record.get("words"):
                progress.note(f"{record['name']}: {record['words']}")
            progress.note(f"{record['name']}: {record['action']}")
        case "Committed":
            value, stderr = map(float, record["metrics"][metric])
            progress.note(f"committed: {record['rule']}")
            progress.best(metric, value, stderr)
        case "RolledBack":
            progress.note(f"rolled back: {record['rule']}")


def left(clock: Clock) -> str:
    left = max(0.0, clock.budget.amount - clock.spent())
    return f"{left:.0f} {'s' if clock.budget.unit == 'seconds' else clock.budget.unit}"


def budget_so_far(started: Mapping[str, Any], past: Sequence[Mapping[str, Any]]) -> Budget:
    budgets = [started["budget"], *(r["budget"] for r in past if r["kind"] == "Resumed")]
    return Budget(**budgets[-1])


def more_of(total: Budget, asked: str) -> Budget:
    """The budget of a run that had `total`: "+5m" adds to it, "10m" is a new total. Raises UserError where that would
    not be more of the same."""
    given = parse_budget(asked.removeprefix("+"))
    added = total.plus(given)  # in the same unit
    if asked.startswith("+"):
        return added
    if given.amount <= total.amount:
        raise UserError(f"budget: the run has {total} already, {given} is not more. Give a larger total, or +{given}.")
    return given


def resumed(book: Journal, clock: Clock, extended: bool) -> dict[str, Any]:
    """The record that a run goes on; `extended`: with more than it had."""
    together = {"processes": team.size()} if team.size() > 1 else {}
    return book.append("Resumed", clock=clock.save(), budget=clock.budget, extended=extended, **together)


def clock_then(past: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The clock to go on from: all the wall time; updates and tokens of finished trials (a live one brings its own)."""
    told = [r for r in past if r["kind"] == "Told"]
    counts = told[-1]["clock"] if told else {"updates": 0, "tokens": 0}
    return {**counts, "wall_s": past[-1]["clock"]["wall_s"]}


def controller_of(
    problem: AnyProblem, name: str, book: Journal, clock: Clock, past: Sequence[Mapping[str, Any]]
) -> Controller:
    """The run's controller; what it is given is written down once, so that the journal alone can be replayed. `past`: the journal so far,
    which a resumed run goes on with."""
    over = bool(past) and past[-1]["kind"] == "Finished"
    if not over and not any(map(is_problem, past)):
        book.append("Noted", clock=clock.save(), **noted(problem, name))
    return begin(problem, name, past)


def versions() -> dict[str, str]:
    import torch
    import transformers

    return {"multistep": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def machine_facts(device: str) -> dict[str, Any]:
    facts = {
        "cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(), "device": device,
    }  # fmt: skip
    return facts | ({"processes": team.size()} if team.size() > 1 else {})


def check_same_data(source: str, fingerprint: str, past: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError when a run would go on with other data than it began with."""
    then = next((r["fingerprint"] for r in past if r["kind"] == "Data"), fingerprint)
    if then != fingerprint:
        raise UserError(f"{source}: the data changed since the run began. Start a new run with another --out.")
