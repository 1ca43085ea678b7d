"""What each action of a trial does. Each is a generator: it yields journal records to write and returns its outcome.

A record to write is `(kind, fields)`. Long work asks `stop()` between batches and raises Interrupted after saving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from multistep import metrics
from multistep.budget import Clock
from multistep.evaluate import head_logits
from multistep.metrics import Scored
from multistep.models.head import solve_head
from multistep.models.linear import fit_linear
from multistep.predictors import Predictor, Single
from multistep.predictors import fit as fitting
from multistep.predictors.temperature import fit_temperature
from multistep.state import read_folder
from multistep.strategy import Average, FitHead, FitLinear, Predict, ReadTest, Trial
from multistep.tune import strength
from multistep.tune.soup import greedy_soup
from multistep.tune.workbench import Workbench
from multistep.types import Cost, Interrupted, Outcome, Verdict

Record = tuple[str, dict[str, Any]]
Run = Generator[Record, None, Outcome]


@dataclass
class Bench:
    """What an action works with: the workbench, the clock, the stop signal and what is committed so far."""

    work: Workbench
    clock: Clock
    stop: Callable[[], int]  # 0, or the number of the signal that asked to stop
    metric: str
    families: dict[str, str] = field(default_factory=dict)  # the best state of each family ("linear", "encoder")
    incumbent: Predictor | None = None
    refits: dict[str, str] = field(default_factory=dict)  # what is served in place of a state that was judged
    bf16: bool = False
    micro_batch: int = 0  # examples at once that fitted into memory when a trial's did not; 0: no limit was met

    def control(self, family: str, state: str) -> Scored:
        """A state's answers on the control split, as they are."""
        return self.work.scored(Single(model=family), {family: state}, "control", self.bf16)

    def judged(self, predictor: Predictor, states: dict[str, str]) -> Scored:
        """A predictor's answers on the control split after a temperature of its own: one parameter, so that models that
        differ only in how sure they are (a smoothed objective, a long training) are compared by what they know."""
        targets = self.work.targets["control"]
        logits = {m: self.work.logits(m, states[m], "control", self.bf16) for m in predictor.models()}
        fitted = fit_temperature(self.work.task, predictor, logits, targets)
        return Scored(targets, *(fitted or predictor).decide(self.work.task, logits))

    def of_incumbent(self, split: str) -> Scored | None:
        if self.incumbent is None:
            return None
        return self.work.scored(self.incumbent, self.families, split, self.bf16)

    def served(self) -> dict[str, str]:
        """The states that are served, by family: fitted again on the rows that judged, where that was done."""
        return {family: self.refits.get(state, state) for family, state in self.families.items()}

    def timed(self) -> bool:
        return self.clock.budget.unit == "seconds"


def decided(bench: Bench, trial: Trial, family: str, state: str, started: float, **more: Any) -> Outcome:
    """Judge a state on the control split: against the best of its family, `trial.against` and the incumbent. Where several models answer
    together and its family is one of them, against the incumbent as it would be with this state in that place. The mean of equal trainings
    takes the place of one of them unless that harms."""
    mean_of = trial.action.members if isinstance(trial.action, Average) and trial.action.which == "mean" else ()
    scored = bench.control(family, state)
    candidate = bench.judged(Single(model=family), {family: state})
    task, seed = bench.work.task, bench.work.config.seed
    names = dict.fromkeys([bench.metric, *task.metrics])
    facts: dict[str, Any] = {"family": family, **more.pop("facts", {})}
    best = bench.families.get(family)
    for name, rival in (("family", best), ("against", trial.against)):
        if rival is not None:
            known = bench.judged(Single(model=family), {family: rival})
            found = _rule(rival in mean_of)(bench.metric, task, candidate, known, seed, trial.alpha)
            facts |= {f"{name}_verdict": found.model_dump(), f"{name}_rival": rival}
    verdict = None
    if trial.commit and bench.incumbent is not None:
        incumbent = bench.judged(bench.incumbent, bench.families)
        if len(bench.incumbent.models()) > 1 and family in bench.incumbent.models():
            states = {**bench.families, family: state}
            candidate = bench.judged(bench.incumbent, states)
            scored = bench.work.scored(bench.incumbent, states, "control", bench.bf16)
            facts["in_place"] = True
        in_its_place = family in bench.incumbent.models() and best in mean_of
        verdict = _rule(in_its_place)(bench.metric, task, candidate, incumbent, seed, trial.alpha)
    return Outcome(
        state=state,
        metrics=metrics.measure(tuple(names), task, scored, seed=seed),
        verdict=verdict,
        cost=Cost(wall_s=time.monotonic() - started, **more),
        facts=facts,
    )


def _rule(mean: bool) -> Callable[..., Verdict]:
    return metrics.judge_harm if mean else metrics.judge


# ---------------------------------------------------------------------------------------------- convex models


def run_linear(bench: Bench, trial: Trial, action: FitLinear) -> Run:
    started = time.monotonic()
    work = bench.work
    take = subsample(work, action.max_rows)
    texts, targets = work.texts["train"], work.targets["train"]
    if take is not None:
        texts, targets = [texts[i] for i in take], targets[take]
    few = strength.too_few(work.texts["control"], len(texts))
    model, facts = fit_linear(
        texts,
        targets,
        work.task.kind,
        work.task.n_outputs,
        features=action.features,
        l2s=strength.of_linear(action, texts, targets, work.task, work.config.seed) if few else action.l2s,
        solver=action.solver,
        valid=(work.texts["control"], work.targets["control"]),
        deadline=_deadline(bench, trial, started),
    )
    folder = work.state_folder(trial.id)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder)
    # Not what a killed process has left of this trial: where the clock ended the solve that was another model.
    work.keep_logits(trial.id, "control", work.linear(trial.id).logits(work.texts["control"]))
    yield "Noted", {"trial": trial.id, "what": "solved", "facts": facts}
    return decided(bench, trial, "linear", trial.id, started, facts={**facts, "rows": len(texts)})


def run_head(bench: Bench, trial: Trial, action: FitHead) -> Run:
    started = time.monotonic()
    work = bench.work
    take = subsample(work, action.max_rows)
    cut = action.cut if take is None and work.fits_hidden(work.rows("train", action.max_length)) else 0
    features: dict[str, np.ndarray] = {}
    cached = True
    for split in ("train", "control"):
        features[split], from_cache = work.features(
            split, action.max_length, bf16=action.bf16, cut=cut, take=take if split == "train" else None
        )
        cached &= from_cache
        if signal := bench.stop():
            raise Interrupted(signal)
    encode_s = time.monotonic() - started
    tokens = sum(int(np.sum(work.rows(s, action.max_length).lengths_N)) for s in ("train", "control"))
    scale, mean = work.units
    standard = {
        s: (work.targets[s] - mean) / scale if work.task.kind == "regress" else work.targets[s] for s in features
    }
    solved = standard["train"] if take is None else standard["train"][take]
    few = strength.too_few(work.texts["control"], len(solved))
    weights_DK, bias_K, facts = solve_head(
        features["train"],
        solved,
        work.task.kind,
        work.task.n_outputs,
        features["control"],
        standard["control"],
        l2s=strength.of_head(action, features["train"], solved, work.task, work.config.seed) if few else action.l2s,
        solver=action.solver,
        deadline=_deadline(bench, trial, time.monotonic()),
        device=work.device,
    )
    model = work.encoder()
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(np.ascontiguousarray(weights_DK.T)))
        model.head.bias.copy_(torch.from_numpy(bias_K))
    work.save_weights(trial.id, model, ["head.weight", "head.bias"], start=None)
    work.keep_logits(trial.id, "control", head_logits(model, features["control"]) * scale + mean)
    facts |= {"encode_s": encode_s, "encoded_tokens": tokens, "cached": cached, "truncated": dict(work.truncated)}
    yield "Noted", {"trial": trial.id, "what": "solved", "facts": facts}
    return decided(bench, trial, "encoder", trial.id, started, facts=facts)


def subsample(work: Workbench, max_rows: int | None) -> np.ndarray | None:
    """The rows of train that a model with `max_rows` is fitted on; None for all."""
    n = len(work.texts["train"])
    if max_rows is None or max_rows >= n:
        return None
    return np.sort(np.random.default_rng(work.config.seed).choice(n, max_rows, replace=False))


def _deadline(bench: Bench, trial: Trial, started: float) -> Callable[[], bool] | None:
    """Whether a convex solve must end with what it has. Under counted budgets it always runs to its end."""
    if not bench.timed() or not trial.share:
        return None
    return lambda: time.monotonic() - started > trial.share or bench.stop() != 0


# ---------------------------------------------------------------------------------------------- averages, prediction, test


def run_average(bench: Bench, trial: Trial, action: Average) -> Run:
    """The averaged weights of a fine-tuned state, against its raw ones."""
    started = time.monotonic()
    work = bench.work
    assert trial.start is not None
    tensors = load_file(work.state_folder(trial.start) / "tensors.safetensors")
    if action.which == "tail" and not read_folder(work.state_folder(trial.start))[0]["counters"]["tail_count"]:
        yield "Noted", {"trial": trial.id, "what": "averaged", "facts": {"which": "tail", "count": 0}}
        return Outcome(ok=False, failure="the segment was too short for a tail", cost=_wall(started))
    prefix = f"{action.which}."
    values = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model = work.encoder(trial.start)
    model.load_state_dict(values, strict=False)
    work.save_weights(trial.id, model, list(values), start=trial.start)
    rows = work.rows("control", work.max_length)
    work.keep_logits(trial.id, "control", work.encoder_logits(model, rows, bench.bf16))
    yield "Noted", {"trial": trial.id, "what": "averaged", "facts": {"which": action.which}}
    return decided(bench, trial, "encoder", trial.id, started)


def run_soup(bench: Bench, trial: Trial, action: Average) -> Run:
    """The mean of fine-tuned states that began at the same weights, taken in one by one while the metric gets no worse."""
    started = time.monotonic()
    work, first = bench.work, action.members[0]
    names = _trained_names(work, first)
    sign = 1.0 if metrics.METRICS[bench.metric].higher_is_better else -1.0
    rows = work.rows("control", work.max_length)

    def score(values: Mapping[str, torch.Tensor]) -> float:
        model = work.encoder(first)
        model.load_state_dict(values, strict=False)
        work.save_weights(trial.id, model, names, start=first)
        work.keep_logits(trial.id, "control", work.encoder_logits(model, rows, bench.bf16))
        return (
            sign * metrics.measure((bench.metric,), work.task, bench.control("encoder", trial.id))[bench.metric].value
        )

    values, taken, tried = greedy_soup(action.members, lambda state: _weights(work, state, names), score)
    yield "Noted", {"trial": trial.id, "what": "averaged", "facts": {"which": "soup", "tried": tried}}
    if len(taken) == 1:
        return Outcome(ok=False, failure=f"nothing improves {taken[0]} in a soup", cost=_wall(started))
    score(values)  # what is on disk is the last mixture that was tried
    return decided(bench, trial, "encoder", trial.id, started, facts={"members": taken})


def run_mean(bench: Bench, trial: Trial, action: Average) -> Run:
    """The mean of the weights of one training in several orders of the data.

    Source: as of soup.py, the uniform soup. Differs from the source: it takes the place of the first training unless that is seen to harm.
    """
    started = time.monotonic()
    work, first = bench.work, action.members[0]
    names = _trained_names(work, first)
    values = _weights(work, first, names)
    for taken, member in enumerate(action.members[1:], 1):
        other = _weights(work, member, names)
        values = {n: v.lerp(other[n], 1 / (taken + 1)) for n, v in values.items()}
    model = work.encoder(first)
    model.load_state_dict(values, strict=False)
    work.save_weights(trial.id, model, names, start=first)
    rows = work.rows("control", work.max_length)
    work.keep_logits(trial.id, "control", work.encoder_logits(model, rows, bench.bf16))
    yield "Noted", {"trial": trial.id, "what": "averaged", "facts": {"which": "mean", "members": list(action.members)}}
    return decided(bench, trial, "encoder", trial.id, started, facts={"members": list(action.members)})


def _trained_names(work: Workbench, state: str) -> list[str]:
    """The parameters that a state's training moved."""
    tensors = read_folder(work.state_folder(state))[1]
    return sorted(k.removeprefix("model.") for k in tensors if k.startswith("model."))


def _weights(work: Workbench, state: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
    parameters = dict(work.encoder(state).named_parameters())
    return {n: parameters[n].detach() for n in names}


def run_predict(bench: Bench, trial: Trial, action: Predict) -> Run:
    """Fit a wrapper of the base predictor on the calibration split; judged on out-of-fold decisions."""
    started = time.monotonic()
    work, seed = bench.work, bench.work.config.seed
    targets = work.targets["calibration"]
    names = set(action.base.models()) | (set(bench.families) if action.what == "blend" else set())
    logits = {m: work.logits(m, bench.families[m], "calibration", bench.bf16) for m in sorted(names)}
    match action.what:
        case "calibrate":
            found = fitting.calibrate(work.task, action.base, logits, targets, seed)
        case "thresholds":
            found = fitting.thresholds(work.task, action.base, logits, targets, bench.metric, seed)
        case "blend":
            members = tuple(Single(model=m) for m in sorted(names))
            found = fitting.blend(work.task, members, logits, targets, seed)
    if found is None:
        return Outcome(ok=False, failure=f"{action.what} has nothing to change here", cost=_wall(started))
    yield "Noted", {"trial": trial.id, "what": "fitted", "facts": {"what": action.what, **found.facts}}
    base = fitting.baseline(work.task, action.base, logits, targets)
    metric = "log_loss" if action.what == "calibrate" and work.task.kind != "regress" else bench.metric
    verdict = metrics.judge(metric, work.task, found.scored, base, seed, trial.alpha)
    names_ = dict.fromkeys([bench.metric, *work.task.metrics])
    return Outcome(
        state=trial.id,
        metrics=metrics.measure(tuple(names_), work.task, found.scored, seed=seed),
        verdict=verdict,
        cost=_wall(started),
        facts={"predictor": found.predictor.model_dump(), **found.facts},
    )


def run_test(bench: Bench, trial: Trial, action: ReadTest) -> Run:
    """The test split, once."""
    started = time.monotonic()
    work = bench.work
    assert bench.incumbent is not None
    scored = work.scored(bench.incumbent, bench.served(), "test", bench.bf16)
    report = test_report(work, scored, bench.metric)
    yield "TestRead", {"trial": trial.id, **report}
    return Outcome(metrics=report["metrics"], cost=_wall(started))


def test_report(work: Workbench, scored: Scored, metric: str) -> dict[str, Any]:
    """Metrics with errors and, for classes, precision/recall/F1 of each and the confusions."""
    task = work.task
    names = tuple(dict.fromkeys([metric, *task.metrics]))
    report: dict[str, Any] = {
        "rows": len(scored.targets),
        "metrics": metrics.measure(names, task, scored, seed=work.config.seed),
    }
    if task.kind != "regress":
        report["per_class"] = metrics.per_class(task, scored)
    if task.kind == "classify":
        report["confusion"] = metrics.confusion(scored.targets, scored.decisions, task.n_outputs).tolist()
        report["labels"] = list(task.labels)
    return report


def _wall(started: float) -> Cost:
    return Cost(wall_s=time.monotonic() - started)
