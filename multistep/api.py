"""The Python front door: fit, resume, load.

run = multistep.fit("reviews.csv", task="classify", metric="f1_macro", budget="5m", out="runs/reviews")
run.predict(["great film"]); print(run.explain()); multistep.load("runs/reviews")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multistep import data, journal, report, team
from multistep.budget import Budget, Clock, parse_budget
from multistep.bundle import Bundle, find_bundle, load_bundle
from multistep.config import FitConfig, save_config
from multistep.controllers import Problem, Target
from multistep.data import Dataset
from multistep.explained import write_page
from multistep.export import Exported, export
from multistep.journal import Journal, Unwritten
from multistep.language import assist_language, fit_language, is_language, resume_language
from multistep.language_bundle import LanguageBundle
from multistep.metrics import METRICS, Scored, check_metric, measure, per_class
from multistep.models.linear import candidates
from multistep.objectives.fits import check_objective
from multistep.policy import Policy
from multistep.replay import Replayed, replay_run
from multistep.report.progress import Progress
from multistep.session import (
    budget_so_far,
    check_same_data,
    clock_then,
    controller_of,
    left,
    machine_facts,
    show,
    signals,
    versions,
)
from multistep.state import sweep
from multistep.target import read_target
from multistep.tasks import Classify, Multilabel, Regress, Task
from multistep.text import text_facts
from multistep.tune import tune
from multistep.tune.actions import Bench
from multistep.tune.text import TextWorks
from multistep.tune.workbench import Workbench
from multistep.tuning import tune_run
from multistep.types import Interrupted, Prediction, UserError

_WARNINGS = ("leakage", "conflict", "duplicates", "empty")  # lines of the data report that a card repeats


@dataclass
class Run:
    """A run's folder, or a bundle's: predict, evaluate, explain."""

    out: Path
    _bundle: Bundle | LanguageBundle | None = field(default=None, repr=False)

    @property
    def bundle(self) -> Bundle | LanguageBundle:
        """The bundle, loaded on first use."""
        if self._bundle is None:
            self._bundle = load_bundle(self.out)
        return self._bundle

    @property
    def labels(self) -> Bundle:
        """The bundle of a model that gives labels or numbers. Raises UserError where it writes."""
        if not isinstance(self.bundle, Bundle):
            raise UserError(f"{self.out}: the model writes texts and gives no labels. Fit one on labels.")
        return self.bundle

    @property
    def language(self) -> LanguageBundle:
        """The bundle of a model that writes. Raises UserError where it gives labels."""
        if not isinstance(self.bundle, LanguageBundle):
            raise UserError(
                f"{self.out}: the model gives labels or numbers and does not write. Use: multistep predict."
            )
        return self.bundle

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """One prediction a text, in order."""
        if isinstance(texts, str):
            raise UserError('predict: give a list of texts, such as ["great film"], not one string.')
        return self.bundle.predict(list(texts))

    def evaluate(self, source: str | Path) -> dict[str, Any]:
        """Score the bundle on labelled data: {"metrics": {name: {"value", "stderr"}}, "n", "per_class", ...}."""
        if isinstance(self.bundle, LanguageBundle):
            return self.bundle.evaluate(source)
        task = self.bundle.task
        columns = data.Columns.parse(self.bundle.info["columns"], "columns")
        examples = data.read_labelled(source, columns, task.kind)
        targets = task.encode([e.label for e in examples])
        scored = Scored(targets, *self.bundle.scored([e.text for e in examples]))
        names = tuple(dict.fromkeys([self.bundle.info["metric"], *task.metrics]))
        found = measure(names, task, scored)
        result: dict[str, Any] = {
            "metrics": {k: {"value": v.value, "stderr": v.stderr} for k, v in found.items()},
            "n": len(examples),
            "data": str(source),
        }
        if task.kind != "regress":
            result["per_class"] = per_class(task, scored)
        return result

    def export(self, to: str, out: str | Path) -> Exported:
        """Write the model for other programs into the new folder `out`: "folder", "onnx", "ctranslate2" or "keras"."""
        return export(self.out, to, out)

    def records(self) -> list[dict[str, Any]]:
        """The journal."""
        return journal.read(self.out / "journal.jsonl")

    def explain(self) -> str:
        """What was tried, what was decided and why, in words and a table; and how it was tuned to predict, where it was."""
        return report.explain_run(self.out)

    def explain_page(self, path: str | Path) -> Path:
        """The same as one HTML file that needs no other: for reading in a browser, and for keeping. Raises OSError."""
        return write_page(self.out, Path(path))

    def replay(self) -> tuple[Replayed, ...]:
        """Every decision derived again from the journal alone, and from that of a tuning where there is one: `findings` are those that
        do not follow from their evidence, `unknown` what the journal does not say enough of."""
        return replay_run(self.out)

    def summary(self) -> dict[str, Any]:
        """The journal as one dictionary; "metrics" are those of the test split, once it was read."""
        found = report.summary(self.records())
        test = found["test"]["metrics"] if found["test"] else {}
        return {**found, "metrics": {k: {"value": v, "stderr": e} for k, (v, e) in test.items()}}

    def tune(
        self, *, metric: str | None = None, latency: str | None = None, budget: str | float = "1m", data: str | None = None,
        costs: str | Path | None = None, coverage: float | None = None, controller: str = "staged",
    ) -> Policy:  # fmt: skip
        """Find the best way to predict under a limit such as latency="p95=20ms", and predict so from now on (multistep.tuning)."""
        self._bundle = None
        return tune_run(
            self.out,
            metric=metric,
            latency=latency,
            budget=budget,
            data=data,
            costs=costs,
            coverage=coverage,
            controller=controller,
        )

    def resume(self, budget: str | None = None) -> Run:
        """Go on where the run stopped; `budget` "+5m" adds time."""
        return resume(self.out, budget)


def fit(
    source: str | Path,
    *,
    task: str | None = None,
    metric: str | None = None,
    budget: str | float | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    text: str | Sequence[str] = (),
    label: str | None = None,
    model: str | None = None,
    controller: str | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = True,
) -> Run:
    """Make a validated model from labelled texts, or for a task whose answer is a text, within a budget.

    `source`: a CSV, TSV, JSONL (also .gz) or Parquet file, a folder of splits, a `datasets` folder, a hub name, or a .yaml
    configuration. `overrides`: "key=value" strings such as "optimizer.lr=1e-4". Raises UserError with one line on bad input.
    """
    from multistep.config import resolve

    options = {
        "task": task, "metric": metric, "budget": budget, "seed": seed, "out": None if out is None else str(out),
        "text": (text,) if isinstance(text, str) else tuple(text), "label": label, "model": model, "controller": controller,
    }  # fmt: skip
    started = time.monotonic()
    with Progress(quiet=quiet) as progress:
        return fit_config(resolve(str(source), options, overrides), progress, started)


def load(path: str | Path) -> Run:
    """A run's folder or a bundle. Raises UserError when there is no servable model in it."""
    find_bundle(Path(path))
    return Run(Path(path))


def fit_config(config: FitConfig, progress: Progress, started: float | None = None) -> Run:
    """Run a configuration. `started`: when the clock began (time.monotonic), for callers that did work before."""
    return _in_team(Path(str(config.out)), lambda: _fit(config, progress, started))


def _in_team(out: Path, run: Callable[[], Run]) -> Run:
    """A run by the first process of a team, the others assisting."""
    with team.gathered():
        if team.leads():
            done = run()
            team.first({})  # that was all
            return done
        while asked := team.first(None):
            _assist(asked)
        return Run(out)


def _assist(asked: dict[str, Any]) -> None:
    """The part of another process in a run that the first one drives: what `_drive` told it."""
    config = FitConfig.parse(asked["config"])
    clock, progress, book = Clock(Budget(**asked["budget"])), Progress(quiet=True), Unwritten()
    if is_language(config.task):
        assist_language(config, asked, clock, book, progress)
        return
    dataset = data_of(config)
    check_same_data(config.data, dataset.fingerprint, [{"kind": "Data", "fingerprint": asked["fingerprint"]}])
    work = Workbench(config, dataset, task_for(dataset), Path(asked["out"]))
    _tune(work, clock, asked["metric"], book, asked["past"], progress)


def _fit(config: FitConfig, progress: Progress, started: float | None) -> Run:
    clock = Clock(parse_budget(config.budget), started=started)
    assert config.out is not None, "resolve() fills it"
    out = Path(config.out)
    if (out / "journal.jsonl").exists():
        raise UserError(f"{out}: there is a run already. Go on with: multistep resume {out}, or choose another --out.")
    if is_language(config.task):
        return Run(fit_language(config, progress, started))
    progress.stage("data", f"reading {config.data}")
    dataset = data_of(config)
    task = task_for(dataset)
    metric = check_metric(config.metric or task.default_metric, task.kind)
    check_objective(config.objective, task.kind, task.n_outputs)
    _target(config, task, metric)
    for line in dataset.report.lines():
        progress.note(line)
    work = Workbench(config, dataset, task, out)
    (out / "states").mkdir(parents=True, exist_ok=True)
    save_config(config, out / "config.yaml")
    book = Journal(out / "journal.jsonl")
    book.append(
        "Started", clock=clock.save(), config=config, budget=clock.budget, metric=metric, versions=versions(),
        machine=machine_facts(work.device),
    )  # fmt: skip
    book.append("Data", clock=clock.save(), report=dataset.report, fingerprint=dataset.fingerprint)
    return _drive(work, clock, metric, book, [], progress)


def resume(run_dir: str | Path, budget: str | None = None, progress: Progress | None = None) -> Run:
    """Go on with a run that was stopped, with the time that was left; `budget` "+5m" adds to it, "10m" is a new total."""
    out = Path(run_dir)
    return _in_team(out, lambda: _resume(out, budget, progress))


def _resume(out: Path, budget: str | None, progress: Progress | None) -> Run:
    past = journal.read(out / "journal.jsonl")
    started = next((r for r in past if r["kind"] == "Started"), None)
    if started is None:
        raise UserError(f"{out}: its journal has no beginning. Start the run again with another --out.")
    config = FitConfig.parse({**started["config"], "out": str(out)})
    total = budget_so_far(started, past)
    extended = budget is not None
    if budget is not None:
        total = total.plus(parse_budget(budget[1:])) if budget.startswith("+") else parse_budget(budget)
    if past[-1]["kind"] == "Finished" and not extended:
        return Run(out)
    sweep(out)
    sweep(out / "states")
    team.sweep(out / "states")
    clock = Clock(total)
    clock.restore(clock_then(past))
    if clock.remaining() <= 0 and extended:
        raise UserError(f"budget: {total} is already spent by this run. Give more, such as --budget +5m.")
    with progress or Progress(quiet=True) as shown:
        if is_language(config.task):
            return Run(resume_language(config, out, past, clock, extended, shown))
        shown.stage("data", f"reading {config.data}")
        dataset = data_of(config)
        check_same_data(config.data, dataset.fingerprint, past)
        work = Workbench(config, dataset, task_for(dataset), out)
        book = Journal(out / "journal.jsonl")
        if not any(r["kind"] == "Data" for r in past):
            book.append("Data", clock=clock.save(), report=dataset.report, fingerprint=dataset.fingerprint)
        past.append(book.append("Resumed", clock=clock.save(), budget=total, extended=extended))
        return _drive(work, clock, started["metric"], book, past, shown)


# ---------------------------------------------------------------------------------------------- one run


def _drive(
    work: Workbench, clock: Clock, metric: str, book: Journal, past: list[dict[str, Any]], progress: Progress
) -> Run:
    """Tune to the end, showing the records as they are written; then the card."""
    team.first(
        {
            "config": work.config, "out": work.out.resolve(), "budget": clock.budget, "metric": metric, "past": past,
            "fingerprint": work.dataset.fingerprint,
        }
    )  # fmt: skip
    bench = _tune(work, clock, metric, book, past, progress)
    run = Run(work.out)
    card = report.card(_card_facts(work, run, bench, clock))
    (work.out / "model" / "README.md").write_text(card, encoding="utf-8")
    book.append("Finished", clock=clock.save(), wall_s=clock.wall_s)
    book.close()
    return run


def _tune(
    work: Workbench, clock: Clock, metric: str, book: Journal, past: list[dict[str, Any]], progress: Progress
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


def _card_facts(work: Workbench, run: Run, bench: Bench, clock: Clock) -> dict[str, Any]:
    """What the model card says; its keys are those of `report.card`."""
    found = run.summary()
    used = bench.incumbent.models() if bench.incumbent is not None else ()
    test = found["test"] or {}
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
        "metrics": found["metrics"],
        "per_class": test.get("per_class"),
        "decisions": [f"{r['stage']}: {r['rule']}" for r in run.records() if r["kind"] == "Committed"],
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
