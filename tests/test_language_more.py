"""Real runs of models that write: given more after nothing was trained, after a divergence, with few validation rows, with dropout that is
searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import of_kind, run, tiny_encoder
from test_language import config, pairs, talks, tiny_llama
from torch import nn

from multistep.api import Run, resume
from multistep.budget import Budget
from multistep.controllers.language_plan import Plan
from multistep.controllers.sizes import weights_fit
from multistep.detect import Course
from multistep.models.spans import load_span_encoder
from multistep.objectives import Span
from multistep.state import TrainState
from multistep.strategy import Shape, TrainWriter
from multistep.tune import language, measuring


@pytest.fixture(autouse=True)
def _small(torch_seeded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LEAST_TARGETS", 10)


def more(folder: Path, budget: str) -> Run:
    found = resume(folder, budget)
    assert not [str(finding) for replayed in found.replay() for finding in replayed.findings]
    return found


def trainings(found: Run, phase: str = "") -> list[dict[str, Any]]:
    """The trials that trained; of the first run, or of what came later (such as "2-")."""
    asked = [r["trial"] for r in of_kind(found, "Asked")]
    later = [t for t in asked if t["id"].startswith(phase)] if phase else [t for t in asked if t["id"][1] != "-"]
    return [t for t in later if t["action"]["kind"] == "train_writer"]


def why(found: Run, stage: str) -> list[str]:
    return [r["why"] for r in of_kind(found, "Skipped") if r["stage"] == stage]


def test_a_run_that_trained_nothing_trains_when_it_is_given_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def fits(weights: int, tokens: float, different: int) -> bool:
        seen.append(tokens)
        return weights_fit(weights, tokens, different)

    monkeypatch.setattr(measuring, "weights_fit", fits)
    settings = {"width": None, "depth": None, "budget": "20 updates"}
    first = run(config(pairs(tmp_path), tmp_path / "run", "translate", **settings))
    assert not trainings(first) and "(< 30)" in why(first, "trunk")[0]
    begun = max(seen)
    found = more(tmp_path / "run", "+40 updates")
    trunk, cooled = trainings(found, "2-")
    assert (trunk["stage"], trunk["start"], cooled["start"]) == ("trunk", None, trunk["id"])
    assert trunk["share"] + cooled["share"] == 60.0, "what the first one did not use too"
    assert max(seen) == 3 * begun, "the size is for what there is now"
    last = more(tmp_path / "run", "+40 updates")
    again = trainings(last, "3-")
    assert [t["stage"] for t in again] == ["trunk", "cool-down"] and again[0]["start"] == trunk["id"]
    assert again[0]["action"]["shape"] == trunk["action"]["shape"]
    profiles = [r["outcome"]["facts"] for r in of_kind(last, "Told") if r["stage"] == "profile"]
    assert [(p["sized_for"], p["trained"] and p["trained"]["state"]) for p in profiles] == [
        (20.0, None), (60.0, None), (60.0, trunk["id"]),
    ]  # fmt: skip


def test_a_model_as_it_was_given_is_no_training_to_go_on_from(tmp_path: Path) -> None:
    settings = {"model": str(tiny_llama(tmp_path / "llama")), "width": None, "depth": None, "tokenizer": "auto"}
    settings |= {"vocabulary": None, "budget": "20 updates"}
    first = run(config(talks(tmp_path, 420), tmp_path / "run", "chat", **settings))
    assert not trainings(first)
    (trunk,) = trainings(more(tmp_path / "run", "+40 updates"), "2-")
    assert (trunk["start"], trunk["action"]["schedule"]["kind"], trunk["commit"]) == (None, "linear", True)


def test_after_a_divergence_nothing_is_cooled_or_averaged_and_more_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            Course,
            "diverges",
            lambda self: {"rule": "4 bad batches with 0 good ones between them"} if self.seen >= 5 else None,
        )
        found = run(config(pairs(tmp_path), tmp_path / "run", "translate"))
    stages = [r["trial"]["stage"] for r in of_kind(found, "Asked")]
    assert "trunk" in stages and not {"cool-down", "average"} & set(stages)
    assert len(why(found, "cool-down")) == 1 and "the training diverged" in why(found, "cool-down")[0]
    later = trainings(more(tmp_path / "run", "+40 updates"), "2-")
    assert [t["start"] for t in later if t["stage"] == "trunk"] == [None]


@pytest.mark.parametrize("rows, control", [(80, 10), (700, 35)])
def test_few_validation_rows_race_no_rates_and_watch_no_trunk(tmp_path: Path, rows: int, control: int) -> None:
    found = run(config(pairs(tmp_path, rows), tmp_path / "run", "translate", optimizer={}, budget="60 updates"))
    (skipped,) = why(found, "race")
    assert not [t for t in trainings(found) if t["stage"] == "race"]
    assert (f"{control} control records (< 21)" in skipped) == (control < 21)
    (told,) = [r["outcome"]["facts"] for r in of_kind(found, "Told") if r["stage"] == "trunk"]
    assert told["looks"], "for the diagnosis"
    silent = [
        r["facts"]["silent"] for r in of_kind(found, "Noted") if r["what"] == "looks" and r["trial"].endswith("trunk")
    ]
    assert silent == ([] if control >= 21 else [["overfitting"]])


def test_a_search_moves_dropout_and_the_model_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[float | None, float, float]] = []
    whole = language.run_training

    def watched(trial: Any, action: TrainWriter, state: Any, *others: Any, **more: Any) -> Any:
        layers = [layer.dropout for layer in state.model.get_encoder().layers]
        made.append((action.dropout, state.model.config.dropout, max(layers)))
        assert len(set(layers)) == 1
        return whole(trial, action, state, *others, **more)

    monkeypatch.setattr(language, "run_training", watched)
    monkeypatch.setattr(Plan, "least_updates", 10.0)
    run(config(pairs(tmp_path), tmp_path / "run", "translate", controller="random", optimizer={}, budget="120 updates"))
    moved = [m for m in made if m[0] is not None]
    assert len({dropout for dropout, *_ in moved}) > 1
    assert all(dropout == of_model == of_layers for dropout, of_model, of_layers in moved)


def test_an_encoder_that_finds_answers_takes_dropout_although_it_comes_without(tmp_path: Path) -> None:
    state = TrainState(load_span_encoder(tiny_encoder(tmp_path / "encoder")))
    drops = [module for module in state.model.modules() if isinstance(module, nn.Dropout)]
    assert drops and {module.p for module in drops} == {0.0}
    strategy = TrainWriter(shape=Shape(reads="spans"), objective=Span(), dropout=0.3)
    state.begin(strategy, Budget(amount=5, unit="updates"))
    state.drop_out()
    assert {module.p for module in drops} == {0.3}
