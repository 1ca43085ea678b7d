"""Tuning how a model that gives labels or numbers answers, from a run's folder to its policy: behind `multistep tune`.

The journal is RUN/tuning.jsonl, as of models that write (language.py). The bundle is replaced whole at every commit and at the
end; until then the old one stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multistep import engines
from multistep.budget import Budget, Clock
from multistep.bundle import Bundle, shortened, write_bundle
from multistep.controllers.answering import AnsweringProblem
from multistep.data import Columns, Dataset, read_labelled
from multistep.data import load as load_data
from multistep.data.split import normalised
from multistep.engines import Runtime
from multistep.evaluate import EncoderText, TextModel
from multistep.metrics import check_metric
from multistep.metrics.power import FEWEST_ROWS
from multistep.policy import Limit, Policy
from multistep.predictors.costs import read_costs
from multistep.predictors.fit import is_fitted
from multistep.report.card import with_section
from multistep.report.policy import explain_policy
from multistep.report.progress import Progress
from multistep.session import check_same_data, controller_of, left, machine_facts, signals
from multistep.strategy import Trial
from multistep.tune.actions import Bench
from multistep.tune.answering import Answering, Before, Rows, Standing
from multistep.tune.text import TextWorks
from multistep.tune.workbench import Workbench
from multistep.tuning.common import FILE, TUNED, config_of, driven, opened
from multistep.types import Example, Interrupted, Outcome, UserError

LENGTHS = (16, 32, 64, 128)
LONGER = 0.05  # of the texts that have to be longer than a length for it to be tried
ASIDE = 1 / 3  # of the rows, for a promise
OWN = "the run's own calibration half"


def tune_labels(
    run_dir: Path, bundle: Bundle, metric: str | None, limit: Limit | None, budget: Budget, data: str | None, costs: Path | None,
    coverage: float | None, progress: Progress, controller: str = "staged",
) -> Policy:  # fmt: skip
    """Tune a run on its own calibration half, or on the labelled file `data`. The bundle and its policy are replaced.

    Raises UserError on bad input, Interrupted after a signal: then the journal is saved, and the bundle is the old one or the last that
    was committed.
    """
    task = bundle.task
    metric = check_metric(metric or bundle.info["metric"], task.kind)
    matrix = None if costs is None else read_costs(costs, getattr(task, "labels", ()))
    if (matrix is not None or coverage is not None) and task.kind != "classify":
        raise UserError(
            f"{'costs' if matrix is not None else 'coverage'}: for one label of several; the task is {task.kind}."
        )
    config, past = config_of(run_dir)
    progress.stage("data", f"reading {config.data}")
    dataset = load_data(
        config.data, task=config.task, text=config.text, label=config.label, seed=config.seed, test=config.test
    )
    check_same_data(config.data, dataset.fingerprint, past)
    models = RunModels(Workbench(config, dataset, task, run_dir), past)
    rows, aside = _judged(dataset, models.work, bundle, data, coverage, config.seed)
    texts, fitted = (*rows.texts, *(aside.texts if aside is not None else ())), _fitted(bundle.info)
    fits = is_fitted(bundle.predictor) and _before(fitted, dataset, data, texts).seen
    if aside is not None and fits and len(rows.texts) < FEWEST_ROWS:
        raise UserError(
            f"coverage: {len(rows.texts)} rows are left beside the third that is set aside for it, too few (< {FEWEST_ROWS}) to fit again "
            "what stands, which may have been fitted to all of them. Give more rows with --data."
        )
    settings = {
        "metric": metric, "limit": None if limit is None else limit.model_dump(mode="json"), "data": rows.words,
        "fingerprint": _fingerprint(rows), "states": models.states, "costs": matrix and [list(row) for row in matrix],
        "coverage": coverage, "controller": controller,
    }  # fmt: skip
    facts = {
        "default": bundle.predictor, "engine": (bundle.info.get("engine") or {}).get("encoder") or {},
        "fitted": fitted, "machine": machine_facts(models.work.device),
    }  # fmt: skip
    book, lived, clock = opened(run_dir / FILE, settings, budget, facts)
    started = lived[0]
    before = _before(started.get("fitted", fitted), dataset, data, texts)
    problem = AnsweringProblem.parse(
        {
            "task": task.model_dump(), "metric": "cost" if matrix is not None else metric, "models": models.names(rows.texts),
            "default": started["default"], "engine": started["engine"], "limit": limit and limit.model_dump(),
            "budget": budget.amount, "rows": len(rows.texts), "costs": matrix, "coverage": coverage, "seed": config.seed,
            "controller": controller,
        }
    )  # fmt: skip
    try:
        with signals() as stop:

            def watch(done: float) -> None:
                if number := stop():
                    raise Interrupted(number)
                progress.remaining(left(clock))

            models.work.watch = watch
            works = Answering(
                models, problem, rows, aside, clock, stop, models.ship_into(run_dir, bundle), started["machine"], before
            )
            script = controller_of(problem, "", book, clock, lived)
            return driven(works, script, book, lived, works.quality.name, progress)
    finally:
        book.close()


# ---------------------------------------------------------------------------------------------- its models


class RunModels:
    """The best state of each family of a run, by name; the encoder also on other engines and on shorter texts."""

    def __init__(self, work: Workbench, past: Sequence[Mapping[str, Any]]):
        self.work = work
        self.bench = replayed(work, past)
        self.states = dict(self.bench.families)
        self._made: dict[str, TextModel] = {}

    def names(self, texts: Sequence[str]) -> tuple[str, ...]:
        """ "linear", "encoder", and "encoder@32" where enough of these texts have more than 32 tokens."""
        found = [m for m in ("linear", "encoder") if m in self.states]
        if "encoder" in found:
            lengths_N = np.array([len(ids) for ids in self.work.tokenize(texts)])
            found += [f"encoder@{n}" for n in LENGTHS if n < self.work.max_length and (lengths_N > n).mean() > LONGER]
        return tuple(found)

    def runtimes(self) -> list[tuple[str, dict[str, Any]]]:
        encoder = self.text_model("encoder", {})
        assert isinstance(encoder, EncoderText)
        return [(name, runtime.model_dump(mode="json")) for name, runtime in engines.variants(encoder)]

    def text_model(self, name: str, engine: Mapping[str, Any]) -> TextModel:
        key = f"{name} {sorted(engine.items())}"
        if key not in self._made:
            self._made[key] = self._make(name, engine)
        return self._made[key]

    def _make(self, name: str, engine: Mapping[str, Any]) -> TextModel:
        family, _, length = name.partition("@")
        if length:
            assert self.work.tokenizer is not None
            return shortened(self.text_model(family, engine), self.work.tokenizer, int(length))
        model = self.work.text_model(family, self.states[family], self.bench.bf16)
        if not engine or not isinstance(model, EncoderText):
            return model
        return engines.prepare(model, Runtime.parse(engine, "engine"), self.work.out / "tuning")

    def ship_into(self, run_dir: Path, bundle: Bundle) -> Callable[[Standing, Policy], None]:
        """How a standing is put where it is served from."""
        folder, work = run_dir / "model", self.work
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else ""

        def ship(standing: Standing, policy: Policy) -> None:
            names = standing.predictor.models()
            families = dict.fromkeys(m.partition("@")[0] for m in names)
            states = (
                self.states if standing.predictor.kind == "conformal" else self.bench.served()
            )  # a promise is about what was judged
            models: Any = {
                m: work.text_model(m, states[m], self.bench.bf16) if states[m] != self.states[m] else self.text_model(m, {})
                for m in families
            }  # fmt: skip
            said = policy.model_dump(mode="json")
            extra = {
                **{k: bundle.info[k] for k in ("columns", "base_model", "metric")},
                "states": {m: states[m] for m in families}, "policy": said,
            }  # fmt: skip
            extra["engine"] = {k: policy.serving[k] for k in ("threads", "batch") if k in policy.serving}
            runs_on = None
            if standing.engine and "encoder" in families:
                extra["engine"] |= {"encoder": standing.engine}
                runs_on = run_dir / "tuning" / "engines" / Runtime.parse(standing.engine, "engine").name
            write_bundle(
                folder, work.task, standing.predictor, models, work.tokenizer, work.max_length, extra,
                card=with_section(text, TUNED, explain_policy(said)), runs_on=runs_on,
            )  # fmt: skip

        return ship


def replayed(work: Workbench, past: Sequence[Mapping[str, Any]]) -> Bench:
    """What stood at the end of the run: its best states, their lengths and precision."""
    bench = Bench(work, Clock(Budget(amount=1, unit="seconds")), lambda: 0, "")
    works = TextWorks(bench)
    asked = {r["trial"]["id"]: r["trial"] for r in past if r["kind"] == "Asked"}
    for told in (r for r in past if r["kind"] == "Told"):
        works.apply(Trial.parse(asked[told["trial"]]), Outcome.parse(told["outcome"]))
    return bench


# ---------------------------------------------------------------------------------------------- what is judged


def _judged(
    dataset: Dataset, work: Workbench, bundle: Bundle, data: str | None, coverage: float | None, seed: int
) -> tuple[Rows, Rows | None]:
    """The rows that decide, and those that a promise rests on. Of a file those that are in the run's train or test are left out."""
    examples: list[Example] = list(dataset.calibration)
    words = OWN
    if data is not None:
        found = read_labelled(data, Columns.parse(bundle.info["columns"], "columns"), work.task.kind, work.task.labels)
        known = {normalised(e.text) for split in (dataset.train, dataset.test) for e in split}
        examples = [e for e in found if normalised(e.text) not in known]
        words = f"{Path(data).name}, neither train nor test"
        if left_out := len(found) - len(examples):
            words += f"; {left_out:,} rows that are there too were left out"
    if len(examples) < FEWEST_ROWS:
        raise UserError(
            f"{data or 'calibration half'}: {len(examples)} rows that are neither train nor test. "
            f"At least {FEWEST_ROWS} are needed to judge; give a labelled file with --data."
        )
    order = np.random.default_rng(seed).permutation(len(examples))
    mixed = [examples[i] for i in order]
    count = 0 if coverage is None else round(ASIDE * len(mixed))

    def rows(part: Sequence[Example]) -> Rows:
        return Rows([e.text for e in part], work.task.encode([e.label for e in part]), words)

    return rows(mixed[count:]), rows(mixed[:count]) if count else None


def _fitted(info: Mapping[str, Any]) -> dict[str, str]:
    """What the predictor of a bundle was fitted for and to, in words: by the run itself, or by the tuning whose pick it is."""
    policy = info.get("policy") or {}
    picked: Any = next((e for e in policy.get("entries", ()) if e["name"] == policy["pick"]), {})
    of_run = {"for": info["metric"], "to": OWN}
    of_policy = {"for": policy.get("metric", info["metric"]), "to": policy.get("data", OWN)} if policy else of_run
    return picked.get("facts", {}).get("fitted") or of_policy  # a policy of before does not say it of its entries


def _before(fitted: Mapping[str, str], dataset: Dataset, data: str | None, texts: Sequence[str]) -> Before:
    """How what stands came to be. Of rows that another tuning fitted to nothing is known but their file: they may be among any."""
    own = {normalised(e.text) for e in dataset.calibration}
    seen = data is None or fitted["to"] != OWN or any(normalised(text) in own for text in texts)
    return Before(fitted["for"], fitted["to"], seen)


def _fingerprint(rows: Rows) -> str:
    text = "\n".join(f"{t}\t{y}" for t, y in zip(rows.texts, rows.targets.tolist(), strict=True))
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
