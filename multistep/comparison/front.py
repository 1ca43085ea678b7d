"""`multistep.compare`: tune every optimizer alike, train each from several seeds in turns, judge after decay, say what can be said.

multistep.compare("adamw,muon,sgd", "imdb.yaml", budget="5m", seeds=5)
multistep.compare(["adamw", "lbfgs@all"], make_module, objective="cross_entropy", train=(x, y), budget="2000 updates")
"""

from __future__ import annotations

import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from multistep import __version__
from multistep.budget import Budget, parse_budget
from multistep.comparison import page
from multistep.comparison.arena import Arena, Make, ModuleArena, made
from multistep.comparison.book import Book, Row, read
from multistep.comparison.entrants import Entrant, chosen, entrants, next_value
from multistep.comparison.plot import svg
from multistep.comparison.run import cost, run_once
from multistep.comparison.texts import TextArena, text_arena
from multistep.loader import Split
from multistep.modules import device_of, first_outputs, metric_of, rows_by_split, spec_of
from multistep.objectives import OBJECTIVES
from multistep.optimizers.base import REGIMES, Regime
from multistep.report.progress import Progress
from multistep.report.words import duration
from multistep.schedules import SCHEDULES, Linear, Schedule
from multistep.session import signals
from multistep.tune.module import task_of
from multistep.types import UserError, nearest

TUNE_SEED = 2**31 - 1  # of every probe: no run has it
LEAST_UPDATES = 3  # of a probe, with the slowest optimizer


@dataclass
class Compared:
    """What `compare` gives back; `Compared(folder)` reads what is in a folder."""

    out: Path
    _folder: Any = field(default=None, repr=False)  # keeps a temporary folder alive

    @property
    def rows(self) -> list[Row]:
        """Every probe and every run, after a row with the settings."""
        return read(self.out / "rows.jsonl")

    def summary(self) -> dict[str, Any]:
        """{"metric", "best", "level", "standings": [{"optimizer", "score", "against", ...}], ...}, best first."""
        return page.summary(self.rows)

    def table(self) -> str:
        """The table in Markdown, and what it says in words."""
        return page.markdown(self.summary())

    def plot(self, title: str = "") -> str:
        """Quality against seconds and against updates, as SVG."""
        return svg(self.rows, title)

    def write(self, title: str = "") -> None:
        """table.md and curves.svg, beside the rows."""
        (self.out / "table.md").write_text(self.table() + "\n", encoding="utf-8")
        (self.out / "curves.svg").write_text(self.plot(title), encoding="utf-8")


@dataclass(frozen=True)
class Plan:
    """What a comparison spends: of tuning and of runs."""

    budget: Budget
    probe: Budget
    probes: int
    seeds: int
    more: int
    closest: int
    points: int
    schedule: Schedule


def compare(
    optimizers: str | Sequence[str | Mapping[str, Any]],
    subject: str | Path | Make,
    *,
    objective: str | Mapping[str, Any] | Any = None,
    train: Any = None,
    validation: Any = None,
    metric: str | None = None,
    budget: str | float = "5m",
    seeds: int = 3,
    more: int = 0,
    closest: int = 3,
    probes: int = 3,
    probe_share: float = 0.25,
    regime: str = "scratch",
    schedule: str | Mapping[str, Any] | Any = None,
    batch_size: int = 32,
    clip: float = 1.0,
    dropout: float | None = None,
    bf16: bool = False,
    split: Split | None = None,
    points: int = 20,
    curve_rows: int = 1000,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Compared:
    """Compare optimizers at equal tuning and equal budget, after the learning rate has decayed, over seeds.

    `optimizers`: "adamw,muon,lbfgs@all" or a list of such names and of dictionaries with `kind`, settings, perhaps `batch_size`, `name`.
    `subject`: data or a .yaml configuration as `fit` takes them (with `overrides`, "key=value"), or a function from a seed to a fresh
    module; then `objective`, `train`, `validation` and what follows are as in `optimize`. `budget`: of one run. `seeds`: runs for each
    optimizer; then the `closest` best get `more` seeds each. `probes` of `probe_share` of the budget tune each optimizer's one knob.
    `points`, `curve_rows`: looks at validation along the way, with the clock stopped, and how many of its rows they use.
    `out`: a folder; what it has already is not run again. `facts`: anything to be kept with every row. Raises UserError on bad input.
    """
    total = parse_budget(budget)
    plan = _plan(total, seeds, more, closest, probes, probe_share, points, schedule)
    temporary = tempfile.TemporaryDirectory(prefix="multistep-") if out is None else None
    folder = Path(temporary.name if temporary is not None else str(out))
    arena: ModuleArena | TextArena
    if isinstance(subject, torch.nn.Module):
        raise UserError("compare: a module is trained once only. Give a function from a seed to a fresh module.")
    if callable(subject):
        if objective is None or train is None:
            raise UserError("compare: a module needs objective= and train= beside it, as optimize does.")
        arena, named, told = _module_arena(
            subject, objective, train, validation, metric, split, clip, dropout, bf16, curve_rows,
        )  # fmt: skip
        chosen_regime = _regime(regime)
        given = entrants(optimizers, _size(batch_size), arena.rows["train"], chosen_regime, {})
        told |= {"regime": chosen_regime, "clip": clip, "dropout": dropout, "bf16": bf16, **named}
    else:
        arena, told = text_arena(str(subject), metric, overrides, curve_rows, folder / "work")
        given = entrants(optimizers, arena.batch_size, arena.rows["train"], arena.regime, arena.scale)
        if schedule is None:
            plan = replace(plan, schedule=decaying(arena.schedule))
    settings = {
        "metric": arena.metric, "budget": str(total), "probe": str(plan.probe), "probes": probes, "points": points,
        "schedule": plan.schedule.model_dump(), "rows": arena.rows, "threads": torch.get_num_threads(), **told,
    }  # fmt: skip
    with Progress(quiet=quiet) as progress, signals() as stop:
        contest = _Contest(arena, given, plan, Book(folder, settings), stop, progress, dict(facts or {}))
        contest.go()
    compared = Compared(folder, temporary)
    compared.write()
    return compared


class _Contest:
    """Carries out what its rows lack: probes first, then runs, in turns."""

    def __init__(
        self, arena: Arena, given: Sequence[Entrant], plan: Plan, book: Book, stop: Callable[[], int],
        progress: Progress, facts: Mapping[str, Any],
    ):  # fmt: skip
        self.arena, self.given, self.plan, self.book = arena, given, plan, book
        self.stop, self.progress, self.facts = stop, progress, facts
        for entrant in given:
            kept = next((r for r in book.rows[1:] if r["optimizer"] == entrant.name), None)
            if kept is not None and kept["entrant"] != entrant.model_dump(mode="json"):
                raise UserError(
                    f"{book.path.parent}: its rows of {entrant.name} were made with other settings of that optimizer. "
                    "Give it another 'name', or choose another --out."
                )

    def go(self) -> None:
        todo = [e for e in self.given if self._missing(e)]
        if todo:
            self._say_plan(todo)
        for n in range(self.plan.probes):
            for entrant in self.given:
                self._probe(entrant, n)
        for seed in range(self.plan.seeds):
            for entrant in self.given:
                self._run(entrant, seed)
        nearest_ones = self._closest()
        for seed in range(self.plan.seeds, self.plan.seeds + self.plan.more):
            for entrant in nearest_ones:
                self._run(entrant, seed)

    # ------------------------------------------------------------------ the plan, said before

    def _missing(self, entrant: Entrant) -> int:
        probes = len(self.book.of("probe", entrant.name)) if entrant.knob else self.plan.probes
        runs = {r["seed"] for r in self.book.of("run", entrant.name)}
        return max(0, self.plan.probes - probes) + len(set(range(self.plan.seeds)) - runs)

    def _say_plan(self, todo: Sequence[Entrant]) -> None:
        """Warm every optimizer up, refuse a budget that is too small, and say how long all will take."""
        plan, arena = self.plan, self.arena
        self.progress.stage("plan", f"an update of each of {len(todo)} optimizers is timed")
        update_s = {e.name: cost(arena, e, plan.schedule, TUNE_SEED) for e in todo}
        looks = {split: _judge_s(arena, split) for split in ("validation", "curve")}
        short = Budget(
            amount=plan.probe.amount if any(e.knob for e in todo) else plan.budget.amount, unit=plan.budget.unit
        )
        fit = {e.name: _updates(short, update_s[e.name], arena, e.batch_size) for e in todo}
        slowest = min(fit, key=lambda name: fit[name])
        if (fits := fit[slowest]) < LEAST_UPDATES:
            need = short.with_(amount=plan.budget.amount * LEAST_UPDATES / max(fits, 1e-3))
            raise UserError(
                f"budget: a probe of {short} is {fits:.1f} updates of {slowest}, and {LEAST_UPDATES} are the least. "
                f"Give a budget of about {_round_up(need)}, or leave {slowest} out."
            )
        trainings, train_s, judge_s = 0, 0.0, 0.0
        for entrant in todo:
            runs = len(set(range(plan.seeds)) - {r["seed"] for r in self.book.of("run", entrant.name)})
            left = max(0, plan.probes - len(self.book.of("probe", entrant.name))) if entrant.knob else 0
            closer = plan.more if len(todo) <= plan.closest else plan.more * plan.closest / len(todo)
            trainings += runs + left
            update = update_s[entrant.name], arena, entrant.batch_size
            train_s += (runs + closer) * _seconds(plan.budget, *update) + left * _seconds(plan.probe, *update)
            judge_s += (runs + closer) * (plan.points * looks["curve"] + looks["validation"]) + left * looks[
                "validation"
            ]
        self.progress.note(
            f"{len(todo)} optimizers x ({plan.probes} probes of {plan.probe} + {plan.seeds} runs of {plan.budget})"
            + (f", {plan.more} more runs of the closest {plan.closest}" if plan.more else "")
            + f": {trainings} trainings to do, about {duration(train_s + judge_s)}, {duration(judge_s)} of it judging"
        )

    # ------------------------------------------------------------------ one row each

    def _probe(self, entrant: Entrant, n: int) -> None:
        done = self.book.of("probe", entrant.name)
        if not entrant.knob or n < len(done):
            return
        value = next_value(entrant, self._tried(entrant))
        self.progress.stage(f"{entrant.name}, probe {n + 1}", f"{entrant.knob} {value:.3g} for {self.plan.probe}")
        found = self._train(entrant, value, self.plan.probe, TUNE_SEED, points=0)
        self.book.add("probe", optimizer=entrant.name, index=n, value=value, **found, **self._about(entrant))
        self.progress.note(_result(self.arena.metric, found))

    def _run(self, entrant: Entrant, seed: int) -> None:
        if any(r["seed"] == seed for r in self.book.of("run", entrant.name)):
            return
        value, edge = chosen(entrant, self._tried(entrant))
        self.progress.stage(
            f"{entrant.name}, seed {seed}", f"{entrant.knob or 'lr'} {value:.3g} for {self.plan.budget}"
        )
        found = self._train(entrant, value, self.plan.budget, seed, self.plan.points)
        self.book.add("run", optimizer=entrant.name, seed=seed, value=value, edge=edge, **found, **self._about(entrant))
        self.progress.note(_result(self.arena.metric, found))

    def _train(self, entrant: Entrant, value: float, budget: Budget, seed: int, points: int) -> Row:
        load = round(os.getloadavg()[0], 2)
        found = run_once(
            self.arena, entrant, value, self.plan.schedule, budget, seed, points, self.stop, self.progress.tick
        )
        return {**found, "load_before": load}

    def _tried(self, entrant: Entrant) -> list[tuple[float, float]]:
        """(value, score) of the probes, higher better; -inf where one diverged."""
        sign = page.sign_of(self.arena.metric)
        rows = self.book.of("probe", entrant.name)
        return [(r["value"], float("-inf") if r["diverged"] else sign * r["score"]) for r in rows]

    def _closest(self) -> list[Entrant]:
        """The best by mean over the first seeds, as many as get more of them. Later seeds do not change who they are."""
        first = [r for r in self.book.rows if r["kind"] != "run" or r["seed"] < self.plan.seeds]
        order = [s["optimizer"] for s in page.summary(first)["standings"] if s["score"] is not None]
        return [e for e in self.given if e.name in order[: self.plan.closest]]

    def _about(self, entrant: Entrant) -> Row:
        """What every row says of how it came to be."""
        return {
            "knob": entrant.knob, "batch_size": entrant.batch_size, "entrant": entrant.model_dump(mode="json"),
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "version": __version__,
            "machine": f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
            **self.facts,
        }  # fmt: skip


# ---------------------------------------------------------------------------------------------- what was asked


def _plan(
    total: Budget, seeds: int, more: int, closest: int, probes: int, share: float, points: int, schedule: Any
) -> Plan:
    for name, value, least in (("seeds", seeds, 2), ("more", more, 0), ("probes", probes, 1), ("points", points, 1)):
        if value < least:
            raise UserError(
                f"{name}: {value} is too few. Give {least} or more{': one seed has no spread' if least == 2 else ''}."
            )
    if closest < 2:
        raise UserError(f"closest: {closest} is too few. Give 2 or more: what is best is told by comparing.")
    if not 0 < share <= 1:
        raise UserError(f"probe_share: {share} is not a share of the budget. Give a number above 0 and up to 1.")
    shape = decaying(Linear() if schedule is None else spec_of(schedule, SCHEDULES, "schedule"))
    amount = total.amount * share
    return Plan(
        total, total.with_(amount=amount if total.unit == "seconds" else float(max(1, round(amount)))), probes, seeds,
        more, closest, points, shape,
    )  # fmt: skip


def decaying(schedule: Schedule) -> Schedule:
    """The schedule itself. Raises UserError when it does not end at zero."""
    if schedule(1.0) > 0.01:
        raise UserError(
            f"schedule: {schedule.kind} does not decay to zero, so its end says little. Take linear, cosine or wsd."
        )
    return schedule


def _module_arena(
    make: Make, objective: Any, train: Any, validation: Any, metric: str | None, split: Split | None, clip: float,
    dropout: float | None, bf16: bool, curve_rows: int,
) -> tuple[ModuleArena, dict[str, Any], dict[str, Any]]:  # fmt: skip
    goal = spec_of(objective, OBJECTIVES, "objective")
    if isinstance(train, DataLoader):
        raise UserError(
            "train: a DataLoader makes batches of its own, so no optimizer could have another. Give its dataset and batch_size=."
        )
    module, again = made(make, TUNE_SEED), made(make, TUNE_SEED)
    if {id(p) for p in module.parameters()} & {id(p) for p in again.parameters()}:
        raise UserError(
            "compare: the function gives the same module again, so one run would go on where another ended. Make a new one in it."
        )
    rows = rows_by_split(train, validation, None, device_of(module), split, seed=0)
    task = task_of(goal, first_outputs(module, rows["validation"]))
    arena = ModuleArena(
        make, rows["train"], rows["validation"], goal, metric_of(metric, task), task, clip=clip, dropout=dropout,
        bf16=bf16, curve_rows=curve_rows,
    )  # fmt: skip
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return arena, {"objective": goal.model_dump()}, {"model": type(module).__name__, "parameters": size}


def _regime(given: str) -> Regime:
    if given not in REGIMES:
        raise UserError(f"regime: {given!r} is not known.{nearest(given, REGIMES)}")
    return next(r for r in REGIMES if r == given)


def _size(batch_size: int) -> int:
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} is not a number of examples. Give 1 or more.")
    return batch_size


# ---------------------------------------------------------------------------------------------- small things


def _judge_s(arena: Arena, split: str) -> float:
    module = arena.module(TUNE_SEED)
    begun = time.monotonic()
    arena.judge(module, split)
    return time.monotonic() - begun


def _updates(budget: Budget, update_s: float, arena: Arena, batch_size: int) -> float:
    match budget.unit:
        case "seconds":
            return budget.amount / max(1e-9, update_s)
        case "updates":
            return budget.amount
        case "tokens":
            return budget.amount / max(1, arena.train.tokens(arena.train.order(batch_size, TUNE_SEED).at(0)))


def _seconds(budget: Budget, update_s: float, arena: Arena, batch_size: int) -> float:
    return budget.amount if budget.unit == "seconds" else _updates(budget, update_s, arena, batch_size) * update_s


def _round_up(budget: Budget) -> str:
    return str(budget.with_(amount=float(int(1.1 * budget.amount) + 1)))


def _result(metric: str, found: Row) -> str:
    if found["diverged"]:
        return f"diverged: {found['diverged']}"
    return f"{metric} {found['score']:.5g} after {found['updates']} updates, {found['seconds']:.1f} s"


def _cpu() -> str:
    lines: Iterator[str] = iter(())
    if Path("/proc/cpuinfo").exists():
        lines = iter(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
