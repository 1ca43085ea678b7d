"""A run's folder in words: how it was made, from its journal, and how it was tuned to predict, from the policy of its bundle."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from multistep.files import read_info
from multistep.report.explain import explain
from multistep.report.policy import explain_policy, explain_tuning
from multistep.report.summary import summary
from multistep.types import UserError


def explain_run(run_dir: Path) -> str:
    """All that is known of a run, and of its tuning, also while it is still going on."""
    from multistep import journal  # with numpy, which no help text waits for

    parts = [explain(journal.read(run_dir / "journal.jsonl")).rstrip()]
    tuning = run_dir / "tuning.jsonl"
    if tuning.exists():
        records = journal.read(tuning)
        policy = policy_of(run_dir)
        finished = bool(records) and records[-1]["kind"] == "Finished"
        said = explain_policy(policy) if finished and policy is not None else explain_tuning(records)
        parts.append(f"How it predicts\n\n{said.rstrip()}")
    return "\n\n".join(parts) + "\n"


def summary_of_run(run_dir: Path) -> dict[str, Any]:
    """The same as one dictionary; "policy" is that of the bundle, where it was tuned."""
    from multistep import journal

    return {**summary(journal.read(run_dir / "journal.jsonl")), "policy": policy_of(run_dir)}


def policy_of(run_dir: Path) -> dict[str, Any] | None:
    """The policy in the run's bundle, or in the bundle itself; None where there is none, or the bundle is damaged: the journal is told all
    the same."""
    for folder in (run_dir / "model", run_dir):
        if (folder / "multistep.json").exists():
            with suppress(UserError):
                return read_info(folder).get("policy")
            return None
    return None
