"""How much sooner than transformers' Trainer do we reach the test accuracy it ends with? Side by side, on banking77.

The Trainer trains first (see peer_trainer.py); then `multistep fit` runs with growing budgets until its mean test
accuracy over the seeds is at least the Trainer's. The Trainer's time is that of `train()` alone; ours is the whole
process, with imports, the data report and the final test. This command looks at the test to find a time; no run does.
"""

from __future__ import annotations

import statistics

import peer_trainer
from _common import Results, Row, fit_and_test, load_average, markdown, mean_sd, parser, seconds, select, values

BENCH = "time_to"
SYSTEM = "multistep"
PEER_LENGTH = "3 epochs"
ASKED = {"defaults": 40, "competent": 10, "competent-fp32": 10}  # how many times sooner the project promises to be


def least_budget(rows: list[Row], target: float, n_seeds: int) -> str | None:
    """The smallest budget whose mean test accuracy reaches the target, among those with all seeds measured."""
    ours = select(rows, system=SYSTEM)
    for budget in sorted({row["budget"] for row in ours}, key=seconds):
        accuracies = values(select(ours, budget=budget), "accuracy")
        if len(accuracies) >= n_seeds and statistics.fmean(accuracies) >= target:
            return budget
    return None


def table(rows: list[Row]) -> str:
    n_seeds = min(len(select(rows, system=s)) for s in {row["system"] for row in rows if row["system"] != SYSTEM})
    head = ["Trainer", "its accuracy", "its train s", "our least budget", "our accuracy", "our wall s"]
    head += ["times sooner", "asked"]
    body = []
    for mode in ASKED:
        peer = select(rows, system=f"trainer-{mode}")
        if not peer:
            continue
        accuracies, train_s = values(peer, "accuracy"), values(peer, "train_s")
        budget = least_budget(rows, statistics.fmean(accuracies), n_seeds)
        ours = select(rows, system=SYSTEM, budget=budget) if budget else []
        wall_s = values(ours, "wall_s")
        sooner = f"{statistics.fmean(train_s) / statistics.fmean(wall_s):.1f}" if wall_s else "not reached"
        body.append(
            [mode, mean_sd(accuracies), mean_sd(train_s, 1), budget or "-", mean_sd(values(ours, "accuracy")),
             mean_sd(wall_s, 1), sooner, ASKED[mode]]
        )  # fmt: skip
    every = [
        [budget, len(mine), mean_sd(values(mine, "accuracy")), mean_sd(values(mine, "wall_s"), 1)]
        for budget in sorted({row["budget"] for row in select(rows, system=SYSTEM)}, key=seconds)
        for mine in [select(rows, system=SYSTEM, budget=budget)]
    ]
    return markdown(head, body) + "\n\n" + markdown(["our budget", "seeds", "test accuracy", "wall s"], every)


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--modes", nargs="+", choices=sorted(ASKED), default=sorted(ASKED), help="the Trainers to beat"
    )
    options.add_argument("--budgets", nargs="+", default=["10s", "15s", "20s", "30s", "60s"], help="ours, growing")
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    dataset = peer_trainer.DATASET
    for seed in given.seeds:
        for mode in given.modes:
            if not results.has(dataset, PEER_LENGTH, f"trainer-{mode}", seed):
                before = load_average()
                results.add(dataset, PEER_LENGTH, f"trainer-{mode}", seed, peer_trainer.run(mode, seed), before)
    for budget in sorted(given.budgets, key=seconds):
        for seed in given.seeds:
            if not results.has(dataset, budget, SYSTEM, seed):
                before = load_average()
                results.add(dataset, budget, SYSTEM, seed, fit_and_test(dataset, budget, seed), before)
        good = [row for row in results.rows if row["ok"]]
        targets = [statistics.fmean(values(select(good, system=f"trainer-{mode}"), "accuracy")) for mode in given.modes]
        if all(least_budget(good, target, len(given.seeds)) for target in targets):
            break


if __name__ == "__main__":
    main()
