"""What is the matter with a run, as a function of its trials and of what was measured at its end: for the run that lives, and for its
journal when it is replayed. The rules are in `diagnosis`; what they read beside the trials is `Known`, and is written into the facts of
the trial that diagnoses, so that a journal alone says whether a diagnosis follows. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from multistep.detect import MAX_ROLLBACKS, RESTART_LR
from multistep.diagnosis import Diagnosis
from multistep.diagnosis import Gain as MoreRows
from multistep.diagnosis import rows as of_rows
from multistep.diagnosis import training as of_training
from multistep.diagnosis.rows import Noise
from multistep.diagnosis.training import Advice, Curve, Fit, Look, Trained
from multistep.strategy import Average, Training, Trial
from multistep.types import Comparison, MetricValue, Outcome, Spec, Verdict

STILL_SAID = ("cannot be learnt", "leaking splits", "validation too small", "divergence")  # where nothing can be learnt
ON_CALIBRATION = ("predict", "decode", "mix", "recount", "refit")  # stages whose verdicts are about other rows
AT_THE_END = "end"  # of a record that is the last word, with what a user can do; others say what the run did

Past = Sequence[tuple[Trial, Outcome]]
JournalRecord = tuple[str, dict[str, Any]]


class Measured(Spec):
    """Of labelled texts: what stands against a guess, and what a convex model (`by`) says of labels that it has not seen and of twice the
    rows. `name`: what stands, in words; `label`: its column; `where`: train, by a name that a user knows; `rows`: of train."""

    name: str
    label: str
    where: str
    rows: int
    what: str
    against_guess: tuple[Comparison, ...] = ()
    by: str = ""
    noise: Noise | None = None
    more_rows: MoreRows | None = None


class Known(Spec):
    """What the rules read beside the trials. `report`: of the data, {} where there is none; `value`: of what stands, on the rows that
    decide; `untrained`: why there is no training although there is a model to train; `halved`: only half of the validation rows decide;
    `served`: the states that what stands is made of; `classes`: of a classifier (0: of none, and in older journals)."""

    metric: str
    value: MetricValue | None
    rows: int
    advice: Advice
    report: dict[str, Any] = Field(default_factory=dict)
    near: dict[str, int] | None = None
    fit: Fit | None = None
    untrained: str = ""
    higher_is_better: bool = True
    seed: int = 0
    halved: bool = True
    served: tuple[str, ...] = ()
    classes: int = 0
    measured: Measured | None = None

    def fact(self) -> dict[str, Any]:
        """For a journal, which has the report on the data already, and the suspects in the diagnosis that names them."""
        return self.model_dump(exclude={"report": True, "measured": {"noise": {"suspects"}}})


def diagnoses(past: Past, known: Known, law: Mapping[str, Any] | None = None) -> list[Diagnosis]:
    """Of the labels, of training, of the splits, and of how much validation can decide. Where nothing can be learnt, nothing is said of
    how it was learnt. `law`: the numbers of a law that a journal has, which is then not looked for again."""
    of_labels = _of_labels(known.measured) if known.measured is not None else []
    runs = _trained(past, known.served, known.classes)
    found = [
        *of_labels,
        of_training.divergence(runs, known.advice),
        of_training.overfitting(runs, known.fit, known.advice),
        of_training.underfitting(runs, known.fit, known.advice),
        of_training.plateau(runs, known.advice),
        of_training.budget(runs, known.untrained, known.advice, known.seed, law),
        of_rows.leaks(of_rows.leaks_of(known.report, known.near)),
        _small_validation(past, known),
    ]
    said = [d for d in found if d is not None]
    hopeless = any(d.found and d.name == "cannot be learnt" for d in said)
    return [d for d in said if d.name in STILL_SAID] if hopeless else said


def records(trial: str, found: Sequence[Diagnosis]) -> list[JournalRecord]:
    """What was found, each with what to do; and what was looked for and is not there."""
    said: list[JournalRecord] = [
        ("Diagnosed", {"trial": trial, "at": AT_THE_END, **d.model_dump()}) for d in found if d.found
    ]
    clear = {d.name: {"words": d.words, "numbers": d.numbers} for d in found if not d.found}
    return [*said, ("Noted", {"trial": trial, "what": "not found", "facts": clear})] if clear else said


# ---------------------------------------------------------------------------------------------- of labels


def _of_labels(m: Measured) -> list[Diagnosis | None]:
    found = [of_rows.cannot_be_learnt(m.against_guess, m.name, m.label)]
    if m.noise is not None:
        found.append(of_rows.noisy_labels(m.noise, m.label, m.where))
    if m.more_rows is not None:
        found.append(of_rows.few_rows(m.more_rows, m.rows, m.what, m.by))
    return found


# ---------------------------------------------------------------------------------------------- of the trials


def _trained(past: Past, served: Sequence[str], classes: int) -> list[Trained]:
    mine = _lineage(past, served)
    found = []
    for trial, outcome in past:
        if not isinstance(trial.action, Training):
            continue
        facts, settings = outcome.facts, trial.action.optimizer.model_dump()
        rollbacks, restarts = int(facts.get("rollbacks", 0)), int(facts.get("restarts", 0))
        lr, diagnosis = float(settings.get("lr") or 0.0), facts.get("diagnosis", {})
        numbers = diagnosis.get("numbers", {})
        found.append(Trained(
            trial=trial.id, stage=trial.stage, lr=lr, rollbacks=rollbacks, restarts=restarts, stopped=rollbacks > MAX_ROLLBACKS,
            diagnosed=diagnosis.get("name", ""), failed_lr=float(numbers.get("lr", lr * RESTART_LR**restarts)),
            rule=str(numbers.get("rule", "")), served=trial.id in mine,
            comparable=_comparable(trial.action.objective.model_dump()),
            floor=_floor(trial.action.objective.model_dump(), classes),
            end=outcome.metrics["log_loss"].value if "log_loss" in outcome.metrics else None,
            looks=tuple(Look(**look) for look in facts.get("looks", ())),
            curve=tuple(Curve(**point) for point in facts.get("curve", ())),
        ))  # fmt: skip
    return found


def _lineage(past: Past, served: Sequence[str]) -> set[str]:
    """The trials that what is served comes from: those that left its states, and where these began."""
    trials = {trial.id: trial for trial, _ in past}
    found: set[str] = set()
    left = list(served)
    while left:
        name = left.pop()
        if name in found or name not in trials:
            continue
        found.add(name)
        trial = trials[name]
        members = trial.action.members if isinstance(trial.action, Average) else ()
        left += [state for state in (trial.start, *members) if state is not None]
    return found


def _comparable(objective: Mapping[str, Any]) -> bool:
    """Whether the training loss is what validation is measured by: nothing smoothed, weighted or added."""
    plain = (
        not objective.get("label_smoothing") and not objective.get("class_weights") and not objective.get("focal_gamma")
    )
    return plain and "inner" not in objective


def _floor(objective: Mapping[str, Any], classes: int) -> float | None:
    """The least that the training loss of a classifier can be, in nats: the entropy of its smoothed labels. None where it is another loss
    than validation's log-loss."""
    smoothing = float(objective.get("label_smoothing") or 0.0)
    if classes < 2 or objective["kind"] != "cross_entropy" or not _comparable({**objective, "label_smoothing": 0.0}):
        return None
    shares = np.array([1 - smoothing + smoothing / classes] + [smoothing / classes] * (classes - 1))
    return float(-(shares * np.log(np.maximum(shares, 1e-300))).sum())


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


def _compared(past: Past) -> list[Any]:
    """The first comparison of every verdict on the rows that decide training."""
    verdicts: list[Verdict] = []
    for trial, outcome in past:
        if trial.stage in ON_CALIBRATION:
            continue
        verdicts += [] if outcome.verdict is None else [outcome.verdict]
        verdicts += [Verdict(**outcome.facts[k]) for k in ("family_verdict", "against_verdict") if k in outcome.facts]
    return [v.evidence[0] for v in verdicts if v.evidence]
