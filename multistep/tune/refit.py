"""The linear model that is served, solved again on train and on the rows that judged it.

A half of them can still say whether that harms: with the control rows in train too, the run's answers on the calibration rows must not be
worse. What is served then is solved on all of them, at the same strength; no rows are left that could judge that one, so what stands,
and what a tuning or more budget is compared with, stays the model that was judged.
"""

from __future__ import annotations

import time

import numpy as np

from multistep import metrics
from multistep.models.linear import Linear, fit_linear, path_to
from multistep.predictors.temperature import fit_temperature
from multistep.strategy import Refit, Trial
from multistep.tune.actions import Bench, Run
from multistep.types import Cost, Interrupted, Outcome


def run_refit(bench: Bench, trial: Trial, action: Refit) -> Run:
    started = time.monotonic()
    work, predictor = bench.work, bench.incumbent
    assert predictor is not None
    logits = {m: work.logits(m, bench.families[m], "calibration", bench.bf16) for m in predictor.models()}
    more = _solved(bench, action, "train", "control")
    swapped = {**logits, "linear": more.logits(work.texts["calibration"])}
    candidate, rival = (_scored(bench, answers) for answers in (swapped, logits))
    seed, names = work.config.seed, dict.fromkeys([bench.metric, *work.task.metrics])
    verdict = metrics.judge_harm(bench.metric, work.task, candidate, rival, seed, trial.alpha)
    measured = metrics.measure(tuple(names), work.task, candidate, seed=seed)
    if verdict.accept:
        model = _solved(bench, action, "train", "control", "calibration")
        folder = work.state_folder(trial.id)
        folder.mkdir(parents=True, exist_ok=True)
        model.save(folder)
        rows = sum(len(work.texts[s]) for s in ("train", "control", "calibration"))
        yield (
            "Noted",
            {"trial": trial.id, "what": "solved", "facts": {"rows": rows, "features": model.vectorizer.width}},
        )
    return Outcome(
        state=trial.id, metrics=measured, verdict=verdict, cost=Cost(wall_s=time.monotonic() - started),
        facts={"of": action.of},
    )  # fmt: skip


def _scored(bench: Bench, logits: dict[str, np.ndarray]) -> metrics.Scored:
    """Answers on the calibration rows, with a temperature of their own: compared by what they know, not by how sure they are."""
    assert bench.incumbent is not None
    task, targets = bench.work.task, bench.work.targets["calibration"]
    fitted = fit_temperature(task, bench.incumbent, logits, targets)
    return metrics.Scored(targets, *(fitted or bench.incumbent).decide(task, logits))


def _solved(bench: Bench, action: Refit, *splits: str) -> Linear:
    work, fit = bench.work, action.fit
    assert fit.l2s is not None
    (chosen,) = fit.l2s
    model, _ = fit_linear(
        [text for s in splits for text in work.texts[s]],
        np.concatenate([work.targets[s] for s in splits]),
        work.task.kind,
        work.task.n_outputs,
        features=fit.features,
        l2s=path_to(chosen, len(work.texts["train"])),
        solver=fit.solver,
        valid=None,
        deadline=lambda: bench.stop() != 0,
    )
    if signal := bench.stop():
        raise Interrupted(signal)
    return model
