"""One process with all cores against two that torchrun starts and that share them: tokens a second of the trunk, and what came out.

Where each process has a GPU of its own they add up; on the cores of one machine this says what meeting after every batch costs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _common import (
    Results,
    Row,
    data_folder,
    load_average,
    markdown,
    mean_sd,
    multistep,
    parser,
    seconds,
    select,
    values,
)
from multistep import journal

BENCH = "processes"
CELLS = (("sst2", "60s"), ("banking77", "60s"))
SYSTEMS = {"one process": 1, "two processes": 2}


def run(dataset: str, budget: str, processes: int, seed: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as place:
        out, cache = Path(place) / "run", Path(place) / "cache"
        options = ["--metric", "accuracy", "--budget", budget, "--seed", str(seed), "--out", str(out)]
        limit = 2 * seconds(budget) + 120
        ran = multistep("fit", str(data_folder(dataset)), *options, limit_s=limit, cache=cache, processes=processes)
        if ran.status != 0:
            return {"ok": False, "status": ran.status, "error": ran.stderr}
        told = [r for r in journal.read(out / "journal.jsonl") if r["kind"] == "Told" and r["stage"] == "trunk"]
        facts = told[0]["outcome"]["facts"] if told else {}
        return {
            "ok": True, "accuracy": ran.payload["metrics"]["accuracy"]["value"], "tokens_s": facts.get("tokens_s"),
            "epochs": facts.get("epochs"), "wall_s": round(ran.wall_s, 2),
        }  # fmt: skip


def table(rows: list[Row]) -> str:
    body = []
    for dataset, budget in CELLS:
        for system in SYSTEMS:
            mine = select(rows, dataset=dataset, budget=budget, system=system)
            trained = [r for r in mine if r.get("tokens_s")]  # else there was no time for a trunk
            if mine:
                numbers = [mean_sd(values(trained, "tokens_s"), 0), mean_sd(values(trained, "epochs"), 2)]
                numbers += [mean_sd(values(mine, "accuracy")), mean_sd(values(mine, "wall_s"), 1)]
                body.append([dataset, budget, system, len(mine), *numbers])
    return markdown(
        ["dataset", "budget", "system", "seeds", "tokens a second of the trunk", "epochs", "test accuracy", "wall s"],
        body,
    )


def main() -> None:
    given = parser(__doc__).parse_args()
    results = Results(BENCH, given.out, table)
    for seed in given.seeds:
        for dataset, budget in CELLS:
            for system, processes in SYSTEMS.items():
                if not results.has(dataset, budget, system, seed):
                    before = load_average()
                    results.add(dataset, budget, system, seed, run(dataset, budget, processes, seed), before)


if __name__ == "__main__":
    main()
