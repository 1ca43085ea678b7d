"""ask -> run -> tell -> commit, for training and for prediction alike; and the same from a journal, to resume.

`tune` is a generator of journal records: the caller shows them. A run that was stopped is resumed by asking the controller again
and telling it what the journal holds; from the first trial without an outcome on, trials are run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import TypeAdapter

from multistep.bundle import write_bundle
from multistep.controllers import Controller, Reserve, Skip
from multistep.journal import Journal
from multistep.predictors import Predictor, Single
from multistep.strategy import Average, FineTune, FitHead, FitLinear, Predict, Profile, ReadTest, Trial
from multistep.tune.actions import (
    Bench,
    Run,
    run_average,
    run_head,
    run_linear,
    run_predict,
    run_profile,
    run_test,
)
from multistep.tune.fine_tune import run_fine_tune
from multistep.types import Interrupted, Outcome, UserError, Verdict

_PREDICTOR: TypeAdapter[Predictor] = TypeAdapter(Predictor)
_ASKS = ("Asked", "Skipped", "Reserved")


def tune(
    bench: Bench, controller: Controller, journal: Journal, past: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Drive the controller to its end. `past`: the journal's records so far; yields the new ones as they are written."""
    asked = deque(r for r in past if r["kind"] in _ASKS)
    told = {r["trial"]: Outcome(**r["outcome"]) for r in past if r["kind"] == "Told"}
    settled = {r["trial"] for r in past if r["kind"] in ("Committed", "RolledBack")}
    stale = False  # the bundle on disk may be older than what was committed
    while (ask := controller.ask()) is not None:
        lived = asked.popleft() if asked else None
        _check_replay(lived, ask)
        if isinstance(ask, Reserve):
            bench.clock.reserve(ask.name, ask.amount)
        if lived is None:
            yield _append(bench, journal, **_record(ask))
        if isinstance(ask, Skip | Reserve):
            continue
        outcome = told.get(ask.id)
        if outcome is None:
            if stale:
                ship(bench)
                stale = False
            outcome = yield from _run(bench, ask, journal)
            yield _append(bench, journal, kind="Told", trial=ask.id, stage=ask.stage, outcome=outcome)
        committed = _apply(bench, ask, outcome)
        stale = stale or committed
        if ask.id not in settled and (committed or outcome.verdict is not None):
            if committed:
                ship(bench)
                stale = False
            yield _append(bench, journal, **_settlement(bench, ask, outcome, committed))
        standing = bench.incumbent.model_dump() if bench.incumbent is not None else None
        controller.tell(ask, outcome.with_(incumbent=standing, families=dict(bench.families)))
    if stale:
        ship(bench)


def _run(bench: Bench, trial: Trial, journal: Journal) -> Iterator[dict[str, Any]]:
    """Run a trial, writing its records; its outcome, with what is left of the budget."""
    run = _start(bench, trial)
    try:
        while True:
            if signal := bench.stop():
                raise Interrupted(signal)
            kind, fields = next(run)
            yield _append(bench, journal, kind=kind, **fields)
    except StopIteration as end:
        outcome: Outcome = end.value
    except Interrupted as stop:
        yield _append(bench, journal, kind="Interrupted", trial=trial.id, signal=stop.signal)
        raise
    return outcome.with_(remaining=bench.clock.remaining())


def _start(bench: Bench, trial: Trial) -> Run:
    match trial.action:
        case Profile() as action:
            return run_profile(bench, trial, action)
        case FitLinear() as action:
            return run_linear(bench, trial, action)
        case FitHead() as action:
            return run_head(bench, trial, action)
        case FineTune() as action:
            return run_fine_tune(bench, trial, action)
        case Average() as action:
            return run_average(bench, trial, action)
        case Predict() as action:
            return run_predict(bench, trial, action)
        case ReadTest() as action:
            return run_test(bench, trial, action)


def _apply(bench: Bench, trial: Trial, outcome: Outcome) -> bool:
    """Take an outcome into the run's standing; whether the incumbent changed. Depends on the outcome alone, so it replays."""
    facts = outcome.facts
    if isinstance(trial.action, Profile):
        bench.bf16 = facts.get("precision") == "bf16"
        bench.work.adopt(facts)
        return False
    if isinstance(trial.action, FitHead | FineTune):
        bench.work.use_length(trial.action.max_length)
    if not outcome.ok:
        return False
    if isinstance(trial.action, Predict):
        if outcome.verdict is not None and outcome.verdict.accept:
            bench.incumbent = _PREDICTOR.validate_python(facts["predictor"])
            return True
        return False
    family = facts.get("family")
    if family is None or not trial.commit or "diagnosis" in facts or outcome.state is None:
        return False
    better = "family_verdict" not in facts or Verdict(**facts["family_verdict"]).accept
    if bench.incumbent is None or (better and outcome.verdict is not None and outcome.verdict.accept):
        bench.families[family] = outcome.state
        bench.incumbent = Single(model=family)
        return True
    if better and family not in bench.incumbent.models():
        bench.families[family] = outcome.state  # a better member for a blend to come
    return False


def ship(bench: Bench) -> None:
    """Put the incumbent into the run's model/ folder."""
    work = bench.work
    assert bench.incumbent is not None
    models = {m: work.text_model(m, bench.families[m], bench.bf16) for m in bench.incumbent.models()}
    columns = work.dataset.columns.model_dump(mode="json")
    extra = {
        "columns": columns,
        "states": {m: bench.families[m] for m in models},
        "base_model": work.source,
        "metric": bench.metric,
    }
    write_bundle(work.out / "model", work.task, bench.incumbent, models, work.tokenizer, work.max_length, extra)


def _settlement(bench: Bench, trial: Trial, outcome: Outcome, committed: bool) -> dict[str, Any]:
    verdict = outcome.verdict
    return {
        "kind": "Committed" if committed else "RolledBack",
        "trial": trial.id,
        "stage": trial.stage,
        "state": outcome.state,
        "incumbent": bench.incumbent,
        "families": dict(bench.families),
        "metrics": outcome.metrics,
        "rule": verdict.rule if verdict is not None else "the first servable model",
        "evidence": [c.model_dump() for c in verdict.evidence] if verdict is not None else [],
    }


def _record(ask: Trial | Skip | Reserve) -> dict[str, Any]:
    if isinstance(ask, Trial):
        return {"kind": "Asked", "trial": ask.model_dump(mode="json")}
    if isinstance(ask, Skip):
        return {"kind": "Skipped", "stage": ask.stage, "why": ask.why}
    return {"kind": "Reserved", "name": ask.name, "amount": ask.amount}


def _check_replay(lived: dict[str, Any] | None, ask: Trial | Skip | Reserve) -> None:
    """The controller, told the same, must ask the same: else the journal and the code do not belong together."""
    if lived is None:
        return
    now = _record(ask)
    then = {k: lived.get(k) for k in now}
    if _plain(now) != _plain(then):
        raise UserError(
            f"journal: record {lived['n']} ({lived['kind']}) does not follow from its evidence: the controller now asks {now}. "
            "The run was made by another version of multistep; start it again."
        )


def _plain(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))


def _append(bench: Bench, journal: Journal, kind: str, **fields: Any) -> dict[str, Any]:
    return journal.append(kind, clock=bench.clock.save(), **fields)
