"""A run's folder as a page in a file: what it came to, every decision with its evidence, and what the replay of its journal says."""

from __future__ import annotations

import os
from pathlib import Path

from multistep import journal
from multistep.replay import replay_run
from multistep.report.page import page
from multistep.report.run import policy_of


def write_page(run_dir: Path, path: Path) -> Path:
    """Write it to `path`, whole or not at all. Works while the run still goes on. Raises UserError where there is no run, OSError."""
    records = journal.read(run_dir / "journal.jsonl")
    replayed = [
        (None if r.unknown and not r.findings else r.ok, str(r), [str(f) for f in r.findings])
        for r in replay_run(run_dir)
    ]
    text = page(records, run_dir.resolve().name, replayed, policy_of(run_dir))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    return path
