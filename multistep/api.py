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
from multistep.budget import Budget, Clock
from multistep.bundle import Bundle, find_bundle, load_bundle
from multistep.config import FitConfig, save_config
from multistep.explained import write_page
from multistep.export import Exported, export
from multistep.files import check_new, working_in
from multistep.journal import Unwritten
from multistep.labels import assist_labels, fit_labels, resume_labels
from multistep.language import assist_language, fit_language, is_language, resume_language
from multistep.language_bundle import LanguageBundle
from multistep.metrics import Scored, measure, per_class
from multistep.policy import Policy
from multistep.replay import Replayed, replay_run
from multistep.report.progress import Progress
from multistep.session import budget_so_far, clock_then, more_of
from multistep.state import sweep
from multistep.tuning import tune_run
from multistep.types import Prediction, UserError


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
        examples = data.read_labelled(source, columns, task.kind, task.labels)
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
        """The journal as one dictionary; "metrics" are those of the test split, once it was read for what stands."""
        found = report.summary(self.records())
        test = found["test"]["metrics"] if found["test"] and not found["test_is_older"] else {}
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

    def resume(self, budget: str | float | None = None) -> Run:
        """Go on where the run stopped; `budget` "+5m" adds time."""
        self._bundle = None
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
    adapter: str | None = None,
    controller: str | None = None,
    until: str | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = True,
) -> Run:
    """Make a validated model from labelled texts, or for a task whose answer is a text, within a budget.

    `source`: a CSV, TSV, JSONL (also .gz) or Parquet file, a folder of splits, a `datasets` folder, a hub name, or a .yaml
    configuration. `adapter`: "lora", beside a model that writes; `until`: a score at which training ends, "f1=0.93". `overrides`: "key=value"
    strings such as "optimizer.lr=1e-4". Raises UserError with one line on bad input.
    """
    from multistep.config import resolve

    options = {
        "task": task, "metric": metric, "budget": budget, "seed": seed, "out": None if out is None else str(out),
        "text": (text,) if isinstance(text, str) else tuple(text), "label": label, "model": model, "adapter": adapter,
        "controller": controller, "until": until,
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
    return _in_team(Path(str(config.out)), lambda: _fit(config, progress, started), config.with_(out=None))


def _in_team(out: Path, run: Callable[[], Run], asked: Any) -> Run:
    """A run by the first process of a team, the others assisting. `asked`: what all of them must have been given."""
    with team.gathered():
        team.same(asked, "settings")
        if team.leads():
            done = run()
            team.first({})  # that was all
            return done
        while told := team.first(None):
            _assist(told)
            out = Path(told["out"])
        return Run(out)


def _assist(told: dict[str, Any]) -> None:
    """The part of another process in a run that the first one drives."""
    config, clock = FitConfig.parse(told["config"]), Clock(Budget(**told["budget"]))
    assist = assist_language if is_language(config.task) else assist_labels
    assist(config, told, clock, Unwritten(), Progress(quiet=True))


def _fit(config: FitConfig, progress: Progress, started: float | None) -> Run:
    out = Path(str(config.out))
    with working_in(out, make=True):
        if (out / "journal.jsonl").exists():
            raise UserError(
                f"{out}: there is a run already. Go on with: multistep resume {out}, or choose another --out."
            )
        check_new(out)
        return Run((fit_language if is_language(config.task) else fit_labels)(config, progress, started))


def resume(run_dir: str | Path, budget: str | float | None = None, progress: Progress | None = None) -> Run:
    """Go on with a run that was stopped, with the time that was left; `budget` "+5m" adds to it, "10m" is a new total."""
    out = Path(run_dir)
    return _in_team(out, lambda: _resume(out, budget, progress), [out.name, budget])


def _resume(out: Path, budget: str | float | None, progress: Progress | None) -> Run:
    with working_in(out):
        return _go_on(out, budget, progress)


def _go_on(out: Path, budget: str | float | None, progress: Progress | None) -> Run:
    past = journal.read(out / "journal.jsonl")
    started = next((r for r in past if r["kind"] == "Started"), None)
    if started is None:
        raise UserError(f"{out}: its journal has no beginning. Start the run again with another --out.")
    config = FitConfig.parse({**started["config"], "out": str(out)})
    total = budget_so_far(started, past)
    extended = budget is not None
    if budget is not None:
        total = more_of(total, str(budget).strip())
    if past[-1]["kind"] == "Finished" and not extended:
        return Run(out)
    if not (out / "config.yaml").exists():  # killed when the journal had just begun
        save_config(config, out / "config.yaml")
    sweep(out)
    sweep(out / "states")
    team.sweep(out / "states")
    clock = Clock(total)
    clock.restore(clock_then(past))
    if clock.remaining() <= 0 and extended:
        raise UserError(f"budget: {total} is already spent by this run. Give more, such as --budget +5m.")
    with progress or Progress(quiet=True) as shown:
        go_on = resume_language if is_language(config.task) else resume_labels
        return Run(go_on(config, out, past, clock, extended, shown))
