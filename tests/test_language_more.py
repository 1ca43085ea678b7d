"""Real runs of models that write: with dropout that is searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import run, tiny_encoder
from test_language import config, pairs
from torch import nn

from multistep.budget import Budget
from multistep.controllers.language_plan import Plan
from multistep.models.spans import load_span_encoder
from multistep.objectives import Span
from multistep.state import TrainState
from multistep.strategy import Shape, TrainWriter
from multistep.tune import language, measuring


@pytest.fixture(autouse=True)
def _small(torch_seeded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LEAST_TARGETS", 10)


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
