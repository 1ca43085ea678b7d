"""The trial that says what is the matter with a run: collects the numbers, asks the rules, writes what they found.

What trials left in the journal is always looked at; what has to be measured comes from `evidence`, for labelled texts. Found is a
`Diagnosed` record with words and what to do next; looked for and not found is one `Noted` record. What the rules read is among the
facts of the trial, so that they can be asked again from the journal alone.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multistep import metrics
from multistep.budget import Budget
from multistep.config import FitConfig
from multistep.data.language import LanguageReport
from multistep.diagnosed import ON_CALIBRATION, Known, Measured, Past, diagnoses, records
from multistep.diagnosis.training import Advice
from multistep.standing import Stood
from multistep.strategy import Diagnose, FitHead, FitLinear, Trial
from multistep.tasks.writing import WRITING
from multistep.tune.actions import Bench, Run
from multistep.tune.evidence import WHAT, OutOfFold, against_guess, by_head, by_linear, gap, more_rows, near, noise
from multistep.tune.segment import Record as JournalRecord
from multistep.types import Cost, MetricValue, Outcome


def told(
    trial: Trial, past: Past, known: Known, facts: Mapping[str, Any], started: float
) -> tuple[list[JournalRecord], Outcome]:
    """The records of what was found and the outcome of the trial."""
    found = diagnoses(past, known)
    facts = {"diagnosed": [d.name for d in found if d.found], "known": known.fact(), **facts}
    return records(trial.id, found), Outcome(facts=facts, cost=Cost(wall_s=time.monotonic() - started))


def advice_of(config: FitConfig, out: str, budget: Budget) -> Advice:
    """For a run of `fit`: as much again, or another run beside it."""
    amount = str(budget) if budget.unit == "seconds" else f"'{budget}'"
    task = "" if config.task == "auto" else f" --task {config.task}"
    fit, other = f"multistep fit {shlex.quote(config.data)}{task}", f"--out {shlex.quote(out + '-2')}"
    stronger = "optimizer.weight_decay=0.1" if config.task in WRITING else "dropout=0.1"
    return Advice(
        more_time=f"multistep resume {shlex.quote(out)} --budget +{amount}", regularized=f"{fit} {stronger} {other}",
        at_rate=f"{fit} optimizer.lr=LR {other}", other_model=f"{fit} --model NAME {other}",
    )  # fmt: skip


def advice_of_module(optimizer: str, budget: str) -> Advice:
    """For `optimize`: its own arguments. `budget`: twice what there was; in the same folder the run goes on with it."""
    return Advice(
        more_time=f"optimize(..., budget={budget!r}) with the same out= goes on from here", regularized="optimize(..., dropout=0.1)",
        at_rate=f'optimize(..., optimizer={{"kind": "{optimizer}", "lr": LR}})', other_model="optimize(other_module, ...)",
    )  # fmt: skip


def judged(past: Past, metric: str) -> tuple[MetricValue | None, int]:
    """The last value on the rows that decide training, and how many they are."""
    for trial, outcome in reversed(past):
        if trial.stage not in ON_CALIBRATION and "judged" in outcome.facts and metric in outcome.metrics:
            return outcome.metrics[metric], int(outcome.facts["judged"])
    return None, 0


def higher_is_better(metric: str) -> bool:
    """Of a metric of labels; "loss" is none of them."""
    return metric in metrics.METRICS and metrics.METRICS[metric].higher_is_better


# ---------------------------------------------------------------------------------------------- whole runs


def diagnose_writer(
    trial: Trial, past: Past, stood: Stood, config: FitConfig, out: Path, report: LanguageReport, metric: str,
    higher_is_better: bool, budget: Budget, has_model: bool,
) -> Run:  # fmt: skip
    """Of a run on texts that are written: what is in the journal. `has_model`: whether there is one that could be trained."""
    started = time.monotonic()
    value, rows = judged(past, metric)
    known = Known(
        metric=metric, value=value, rows=rows, advice=advice_of(config, str(out), budget), report=report.model_dump(mode="json"),
        untrained=f"no training fitted into {budget}: only cheap writers were made" if has_model else "",
        higher_is_better=higher_is_better, seed=config.seed, served=stood.states(),
    )  # fmt: skip
    said, outcome = told(trial, past, known, {}, started)
    yield from said
    return outcome


def run_diagnose(bench: Bench, trial: Trial, action: Diagnose, past: Past, stood: Stood) -> Run:
    """Of a run on labelled texts. Where nothing can be learnt, nothing is said of how it was learnt."""
    started = time.monotonic()
    work, config = bench.work, bench.work.config
    stands = bench.of_incumbent("control")
    assert stands is not None and bench.incumbent is not None
    measured = Measured(
        name=" and ".join(bench.incumbent.models()), label=work.dataset.columns.label,
        where="train" if work.dataset.splits_given else "the file", rows=len(work.texts["train"]), what=WHAT[work.task.kind],
        against_guess=tuple(against_guess(bench)),
    )  # fmt: skip
    facts: dict[str, Any] = {}
    fit = gap(bench) if action.by else None
    if action.by:
        found = _out_of_fold(bench, action, past)
        if isinstance(found, str):
            facts["not_measured"] = found
        else:
            measured = measured.with_(by=found.model, noise=noise(bench, found))
            asked, n = len(found.rows_N), measured.rows
            if asked < n:  # what more of a part would bring is not what more of all would
                facts["not_measured"] = f"too little data: {found.model} saw {asked:,} of the {n:,} rows of train"
            else:
                measured = measured.with_(more_rows=more_rows(found, config.seed))
    untrained = f"no training fitted into {bench.clock.budget}: the encoder is as it came" if work.has_encoder else ""
    known = Known(
        metric=bench.metric, value=metrics.measure((bench.metric,), work.task, stands, seed=config.seed)[bench.metric],
        rows=len(stands.targets), advice=advice_of(config, str(work.out), bench.clock.budget),
        report=work.dataset.report.model_dump(mode="json"), near=near(work.texts), fit=fit,
        untrained=untrained, higher_is_better=higher_is_better(bench.metric), seed=config.seed, served=stood.states(),
        classes=work.task.n_outputs if work.task.kind == "classify" else 0, measured=measured,
    )  # fmt: skip
    said, outcome = told(trial, past, known, facts, started)
    yield from said
    return outcome


def _out_of_fold(bench: Bench, action: Diagnose, past: Past) -> OutOfFold | str:
    """What the convex model says of rows that it has not seen; or why it could not be asked."""
    if action.by == "head":
        heads = [t.action for t, o in past if isinstance(t.action, FitHead) and o.ok]
        return by_head(bench, heads[-1]) if heads else "no head was solved"
    n, best = len(bench.work.texts["train"]), bench.families.get("linear")
    whole = [(t, o) for t, o in past if isinstance(t.action, FitLinear) and t.id == best and o.facts.get("rows") == n]
    if not whole:
        return "the linear model that stands was not fitted on all rows"
    return by_linear(bench, *whole[-1], seconds=bench.clock.remaining() if bench.timed() else float("inf"))
