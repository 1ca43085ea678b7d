"""Our four classification datasets at their budgets, three seeds each, through the command line as a user calls it.

Accuracy is on the test split; wall seconds are those of the whole process, imports and the final test included.
Compared with the project's bars and, where `peer_sklearn.py` has been run, with its grid search in the same time.
"""

from __future__ import annotations

import math
import statistics

from _common import (
    CELLS,
    EXTRA_TESTS,
    Cell,
    Results,
    Row,
    fit_and_test,
    load,
    load_average,
    markdown,
    mean_sd,
    newest_rows,
    parser,
    seconds,
    select,
    values,
)

BENCH = "suite"
SYSTEM = "multistep"


def table(rows: list[Row]) -> str:
    peers = newest_rows("peer_sklearn")
    head = ["dataset", "budget", "seeds", "test accuracy", "bar", "reached", "scikit-learn, same time"]
    head += ["difference ± se", "verdict", "longest wall s", "over budget"]
    body = []
    for cell, column, test in _lines():
        mine = select(rows, dataset=cell.dataset, budget=cell.budget)
        accuracies = values(mine, column)
        if not accuracies:
            continue
        mean = statistics.fmean(accuracies)
        peer = values(select(peers, dataset=cell.dataset, budget=cell.budget, system="grid"), column)
        longest_s = max(values(mine, "wall_s"))
        name = cell.dataset if test == "test" else f"{cell.dataset} ({test})"
        bar = f"{cell.bar:.3f}" if cell.bar else "-"
        reached = ("yes" if mean >= cell.bar else "no") if cell.bar else "-"
        mine_text = [name, cell.budget, len(accuracies), mean_sd(accuracies), bar, reached]
        over = f"{longest_s / seconds(cell.budget) - 1:+.1%}"
        against = _against(mean, peer, cell.dataset, test)
        body.append([*mine_text, mean_sd(peer), *against, f"{longest_s:.1f}", over])
    return markdown(head, body) + "\n\n± is the sd over seeds; se the binomial standard error of the difference."


def _lines() -> list[tuple[Cell, str, str]]:
    """(cell, name of the number in its rows, test file): a line of the table each."""
    lines = []
    for cell in CELLS:
        lines.append((cell, "accuracy", "test"))
        lines += [(cell, f"accuracy_{extra}", extra) for extra in EXTRA_TESTS.get(cell.dataset, ())]
    return lines


def _against(mean: float, peer: list[float], dataset: str, test: str) -> tuple[str, str]:
    if not peer:
        return "-", "-"
    other = statistics.fmean(peer)
    n = len(load(dataset, test)[0])
    se = math.sqrt((mean * (1 - mean) + other * (1 - other)) / n)
    verdict = "better" if mean > other else "within noise" if mean >= other - se else "WORSE"
    return f"{mean - other:+.4f} ± {se:.4f}", verdict


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--datasets", nargs="+", choices=sorted({c.dataset for c in CELLS}), help="None: all")
    options.add_argument("--budgets", nargs="+", help="such as 10s. None: the datasets' own")
    options.add_argument("--table", action="store_true", help="only rewrite table.md from the rows")
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    if given.table:
        results.write_table()
        return
    cells = [c for c in CELLS if not given.datasets or c.dataset in given.datasets]
    todo = [(c.dataset, c.budget) for c in cells]
    if given.budgets:
        todo = list(dict.fromkeys((c.dataset, b) for c in cells for b in given.budgets))
    for seed in given.seeds:
        for dataset, budget in todo:
            if not results.has(dataset, budget, SYSTEM, seed):
                before = load_average()
                measured = fit_and_test(
                    dataset, budget, seed, EXTRA_TESTS.get(dataset, ()), results.folder / "journals"
                )
                results.add(dataset, budget, SYSTEM, seed, measured, before)


if __name__ == "__main__":
    main()
