"""Greedy writing against the way that tuning picks, within the same limit on the latency of a request, on multi30k's test.

The run is one that lies there (--run, a folder of `multistep fit` on multi30k_en_de; it is copied, not touched) or is fitted first (--fit
300s). Its model is set to write greedily; then it is tuned on its calibration half for limits that are multiples of greedy's own p95
(--limits), each time from greedy. Both ways write the whole test, which tuning never sees; BLEU and chrF are compared row by row,
single requests are timed on the test too. A row holds what was picked, and whether it keeps the limit on the test.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from _common import Results, Row, data_folder, load_average, markdown, multistep, parser, seconds, select
from multistep import load
from multistep.budget import parse_budget
from multistep.data.records import load_language
from multistep.journal import read
from multistep.language_bundle import rewrite_decoding
from multistep.metrics.texts import compare_rows, measure_rows, statistics
from multistep.policy import Limit, one_by_one
from multistep.predictors.decoding import Greedy
from multistep.predictors.ways import Way, plain, read_way
from multistep.report.progress import Progress
from multistep.tuning.language import tune_language
from multistep.writing import Neural

BENCH = "decoding"
DATASET = "multi30k_en_de"
TIMED_S = 20.0  # of single requests on the test, for each way
METRICS = ("bleu", "chrf")


def copied(run: Path, place: Path) -> Path:
    """What tuning reads of a run, where nothing else is written."""
    out = place / "run"
    out.mkdir()
    for name in ("config.yaml", "journal.jsonl"):
        shutil.copy(run / name, out / name)
    shutil.copytree(run / "model", out / "model")
    return out


def fitted(budget: str, seed: int, place: Path) -> Path:
    out = place / "fitted"
    ran = multistep(
        "fit", str(data_folder(DATASET)), "--task", "translate", "--metric", "bleu", "--budget", budget, "--seed", str(seed),
        "--out", str(out), limit_s=2 * seconds(budget) + 300, cache=place / "cache",
    )  # fmt: skip
    if ran.status:
        raise SystemExit(f"benchmarks: fit failed with status {ran.status}: {ran.stderr}")
    return out


def measured(speaker: Any, way: Way, records: list[Any]) -> dict[str, Any]:
    """Statistics of the test by metric, and the latency of single requests."""
    speaker.decoding = way
    latency = one_by_one(lambda r: speaker.write([r]), records, TIMED_S)
    texts, right = [str(p.value) for p in speaker.write(records)], [r.targets for r in records]
    return {"latency": latency, **{m: statistics(m, texts, right) for m in METRICS}}


def run(out: Path, factors: list[float], budget: str, seed: int, rows: int | None, add: Any) -> None:
    """Tune for each limit, from greedy, and add a row."""
    started = read(out / "journal.jsonl")[0]["config"]
    data = load_language(
        started["data"], task="translate", text=started["text"], label=started["label"], seed=started["seed"]
    )
    speaker: Any = load(out).language.speaker
    if not isinstance(speaker, Neural):
        raise SystemExit("benchmarks: a cheap writer stands in that run, no trained model. Give --fit more time.")
    greedy = Greedy(max_new_tokens=plain(speaker.decoding).max_new_tokens)
    test = list(data.test)[:rows]
    base = measured(speaker, greedy, test)
    for factor in factors:
        limit = Limit(ms=round(factor * base["latency"].p95, 1))
        rewrite_decoding(out / "model", speaker, greedy, {}, "greedy")
        policy = tune_language(out, "bleu", limit, parse_budget(budget), None, Progress())
        picked = measured(speaker, read_way(policy.entry(policy.pick).predictor), test)
        row: Row = {"ok": True, "factor": factor, "limit_ms": limit.ms, "pick": policy.pick, "test_rows": len(test)}
        row |= {
            "judged": policy.rows,
            "tried": len(policy.entries) - 1,
            "refused": len(policy.refused),
            "rule": policy.rule,
        }
        for name in METRICS:
            row[name] = [list(measure_rows(name, w[name], seed)) for w in (base, picked)]
            row[f"{name}_paired"] = compare_rows(name, picked[name], base[name], seed).model_dump()
        row["latency"] = [w["latency"].model_dump() for w in (base, picked)]
        row["keeps"] = picked["latency"].within(limit)
        add(f"p95 {factor:g}x greedy", row)


def table(rows: list[Row]) -> str:
    head = ["limit", "p95 at most", "picked", "BLEU greedy", "BLEU picked", "difference, paired", "p", "chrF difference",
            "p95 greedy", "p95 picked", "keeps the limit on test", "ways tried"]  # fmt: skip
    body = []
    for row in select(rows, dataset=DATASET):
        bleu, chrf = row["bleu_paired"], row["chrf_paired"]
        ms = [f"{w['p95']:.1f} ms" for w in row["latency"]]
        body.append([
            row["system"], f"{row['limit_ms']:g} ms", row["pick"], *(f"{v:.2f} ± {e:.2f}" for v, e in row["bleu"]),
            f"{bleu['difference']:+.2f} ± {bleu['stderr']:.2f}", f"{bleu['p']:.3g}",
            f"{chrf['difference']:+.2f} ± {chrf['stderr']:.2f}", *ms, "yes" if row["keeps"] else "no", row["tried"],
        ])  # fmt: skip
    return markdown(head, body)


def main() -> None:
    options = parser(__doc__, seeds=(0,))
    options.add_argument("--run", type=Path, help="the folder of a run on multi30k_en_de; None: one is fitted")
    options.add_argument("--fit", default="300s", help="the budget of the run that is fitted where --run names none")
    options.add_argument("--tune", default="300s", help="the budget of each tuning")
    options.add_argument("--limits", type=float, nargs="+", default=[2.0, 5.0], help="multiples of greedy's p95")
    options.add_argument("--rows", type=int, help="of the test, to try the command; None: all of it")
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    for seed in given.seeds:
        budget = f"{given.run.name if given.run else given.fit}, tuned {given.tune}"
        factors = [f for f in given.limits if not results.has(DATASET, budget, f"p95 {f:g}x greedy", seed)]
        if not factors:
            continue
        before = load_average()
        with tempfile.TemporaryDirectory(prefix="multistep-bench-") as folder:
            place = Path(folder)
            out = copied(given.run or fitted(given.fit, seed, place), place)

            def add(system: str, row: Row, budget: str = budget, seed: int = seed, before: float = before) -> None:
                results.add(DATASET, budget, system, seed, row, before)

            run(out, factors, given.tune, seed, given.rows, add)


if __name__ == "__main__":
    main()
