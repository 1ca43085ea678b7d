"""What a run decided, did about what went wrong and diagnosed, derived again from its journal alone: no data, no model, no torch.

account.py      the records are whole and in order; the clock, the budget, the test
verdicts.py     every verdict from its evidence, by the rule that made it
decisions.py    what the controller asks, told what came of it; what stands after each trial
trainings.py    what went wrong in trainings and what was done about it; what watches saw
diagnoses.py    what was said to be the matter at the end
found.py        what was found

What a journal does not say cannot be derived: the scores of models on data, the draws of a bootstrap or a swap test, whether a batch was
bad, how long something took. They are taken as they are written, and checked against each other where they are written twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multistep import journal
from multistep.controllers.begin import is_problem
from multistep.replay import account, decisions, diagnoses, trainings, verdicts
from multistep.replay.found import Finding, Found, Replayed
from multistep.types import UserError

JOURNALS = ("journal.jsonl", "tuning.jsonl")  # of a run, and of its tuning


def replay_run(run_dir: Path) -> tuple[Replayed, ...]:
    """The run's journal, and that of its tuning where there is one. Works while the run still goes on. Raises UserError when there is no
    journal, or it is damaged."""
    paths = [run_dir / name for name in JOURNALS]
    return tuple(replay(journal.read(path), path.name) for path in paths if path.exists() or path is paths[0])


def replay(records: Sequence[Mapping[str, Any]], name: str = JOURNALS[0]) -> Replayed:
    """What of a journal does not follow from its evidence. `name`: what the journal is called in what is said of it."""
    found = Found()
    whole = account.whole(records, found)
    account.clock(whole, found)
    account.test(whole, found)
    if any(map(is_problem, whole)):
        verdicts.check(whole, found)
        trainings.check(whole, found)
        diagnoses.check(whole, decisions.check(whole, found), found)
    elif any(r["kind"] in ("Asked", "Skipped", "Reserved", "Told") for r in whole):
        found.unknown.append("what the controller was given is not in it")
    return found.replayed(name)


def check(replayed: Sequence[Replayed]) -> None:
    """Raises UserError where a journal does not say enough for its decisions to be derived again."""
    for r in replayed:
        if r.unknown:
            said = "; ".join(dict.fromkeys(r.unknown))
            raise UserError(
                f"{r.journal}: it was written by an older version, and cannot be replayed: {said}. Fit or tune again for one that can."
            )


__all__ = ["JOURNALS", "Finding", "Replayed", "check", "replay", "replay_run"]
