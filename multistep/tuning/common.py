"""What tuning shares, whatever a model gives: where its journal is, and when it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from multistep import journal
from multistep.budget import Budget, Clock
from multistep.config import FitConfig
from multistep.controllers.script import Controller
from multistep.journal import Journal
from multistep.policy import Policy
from multistep.report.progress import Progress
from multistep.session import clock_then, show, versions
from multistep.tune import Works, tune
from multistep.types import UserError

FILE = "tuning.jsonl"
TUNED = "How it predicts"  # the card's section


def config_of(run_dir: Path) -> tuple[FitConfig, list[dict[str, Any]]]:
    """A run's configuration and its journal. Raises UserError where there is no run."""
    if not (run_dir / "journal.jsonl").exists() and (run_dir / "multistep.json").exists():
        raise UserError(f"{run_dir}: a bundle alone. Tuning reads the run's data too: give the run's folder.")
    past = journal.read(run_dir / "journal.jsonl")
    started = next((r for r in past if r["kind"] == "Started"), None)
    if started is None:
        raise UserError(f"{run_dir}: its journal has no beginning. Start the run again with another --out.")
    return FitConfig.parse({**started["config"], "out": str(run_dir)}), past


def tuning_journal(path: Path, settings: Mapping[str, Any]) -> tuple[Journal, list[dict[str, Any]]]:
    """The journal, and what it holds where a tuning with the same settings was stopped; another one is put aside (tuning-1.jsonl)."""
    if path.exists():
        past = journal.read(path)
        same = bool(past) and past[-1]["kind"] != "Finished" and all(past[0].get(k) == v for k, v in settings.items())
        if same:
            return Journal(path), past
        number = 1
        while path.with_name(f"{path.stem}-{number}.jsonl").exists():
            number += 1
        path.rename(path.with_name(f"{path.stem}-{number}.jsonl"))
    return Journal(path), []


def opened(
    path: Path, settings: Mapping[str, Any], budget: Budget, facts: Mapping[str, Any]
) -> tuple[Journal, list[dict[str, Any]], Clock]:
    """The journal, what it holds by now, and the clock. `facts`: what the first record says beside the settings."""
    book, lived = tuning_journal(path, settings)
    clock = Clock(budget)
    if lived:
        clock.restore(clock_then(lived))
        lived.append(book.append("Resumed", clock=clock.save(), budget=budget, extended=False))
    else:
        lived = [book.append("Started", clock=clock.save(), budget=budget, versions=versions(), **facts, **settings)]
    return book, lived, clock


class Predicts(Works, Protocol):
    """What tries ways to predict, and knows the policy that comes of them."""

    def policy(self, skipped: Sequence[Mapping[str, str]] = ()) -> Policy: ...

    def ship(self, policy: Policy | None = None) -> None: ...


def driven(
    works: Predicts, controller: Controller, book: Journal, lived: list[dict[str, Any]], metric: str, progress: Progress
) -> Policy:
    """Tune to the end: what was found, shipped with what was not begun and why."""
    for record in tune(works, controller, book, list(lived)):
        lived.append(record)
        show(progress, record, works.clock, metric)
    skipped = [r["why"].partition(": ") for r in lived if r["kind"] == "Skipped"]
    policy = works.policy([{"name": name, "why": why} for name, _, why in skipped])
    works.ship(policy)
    book.append("Finished", clock=works.clock.save(), wall_s=works.clock.wall_s, pick=policy.pick)
    return policy
