"""Early stopping and reduce-on-plateau: what a look decides, that the journal has the numbers, that a resumed run decides the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from test_controllers import Machine, problem
from test_modules import Data, _Rows, _Stops, blobs, network, run

from multistep.budget import Budget
from multistep.config import FitConfig
from multistep.controllers import CONTROLLERS, Scripted
from multistep.controllers.plan import Plan
from multistep.evaluate import Rows
from multistep.schedules import Plateau
from multistep.state import TrainState
from multistep.strategy import FineTune, Trial
from multistep.tune import segment
from multistep.tune.watch import CHECKS, Looks, checks
from multistep.types import Interrupted, UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")
SETTLED = {"kind": "plateau", "warmup": 0.0, "patience": 2, "factor": 0.5}


def noisy(n: int = 60) -> Data:
    """Points whose classes nobody can learn beyond the centres."""
    x, y = blobs(n, 0, noise=3.0)
    return x, torch.where(torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.3, (y + 1) % 3, y)


def events(result: Any, name: str) -> list[dict[str, Any]]:
    return [r for r in result.records() if r["kind"] == "Event" and r["event"] == name]


# ---------------------------------------------------------------------------------------------- the rule


def begun(tmp_path: Path) -> TrainState:
    from multistep.strategy import TrainModule

    state = TrainState(network())
    state.begin(TrainModule(schedule=Plateau()), Budget(amount=100, unit="updates"))
    return state


def looked(tmp_path: Path, losses: list[np.ndarray], **more: Any) -> tuple[list[Any], TrainState, Looks]:
    """What each look finds when validation gives these losses one after the other."""
    state, given = begun(tmp_path), iter(losses)
    watch = Looks(tmp_path / "best", lambda _: next(given), checks(), **more)
    found = []
    for update in range(1, 101):
        state.segment.updates = state.counters.update = update
        if update % 5 == 0 and update < 100 and len(found) < len(losses):
            found.append(watch.look(state, [1.0]))
            if found[-1] is not None and found[-1].ends:
                break
    return found, state, watch


def flat(level: float, n: int = 50, spread: float = 0.1, seed: int = 0) -> np.ndarray:
    return level + spread * np.random.default_rng(seed).standard_normal(n)


def test_looks_are_every_twentieth_and_fewer_where_they_cost() -> None:
    assert checks() == [(n + 1) / (CHECKS + 1) for n in range(CHECKS)]
    assert len(checks(100.0, 1.0)) == 10 and len(checks(1.0, 10.0)) == 4 and len(checks(1e6, 0.1)) == CHECKS


def test_patience_counts_looks_without_a_paired_gain(tmp_path: Path) -> None:
    better, noise = flat(0.5, seed=1), flat(0.499, seed=2)  # a lower mean, but by chance
    found, _, _ = looked(tmp_path, [flat(1.0), better, noise, noise, noise], patience=3)
    assert [f is None for f in found] == [True, True, True, True, False]
    assert found[-1].kind == "Event" and found[-1].ends == "stopped"
    fields = found[-1].fields
    assert fields["event"] == "no improvement" and "3 looks in a row" in fields["action"]
    assert fields["numbers"]["checks"] == 5 and fields["evidence"][0]["n"] == 50 and fields["evidence"][0]["p"] > 0.1


def test_many_small_gains_add_up_to_one(tmp_path: Path) -> None:
    base = flat(1.0, spread=0.0)
    steps = [base - 0.004 * k + flat(0.0, spread=0.05, seed=k) for k in range(19)]
    found, _, _ = looked(tmp_path, steps, patience=8)
    assert all(f is None for f in found) and len(found) == 19


def test_a_plateau_cuts_again_and_again_down_to_its_floor(tmp_path: Path) -> None:
    plateau = Plateau(factor=0.1, patience=2, floor=0.01)
    found, state, _ = looked(tmp_path, [flat(1.0)] * 9, plateau=plateau)
    cuts = [n for n, f in enumerate(found) if f is not None]
    assert cuts == [2, 4] and not any(found[n].ends for n in cuts)  # 0.1, 0.01, and no further
    assert state.counters.lr_scale == pytest.approx(0.01)
    assert [found[n].fields["lr_scale"] for n in cuts] == pytest.approx([0.1, 0.01])


def test_what_is_remembered_decides_the_same(tmp_path: Path) -> None:
    given = [flat(1.0), *[flat(0.5, seed=1)] * 5]
    whole, _, _ = looked(tmp_path, given, patience=4)
    _, state, first = looked(tmp_path, given[:3], patience=4)
    rest = iter(given[3:])
    again = Looks(tmp_path / "best", lambda _: next(rest), checks(), patience=4)
    again.remember(*first.memory())
    found = []
    for update in range(16, 31):
        state.segment.updates = state.counters.update = update
        found.append(again.look(state, [1.0]))
    assert [f for f in found if f is not None] == [f for f in whole if f is not None] and found[-1] is not None


# ---------------------------------------------------------------------------------------------- any module


def test_early_stopping_keeps_the_best_state_and_saves_the_rest() -> None:
    result = run(
        network(hidden=64), train=noisy(), validation=blobs(400, 1, noise=3.0), metric="loss", patience=3,
        optimizer={"kind": "adamw", "lr": 0.002}, schedule="constant", budget="1000 updates",
    )  # fmt: skip
    (event,) = events(result, "no improvement")
    best, now = event["numbers"]["best"], event["numbers"]["now"]
    assert best["validation_loss"] < now["validation_loss"] and best["progress"] < now["progress"] < 1
    told = next(r["outcome"] for r in result.records() if r["kind"] == "Told" and r["stage"] == "trunk")
    assert told["cost"]["updates"] < 1000 and told["remaining"] > 0 and told["facts"]["stopped"]["event"]
    assert result.best.value == pytest.approx(best["validation_loss"], rel=1e-5)
    assert "no improvement" in result.explain()


def test_staged_cools_down_from_the_best_state() -> None:
    result = run(
        train=noisy(), validation=blobs(400, 1, noise=3.0), metric="loss", patience=2, controller="staged",
        optimizer={"kind": "adamw", "lr": 0.01}, budget="600 updates",
    )  # fmt: skip
    stages = [r["trial"]["stage"] for r in result.records() if r["kind"] == "Asked"]
    assert "cool-down" in stages and (events(result, "no improvement") or "overfitting" in result.explain())


def test_a_plateau_cuts_the_rate_and_the_journal_says_why() -> None:
    result = run(optimizer={"kind": "sgd", "lr": 0.3}, schedule=SETTLED, budget="400 updates")
    cuts = events(result, "plateau")
    assert len(cuts) >= 2
    assert [c["lr_scale"] for c in cuts] == pytest.approx([0.5 ** (n + 1) for n in range(len(cuts))])
    assert all(c["evidence"] and "looks in a row without a gain" in c["action"] for c in cuts)
    assert result.best.value > 0.7 and "plateau" in result.explain()


STOPPING = {"patience": 3, "schedule": "constant"}


@pytest.mark.parametrize(
    "more, at",
    [({"schedule": SETTLED}, 2900), ({"schedule": SETTLED}, 6100), (STOPPING, 700), (STOPPING, 1190)],
    ids=["plateau-2900", "plateau-6100", "patience-700", "patience-1190"],
)
def test_resumed_it_decides_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict, at: int) -> None:
    monkeypatch.setattr(segment, "SNAPSHOT_UPDATES", 10)  # looks and snapshots fall on the same updates

    def go(out: Path, stop: int) -> Any:
        return run(
            network(dropout=0.2), train=_Rows(_Stops(noisy(200), stop)), budget="200 updates", out=out,
            optimizer={"kind": "adamw", "lr": 0.02}, **more,
        )  # fmt: skip

    straight = go(tmp_path / "straight", 10**9)
    assert events(straight, "plateau") or events(straight, "no improvement")
    with pytest.raises(Interrupted):
        go(tmp_path / "stopped", at)
    again = go(tmp_path / "stopped", 10**9)
    for mine, theirs in zip(again.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert again.validation == straight.validation

    def said(result: Any) -> list[Any]:
        return [
            {k: v for k, v in e.items() if k not in ("n", "at", "clock")} for e in result.records() if e.get("numbers")
        ]

    assert [s for n, s in enumerate(said(again)) if s not in said(again)[:n]] == said(straight)


def test_patience_is_a_number_of_looks() -> None:
    with pytest.raises(UserError, match="'patience'"):
        run(patience=-1)
    with pytest.raises(UserError, match="'patience'"):
        FitConfig.parse({"data": "x.csv", "patience": -1})


# ---------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("more", [{"patience": 2}, {"schedule": SETTLED}], ids=["patience", "plateau"])
def test_texts_stop_early_and_cut_on_a_plateau_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    from multistep import api

    monkeypatch.setattr(segment, "SNAPSHOT_UPDATES", 5)
    encoder = runs.tiny_encoder(tmp_path / "encoder")
    rows = runs.write_rows(
        tmp_path / "rows.csv", rows=440, noise=0.3
    )  # 22 of them are control: on fewer no look decides
    settings = {"controller": "staged", "schedule": {"kind": "constant"}, "budget": "200 updates", **more}
    straight = runs.run(runs.config(rows, tmp_path / "straight", encoder, **settings))
    said = [e for e in runs.of_kind(straight, "Event") if e["event"] in ("no improvement", "plateau")]
    assert said and all(e["evidence"] for e in said)
    load, calls = Rows.load, [0]

    def signalled(self: Rows, few: np.ndarray) -> Any:
        calls[0] += 1
        if calls[0] == 27:
            os.kill(os.getpid(), signal.SIGTERM)
        return load(self, few)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "load", signalled)
        with pytest.raises(Interrupted):
            runs.run(runs.config(rows, tmp_path / "run", encoder, **settings))
    api.resume(tmp_path / "run")
    runs.same_states(tmp_path / "straight", tmp_path / "run")


def test_probes_decay_and_are_not_stopped_whatever_was_asked_for() -> None:
    machine = Machine(problem=problem(5000, "updates", schedule={"kind": "plateau"}, patience=3, soup=True))
    controller, trials = Scripted(CONTROLLERS["staged"](machine.problem)), []
    while (ask := controller.ask()) is not None:
        if isinstance(ask, Trial):
            trials.append(ask)
            controller.tell(ask, machine.run(ask))
    tuned = [t for t in trials if isinstance(t.action, FineTune)]
    assert {(t.stage == "race", t.action.schedule.kind, t.patience) for t in tuned} == {
        (True, "linear", 0),
        (False, "plateau", 3),
    }
    (soup,) = [t for t in trials if t.stage == "soup"]
    assert soup.action.members == tuple(t.id for t in tuned)


def test_growth_is_what_the_plan_counts_with() -> None:
    plan = Plan(problem(5000, "updates", batch_growth=[0.5, 0.75]))
    strategy = FineTune(batch_growth=(0.5, 0.75))
    assert plan.growth == pytest.approx(np.mean([strategy.batches(p) for p in np.arange(0, 1, 1e-3)])) == 2.0
