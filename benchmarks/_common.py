"""What every benchmark shares: the data, the machine's facts, and results that a second run completes.

A result is one JSON line keyed by (bench, dataset, budget, system, seed). `Results.has` says whether it is there, so a
command that was stopped goes on where it was. The table is rewritten from the rows after each of them.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
UNSHOWN = ("machine", "bench", "when", "commit", "right", "nats")  # of a row, where it is printed
KEY = ("bench", "dataset", "budget", "system", "seed")
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "scikit-learn", "numpy", "scipy")

Row = dict[str, Any]


class Cell(NamedTuple):
    """One thing to measure, but for the seed. `bar` is the accuracy that the project promises there, if any."""

    dataset: str
    budget: str
    bar: float | None = None


# The four datasets at the times of the claim. chnsenticorp's bar is what scikit-learn reaches in the same time.
CELLS = (
    Cell("banking77", "60s", 0.930),
    Cell("banking77", "300s", 0.938),
    Cell("imdb", "300s", 0.915),
    Cell("sst2", "300s", 0.885),
    Cell("chnsenticorp", "300s", None),
)
# Extra test files beside the official one: chnsenticorp's official test repeats 331 texts of its train split.
EXTRA_TESTS = {"chnsenticorp": ("test_dedup",)}


# ---------------------------------------------------------------------------------------------- data


def data_folder(name: str) -> Path:
    """The folder of one dataset, below MULTISTEP_DATA or, without it, ../shared/data beside the repository."""
    root = Path(os.environ.get("MULTISTEP_DATA") or ROOT.parent / "shared" / "data")
    folder = root / name
    if not folder.is_dir():
        raise SystemExit(f"benchmarks: no data for {name!r}. Set MULTISTEP_DATA to the folder that holds it.")
    return folder


def load(name: str, split: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a split, in file order."""
    texts: list[str] = []
    labels: list[str] = []
    with gzip.open(data_folder(name) / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            texts.append(row["text"])
            labels.append(str(row["label"]))
    return texts, labels


def rows_of_text(name: str, split: str) -> list[str]:
    """The rows of a split of a running text, in order; joined they are the text."""
    with gzip.open(data_folder(name) / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def seconds(budget: str) -> float:
    """'60s' -> 60.0"""
    return float(budget.removesuffix("s"))


# ---------------------------------------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    """What a reader needs to judge a time: processor, cores, memory, versions."""
    cpu, flags = platform.processor(), set[str]()
    memory_gb = 0.0
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    if Path("/proc/meminfo").exists():
        memory_gb = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "bf16_instructions": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "memory_gb": round(memory_gb, 1),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def commit() -> str:
    """The commit that was measured, with '-dirty' when the tree differs from it; 'unknown' outside a clone."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


# ---------------------------------------------------------------------------------------------- results


class Results:
    """A folder benchmarks/results/<date>-<name> with command.txt, rows.jsonl and table.md."""

    def __init__(self, bench: str, folder: Path | None, table: Callable[[list[Row]], str]):
        self.bench = bench
        self.folder = folder or result_folder(bench)
        self._table = table
        self.folder.mkdir(parents=True, exist_ok=True)
        self._note_command()

    @property
    def rows(self) -> list[Row]:
        return read_rows(self.folder)

    def has(self, dataset: str, budget: str, system: str, seed: int) -> bool:
        """Is there a good row for this key? Failed runs are kept as rows, but are run again."""
        wanted = (self.bench, dataset, budget, system, seed)
        return any(row["ok"] and tuple(row[k] for k in KEY) == wanted for row in self.rows)

    def add(self, dataset: str, budget: str, system: str, seed: int, measured: Row, load_before: float) -> Row:
        """Append one row (with the machine's facts) and rewrite the table. `measured` has `ok` and the numbers."""
        row: Row = {"bench": self.bench, "dataset": dataset, "budget": budget, "system": system, "seed": seed}
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row |= measured | {"when": when, "commit": commit(), "load_before": load_before, "machine": machine()}
        with open(self.folder / "rows.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.write_table()
        shown = {k: v for k, v in row.items() if k not in UNSHOWN and v is not None}
        print(json.dumps(shown, ensure_ascii=False), flush=True)
        return row

    def write_table(self) -> None:
        good = [row for row in self.rows if row["ok"]]
        if not good:
            return
        facts = ", ".join(f"{k} {v}" for k, v in good[-1]["machine"].items())
        commits = ", ".join(sorted({row["commit"] for row in good}))
        text = f"{self._table(good)}\n\nMachine: {facts}.\n\nCommit: {commits}. Command: see command.txt.\n"
        (self.folder / "table.md").write_text(text, encoding="utf-8")

    def _note_command(self) -> None:
        arguments = [a.replace(f"{ROOT}{os.sep}", "") for a in sys.argv[1:]]
        line = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
        path = self.folder / "command.txt"
        known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if line not in known:
            path.write_text("\n".join([*known, line]) + "\n", encoding="utf-8")


def result_folder(bench: str) -> Path:
    """Today's, where none is given."""
    return ROOT / "benchmarks" / "results" / f"{datetime.date.today().isoformat()}-{bench}"


def read_rows(folder: Path) -> list[Row]:
    """All rows of a result folder; none where nothing was measured yet."""
    path = folder / "rows.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def newest_rows(bench: str) -> list[Row]:
    """The good rows of the newest committed or local result of another benchmark."""
    folders = sorted((ROOT / "benchmarks" / "results").glob(f"????-??-??-{bench}"))
    return [row for row in read_rows(folders[-1]) if row["ok"]] if folders else []


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def values(rows: Iterable[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]


def load_average() -> float:
    """Of the last minute, before a run. Our own last run is in it too, so it is a hint, kept with every row."""
    return round(os.getloadavg()[0], 2)


# ---------------------------------------------------------------------------------------------- words and tables


def mean_sd(numbers: Sequence[float], digits: int = 4) -> str:
    """'0.9312 ± 0.0011' over seeds (sample standard deviation); '-' for none, no ± for one."""
    if not numbers:
        return "-"
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f}"
    return f"{statistics.fmean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def markdown(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def parser(description: str | None, seeds: Sequence[int] = (0, 1, 2)) -> argparse.ArgumentParser:
    """The options that every command has."""
    made = argparse.ArgumentParser(
        description=(description or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="one run each")
    made.add_argument("--out", type=Path, help="result folder; rows it has are kept. None: results/<today>-<bench>")
    return made


# ---------------------------------------------------------------------------------------------- our command line


class Ran(NamedTuple):
    """One finished process: the JSON object it printed, its exit status, whole wall time, and the end of its stderr."""

    payload: Row
    status: int
    wall_s: float
    stderr: str


def multistep(*arguments: str, limit_s: float, cache: Path | None = None, processes: int = 1) -> Ran:
    """Run `python -m multistep ... --json` as a user would. Killed after `limit_s`, which then is the status 124.

    `cache`: where encoded features are kept; an empty folder makes sure that nothing comes from an earlier run. `processes`: that torchrun
    starts, which share the cores.
    """
    env = {**os.environ, **({"MULTISTEP_CACHE": str(cache)} if cache else {})}
    command = [sys.executable, "-m", "multistep", *arguments, "--json"]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    start = time.monotonic()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.terminate() if processes > 1 else process.kill()  # torchrun ends what it started
            process.communicate()
            return Ran({}, 124, time.monotonic() - start, f"killed after {limit_s:.0f} s")
    wall_s = time.monotonic() - start
    try:
        payload = json.loads(out)
    except ValueError:
        payload = {}
    return Ran(payload, process.returncode, wall_s, err[-500:])


def fit_and_test(
    dataset: str, budget: str, seed: int, extra_tests: Sequence[str] = (), journals: Path | None = None
) -> Row:
    """`multistep fit` on a dataset in a temporary folder; its test accuracy and whole-process wall seconds.

    The accuracy is the one that the run itself read, once, at its end (`metrics` of the fit's JSON); where the run did
    not get that far, `multistep evaluate` reads it from the bundle. Extra test files are always read by `evaluate`.
    The run's journal is kept in `journals`.
    """
    folder = data_folder(dataset)
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as place:
        out = str(Path(place) / "run")
        options = ["--task", "classify", "--metric", "accuracy", "--text", "text", "--label", "label"]
        options += ["--budget", budget, "--seed", str(seed), "--out", out]
        cache = Path(place) / "cache"
        ran = multistep("fit", str(folder), *options, limit_s=2 * seconds(budget) + 120, cache=cache)
        if journals is not None and (Path(out) / "journal.jsonl").exists():
            said = {place: "TMP", str(folder): f"DATA/{dataset}"}
            publish_journal(Path(out), journals / f"{dataset}-{budget}-{seed}.jsonl.gz", said)
        if ran.status != 0:
            return {"ok": False, "status": ran.status, "wall_s": round(ran.wall_s, 2), "error": ran.stderr}
        metrics = ran.payload.get("metrics") or {}
        read_by = "fit"
        if "accuracy" not in metrics:
            metrics, read_by = _evaluate(out, folder / "test.jsonl.gz"), "evaluate"
        row: Row = {"ok": True, "accuracy": metrics["accuracy"]["value"], "stderr": metrics["accuracy"]["stderr"]}
        row |= {"wall_s": round(ran.wall_s, 2), "read_by": read_by}
        for name in extra_tests:
            row[f"accuracy_{name}"] = _evaluate(out, folder / f"{name}.jsonl.gz")["accuracy"]["value"]
        return row


def publish_journal(run: Path, to: Path, said: Mapping[str, str]) -> None:
    """Keep a run's journal beside the rows. What is published names no folder of this machine: `said` is what stands for each."""
    text = (run / "journal.jsonl").read_text(encoding="utf-8")
    for here, name in (*said.items(), (sys.prefix, "PREFIX"), (str(ROOT), ".")):
        text = text.replace(here, name)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(gzip.compress(text.encode(), mtime=0))


def _evaluate(run: str, source: Path) -> Row:
    ran = multistep("evaluate", run, str(source), limit_s=1800)
    if ran.status != 0:
        raise SystemExit(f"benchmarks: evaluate failed with status {ran.status}: {ran.stderr}")
    return ran.payload["metrics"]
