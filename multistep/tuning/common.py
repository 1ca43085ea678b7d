"""What tuning shares, whatever a model gives: where its journal is, and when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multistep import journal
from multistep.config import FitConfig
from multistep.journal import Journal
from multistep.types import UserError

FILE = "tuning.jsonl"
LEAST = 20  # rows or records to judge with
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
