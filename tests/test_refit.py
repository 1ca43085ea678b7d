"""The stage that solves a linear model again with the validation rows: when it is asked for, and how its time is kept."""

from __future__ import annotations

import pytest
from test_controllers import SCENARIOS, live, problem

from multistep.controllers import Reserve
from multistep.strategy import Refit


def test_a_linear_model_that_is_served_learns_from_the_rows_that_judged_it(monkeypatch: pytest.MonkeyPatch) -> None:
    story = live("staged", "no encoder")
    (trial,) = story.trials("refit")
    assert isinstance(trial.action, Refit) and trial.action.of == story.machine.families["linear"]
    assert trial.action.fit.l2s == (0.5 / 5000,), "the strength that was chosen, for more rows"
    stages = [t.stage for t in story.trials()]
    assert stages.index("refit") > max(n for n, stage in enumerate(stages) if stage in ("linear", "predict"))
    assert stages.index("refit") < stages.index("test")
    assert not live("staged", "plain").trials("refit"), "the encoder is served alone"
    assert not live("fixed", "no encoder").trials("refit") and not live("more", "no encoder").trials("refit")
    few = problem(60.0, rows={"control": 10, "calibration": 10})
    monkeypatch.setitem(SCENARIOS, "here", {"encoder": "none", "problem": few})
    assert "too few to see harm" in live("staged", "here").skips("refit")[0].why
    monkeypatch.setitem(SCENARIOS, "here", {"encoder": "none", "problem": problem(skip=("refit",))})
    assert [s.why for s in live("staged", "here").skips("refit")] == ["left out: skip=refit was given"]
    monkeypatch.setitem(SCENARIOS, "here", {"encoder": "none", "problem": problem(2.0)})
    assert "solving 03-linear twice again takes" in live("staged", "here").skips("refit")[0].why


def test_time_for_a_refit_is_kept_where_it_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multistep.controllers.stages.REFIT_SHARE", 0.01)
    story = live("staged", "plain")
    kept = [a for a in story.asks if isinstance(a, Reserve) and a.name == "refit"]
    assert [a.amount for a in kept] == [pytest.approx(2.2 * 0.5), 0.0]
    places = [story.asks.index(a) for a in kept]
    (trunk,) = story.trials("trunk")
    assert places[0] < story.asks.index(trunk) < places[1], "before training takes it, and given back after"
    assert not [a for a in live("staged", "tiny").asks if isinstance(a, Reserve) and a.name == "refit"]
