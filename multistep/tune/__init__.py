"""ask -> run -> tell -> commit, for training and for prediction alike; and the same from a journal, to resume.

`tune` is a generator of journal records: the caller shows them. A run that was stopped is resumed by asking the controller again
and telling it what the journal holds; from the first trial without an outcome on, trials are run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

from multistep import processes, team
from multistep.allocation import out_of_memory, shortage
from multistep.budget import Clock
from multistep.controllers import Controller, Reserve, Skip
from multistep.controllers.begin import record_of, same
from multistep.journal import Journal
from multistep.standing import Stood, settlement
from multistep.strategy import Training, Trial
from multistep.types import Interrupted, Outcome, UserError

_ASKS = ("Asked", "Skipped", "Reserved")


class Works(Protocol):
    """What runs trials and keeps what stands: that of a text run (`tune.text`) or of any module (`tune.module`)."""

    clock: Clock
    stop: Callable[[], int]  # 0, or the number of the signal that asked to stop

    def run(self, trial: Trial) -> Generator[tuple[str, dict[str, Any]], None, Outcome]:
        """Run a trial: yields journal records to write, returns its outcome."""
        ...

    def apply(self, trial: Trial, outcome: Outcome) -> bool:
        """Take an outcome into the run's standing; whether the incumbent changed. Depends on the outcome alone, so it replays."""
        ...

    def ship(self) -> None:
        """Put the incumbent where it is served from."""
        ...

    def standing(self) -> dict[str, Any] | None:
        """The incumbent, as JSON."""
        ...

    def families(self) -> dict[str, str]:
        """The best state of each family."""
        ...


def tune(
    bench: Works, controller: Controller, journal: Journal, past: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Drive the controller to its end. `past`: the journal's records so far; yields the new ones as they are written."""
    asked = deque(r for r in past if r["kind"] in _ASKS)
    told = {r["trial"]: Outcome(**r["outcome"]) for r in past if r["kind"] == "Told"}
    settled = {r["trial"] for r in past if r["kind"] in ("Committed", "RolledBack")}
    stale = False  # the bundle on disk may be older than what was committed
    outstanding: deque[Trial] = deque()
    while (ask := controller.ask()) is not None or outstanding:
        if isinstance(ask, Trial | Skip | Reserve):
            lived = asked.popleft() if asked else None
            _check_replay(lived, ask)
            if isinstance(ask, Reserve):
                bench.clock.reserve(ask.name, ask.amount)
            if lived is None:
                yield _append(bench, journal, **record_of(ask))
            if isinstance(ask, Trial):
                outstanding.append(ask)
            continue
        assert outstanding, "the controller waits for nothing"
        trial = outstanding.popleft()
        outcome = told.get(trial.id)
        if outcome is None:
            if stale and team.leads():
                bench.ship()
            stale = False
            if team.leads():
                outcome = yield from _run(bench, trial, journal)
            else:
                _assist(bench, trial)
                outcome = None
            told_now = team.first(outcome)
            outcome = outcome or Outcome(**told_now)
            yield _append(bench, journal, kind="Told", trial=trial.id, stage=trial.stage, outcome=outcome)
        committed = bench.apply(trial, outcome)
        stale = stale or committed
        decision = settlement(Stood(bench.standing(), bench.families()), trial, outcome, committed)
        if trial.id not in settled and decision is not None:
            if committed and team.leads():
                bench.ship()
                stale = False
            yield _append(bench, journal, **decision)
        controller.tell(trial, outcome.with_(incumbent=bench.standing(), families=bench.families()))
    if stale and team.leads():
        bench.ship()


def _assist(bench: Works, trial: Trial) -> None:
    """What the other processes of a team do of a trial: they train with the first one, and wait for what came out."""
    if not isinstance(trial.action, Training) or trial.action.optimizer.products:
        return
    try:
        for _ in bench.run(trial):
            pass  # its records are the first one's to write
    except team.Assisted:
        pass


def _run(bench: Works, trial: Trial, journal: Journal) -> Iterator[dict[str, Any]]:
    """Run a trial, writing its records; its outcome, with what is left of the budget."""
    run = bench.run(trial)
    try:
        while True:
            # Thrown into the trial, which may have something to save. Where several train together they agree on it inside.
            signal = bench.stop() if processes.count() == 1 else 0
            kind, fields = run.throw(Interrupted(signal)) if signal else next(run)
            yield _append(bench, journal, kind=kind, **fields)
    except StopIteration as end:
        outcome: Outcome = end.value
    except Interrupted as stop:
        yield _append(bench, journal, kind="Interrupted", trial=trial.id, signal=stop.signal)
        raise
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"{trial.id}: {shortage(error)} What stands is kept.") from None
    return outcome.with_(remaining=bench.clock.remaining())


def _check_replay(lived: dict[str, Any] | None, ask: Trial | Skip | Reserve) -> None:
    """The controller, told the same, must ask the same: else the journal and the code do not belong together."""
    if lived is None:
        return
    now = record_of(ask)
    if not same(now, lived):
        raise UserError(
            f"journal: record {lived['n']} ({lived['kind']}) does not follow from its evidence: the controller now asks {now}. "
            "The run was made by another version of multistep; start it again."
        )


def _append(bench: Works, journal: Journal, kind: str, **fields: Any) -> dict[str, Any]:
    return journal.append(kind, clock=bench.clock.save(), **fields)
