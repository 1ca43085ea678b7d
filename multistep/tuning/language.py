"""Tuning how a model writes, from a run's folder to its policy: behind `multistep tune` where the answer is a text.

The journal is RUN/tuning.jsonl. A tuning that was stopped goes on with the same command; a finished one, or one with other settings, is
put aside (tuning-1.jsonl ...). The bundle is replaced whole at every commit and at the end; until then the old one stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from multistep import engines
from multistep.budget import Budget
from multistep.bundle import load_bundle
from multistep.controllers.decoding import DecodingProblem
from multistep.data.cells import Record
from multistep.data.records import LanguageData, load_language, read_records
from multistep.data.split import normalised
from multistep.engines import Runtime
from multistep.examples import Examples
from multistep.language_bundle import LanguageBundle, rewrite_decoding
from multistep.metrics.power import FEWEST_ROWS
from multistep.metrics.texts import check_language_metric
from multistep.policy import Limit, Policy
from multistep.predictors.decoding import Greedy
from multistep.predictors.ways import Way, read_way
from multistep.report.policy import explain_policy
from multistep.report.progress import Progress
from multistep.session import check_same_data, controller_of, left, machine_facts, signals
from multistep.tasks.writing import LOSSES, Writing
from multistep.tune.decoding import LanguagePrediction
from multistep.tune.workbench import device_for
from multistep.tuning.common import FILE, config_of, driven, opened
from multistep.types import Interrupted, UserError
from multistep.writing import Neural

POOL = 500  # examples of train that prompts choose from


def tune_language(
    run_dir: Path, metric: str | None, limit: Limit | None, budget: Budget, data: str | None, progress: Progress,
    controller: str = "staged",
) -> Policy:  # fmt: skip
    """Tune the bundle of a run whose model writes, on the run's calibration half or on the records of the file `data`.

    The bundle and its policy are replaced. Raises UserError on bad input, Interrupted after a signal: then the journal is saved, and
    the bundle is the old one or the last that was committed.
    """
    config, past = config_of(run_dir)
    neural, info = _model(run_dir, device_for(config.device))
    task = neural.task
    metric = _metric(metric or info["metric"], task)
    progress.stage("data", f"reading {config.data}")
    own = load_language(
        config.data, task=config.task, text=config.text, label=config.label, seed=config.seed, test=config.test
    )
    check_same_data(config.data, own.fingerprint, past)
    records, words = _judged(own, task, data, config.seed, info, neural)
    if neural.reads == "prompts":
        neural.pool = Examples(_some(own.train, POOL, config.seed), task.reads)
    settings = {
        "metric": metric, "limit": None if limit is None else limit.model_dump(mode="json"), "data": words,
        "fingerprint": _fingerprint(records), "states": info["states"],
        "controller": controller,
    }  # fmt: skip
    facts = {"default": neural.decoding, "engine": info.get("engine") or {}, "machine": machine_facts(neural.device)}
    book, lived, clock = opened(run_dir / FILE, settings, budget, facts)
    started = lived[0]
    default = read_way(started["default"])
    examples = len(neural.examples)
    problem = DecodingProblem(
        task=task, metric=metric, default=default, engine=started["engine"], prompts=neural.reads == "prompts", examples=examples, limit=limit,
        budget=budget.amount, seed=config.seed, controller=controller,
    )  # fmt: skip
    folder = run_dir / "model"
    writers = RunWriters(neural, default, run_dir / "tuning")

    def ship(way: Way, engine: dict[str, Any], policy: Policy) -> None:
        said = policy.model_dump(mode="json")
        runs_on = writers.files(engine)
        rewrite_decoding(folder, neural, way, said, explain_policy(said), engine, runs_on)

    try:
        with signals() as stop:

            def watch(done: float) -> None:
                if number := stop():
                    raise Interrupted(number)
                progress.remaining(left(clock))

            neural.watch = watch
            works = LanguagePrediction(neural, problem, records, words, clock, stop, ship, started["machine"], writers)
            script = controller_of(problem, "", book, clock, lived)
            return driven(works, script, book, lived, metric, progress)
    finally:
        book.close()


class RunWriters:
    """The model of a run on each engine. `folder`: where files for other engines are made."""

    def __init__(self, neural: Neural, default: Way, folder: Path):
        self._own, self._default, self._folder = neural, default, folder
        neural.pen = None
        self._made: dict[str, Neural] = {}

    def runtimes(self) -> list[tuple[str, dict[str, Any]]]:
        """All but torch in float32, which is our own engine as it is; and all of them on one thread: threads of a small model wait for
        each other for longer than they compute."""
        found = engines.variants(replace(self._own, decoding=self._default))
        alone = [(f"{name}, 1 thread", runtime.with_(threads=1)) for name, runtime in found] if cores() > 1 else []
        return [(name, runtime.model_dump(mode="json")) for name, runtime in (*alone, *found[1:])]

    def writer(self, engine: Mapping[str, Any]) -> Neural:
        if not engine:
            return self._own
        key = repr(sorted(engine.items()))
        if key not in self._made:
            plain = replace(self._own, decoding=Greedy())
            self._made[key] = engines.prepare(plain, Runtime.parse(engine, "engine"), self._folder)
        return self._made[key]

    def files(self, engine: Mapping[str, Any]) -> Path | None:
        """What the engine reads, where it reads something of its own."""
        if not engine:
            return None
        self.writer(engine)
        found = self._folder / "engines" / Runtime.parse(engine, "engine").name
        return found if found.is_dir() else None


def cores() -> int:
    """Threads that torch computes with."""
    import torch

    return torch.get_num_threads()


# ---------------------------------------------------------------------------------------------- what is tuned


def _model(run_dir: Path, device: str) -> tuple[Neural, dict[str, Any]]:
    bundle = load_bundle(run_dir, device)
    if not isinstance(bundle, LanguageBundle):
        raise UserError(f"{run_dir}: the model gives labels or numbers and does not write.")
    if bundle.task.kind == "lm":
        raise UserError(f"{run_dir}: a language model is judged by its losses, which no way of writing changes.")
    if not isinstance(bundle.speaker, Neural):
        what = bundle.info["standing"]["kind"]
        raise UserError(f"{run_dir}: what stands ({what}) has one way to write: there is nothing to tune.")
    return bundle.speaker, bundle.info


def _metric(name: str, task: Writing) -> str:
    metric = check_language_metric(name, task.kind)
    if metric in LOSSES:
        raise UserError(
            f"metric: {metric} is read off losses, which no way of writing changes. Name one of texts with --metric, such as chrf."
        )
    return metric


# ---------------------------------------------------------------------------------------------- what is judged


def _judged(
    own: LanguageData, task: Writing, data: str | None, seed: int, info: Mapping[str, Any], neural: Neural
) -> tuple[list[Record], str]:
    """The records that decide, mixed by the seed, and what they are. Of a file those that are in the run's train or test are left out."""
    if data is None:
        records, said = list(own.calibration), "the run's own calibration half"
    else:
        from multistep.data.shapes import Layout

        found = read_records(data, Layout.parse(info["layout"], "layout"))
        known = {_key(r, task) for r in (*own.train, *own.test)}
        records = [r for r in found if _key(r, task) not in known]
        said = f"{Path(data).name}, neither train nor test"
        if len(records) < len(found):
            said += f"; {len(found) - len(records):,} rows that are there too were left out"
    if len(records) < FEWEST_ROWS:
        raise UserError(
            f"{data or 'calibration half'}: {len(records)} records that are neither train nor test. "
            f"At least {FEWEST_ROWS} are needed to judge; give a file with right answers with --data."
        )
    return _some(records, len(records), seed), said


def _key(record: Record, task: Writing) -> bytes:
    """Under which equal sources meet, whatever the answer: the model has seen one."""
    return normalised(task.reads(record))[0]


def _some(records: Sequence[Record], most: int, seed: int) -> list[Record]:
    order = np.random.default_rng(seed).permutation(len(records))[:most]
    return [records[i] for i in order]


def _fingerprint(records: Sequence[Record]) -> str:
    return hashlib.sha256("\n".join(map(repr, records)).encode("utf-8", "replace")).hexdigest()[:16]
