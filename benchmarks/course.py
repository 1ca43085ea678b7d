"""The course: four datasets and a GPT, our controllers and every way that a competent user would spend the same minutes, paired.

Equal wall clock; the test is never seen: a peer gets the same seconds for all it does from raw texts to a model that predicts, chooses on
the validation split, and its test is loaded when it has ended. Its imports are not counted; ours are.
Every run is a process of its own, killed at twice its budget + 120 s (and 1,800 s for a test). What is there is not run again; a failed
run stays as a row with "ok": false and is run again. `--plan` says what is missing and about how long it takes.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from _common import ROOT, Results, Row, load_average, markdown, parser, read_rows, result_folder, seconds, select
from course_rows import BENCH, CELLS, CONTROLLERS, DOUBLE, LABEL_PEERS, OURS, TEXT, TEXT_PEERS, Cell, limit
from course_table import table

TEST_ROWS = 5000  # of a test at most: imdb's 25,000 would take the encoders longer to read than all else
TEST_S = 1800  # for reading it, at most
# Seconds beside the budget, where no row tells: starting, and reading the test.
START_S, TEST_GUESS_S = 15.0, 6.0
LONG_TESTS_S = {"trainer-defaults": 500.0, "trainer-competent": 110.0, "trainer-optuna": 110.0, "trainer-asha": 120.0,
                "frozen-grid": 100.0, "keras-lstm": 60.0}  # fmt: skip
LONG_TEXTS = ("imdb",)


class Job(NamedTuple):
    cell: Cell
    system: str
    seed: int


def known_controllers(dataset: str) -> set[str]:
    """The controllers that this version of multistep has for the task."""
    if dataset == TEXT:
        from multistep.controllers.language import LANGUAGE_CONTROLLERS

        return set(LANGUAGE_CONTROLLERS)
    from multistep.controllers import CONTROLLERS as LABEL_CONTROLLERS

    return set(LABEL_CONTROLLERS)


def jobs(
    cells: Sequence[Cell], seeds: Sequence[int], systems: Sequence[str] | None, controllers: Sequence[str]
) -> list[Job]:
    """All that is asked for, seed by seed, so that a table of one seed is whole first. Says what this version cannot run."""
    made, skipped = [], set()
    for seed in seeds:
        for cell in cells:
            if seed not in cell.seeds:
                continue
            own = [f"{OURS}{name}" for name in controllers]
            here = [*own, *(TEXT_PEERS if cell.dataset == TEXT else LABEL_PEERS)]
            for system in here:
                if systems and system not in systems:
                    continue
                controller = system.removeprefix(OURS).removesuffix(DOUBLE)
                if system.startswith(OURS) and controller not in known_controllers(cell.dataset):
                    task = "lm" if cell.dataset == TEXT else "classify"
                    skipped.add(f"skipped: {system}: this version has no controller {controller!r} for {task}")
                    continue
                made.append(Job(cell, system, seed))
    for line in sorted(skipped):
        print(line, flush=True)
    return made


def reckoned(job: Job, rows: Sequence[Row]) -> float:
    """Seconds of a job's process: as its other seeds took, else its budget and what is known of starting and reading."""
    cell = job.cell
    same = [r["process_s"] for r in select(rows, dataset=cell.dataset, budget=cell.budget, system=job.system)]
    if same:
        return statistics.fmean(same)
    budget_s = seconds(cell.budget) * (2 if job.system.endswith(DOUBLE) else 1)
    test_s = LONG_TESTS_S.get(job.system, 20.0) if cell.dataset in LONG_TEXTS else TEST_GUESS_S
    return budget_s + START_S + test_s


def run(job: Job, most: int, journals: Path) -> Row:
    """One process, and nothing of it left behind."""
    folder = Path(__file__).parent
    budget_s = seconds(job.cell.budget)
    given_s = budget_s * (2 if job.system.endswith(DOUBLE) else 1)
    command = [sys.executable, str(folder / "course_worker.py"), job.system, job.cell.dataset, f"{budget_s:g}"]
    command += [str(job.seed), "--most", str(most), "--journals", str(journals)]
    paths = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )  # this clone's code, in all of it
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="course-", ignore_cleanup_errors=True) as place:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": paths, "TMPDIR": place}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            out, error = process.communicate(timeout=limit(given_s) + TEST_S)
        except subprocess.TimeoutExpired:
            out, error = "", f"killed after {limit(given_s) + TEST_S:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # itself, where it goes on, and what it started
            except ProcessLookupError:
                pass
            process.wait()
    process_s = round(time.monotonic() - begun, 2)
    try:
        row = json.loads(out)
    except ValueError:
        status = process.returncode
        said = f"killed after {limit(budget_s):.0f} s on its clock" if status == -signal.SIGALRM else error[-500:]
        row = {"ok": False, "status": status, "error": said}
    return {**row, "process_s": process_s}


def plan(todo: Sequence[Job], rows: Sequence[Row]) -> str:
    """What is missing and about how long it takes, a cell a line."""
    body = []
    for cell in dict.fromkeys(job.cell for job in todo):
        mine = [job for job in todo if job.cell == cell]
        minutes = sum(reckoned(job, rows) for job in mine) / 60
        systems = ", ".join(dict.fromkeys(job.system for job in mine))
        body.append([cell.dataset, cell.budget, len(mine), f"{minutes:.0f}", systems])
    total = sum(reckoned(job, rows) for job in todo) / 60
    return (
        f"{markdown(['dataset', 'budget', 'runs missing', 'minutes', 'systems'], body)}\n\nin all about {total:.0f} min"
    )


def main() -> None:
    options = parser(__doc__)
    every = [*(f"{OURS}{name}" for name in CONTROLLERS), *LABEL_PEERS, *TEXT_PEERS]
    options.add_argument("--datasets", nargs="+", choices=sorted({c.dataset for c in CELLS}), help="None: all")
    options.add_argument("--budgets", nargs="+", help="such as 15s, to try it. None: the cells' own")
    options.add_argument("--systems", nargs="+", help=f"of {', '.join(every)}. None: all")
    options.add_argument(
        "--controllers", nargs="+", default=list(CONTROLLERS), help=f"ours; {DOUBLE} at the end: twice the minutes"
    )
    options.add_argument("--test-rows", type=int, default=TEST_ROWS, help="of a test, drawn alike for all")
    options.add_argument("--plan", action="store_true", help="say what is missing and how long it takes, and stop")
    options.add_argument("--table", action="store_true", help="only rewrite table.md from the rows")
    given = options.parse_args()
    own = [f"{OURS}{name}" for name in given.controllers]
    if unknown := set(given.systems or ()) - {*every, *own}:
        options.error(
            f"no system {', '.join(sorted(unknown))}; there are {', '.join([*own, *LABEL_PEERS, *TEXT_PEERS])}"
        )
    cells = [c for c in CELLS if not given.datasets or c.dataset in given.datasets]
    if given.budgets:
        own_cells = {(c.dataset, c.budget): c for c in CELLS}
        names = dict.fromkeys((c.dataset, b) for c in cells for b in given.budgets)
        cells = [own_cells.get(key, Cell(*key, tuple(given.seeds))) for key in names]
    wanted = jobs(cells, given.seeds, given.systems, given.controllers)
    rows = [row for row in read_rows(given.out or result_folder(BENCH)) if row["ok"]]
    there = {(row["dataset"], row["budget"], row["system"], row["seed"]) for row in rows}
    todo = [j for j in wanted if (j.cell.dataset, j.cell.budget, j.system, j.seed) not in there]
    print(plan(todo, rows), flush=True)
    if given.plan:
        return
    results = Results(BENCH, given.out, table)
    if given.table:
        results.write_table()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `run` ends what it started
    for number, job in enumerate(todo):
        rows = [row for row in results.rows if row["ok"]]
        left_s = sum(reckoned(other, rows) for other in todo[number:])
        now = time.strftime("%H:%M:%S")
        where = f"{job.cell.dataset} {job.cell.budget}, {job.system}, seed {job.seed}"
        print(f"{now} {number + 1}/{len(todo)} {where}; about {left_s / 60:.0f} min left", flush=True)
        before = load_average()
        row = run(job, given.test_rows, results.folder.resolve() / "journals")
        results.add(job.cell.dataset, job.cell.budget, job.system, job.seed, row, before)
    print(f"done: {results.folder / 'table.md'}")


if __name__ == "__main__":
    main()
