"""A run on a task whose answer is a text, from configuration to bundle: behind `fit` and `resume`.

Which tasks those are: tasks/writing.py. What is tried: controllers/language.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multistep import journal, report, team
from multistep.budget import Clock, parse_budget
from multistep.config import FitConfig, save_config
from multistep.controllers.language_plan import LanguageProblem, higher_is_better
from multistep.controllers.script import Target
from multistep.data.records import LanguageData, load_language
from multistep.journal import Journal
from multistep.language_bundle import write_language_bundle
from multistep.metrics.texts import check_language_metric
from multistep.models.adapter import save_adapter
from multistep.predictors.ways import read_way, words
from multistep.report.progress import Progress
from multistep.session import check_same_data, controller_of, left, machine_facts, resumed, show, signals, versions
from multistep.target import read_target
from multistep.tasks.writing import LOSSES, WRITING, Writing, writing_task
from multistep.tune import tune
from multistep.tune.language import LanguageWorks
from multistep.tune.speakers import Pretrained, Speakers
from multistep.tune.workbench import device_for
from multistep.types import Interrupted, UserError
from multistep.writing import Neural, sizes

_WARNINGS = (
    "leakage",
    "conflict",
    "duplicates",
    "empty",
    "dropped",
    "remark",
)  # lines of the data report that a card repeats


def is_language(task: str) -> bool:
    return task in WRITING


def fit_language(config: FitConfig, progress: Progress, started: float | None = None) -> Path:
    """Run a configuration; the run's folder. Raises UserError on bad input."""
    assert config.out is not None
    clock, out = Clock(parse_budget(config.budget), started=started), Path(config.out)
    progress.stage("data", f"reading {config.data}")
    run = _Run(config, out)
    for line in run.data.report.lines():
        progress.note(line)
    book = Journal(out / "journal.jsonl")  # first: what is there without one is not a run's
    book.append(
        "Started", clock=clock.save(), config=config, budget=clock.budget, metric=run.metric, versions=versions(),
        machine=machine_facts(run.speakers.device),
    )  # fmt: skip
    save_config(config, out / "config.yaml")
    (out / "states").mkdir(exist_ok=True)
    book.append("Data", clock=clock.save(), report=run.data.report, fingerprint=run.data.fingerprint)
    return run.drive(clock, book, [], progress)


def resume_language(
    config: FitConfig, out: Path, past: list[dict[str, Any]], clock: Clock, extended: bool, progress: Progress
) -> Path:
    """Go on with a run that was stopped, or that was given more."""
    progress.stage("data", f"reading {config.data}")
    run = _Run(config, out)
    check_same_data(config.data, run.data.fingerprint, past)
    book = Journal(out / "journal.jsonl")
    if not any(r["kind"] == "Data" for r in past):
        book.append("Data", clock=clock.save(), report=run.data.report, fingerprint=run.data.fingerprint)
    past.append(resumed(book, clock, extended))
    return run.drive(clock, book, past, progress)


def assist_language(config: FitConfig, told: dict[str, Any], clock: Clock, book: Journal, progress: Progress) -> None:
    """The part of another process in a run that the first one drives: what `drive` told it."""
    run = _Run(config, Path(told["out"]))
    check_same_data(config.data, run.data.fingerprint, [{"kind": "Data", "fingerprint": told["fingerprint"]}])
    run.tune(clock, book, told["past"], progress)


class _Run:
    """What a configuration comes to: data, task, metric, speakers."""

    def __init__(self, config: FitConfig, out: Path):
        self.config, self.out = config, out
        self.data: LanguageData = load_language(
            config.data, task=config.task, text=config.text, label=config.label, seed=config.seed, test=config.test
        )
        self.task = writing_task(config.task, self.data.train)  # pyright: ignore[reportArgumentType]
        self.metric = check_language_metric(config.metric or self.task.default_metric, self.task.kind)
        self.target()  # bad ones are told before anything is written
        self.pretrained: Pretrained = pretrained_kind(config)
        if self.metric in LOSSES and self.task.kind not in ("lm", "chat"):
            raise UserError(
                f"metric: {self.metric} decides only language models and chats. Use {self.task.default_metric}."
            )
        if config.adapter == "lora" and self.pretrained not in ("decoder", "seq2seq"):
            raise UserError(
                "adapter: lora needs a pretrained model to stand beside. Name one that writes with --model."
            )
        check_used(config, self.task, self.pretrained)
        self.speakers = Speakers(config, self.data, self.task, out, self.pretrained, device_for(config.device))

    def problem(self) -> LanguageProblem:
        budget, records = parse_budget(self.config.budget), self.speakers.records
        regime = "scratch" if not self.pretrained and self.task.answers != "passage" else "fine_tune"
        return LanguageProblem(
            task=self.task, metric=self.metric, config=self.config, pretrained=self.pretrained,
            regime="adapter" if self.config.adapter == "lora" else regime,
            rows={k: len(v) for k, v in records.items()}, bytes={k: int(sizes(v).sum()) for k, v in records.items()},
            budget=budget.amount, unit=budget.unit, target=self.target(),
        )  # fmt: skip

    def target(self) -> Target | None:
        """The score at which training ends, where one was asked for. Raises UserError."""
        kind = self.task.kind
        measured = tuple(dict.fromkeys([self.metric, "bits_per_byte"]))
        return read_target(
            self.config.until, self.metric, measured, lambda name: check_language_metric(name, kind), higher_is_better
        )

    def drive(self, clock: Clock, book: Journal, past: Sequence[dict[str, Any]], progress: Progress) -> Path:
        team.first(
            {
                "config": self.config, "out": self.out.resolve(), "budget": clock.budget, "past": past,
                "fingerprint": self.data.fingerprint,
            }
        )  # fmt: skip
        self.tune(clock, book, past, progress)
        (self.out / "model" / "README.md").write_text(report.card(self._card(clock)), encoding="utf-8")
        book.append("Finished", clock=clock.save(), wall_s=clock.wall_s)
        book.close()
        return self.out

    def tune(self, clock: Clock, book: Journal, past: Sequence[dict[str, Any]], progress: Progress) -> None:
        with signals() as stop:

            def watch(done: float) -> None:
                """Long reading and writing comes by here after every batch."""
                if number := stop():
                    raise Interrupted(number)
                progress.remaining(left(clock))
                progress.tick(done, "through the texts")

            self.speakers.watch = watch
            works = LanguageWorks(self.speakers, self.problem(), clock, stop)
            works.ship_with(self.ship)
            controller = controller_of(self.problem(), self.config.controller, book, clock, past)
            for record in tune(works, controller, book, past):
                show(progress, record, clock, self.metric)

    def ship(self, standing: dict[str, Any]) -> None:
        s = self.speakers
        speaker = s.speaker(standing)
        shape = s.shape_of(standing["state"]) if isinstance(speaker, Neural) else None

        def adapter(folder: Path) -> None:
            assert shape is not None
            save_adapter(s.model(shape, standing["state"]), folder, self.config.model)

        adapted = adapter if shape is not None and shape.lora is not None else None
        extra = {
            "metric": self.metric, "stream": self.data.stream, "base_model": self._base_model(),
            "states": {"model": standing["state"]},
        }  # fmt: skip
        write_language_bundle(
            self.out / "model", self.task, self.data.layout, speaker, standing, extra, adapted, s.ranking_encoder
        )

    def _base_model(self) -> str | None:
        if not self.pretrained:
            return None
        return Path(self.config.model).name if Path(self.config.model).is_dir() else self.config.model

    def _card(self, clock: Clock) -> dict[str, Any]:
        records = journal.read(self.out / "journal.jsonl")
        found = report.summary(records)
        test = found["test"]["metrics"] if found["test"] else {}
        info = json.loads((self.out / "model" / "multistep.json").read_text(encoding="utf-8"))
        return {
            "name": self.out.name, "task": self.task.kind, "base_model": info["base_model"], "dataset": self.config.data,
            "rows": {k: len(v) for k, v in self.speakers.records.items()},
            "warnings": [x.strip() for x in self.data.report.lines() if x.startswith(_WARNINGS) and "none between" not in x],
            "metrics": {k: {"value": v, "stderr": e} for k, (v, e) in test.items()},
            "test_reads": found["test_reads"], "decisions": [f"{r['stage']}: {r['rule']}" for r in records if r["kind"] == "Committed"],
            "predictor": _words(info["standing"]), "budget": str(clock.budget), "wall_s": clock.wall_s, "versions": versions(),
            "writer": info["standing"]["kind"],
        }  # fmt: skip


def _words(standing: Mapping[str, Any]) -> str:
    """What stands, for the card: 'a trained model (beam 4, length penalty 1)'."""
    names = {
        "writer": "a cheap writer: no trained model beat it on held-out data", "ngram": "an n-gram model over bytes",
        "model": "a trained model", "mixed": "a trained model mixed with an n-gram model", "spans": "a model that finds spans",
    }  # fmt: skip
    decoding = standing.get("decoding")
    return names[standing["kind"]] + (f" ({words(read_way(decoding))})" if decoding else "")


def check_used(config: FitConfig, task: Writing, pretrained: Pretrained) -> None:
    """Raises UserError where a key was given that the model for this task would not use."""
    pairs = not pretrained and task.kind not in ("lm", "chat") and task.answers not in ("passage", "choices")
    if config.dropout is not None and not pairs:
        raise UserError("dropout: only models from scratch that translate, summarize or answer have one. Leave it out.")
    if config.label_smoothing is not None and task.answers == "passage" and pretrained in ("", "encoder"):
        raise UserError("label_smoothing: a span of a passage has no label to smooth. Leave it out.")


def pretrained_kind(config: FitConfig) -> Pretrained:
    """What --model names. Raises UserError where it is nothing that can be used for texts."""
    if config.model in ("auto", "none"):
        return ""
    if config.model == "lstm":
        raise UserError(
            "model: lstm is for labels. Leave it at auto, or name a model that writes (folder or org/name)."
        )
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(config.model)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(
            f"model: {config.model!r} cannot be read ({reason}). Give a folder with config.json, or a hub name (org/name)."
        ) from None
    if found.is_encoder_decoder:
        return "seq2seq"
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = " ".join(found.architectures or ())
    if "CausalLM" in architectures or "LMHead" in architectures:
        return "decoder"
    if config.task == "answer":
        return "encoder"
    if found.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not architectures:
        return "decoder"
    raise UserError(
        f"model: {config.model!r} is an encoder, which does not write. Name a decoder or a sequence-to-sequence model."
    )
