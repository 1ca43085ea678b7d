"""What a run of `optimize` keeps to: the time of its end is set aside, few rows decide nothing, what was given is not searched, what diverged
does not stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_modules import _Rows, _Stops, blobs, run
from test_searches import EVERYWHERE, PRIOR, Machine, live, problem
from torch import nn

from multistep.controllers import Reserve, Scripted, Skip, Target
from multistep.controllers.members import alone
from multistep.controllers.module_plan import Plan
from multistep.controllers.random import random_search
from multistep.metrics.power import FEWEST_ROWS
from multistep.standing import Stood, after, settlement
from multistep.strategy import TrainModule, Trial
from multistep.tune import segment
from multistep.types import Interrupted, MetricValue, Outcome, Verdict

pytestmark = pytest.mark.usefixtures("torch_seeded")
FEW = {"train": 6000, "validation": FEWEST_ROWS - 1, "test": 500}


def strategies(result: Any) -> list[dict[str, Any]]:
    trials = [r["trial"] for r in result.records() if r["kind"] == "Asked"]
    return [t["action"] for t in trials if t["action"]["kind"] == "train_module"]


def skipped(result: Any, stage: str) -> list[str]:
    return [r["why"] for r in result.records() if r["kind"] == "Skipped" and r["stage"] == stage]


# ---------------------------------------------------------------------------------------------- the end


@EVERYWHERE
@pytest.mark.parametrize("target", [None, Target(metric="accuracy", value=0.5, higher_is_better=True)])
def test_the_end_is_set_aside_before_training_and_given_back(name: str, target: Target | None) -> None:
    machine = Machine(problem(60, unit="seconds", target=target), update_s=0.01, judge_s=0.5)
    asks, _ = live(name, machine)
    trained = [n for n, a in enumerate(asks) if isinstance(a, Trial) and isinstance(a.action, TrainModule)]
    kept = [(n, a.name, a.amount) for n, a in enumerate(asks) if isinstance(a, Reserve)]
    amounts = {"finish": pytest.approx(0.5 + 0.02 * 60), "average": 1.0}
    if name in ("fixed", "race"):
        amounts.pop("average")
    assert {word: amount for n, word, amount in kept if n < trained[0]} == amounts
    assert {word for n, word, amount in kept if n > trained[-1] and not amount} == set(amounts)
    assert not any(machine.reserved.values()) and machine.spent <= 60 - 1.7
    assert not [a for a in live(name, Machine(problem(600)))[0] if isinstance(a, Reserve)], "counted budgets need none"


def test_a_trunk_that_goes_on_leaves_the_time_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go(stop: int) -> Any:
        return run(
            train=_Rows(_Stops(blobs(200, 0), stop)), controller="staged", optimizer={"kind": "adamw", "lr": 1e-3}, budget="30s",
            test=blobs(50, 2), out=tmp_path / "r",
        )  # fmt: skip

    with pytest.raises(Interrupted):
        go(4000)
    path = tmp_path / "r" / "journal.jsonl"
    *lines, last = path.read_text().splitlines()
    stopped = json.loads(last)
    assert stopped["kind"] == "Interrupted" and stopped["trial"].endswith("trunk")
    stopped["clock"]["wall_s"] = 28.0  # what came after the last snapshot was lost, and took its time
    path.write_text("\n".join([*lines, json.dumps(stopped), ""]))
    shares, stretch = [], segment.stretch

    def seen(state: Any, share: float) -> None:
        shares.append(share)
        stretch(state, share)

    monkeypatch.setattr(segment, "stretch", seen)
    records = go(10**9).records()
    kept = {r["name"]: r["amount"] for r in records if r["kind"] == "Reserved" and r["amount"]}
    assert set(kept) == {"finish", "average"} and kept["finish"] > 0.6
    assert shares[0] <= max(1e-3, 30 - 28 - sum(kept.values()))
    assert [r["amount"] for r in records if r["kind"] == "Reserved"][2:] == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------- few rows


def test_on_twenty_rows_no_rate_is_raced_and_no_trunk_watched() -> None:
    result = run(
        controller="staged", budget="1500 updates", validation=blobs(20, 1), metric="loss", optimizer={"kind": "adamw"}
    )
    (why,) = skipped(result, "race")
    assert "20 validation rows (< 21) cannot tell rates apart" in why and len(strategies(result)) == 1
    noted = [r["facts"]["rule"] for r in result.records() if r["kind"] == "Noted" and r["what"] == "looks"]
    assert len(noted) == 1 and noted[0].endswith("overfitting is not looked for") and noted[0] in result.explain()
    (told,) = [r["outcome"] for r in result.records() if r["kind"] == "Told" and r["stage"] == "trunk"]
    assert told["cost"]["updates"] == 1500 and "looks" not in told["facts"] and "diagnosis" not in told["facts"]
    assert result.replay()[0].ok
    enough = run(
        controller="staged", budget="1500 updates", validation=blobs(21, 1), metric="loss", optimizer={"kind": "adamw"}
    )
    assert not skipped(enough, "race") and not [r for r in enough.records() if r.get("what") == "looks"]


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"patience": 3, "schedule": "constant"}, "patience=3 stops nothing"),
        ({"schedule": {"kind": "plateau", "patience": 1}}, "the plateau cuts no rate"),
    ],
)
@pytest.mark.parametrize("looks", ["auto", "epoch"])
def test_on_twenty_rows_no_look_stops_a_training_or_cuts_its_rate(
    asked: dict[str, Any], words: str, looks: str
) -> None:
    settings: dict[str, Any] = {
        "metric": "loss",
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "budget": "300 updates",
        "looks": looks,
    }
    few = run(validation=blobs(20, 1), **settings, **asked)
    seen = ("plateau", "no improvement")
    assert not [r for r in few.records() if r["kind"] == "Event" and r["event"] in seen]
    (told,) = [r["outcome"] for r in few.records() if r["kind"] == "Told" and r["stage"] == "trunk"]
    assert told["cost"]["updates"] == 300 and "stopped" not in told["facts"]
    (noted,) = [r["facts"]["rule"] for r in few.records() if r["kind"] == "Noted" and r["what"] == "looks"]
    assert noted == f"20 validation rows (< 21) cannot tell a gain from chance: {words}" and noted in few.explain()
    assert ("looks" in told["facts"]) == (looks == "epoch"), "epochs are shown all the same"


def test_on_few_rows_the_order_of_halving_is_that_of_the_proposals() -> None:
    for rows, first in ((FEW, True), ({**FEW, "validation": 500}, False)):
        machine = Machine(problem(rows=rows), best_rate=6 * PRIOR)
        live("halving", machine)
        last = [t.why.partition(" (")[0] for t in machine.trials if t.stage == "halving"][-2:]
        assert (last == ["member 1", "member 2"]) == first
        ends = [t for t in machine.trials if t.stage == "cool-down"]
        averaged = {t.start for t in machine.trials if t.stage == "average"}
        assert not first or averaged == {ends[-2].id}, "the end of the first that is left"
        assert machine.incumbent is not None and machine.incumbent != "02-incumbent"


# ---------------------------------------------------------------------------------------------- what was given


@pytest.mark.parametrize(
    "objective, fixed",
    [
        ("cross_entropy", None),
        ({"kind": "cross_entropy", "label_smoothing": 0.1}, 0.1),
        ({"kind": "cross_entropy"}, 0.0),
    ],
)
def test_label_smoothing_that_was_given_stays(objective: Any, fixed: float | None) -> None:
    result = run(objective=objective, controller="halving", budget="600 updates")
    found = {s["objective"]["label_smoothing"] for s in strategies(result)}
    assert len(found) > 2 if fixed is None else found == {fixed}
    assert "optimizer.lr" in {a.path for a in Plan(problem(objective_given=True)).space().axes}


def nested(*dropout: float) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        inner = [layer for p in dropout for layer in (nn.Linear(8, 8), nn.ReLU(), nn.Dropout(p))]
        return nn.Sequential(*inner, nn.Linear(8, 3))


@pytest.mark.parametrize("module, own", [(nested(0.3), 0.3), (nested(0.2, 0.2), 0.2), (nested(0.0), 0.0)])
def test_dropout_is_searched_from_the_modules_own(module: nn.Module, own: float) -> None:
    found = [s["dropout"] for s in strategies(run(module, controller="halving", budget="600 updates"))]
    assert found[0] == own and len(set(found)) > 2 and all(0 <= p <= 0.5 for p in found)
    assert module[2].p == own, "what comes back is as it was"
    given = run(module, controller="halving", budget="600 updates", dropout=0.1)
    assert {s["dropout"] for s in strategies(given)} == {0.1}


@pytest.mark.parametrize("module", [nested(), nested(0.1, 0.3), nested(0.7)], ids=["none", "they differ", "too much"])
def test_a_dropout_that_is_not_one_number_stays_the_modules_own(module: nn.Module) -> None:
    assert {s["dropout"] for s in strategies(run(module, controller="halving", budget="600 updates"))} == {None}


def test_more_dropout_is_what_a_gap_is_answered_with_first() -> None:
    machine = Machine(problem(own_dropout=0.0), pace=50, overfits_after=1500)
    live("reactive", machine)
    tried = [t for t in machine.trials if "): gap: this in place of going on as before" in t.why]
    assert tried[0].why.startswith("more dropout") and value(tried[0]) == 0.1
    assert [t for t in machine.trials if t.why.startswith("run (dropout 0.1)")], (
        "it was committed: training goes on with it"
    )


def value(trial: Trial) -> float | None:
    assert isinstance(trial.action, TrainModule)
    return trial.action.dropout


# ---------------------------------------------------------------------------------------------- what diverged

DIVERGED = {"diagnosis": {"name": "divergence"}, "best_lr": 1e-6, "best_progress": 0.0}


def told_all(steps: Any, facts: dict[str, Any]) -> Any:
    """What the steps come back with, told of every training that it ended with these facts."""
    script, waiting = Scripted(steps), []
    while (ask := script.ask()) is not None:
        if isinstance(ask, Trial):
            waiting.append(ask)
        elif not isinstance(ask, Skip | Reserve):
            trial = waiting.pop(0)
            metrics = {"accuracy": MetricValue(0.5, 0.01)}
            script.tell(trial, Outcome(state=trial.id, metrics=metrics, facts=facts, remaining=500.0))
    return script.result


@pytest.mark.parametrize("search", [alone, random_search])
def test_what_diverged_at_any_rate_is_no_end_to_go_on_from(search: Any) -> None:
    assert told_all(search(Plan(problem(1000))), DIVERGED) is None
    assert told_all(search(Plan(problem(1000))), {}) is not None


def test_only_what_diverged_is_kept_from_standing() -> None:
    trial = Trial(id="09-cool-down", stage="cool-down", action=TrainModule())
    stood = Stood({"kind": "module", "state": "02-incumbent"}, {"module": "02-incumbent"})
    better = Outcome(state=trial.id, verdict=Verdict(accept=True, rule="better"))
    for facts, taken in (
        ({}, True),
        ({"stopped": {"event": "no improvement"}}, True),
        ({"diagnosis": {"name": "overfitting"}}, True),
        (DIVERGED, False),
    ):
        outcome = better.with_(facts=facts)
        now, committed = after("module", stood, trial, outcome)
        assert committed == taken and now.families["module"] == (trial.id if taken else "02-incumbent")
        settled = settlement(now, trial, outcome, committed)
        assert settled is not None and settled["kind"] == ("Committed" if taken else "RolledBack")
