"""The trial that says what is the matter with a run: collects the numbers, asks the rules, writes what they found.

What trials left in the journal is always looked at; what has to be measured comes from `evidence`, for labelled texts. Found is a
`Diagnosed` record with words and what to do next; looked for and not found is one `Noted` record.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from multistep import metrics
from multistep.budget import Budget
from multistep.config import FitConfig
from multistep.data.language import LanguageReport
from multistep.diagnosis import Diagnosis
from multistep.diagnosis import rows as of_rows
from multistep.diagnosis import training as of_training
from multistep.diagnosis.training import Advice, Curve, Fit, Look, Trained
from multistep.strategy import Diagnose, FitHead, FitLinear, Training, Trial
from multistep.tasks.writing import WRITING
from multistep.tune.actions import Bench, Run
from multistep.tune.evidence import WHAT, OutOfFold, against_guess, by_head, by_linear, gap, more_rows, near, noise
from multistep.tune.segment import MAX_ROLLBACKS
from multistep.tune.segment import Record as JournalRecord
from multistep.types import Cost, MetricValue, Outcome, Verdict

STILL_SAID = ("cannot be learnt", "leaking splits", "validation too small", "divergence")  # where nothing can be learnt
ON_CALIBRATION = ("predict", "decode", "mix", "recount", "refit")  # stages whose verdicts are about other rows
AT_THE_END = "end"  # of a record that is the last word, with what a user can do; others say what the run did

Past = Sequence[tuple[Trial, Outcome]]


class Known(NamedTuple):
    """What the rules read beside the trials. `report`: of the data, {} where there is none; `value`: of what stands, on the rows that
    decide; `untrained`: why there is no training although there is a model to train; `halved`: only half of the validation rows decide."""

    metric: str
    value: MetricValue | None
    rows: int
    advice: Advice
    report: Mapping[str, Any] = {}
    near: Mapping[str, int] | None = None
    fit: Fit | None = None
    untrained: str = ""
    higher_is_better: bool = True
    seed: int = 0
    halved: bool = True


def diagnoses(past: Past, known: Known) -> list[Diagnosis]:
    """Of training, of the splits, and of how much validation can decide."""
    runs = [_trained(trial, outcome) for trial, outcome in past if isinstance(trial.action, Training)]
    found = [
        of_training.divergence(runs, known.advice),
        of_training.overfitting(runs, known.fit, known.advice),
        of_training.underfitting(runs, known.fit, known.advice),
        of_training.plateau(runs, known.advice),
        of_training.budget(runs, known.untrained, known.advice, known.seed),
        of_rows.leaks(of_rows.leaks_of(known.report, known.near)),
        _small_validation(past, known),
    ]
    return [d for d in found if d is not None]


def told(
    trial: Trial, found: Sequence[Diagnosis], facts: Mapping[str, Any], started: float
) -> tuple[list[JournalRecord], Outcome]:
    """The records of what was found and the outcome of the trial."""
    records: list[JournalRecord] = [
        ("Diagnosed", {"trial": trial.id, "at": AT_THE_END, **d.model_dump()}) for d in found if d.found
    ]
    clear = {d.name: {"words": d.words, "numbers": d.numbers} for d in found if not d.found}
    if clear:
        records.append(("Noted", {"trial": trial.id, "what": "not found", "facts": clear}))
    outcome = Outcome(
        facts={"diagnosed": [d.name for d in found if d.found], **facts}, cost=Cost(wall_s=time.monotonic() - started)
    )
    return records, outcome


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
    """For `optimize`: its own arguments. `budget`: twice what there was."""
    return Advice(
        more_time=f"optimize(..., budget={budget!r})", regularized="optimize(..., dropout=0.1)",
        at_rate=f'optimize(..., optimizer={{"kind": "{optimizer}", "lr": LR}})', other_model="optimize(other_module, ...)",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- from the trials


def _trained(trial: Trial, outcome: Outcome) -> Trained:
    assert isinstance(trial.action, Training)
    facts, settings = outcome.facts, trial.action.optimizer.model_dump()
    rollbacks = int(facts.get("rollbacks", 0))
    return Trained(
        trial=trial.id, stage=trial.stage, lr=float(settings.get("lr") or 0.0), rollbacks=rollbacks,
        stopped=rollbacks > MAX_ROLLBACKS, diagnosed=facts.get("diagnosis", {}).get("name", ""),
        comparable=_comparable(trial.action.objective.model_dump()),
        looks=tuple(Look(**look) for look in facts.get("looks", ())),
        curve=tuple(Curve(**point) for point in facts.get("curve", ())),
    )  # fmt: skip


def _comparable(objective: Mapping[str, Any]) -> bool:
    """Whether the training loss is what validation is measured by: nothing smoothed, weighted or added."""
    plain = (
        not objective.get("label_smoothing") and not objective.get("class_weights") and not objective.get("focal_gamma")
    )
    return plain and "inner" not in objective


def _small_validation(past: Past, known: Known) -> Diagnosis | None:
    if known.value is None or not known.rows:
        return None
    zero_one = known.metric in ("accuracy", "exact_match")
    value = known.value.value
    if not np.isfinite(value) or (value == 0 and not known.higher_is_better):
        return None
    # Of what falls by orders of magnitude the error falls too: it is taken in proportion to what was compared.
    stderrs = [
        c.stderr if known.higher_is_better else c.stderr * abs(value) / max(abs(c.candidate), abs(c.incumbent), 1e-30)
        for c in _compared(past)
        if c.metric == known.metric and np.isfinite(c.stderr) and c.stderr > 0
    ]
    if not stderrs and not zero_one:
        return None
    usual = (0.2 / known.rows) ** 0.5  # two models that differ in every fifth answer
    return of_rows.small_validation(
        known.metric, value, known.higher_is_better, zero_one, known.rows,
        float(np.median(stderrs)) if stderrs else usual, known.halved,
    )  # fmt: skip


def judged(past: Past, metric: str) -> tuple[MetricValue | None, int]:
    """The last value on the rows that decide training, and how many they are."""
    for trial, outcome in reversed(past):
        if trial.stage not in ON_CALIBRATION and "judged" in outcome.facts and metric in outcome.metrics:
            return outcome.metrics[metric], int(outcome.facts["judged"])
    return None, 0


def _compared(past: Past) -> list[Any]:
    """The first comparison of every verdict on the rows that decide training."""
    verdicts: list[Verdict] = []
    for trial, outcome in past:
        if trial.stage in ON_CALIBRATION:
            continue
        verdicts += [] if outcome.verdict is None else [outcome.verdict]
        verdicts += [Verdict(**outcome.facts[k]) for k in ("family_verdict", "against_verdict") if k in outcome.facts]
    return [v.evidence[0] for v in verdicts if v.evidence]


def higher_is_better(metric: str) -> bool:
    """Of a metric of labels; "loss" is none of them."""
    return metric in metrics.METRICS and metrics.METRICS[metric].higher_is_better


# ---------------------------------------------------------------------------------------------- whole runs


def diagnose_writer(
    trial: Trial, past: Past, config: FitConfig, out: Path, report: LanguageReport, metric: str, higher_is_better: bool,
    budget: Budget, has_model: bool,
) -> Run:  # fmt: skip
    """Of a run on texts that are written: what is in the journal. `has_model`: whether there is one that could be trained."""
    started = time.monotonic()
    value, rows = judged(past, metric)
    known = Known(
        metric, value, rows, advice_of(config, str(out), budget), report.model_dump(mode="json"),
        untrained=f"no training fitted into {budget}: only cheap writers were made" if has_model else "",
        higher_is_better=higher_is_better, seed=config.seed,
    )  # fmt: skip
    records, outcome = told(trial, diagnoses(past, known), {}, started)
    yield from records
    return outcome


def run_diagnose(bench: Bench, trial: Trial, action: Diagnose, past: Past) -> Run:
    """Of a run on labelled texts. Where nothing can be learnt, nothing is said of how it was learnt."""
    started = time.monotonic()
    work, config = bench.work, bench.work.config
    stands = bench.of_incumbent("control")
    assert stands is not None and bench.incumbent is not None
    label, seed = work.dataset.columns.label, config.seed
    name = " and ".join(bench.incumbent.models())
    first = of_rows.cannot_be_learnt(against_guess(bench), name, label)
    found: list[Diagnosis] = [] if first is None else [first]
    facts: dict[str, Any] = {}
    fit = None
    if action.by:
        fit = gap(bench)
        measured = _out_of_fold(bench, action, past)
        if isinstance(measured, str):
            facts["not_measured"] = measured
        else:
            where = "train" if work.dataset.splits_given else "the file"
            found.append(of_rows.noisy_labels(noise(bench, measured), label, where))
            asked, n = len(measured.rows_N), len(work.texts["train"])
            if asked < n:  # what more of a part would bring is not what more of all would
                facts["not_measured"] = f"too little data: {measured.model} saw {asked:,} of the {n:,} rows of train"
            elif (gain := more_rows(measured, seed)) is not None:
                found.append(of_rows.few_rows(gain, n, WHAT[work.task.kind], measured.model))
    untrained = f"no training fitted into {bench.clock.budget}: the encoder is as it came" if work.has_encoder else ""
    known = Known(
        bench.metric, metrics.measure((bench.metric,), work.task, stands, seed=seed)[bench.metric], len(stands.targets),
        advice_of(config, str(work.out), bench.clock.budget), work.dataset.report.model_dump(mode="json"), near(work.texts), fit,
        untrained, higher_is_better(bench.metric), seed,
    )  # fmt: skip
    found += diagnoses(past, known)
    if first is not None and first.found:
        found = [d for d in found if d.name in STILL_SAID]
    records, outcome = told(trial, found, facts, started)
    yield from records
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
