"""A run on labels or numbers, from configuration to bundle: behind `fit` and `resume`. Of texts as answers: language.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from multistep import data, journal, report, team
from multistep.budget import Clock, parse_budget
from multistep.config import FitConfig, save_config
from multistep.controllers import Problem, Target
from multistep.data import Dataset
from multistep.journal import Journal
from multistep.metrics import METRICS, check_metric
from multistep.models.linear import candidates
from multistep.objectives.fits import check_objective
from multistep.report.progress import Progress
from multistep.session import check_same_data, controller_of, left, machine_facts, resumed, show, signals, versions
from multistep.target import read_target
from multistep.tasks import Classify, Multilabel, Regress, Task
from multistep.text import text_facts
from multistep.tune import tune
from multistep.tune.actions import Bench
from multistep.tune.text import TextWorks
from multistep.tune.workbench import Workbench
from multistep.types import Interrupted

_WARNINGS = ("leakage", "conflict", "duplicates", "empty")  # lines of the data report that a card repeats


def fit_labels(config: FitConfig, progress: Progress, started: float | None = None) -> Path:
    """Run a configuration; the run's folder. Raises UserError on bad input."""
    assert config.out is not None
    clock, out = Clock(parse_budget(config.budget), started=started), Path(config.out)
    progress.stage("data", f"reading {config.data}")
    dataset = data_of(config)
    task = task_for(dataset)
    metric = check_metric(config.metric or task.default_metric, task.kind)
    check_objective(config.objective, task.kind, task.n_outputs)
    _target(config, task, metric)
    for line in dataset.report.lines():
        progress.note(line)
    work = Workbench(config, dataset, task, out)
    book = Journal(out / "journal.jsonl")  # first: what is there without one is not a run's
    book.append(
        "Started", clock=clock.save(), config=config, budget=clock.budget, metric=metric, versions=versions(),
        machine=machine_facts(work.device),
    )  # fmt: skip
    save_config(config, out / "config.yaml")
    (out / "states").mkdir(exist_ok=True)
    book.append("Data", clock=clock.save(), report=dataset.report, fingerprint=dataset.fingerprint)
    return _drive(work, clock, metric, book, [], progress)


def resume_labels(
    config: FitConfig, out: Path, past: list[dict[str, Any]], clock: Clock, extended: bool, progress: Progress
) -> Path:
    """Go on with a run that was stopped, or that was given more."""
    progress.stage("data", f"reading {config.data}")
    dataset = data_of(config)
    check_same_data(config.data, dataset.fingerprint, past)
    work = Workbench(config, dataset, task_for(dataset), out)
    book = Journal(out / "journal.jsonl")
    if not any(r["kind"] == "Data" for r in past):
        book.append("Data", clock=clock.save(), report=dataset.report, fingerprint=dataset.fingerprint)
    past.append(resumed(book, clock, extended))
    metric = next(r["metric"] for r in past if r["kind"] == "Started")
    return _drive(work, clock, metric, book, past, progress)


def assist_labels(config: FitConfig, told: dict[str, Any], clock: Clock, book: Journal, progress: Progress) -> None:
    """The part of another process in a run that the first one drives: what `_drive` told it."""
    dataset = data_of(config)
    check_same_data(config.data, dataset.fingerprint, [{"kind": "Data", "fingerprint": told["fingerprint"]}])
    work = Workbench(config, dataset, task_for(dataset), Path(told["out"]))
    _tune(work, clock, told["metric"], book, told["past"], progress)


def _drive(
    work: Workbench, clock: Clock, metric: str, book: Journal, past: Sequence[dict[str, Any]], progress: Progress
) -> Path:
    """Tune to the end, showing the records as they are written; then the card."""
    team.first(
        {
            "config": work.config, "out": work.out.resolve(), "budget": clock.budget, "metric": metric, "past": past,
            "fingerprint": work.dataset.fingerprint,
        }
    )  # fmt: skip
    bench = _tune(work, clock, metric, book, past, progress)
    card = report.card(_card_facts(work, bench, clock))
    (work.out / "model" / "README.md").write_text(card, encoding="utf-8")
    book.append("Finished", clock=clock.save(), wall_s=clock.wall_s)
    book.close()
    return work.out


def _tune(
    work: Workbench, clock: Clock, metric: str, book: Journal, past: Sequence[dict[str, Any]], progress: Progress
) -> Bench:
    """To the end, showing the records as they are written."""
    with signals() as stop:
        bench = Bench(work, clock, stop, metric)

        def watch(done: float) -> None:
            """Long encoding comes by here after every batch."""
            if number := stop():
                raise Interrupted(number)
            progress.remaining(left(clock))
            progress.tick(done, "through the encoder")

        work.watch = watch
        controller = controller_of(_problem(work, metric), work.config.controller, book, clock, past)
        for record in tune(TextWorks(bench), controller, book, past):
            show(progress, record, clock, metric)
    return bench


def _card_facts(work: Workbench, bench: Bench, clock: Clock) -> dict[str, Any]:
    """What the model card says; its keys are those of `report.card`."""
    records = journal.read(work.out / "journal.jsonl")
    found = report.summary(records)
    test = found["test"] or {"metrics": {}}
    used = bench.incumbent.models() if bench.incumbent is not None else ()
    return {
        "name": work.out.name,
        "task": work.task.kind,
        "labels": work.task.labels,
        "base_model": work.base_model if "encoder" in used else None,
        "dataset": work.config.data,
        "rows": {k: len(v) for k, v in work.texts.items()},
        "warnings": [
            line.strip()
            for line in work.dataset.report.lines()
            if line.startswith(_WARNINGS) and "none between" not in line
        ],
        "metrics": {k: {"value": v, "stderr": e} for k, (v, e) in test["metrics"].items()},
        "per_class": test.get("per_class"),
        "test_reads": found["test_reads"],
        "decisions": [f"{r['stage']}: {r['rule']}" for r in records if r["kind"] == "Committed"],
        "predictor": " and ".join(used) + ("" if bench.incumbent is None else f" ({bench.incumbent.kind})"),
        "max_length": work.max_length if "encoder" in used else None,
        "budget": str(clock.budget),
        "wall_s": clock.wall_s,
        "versions": versions(),
    }


def _target(config: FitConfig, task: Task, metric: str) -> Target | None:
    """The score at which training ends, where one was asked for. Raises UserError."""
    measured = tuple(dict.fromkeys([metric, *task.metrics]))
    return read_target(
        config.until, metric, measured, lambda name: check_metric(name, task.kind),
        lambda name: METRICS[name].higher_is_better,
    )  # fmt: skip


def _problem(work: Workbench, metric: str) -> Problem:
    first, kind = parse_budget(work.config.budget), work.task.kind
    return Problem(
        task=kind, n_outputs=work.task.n_outputs, metric=metric, higher_is_better=METRICS[metric].higher_is_better,
        target=_target(work.config, work.task, metric), rows={k: len(v) for k, v in work.texts.items()},
        characters={k: sum(map(len, v)) for k, v in work.texts.items()}, budget=first.amount, unit=first.unit, config=work.config,
        linear=tuple(candidates(work.task.kind, work.task.n_outputs, text_facts(work.texts["train"]))),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- small things


def data_of(config: FitConfig) -> Dataset:
    """The rows that a configuration names, split as it says."""
    return data.load(
        config.data, task=config.task, text=config.text, label=config.label, seed=config.seed, test=config.test
    )


def task_for(dataset: Dataset) -> Task:
    """The task of a dataset: its labels, or the units of its numbers."""
    match dataset.task_kind:
        case "classify":
            return Classify(labels=dataset.labels)
        case "multilabel":
            return Multilabel(labels=dataset.labels)
        case "regress":
            values = [float(e.label) for e in dataset.train]
            mean = sum(values) / len(values)
            scale = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
            return Regress(mean=mean, scale=scale or 1.0)
