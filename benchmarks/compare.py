"""Optimizers against each other on three problems, tuned alike, over seeds, after decay: a convex head, an LSTM, a small GPT.

head: a linear softmax head on the encoder's features of banking77, with an L2 penalty: one convex function, the same for all.
imdb_lstm: the LSTM of `fit --model lstm` on imdb, from random weights. gpt: the character model of benchmarks/gpt.py.
The rules are those of docs/compare.md. Rows, table and curves are in results/<date>-compare/<problem>/; what is there is not run
again. `--plan` says how long all would take and stops; `--docs` writes the tables into docs/which-optimizer.md from the rows.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from _common import ROOT, commit, data_folder
from gpt import GPT, GPTSize, characters, windows
from head import encoded
from multistep.budget import parse_budget
from multistep.comparison.front import Compared, compare

DOCS = ROOT / "docs" / "which-optimizer.md"
HEAD_L2 = (
    1e-3  # the best of the path that `fit` walks on this data, so that minimizing further does not make the head worse
)
JUDGING = 1.25  # all wall time as a multiple of training's: judging, warming up, loading


class Problem(NamedTuple):
    title: str
    budget: str
    optimizers: tuple[str, ...]
    points: int  # looks at validation along a run
    curve_rows: int
    run: Callable[[Sequence[Any], dict[str, Any]], Compared]  # optimizers, and the options that all problems share


def head(optimizers: Sequence[Any], options: dict[str, Any]) -> Compared:
    raw, y = encoded(data_folder("banking77"), 9000)
    mixed = np.random.default_rng(0).permutation(len(y))
    train, held = mixed[: len(y) * 8 // 10], mixed[len(y) * 8 // 10 :]
    x = torch.from_numpy((raw - raw[train].mean(0)) / np.maximum(raw[train].std(0), 1e-6))
    parts = [(x[take], torch.from_numpy(y[take])) for take in (train, held)]
    # The penalty is in the objective, so nothing decays beside it: all minimize the same function.
    given = [_settings(o) for o in optimizers]
    return compare(
        given, lambda seed: nn.Linear(x.shape[1], int(y.max()) + 1), train=parts[0], validation=parts[1], metric="loss",
        objective={"kind": "penalized", "inner": {"kind": "cross_entropy"}, "l2": HEAD_L2}, batch_size=64, clip=0.0, **options,
    )  # fmt: skip


def _settings(name: str) -> dict[str, Any]:
    kind, _, batch = name.partition("@")
    return {"kind": kind, "name": name, "weight_decay": 0.0, **({"batch_size": batch} if batch else {})}


def imdb_lstm(optimizers: Sequence[Any], options: dict[str, Any]) -> Compared:
    return compare(list(optimizers), data_folder("imdb"), overrides=["model=lstm"], metric="accuracy", **options)


def gpt(optimizers: Sequence[Any], options: dict[str, Any]) -> Compared:
    size = GPTSize(vocabulary=len(characters()))
    return compare(
        list(optimizers), lambda seed: GPT(size, seed), objective="next_token", train=windows("train"),
        validation=windows("validation", stride=size.context), metric="loss", batch_size=12, **options,
    )  # fmt: skip


PROBLEMS = {
    "head": Problem(
        "A linear head on fixed features (banking77, convex)", "12s",
        ("adamw", "sgd", "nesterov", "adagrad", "lion", "soap", "schedule_free", "prodigy", "gradient_descent@all",
         "lbfgs@all", "newton_cg@all"), 20, 10_000, head,
    ),
    "imdb_lstm": Problem(
        "An LSTM from random weights (imdb)", "60s",
        ("adamw", "muon", "soap", "lion", "schedule_free", "prodigy", "sgd", "newton_cg@128"), 12, 500, imdb_lstm,
    ),
    "gpt": Problem(
        "A character GPT from random weights (tinyshakespeare)", "60s",
        ("adamw", "muon", "soap", "lion", "schedule_free", "prodigy", "adafactor", "momentum"), 12, 250, gpt,
    ),
}  # fmt: skip


def minutes(problem: Problem, given: argparse.Namespace) -> float:
    """Of one full pass, judging included. Raises SystemExit for a budget that is not in seconds."""
    budget = parse_budget(given.budget or problem.budget)
    if budget.unit != "seconds":
        raise SystemExit("benchmarks: --budget is in seconds here, such as 30s.")
    names = given.optimizers or problem.optimizers
    runs = len(names) * (given.seeds + given.probes * given.probe_share) + given.more * min(given.closest, len(names))
    return JUDGING * runs * budget.amount / 60


def write_docs(folder: Path) -> None:
    """Put the table of every problem that has rows between its markers in the guide."""
    text = DOCS.read_text(encoding="utf-8")
    for name in PROBLEMS:
        rows = folder / name / "rows.jsonl"
        start, end = f"<!-- compare:{name} -->", f"<!-- /compare:{name} -->"
        if not rows.exists() or start not in text:
            continue
        place = f"../benchmarks/results/{folder.name}/{name}"
        table = Compared(folder / name).table()
        before, _, rest = text.partition(start)
        after = rest.partition(end)[2]
        text = f"{before}{start}\n\n![{PROBLEMS[name].title}]({place}/curves.svg)\n\n{table}\n\n{end}{after}"
    DOCS.write_text(text, encoding="utf-8")


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("problems", nargs="*", help=f"of {', '.join(PROBLEMS)}; none: all")
    made.add_argument("--budget", help="of one run, such as 30s; none: the problem's own")
    made.add_argument(
        "--optimizers", type=lambda text: text.split(","), help="such as adamw,muon; none: the problem's own"
    )
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--more", type=int, default=2, help="more seeds of the closest ones (2)")
    made.add_argument("--closest", type=int, default=3)
    made.add_argument("--probes", type=int, default=3)
    made.add_argument("--probe-share", type=float, default=0.25)
    made.add_argument("--threads", type=int, help="of torch; none: as the machine gives")
    made.add_argument("--out", type=Path, help="none: results/<today>-compare")
    made.add_argument("--plan", action="store_true", help="say how long it would take, and stop")
    made.add_argument("--docs", action="store_true", help="only write the guide's tables from the rows")
    given = made.parse_args()
    folder = given.out or ROOT / "benchmarks" / "results" / f"{datetime.date.today().isoformat()}-compare"
    names = given.problems or list(PROBLEMS)
    if unknown := set(names) - set(PROBLEMS):
        made.error(f"no problem {', '.join(unknown)}; there are {', '.join(PROBLEMS)}")
    if given.docs:
        write_docs(folder)
        return
    if given.threads:
        torch.set_num_threads(given.threads)
    for name in names:
        problem = PROBLEMS[name]
        count = len(given.optimizers or problem.optimizers)
        print(
            f"{name}: {count} optimizers, {given.budget or problem.budget} a run, about {minutes(problem, given):.0f} min"
        )
    print(f"in all about {sum(minutes(PROBLEMS[n], given) for n in names):.0f} min", flush=True)
    if given.plan:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "command.txt", "a", encoding="utf-8") as file:
        words = [a.replace(f"{ROOT}/", "") for a in sys.argv[1:]]
        file.write(shlex.join(["python", "benchmarks/compare.py", *words]) + "\n")
    for name in names:
        problem = PROBLEMS[name]
        options = {
            "budget": given.budget or problem.budget, "seeds": given.seeds, "more": given.more, "closest": given.closest,
            "probes": given.probes, "probe_share": given.probe_share, "points": problem.points, "quiet": False,
            "curve_rows": problem.curve_rows, "out": folder / name, "facts": {"commit": commit()},
        }  # fmt: skip
        found = problem.run(given.optimizers or problem.optimizers, options)
        found.write(problem.title)
        print(f"\n{problem.title}\n\n{found.table()}\n", flush=True)


if __name__ == "__main__":
    main()
