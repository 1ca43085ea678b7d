"""What each stage of `staged` adds at equal budget: the whole, and the whole without one stage, on the same data, seeds and minutes.

Every run goes through the command line as a user calls it, with an empty cache. Test accuracy, paired over the test rows by seed
(the answers of both bundles), pooled over seeds; the time that a left-out stage would have taken is the others'.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np

from _common import (
    Results,
    Row,
    data_folder,
    load,
    load_average,
    markdown,
    mean_sd,
    multistep,
    parser,
    seconds,
    select,
    values,
)
from multistep.metrics.verdicts import mcnemar_p

BENCH = "ablation"
STAGES = ("linear", "race", "average", "predict", "refit")
CELLS = (("banking77", "60s"), ("sst2", "60s"), ("chnsenticorp", "60s"), ("banking77", "300s"), ("sst2", "300s"))


def run(dataset: str, budget: str, without: str, seed: int) -> Row:
    """Fit, then answer the test with the bundle: accuracy, log-loss as the run read it, and who was right as a string of 0 and 1."""
    texts, labels = load(dataset, "test")
    with tempfile.TemporaryDirectory(prefix="multistep-bench-") as place:
        out, cache = str(Path(place) / "run"), Path(place) / "cache"
        options = ["--metric", "accuracy", "--budget", budget, "--seed", str(seed), "--out", out]
        options += [f"skip={without}"] if without else []
        ran = multistep("fit", str(data_folder(dataset)), *options, limit_s=2 * seconds(budget) + 120, cache=cache)
        if ran.status != 0:
            return {"ok": False, "status": ran.status, "error": ran.stderr}
        answered = multistep("predict", out, str(data_folder(dataset) / "test.jsonl.gz"), limit_s=900)
        said = [p["value"] for p in answered.payload["predictions"]]
        assert len(said) == len(texts)
        right = "".join("1" if str(a) == b else "0" for a, b in zip(said, labels, strict=True))
        read = ran.payload["metrics"]
        return {
            "ok": True, "accuracy": read["accuracy"]["value"], "log_loss": read["log_loss"]["value"], "right": right,
            "wall_s": round(ran.wall_s, 2),
        }  # fmt: skip


def table(rows: list[Row]) -> str:
    head = [
        "dataset",
        "budget",
        "without",
        "seeds",
        "test accuracy",
        "log loss",
        "what the stage adds, points ± se",
        "p",
    ]
    body = []
    for dataset, budget in CELLS:
        whole = {r["seed"]: r for r in select(rows, dataset=dataset, budget=budget, system="whole")}
        for system in ("whole", *STAGES):
            mine = select(rows, dataset=dataset, budget=budget, system=system)
            if not mine:
                continue
            line = [dataset, budget, "-" if system == "whole" else system, len(mine), mean_sd(values(mine, "accuracy"))]
            line.append(mean_sd(values(mine, "log_loss")))
            pairs = [(_bits(whole[r["seed"]]), _bits(r)) for r in mine if r["seed"] in whole]
            if system == "whole" or not pairs:
                body.append([*line, "-", "-"])
                continue
            gain_N = np.concatenate([a.astype(float) - b for a, b in pairs])
            by_seed = [float((a.astype(float) - b).mean()) for a, b in pairs]
            stderr = 100 * gain_N.std() / len(gain_N) ** 0.5
            worse = gain_N.mean() < 0
            sign = -1 if worse else 1
            p = min(1.0, 2 * mcnemar_p(int((sign * gain_N > 0).sum()), int((sign * gain_N < 0).sum())))
            body.append([*line, f"{100 * statistics.fmean(by_seed):+.2f} ± {stderr:.2f}", f"{p:.2g}"])
    return markdown(head, body) + "\n\np: exact McNemar over the test rows of all seeds, two-sided."


def _bits(row: Row) -> np.ndarray:
    return np.frombuffer(row["right"].encode(), np.uint8) == ord("1")


def main() -> None:
    options = parser(__doc__)
    datasets, budgets = (tuple(dict.fromkeys(cell[i] for cell in CELLS)) for i in (0, 1))
    options.add_argument("--datasets", nargs="+", choices=datasets, default=datasets)
    options.add_argument("--budgets", nargs="+", choices=budgets, default=budgets)
    options.add_argument("--without", nargs="+", choices=STAGES, default=STAGES)
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    for seed in given.seeds:
        for dataset, budget in CELLS:
            for system in ("whole", *given.without):
                wanted = dataset in given.datasets and budget in given.budgets
                if wanted and not results.has(dataset, budget, system, seed):
                    before = load_average()
                    found = run(dataset, budget, "" if system == "whole" else system, seed)
                    results.add(dataset, budget, system, seed, found, before)


if __name__ == "__main__":
    main()
