"""A finished run of `optimize` that is called with a larger budget: it goes on from what stands, and says so; what is no more of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_modules import _Rows, _Stops, blobs, network, run
from test_searches import problem
from torch import nn

from multistep.budget import Budget, Clock
from multistep.controllers import Reserve, Scripted, Skip, Target
from multistep.controllers.module import MODULE_CONTROLLERS, go_on
from multistep.controllers.module_plan import Plan
from multistep.journal import Unwritten
from multistep.module_run import given_more
from multistep.objectives import CrossEntropy
from multistep.optimizers import AdamW
from multistep.schedules import Linear
from multistep.strategy import Average, Profile, TrainModule, Trial
from multistep.tune.module import ModuleWorks
from multistep.types import Interrupted, MetricValue, Outcome, UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")
SLOWLY = {"optimizer": {"kind": "adamw", "lr": 1e-3}, "metric": "loss"}
Records = list[dict[str, Any]]


def asked(records: Records) -> list[dict[str, Any]]:
    return [r["trial"] for r in records if r["kind"] == "Asked"]


def told(records: Records, stage: str) -> dict[str, Any]:
    return next(r["outcome"] for r in records if r["kind"] == "Told" and r["stage"] == stage)


def same(one: Any, two: Any) -> None:
    for mine, theirs in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert one.validation == two.validation


def test_a_larger_budget_goes_on_from_what_stands(tmp_path: Path) -> None:
    settings = {**SLOWLY, "out": tmp_path / "r", "test": blobs(100, 2)}
    first = run(budget="60 updates", **settings)
    before = first.records()
    assert before[-1]["kind"] == "Finished" and told(before, "trunk")["verdict"]["accept"]
    again = run(budget="300 updates", **settings)
    records = again.records()
    new = records[len(before) :]
    assert records[: len(before)] == before, "what was written stays"
    assert (new[0]["kind"], new[0]["extended"], new[0]["budget"]["amount"]) == ("Resumed", True, 300)
    trials = asked(new)
    assert all(t["id"].startswith("2-") for t in trials) and not [t for t in trials if t["stage"] == "incumbent"]
    (trunk,) = [t for t in trials if t["stage"] == "trunk"]
    assert (trunk["start"], trunk["share"]) == ("03-trunk", 240) and trunk["action"]["optimizer"]["lr"] == 1e-3
    assert told(new, "trunk")["facts"]["update"] == 300, "with its moments and its place in the data"
    assert again.best.value < first.best.value and again.test is not None
    assert "2-02-trunk" in [r["trial"] for r in new if r["kind"] == "Committed"]
    (replayed,) = again.replay()
    assert replayed.ok and replayed.derived["test readings"] == 2, replayed.findings
    assert "of 300 updates" in again.explain()
    (advice,) = {r["action"] for r in new if r["kind"] == "Diagnosed" and r["name"] == "budget too small"} or {""}
    assert not advice or "budget='600 updates'" in advice

    for _ in range(2):  # the same call on what is finished gives back what stands
        once_more = run(budget="300 updates", **settings)
        assert once_more.records() == records and once_more.best == again.best
    third = run(budget="340 updates", **settings)
    assert asked(third.records())[-1]["id"].startswith("3-") and third.best.value <= again.best.value
    assert third.replay()[0].ok


@pytest.mark.parametrize("budget, words", [("100 updates", "is less"), ("10m", "Give it in updates")])
def test_what_is_not_more_of_it_is_an_error(tmp_path: Path, budget: str, words: str) -> None:
    done = run(budget="120 updates", out=tmp_path / "r")
    records = done.records()
    with pytest.raises(UserError, match=words) as caught:
        run(budget=budget, out=tmp_path / "r")
    assert "120 updates" in str(caught.value) and "\n" not in str(caught.value) and done.records() == records
    with pytest.raises(UserError, match="another run"):
        run(budget="200 updates", out=tmp_path / "r", clip=0.5)


def test_what_is_spent_already_is_not_more(tmp_path: Path) -> None:
    clock = Clock(Budget(amount=5.0), now=lambda: 100.0, started=0.0)
    with pytest.raises(UserError, match="7s is already spent"):
        given_more(tmp_path, Unwritten(), clock, Budget(amount=7.0))


@pytest.mark.parametrize("phase, at", [(1, 1500), (2, 1500)])
def test_stopped_and_given_more_it_is_the_straight_run_given_more(tmp_path: Path, phase: int, at: int) -> None:
    def go(out: Path, updates: int, stop: int = 10**9) -> Any:
        rows = _Rows(_Stops(blobs(200, 0), stop))
        return run(
            network(dropout=0.2), train=rows, controller="staged", budget=f"{updates} updates", out=out, **SLOWLY
        )

    go(tmp_path / "straight", 100)
    straight = go(tmp_path / "straight", 220)
    if phase == 2:
        go(tmp_path / "stopped", 100)
    with pytest.raises(Interrupted):
        go(tmp_path / "stopped", 220 if phase == 2 else 100, at)
    again = go(tmp_path / "stopped", 220)
    same(again, straight)
    kinds = [(r["kind"], r.get("extended")) for r in again.records() if r["kind"] in ("Resumed", "Finished")]
    resumed, end, more = ("Resumed", False), ("Finished", None), ("Resumed", True)
    assert kinds == ([resumed, end, more, end] if phase == 1 else [end, more, resumed, end])
    assert again.replay()[0].ok


def test_where_nothing_was_trained_the_controller_does_what_it_would_have_done(tmp_path: Path) -> None:
    settings = {"controller": "staged", "optimizer": "auto", "out": tmp_path / "r"}
    first = run(budget="20 updates", **settings)
    before = first.records()
    assert not [t for t in asked(before) if t["action"]["kind"] == "train_module"]
    again = run(budget="1300 updates", **settings)
    new = asked(again.records()[len(before) :])
    assert {"race", "trunk", "average"} <= {t["stage"] for t in new} and again.best.value > first.best.value
    assert again.replay()[0].ok


def test_what_was_chosen_by_the_first_budget_stays(tmp_path: Path) -> None:
    """For eight updates a linear layer is not solved; for a hundred it would have been."""
    run(nn.Linear(8, 3), optimizer="auto", budget="8 updates", out=tmp_path / "r")
    again = run(nn.Linear(8, 3), optimizer="auto", budget="100 updates", out=tmp_path / "r")
    trained = [t for t in asked(again.records()) if t["stage"] == "trunk"]
    assert [t["action"]["optimizer"]["kind"] for t in trained] == ["adamw", "adamw"]
    assert run(nn.Linear(8, 3), optimizer="auto", budget="100 updates").best != again.best


# ---------------------------------------------------------------------------------------------- the script


WON = TrainModule(
    optimizer=AdamW(lr=7e-4), objective=CrossEntropy(), dropout=0.25, batch_size=16, schedule=Linear(warmup=0.0)
)


def lived(steps: Any, made_by: TrainModule | None = WON, **facts: Any) -> list[Any]:
    """What the script of a finished run asks: every training ends with these facts."""
    script, asks, families = Scripted(steps), [], {"module": "07-cool-down"}
    while (ask := script.ask()) is not None:
        asks.append(ask)
        if not isinstance(ask, Trial):
            continue
        said: dict[str, Any] = {}
        if isinstance(ask.action, Profile):
            said = {"update_s": 0.0, "judge_s": 0.0, "test_s": 0.0, "tokens_an_update": 1}
            said["made_by"] = None if made_by is None else made_by.model_dump(mode="json")
        if isinstance(ask.action, TrainModule):
            said = facts
        metrics = {"accuracy": MetricValue(0.7, 0.01)}
        script.tell(ask, Outcome(state=ask.id, families=families, remaining=1000.0, facts=said, metrics=metrics))
    return asks


@pytest.mark.parametrize("name", MODULE_CONTROLLERS)
def test_the_settings_that_won_go_on_and_the_schedule_begins_anew(name: str) -> None:
    asks = [a for a in lived(go_on(problem(1000), name)) if isinstance(a, Trial)]
    assert [a.stage for a in asks] == ["profile", "trunk", "average", "average", "diagnose", "test"]
    trunk = asks[1]
    assert trunk.start == "07-cool-down" and trunk.share == 1000 and trunk.watch_gap
    assert trunk.action == WON.with_(schedule=Linear())
    given = problem(1000, schedule={"kind": "cosine"})
    assert next(a for a in lived(go_on(given, name)) if a.stage == "trunk").action.schedule.kind == "cosine"


def test_too_little_more_is_left_out() -> None:
    steps = go_on(problem(1000).with_(batch_growth=()), "staged")
    script = Scripted(steps)
    profile = script.ask()
    assert isinstance(profile, Trial)
    facts = {"judge_s": 0.0, "test_s": 0.0, "made_by": WON.model_dump(mode="json")}
    script.tell(profile, Outcome(families={"module": "03-trunk"}, remaining=10.0, facts=facts))
    skip = script.ask()
    assert isinstance(skip, Skip) and "10 updates fit" in skip.why


def test_it_overfits_diverges_and_reaches_a_target_by_the_same_rules() -> None:
    paused = {"diagnosis": {"name": "overfitting"}, "best_lr": 3e-4, "best_progress": 0.4}
    asks = lived(go_on(problem(1000), "staged"), **paused)
    (cool,) = [a for a in asks if isinstance(a, Trial) and a.stage == "cool-down"]
    assert cool.action == WON.with_(optimizer=AdamW(lr=3e-4), schedule=Linear(warmup=0.0))
    lost = {"diagnosis": {"name": "divergence"}, "best_lr": 7e-7, "best_progress": 0.0}
    asks = lived(go_on(problem(1000), "staged"), **lost)
    assert "average" not in [a.stage for a in asks]
    target = Target(metric="accuracy", value=0.99, higher_is_better=True)
    legs = [a for a in lived(go_on(problem(1000, target=target), "staged")) if isinstance(a, Trial)]
    assert legs[1].start == "07-cool-down" and {"trunk", "cool-down"} <= {a.stage for a in legs}


def test_under_a_budget_of_time_the_end_is_set_aside_again() -> None:
    script, amounts = Scripted(go_on(problem(100, unit="seconds"), "fixed")), []
    while (ask := script.ask()) is not None:
        if isinstance(ask, Reserve):
            amounts.append((ask.name, ask.amount))
        if isinstance(ask, Trial):
            facts: dict[str, Any] = {"update_s": 0.01, "judge_s": 0.5, "test_s": 0.25, "made_by": WON.model_dump()}
            script.tell(ask, Outcome(state=ask.id, families={"module": "03-trunk"}, remaining=90.0, facts=facts))
    assert amounts == [("finish", 2.75), ("average", 1.0), ("average", 0.0), ("finish", 0.0)]


def test_what_made_a_state() -> None:
    ended = Outcome(state="x")
    past = [
        (Trial(id="02-incumbent", stage="incumbent", action=Profile()), ended),
        (Trial(id="03-trunk", stage="trunk", action=WON), ended),
        (Trial(id="04-average", stage="average", action=Average(which="ema"), start="03-trunk"), ended),
        (
            Trial(id="05-soup", stage="soup", action=Average(which="soup", members=("02-incumbent", "03-trunk"))),
            ended.with_(facts={"members": ["03-trunk"]}),
        ),
    ]
    works: Any = SimpleNamespace(past=past)
    found = {
        state: ModuleWorks._made_by(works, state) for state in ("02-incumbent", "03-trunk", "04-average", "05-soup")
    }
    made = WON.model_dump(mode="json")
    assert found == {"02-incumbent": None, "03-trunk": made, "04-average": made, "05-soup": made}
    assert TrainModule.parse(made) == WON and Plan(problem()).base is None
