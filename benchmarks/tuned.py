"""What `multistep tune` is worth on the test split: every way that it measured, beside what stood before, paired.

    banking77, imdb, sst2, chnsenticorp    fit for a minute (--fit), tune for a minute (--tune), no limit
    rare                                   imdb with one positive in ten, f1_macro: thresholds beside the likeliest label

Tuning reads the run's calibration half alone; test is read here, once, after the pick. Rows hold, for what stood, for the pick, for every
cascade and for every model alone and both blended: the metric, log-loss and calibration error on test, the paired difference with its
error and p, and the latency of single requests, in turns with what stood. Test texts: the first `--rows` of a mixed order.

Promises: calibration and test rows together are split in two 20 times; on one half the promise is made around the pick, on the other
it is counted how often the right label is among the candidates.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from _common import Results, Row, data_folder, load_average, markdown, multistep, parser, seconds
from multistep import load
from multistep.data import load as load_data
from multistep.evaluate import Engine
from multistep.metrics import Scored, compare, measure
from multistep.policy import Entry, Policy, side_by_side
from multistep.predictors import Asked, Predictor, Single, predict
from multistep.predictors.conformal import fit_conformal
from multistep.tune.workbench import Workbench
from multistep.tuning import tune_run
from multistep.tuning.common import config_of
from multistep.tuning.labels import RunModels

BENCH = "tuned"
_PREDICTOR: TypeAdapter[Predictor] = TypeAdapter(Predictor)
RARE = 0.1  # the share of positives
PROMISES, RESPLITS = (0.8, 0.9, 0.95), 20


class Problem(NamedTuple):
    dataset: str
    metric: str
    rare: bool = False


PROBLEMS = {
    "banking77": Problem("banking77", "accuracy"),
    "imdb": Problem("imdb", "accuracy"),
    "sst2": Problem("sst2", "accuracy"),
    "chnsenticorp": Problem("chnsenticorp", "accuracy"),
    "rare": Problem("imdb", "f1_macro", True),
}


def rare(folder: Path, out: Path, seed: int) -> Path:
    """The dataset with one positive in ten, in every split."""
    rng = np.random.default_rng(seed)
    out.mkdir()
    for name in ("train", "validation", "test"):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        labels = sorted({str(r["label"]) for r in rows})
        many, few = ([r for r in rows if str(r["label"]) == label] for label in labels)
        kept = many + [few[i] for i in rng.permutation(len(few))[: round(len(many) * RARE / (1 - RARE))]]
        order = rng.permutation(len(kept))
        with gzip.open(out / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(kept[i], ensure_ascii=False) + "\n" for i in order)
    return out


class Judge:
    """Entries of a policy on test rows."""

    def __init__(self, run: Path, metric: str, rows: int):
        config, past = config_of(run)
        dataset = load_data(config.data, task=config.task, text=config.text, label=config.label, seed=config.seed)
        self.task, self.metric = load(run).labels.task, metric
        self.models = RunModels(Workbench(config, dataset, self.task, run), past)
        order = np.random.default_rng(0).permutation(len(dataset.test))[:rows]
        some, self.calibration = [dataset.test[i] for i in order], list(dataset.calibration)
        self.texts, self.targets = [e.text for e in some], self.task.encode([e.label for e in some])
        self._outputs: dict[str, np.ndarray] = {}

    def scored(self, entry: Entry) -> Scored:
        predictor = _PREDICTOR.validate_python(entry.predictor)
        for name in predictor.models():
            key = f"{name} {entry.engine if name.startswith('encoder') else ''}"
            if key not in self._outputs:
                self._outputs[key] = self.models.text_model(name, entry.engine).logits(self.texts)
        logits = {
            m: self._outputs[f"{m} {entry.engine if m.startswith('encoder') else ''}"] for m in predictor.models()
        }
        return Scored(self.targets, *predictor.decide(self.task, logits))

    def answers(self, entry: Entry) -> Any:
        predictor = _PREDICTOR.validate_python(entry.predictor)
        engine = self.engine(entry)
        return lambda text: predict(self.task, predictor, engine, [text])

    def asked_again(self, entry: Entry) -> float:
        """The share of the test rows that the costly model answers."""
        predictor = _PREDICTOR.validate_python(entry.predictor)
        if predictor.kind != "cascade":
            return 1.0
        stages = predictor.stages(self.task, Asked(self.engine(entry), predictor.models(), self.texts[:1000]))
        return float((stages != "+".join(predictor.first.models())).mean())

    def row(self, entry: Entry, against: Entry) -> Row:
        new, old = self.scored(entry), self.scored(against)
        metrics = measure((self.metric, "log_loss", "calibration_error"), self.task, new)
        before = measure((self.metric, "log_loss", "calibration_error"), self.task, old)
        ms, old_ms = side_by_side(self.answers(entry), self.answers(against), self.texts[:400], 4.0)
        return {
            "way": entry.name, "against": against.name, "metric": self.metric, "n": len(self.texts),
            "value": metrics[self.metric].value, "stderr": metrics[self.metric].stderr,
            "metrics": {k: list(v) for k, v in metrics.items()}, "before": {k: list(v) for k, v in before.items()},
            "paired": [compare(m, self.task, new, old).model_dump() for m in dict.fromkeys((self.metric, "log_loss"))],
            "ms": ms.model_dump(), "before_ms": old_ms.model_dump(), "of_time": ms.mean / old_ms.mean,
            "asked_again": self.asked_again(entry),
        }  # fmt: skip

    def promises(self, entry: Entry, calibration: list[Any]) -> list[Row]:
        """Coverage over resplits of the rows that no training saw."""
        predictor = _PREDICTOR.validate_python(entry.predictor)
        texts, targets = [e.text for e in calibration], self.task.encode([e.label for e in calibration])
        of_test = predictor.combine(self.task, Asked(self.engine(entry), predictor.models(), self.texts))
        of_rest = predictor.combine(self.task, Asked(self.engine(entry), predictor.models(), texts))
        z_NK, right = np.concatenate([of_test, of_rest]), np.concatenate([self.targets, targets])
        found, whole = [], Single(model="all")
        for promise in PROMISES:
            kept, withheld = [], []
            for split in range(RESPLITS):
                order = np.random.default_rng(split).permutation(len(right))
                one, other = order[: len(order) // 2], order[len(order) // 2 :]
                fitted = fit_conformal(self.task, whole, {"all": z_NK[one]}, right[one], promise)
                among_NK = fitted.candidates(self.task, z_NK[other])
                kept.append(float(among_NK[np.arange(len(other)), right[other]].mean()))
                withheld.append(float((among_NK.sum(axis=1) != 1).mean()))
            found.append({"promise": promise, "mean": float(np.mean(kept)), "least": min(kept), "most": max(kept),
                          "withheld": float(np.mean(withheld)), "rows": len(right)})  # fmt: skip
        return found

    def engine(self, entry: Entry) -> Engine:
        predictor = _PREDICTOR.validate_python(entry.predictor)
        return Engine({m: self.models.text_model(m, entry.engine) for m in predictor.models()})


def pairs(policy: Policy) -> list[tuple[str, Entry, Entry]]:
    """(what is shown, entry, against): the pick against what stood, a cascade against its costly member, a blend against the better of
    its members, thresholds against the likeliest label."""
    entries = {e.name: e for e in policy.entries}
    by_recipe = {json.dumps(e.facts.get("recipe"), sort_keys=True) + repr(e.engine): e for e in policy.entries}

    def of(entry: Entry, **changes: Any) -> Entry | None:
        return by_recipe.get(json.dumps({**entry.facts["recipe"], **changes}, sort_keys=True) + repr(entry.engine))

    found = [("pick", entries[policy.pick], entries[policy.default])]
    for e in policy.entries:
        recipe = e.facts.get("recipe")
        if recipe is None:
            continue
        if recipe["first"] is not None:
            if whole := of(e, first=None, again=0.0):
                found.append(("cascade", e, whole))
        elif recipe["decision"] == "thresholds" and (plain := of(e, decision="likeliest")):
            found.append(("thresholds", e, plain))
    return found


def blends(policy: Policy) -> list[tuple[str, Entry, Entry]]:
    """A blend against each of its members, calibrated, decided and run as it is."""
    plain = [e for e in policy.entries if e.facts.get("recipe") and e.facts["recipe"]["first"] is None]
    mixed = [e for e in plain if len(e.facts["recipe"]["models"]) > 1]

    def member(e: Entry, of: Entry) -> bool:
        mine, its = e.facts["recipe"], of.facts["recipe"]
        return (
            len(mine["models"]) == 1
            and {**mine, "models": None} == {**its, "models": None}
            and mine["models"][0] in its["models"]
        )

    return [
        ("blend", whole, e) for whole in mixed for e in plain if member(e, whole) and e.engine in (whole.engine, {})
    ]


def table(rows: list[Row]) -> str:
    head = ["problem", "seed", "what", "way", "against", "metric", "test ± se", "difference ± se", "p", "log-loss", "before", "ECE", "before",
            "of the time", "p95 ms", "asked again"]  # fmt: skip
    body = []
    for row in rows:
        for shown in row.get("shown", ()):
            c = shown["paired"][0]
            body.append([
                row["system"], row["seed"], shown["what"], shown["way"], shown["against"], shown["metric"],
                f"{shown['value']:.4f} ± {shown['stderr']:.4f}", f"{c['difference']:+.4f} ± {c['stderr']:.4f}", f"{c['p']:.2g}",
                f"{shown['metrics']['log_loss'][0]:.4f}", f"{shown['before']['log_loss'][0]:.4f}",
                f"{shown['metrics']['calibration_error'][0]:.4f}", f"{shown['before']['calibration_error'][0]:.4f}",
                f"{shown['of_time']:.3f}", f"{shown['ms']['p95']:.2f}", f"{shown['asked_again']:.2f}",
            ])  # fmt: skip
    kept = [
        [row["system"], row["seed"], p["promise"], f"{p['mean']:.4f}", f"{p['least']:.4f} to {p['most']:.4f}",
         f"{p['withheld']:.3f}", p["rows"]]
        for row in rows
        for p in row.get("promises", ())
    ]  # fmt: skip
    heads = ["problem", "seed", "promised", f"kept, mean of {RESPLITS} resplits", "range", "answers withheld", "rows"]
    return f"{markdown(head, body)}\n\n{markdown(heads, kept)}"


def run(name: str, seed: int, fit: str, tune: str, rows: int) -> Row:
    problem, place = PROBLEMS[name], Path(tempfile.mkdtemp(prefix="multistep-bench-"))
    try:
        source = data_folder(problem.dataset)
        if problem.rare:
            source = rare(source, place / "rare", seed)
        out = place / "run"
        options = ["--metric", problem.metric, "--budget", fit, "--seed", str(seed), "--out", str(out)]
        ran = multistep("fit", str(source), *options, limit_s=2 * seconds(fit) + 120, cache=place / "cache")
        if ran.status != 0:
            return {"ok": False, "status": ran.status, "error": ran.stderr}
        policy = tune_run(out, budget=tune)
        judge = Judge(out, problem.metric, rows)
        shown = [{"what": what, **judge.row(e, old)} for what, e, old in (*pairs(policy), *blends(policy))]
        return {
            "ok": True, "pick": policy.pick, "rule": policy.rule, "front": list(policy.front), "value": shown[0]["value"],
            "stderr": shown[0]["stderr"], "shown": shown, "refused": list(policy.refused),
            "promises": judge.promises(policy.entry(policy.pick), judge.calibration),
        }  # fmt: skip
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    options = parser(__doc__, seeds=(0,))
    options.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    options.add_argument("--fit", default="60s")
    options.add_argument("--tune", default="60s")
    options.add_argument("--rows", type=int, default=3000, help="of the test split")
    given = options.parse_args()
    results = Results(BENCH, given.out, table)
    for seed in given.seeds:
        for name in given.problems:
            dataset = PROBLEMS[name].dataset
            if not results.has(dataset, given.fit, name, seed):
                before = load_average()
                results.add(dataset, given.fit, name, seed, run(name, seed, given.fit, given.tune, given.rows), before)


if __name__ == "__main__":
    main()
