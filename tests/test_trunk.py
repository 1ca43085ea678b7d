"""How many layers the time buys, at what rate, how long they are trained, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import papers
import pytest
from test_controllers import SCENARIOS, Machine, live, problem

from multistep.budget import parse_budget
from multistep.controllers.plan import MOST_EPOCHS, Plan
from multistep.controllers.trunk import AGAIN_EPOCHS, MEMBERS, SHORTER, TRUNK_EPOCHS, TRUNK_EXAMPLES, end_s, trainings
from multistep.metrics.verdicts import better, not_worse
from multistep.replay import replay
from multistep.strategy import Average, FineTune, FitHead, Trial
from multistep.types import NotWorse, Outcome, Verdict


@pytest.mark.parametrize("name", ["staged", "race", "fixed"])
@pytest.mark.parametrize(
    "tokens_s, layers, lr",
    [(200_000.0, 6, 2e-4), (35_000.0, 6, 2e-4), (17_000.0, 3, 3e-4), (12_000.0, 3, 3e-4), (8_000.0, 2, 6e-4), (6_000.0, 1, 6e-4)],
)  # fmt: skip
def test_the_less_time_the_fewer_layers_and_the_higher_their_rate(
    name: str, tokens_s: float, layers: int, lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(60.0), "tokens_s": tokens_s})
    story = live(name, "here")
    (head,), (trunk,) = story.trials("head"), story.trials("trunk")
    assert isinstance(head.action, FitHead) and isinstance(trunk.action, FineTune)
    assert trunk.action.layers == layers
    assert trunk.action.optimizer.lr == pytest.approx(lr)
    assert head.action.cut <= 6 - layers, "states are never kept above what is trained"


def test_the_deeper_a_training_goes_the_lower_its_rate() -> None:
    plan = Plan(problem())
    plan.facts = Machine(problem=problem()).profile()
    rates = [plan.prior_lr(depth) for depth in range(1, 7)]
    assert rates[:3] == pytest.approx([6e-4, 6e-4, 3e-4]) and rates[5] == pytest.approx(2e-4)
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 5
    plan.facts |= {"n_layers": 0}  # it cannot be cut: all of it is trained
    assert plan.prior_lr(0) == pytest.approx(2e-4)


def test_where_training_was_measured_its_speed_is_not_that_of_a_forward_pass() -> None:
    plan = Plan(problem())
    plan.facts = Machine(problem=problem()).profile()
    promised = {layers: plan.train_tokens_s(layers) for layers in (3, 6)}
    plan.facts |= {"train_tokens_s": 20_000.0}
    assert plan.train_tokens_s(6) == pytest.approx(20_000.0) != pytest.approx(promised[6])
    assert plan.train_tokens_s(3) / plan.train_tokens_s(6) == pytest.approx(promised[3] / promised[6])
    plan.facts |= {"processes": 2}
    assert plan.train_tokens_s(6) == pytest.approx(40_000.0)


@pytest.mark.parametrize("name", ["staged", "more"])
def test_what_one_training_does_not_need_goes_into_others_and_the_mean_of_all(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(1200.0, rows={"train": 9000})})
    story = live(name, "here")
    (trunk,), again, (mean,) = story.trials("trunk"), story.trials("again"), story.trials("average")
    assert isinstance(trunk.action, FineTune) and len(again) == MEMBERS - 1
    plan = Plan(story.machine.problem)
    plan.facts, plan.max_length = story.machine.profile(), trunk.action.max_length
    for n, trial in enumerate(again, 1):
        assert trial.action == trunk.action.with_(reshuffle=n) and trial.start == trunk.start and not trial.commit
    for trial in (trunk, *again):
        assert AGAIN_EPOCHS <= plan.epochs(trial.share, trunk.action.layers) <= TRUNK_EPOCHS + 0.01
    assert mean.action == Average(which="mean", members=(trunk.id, *(t.id for t in again))) and mean.start == trunk.id
    assert mean.commit and mean.alpha <= 0.01, "it takes the place of the first unless it harms"
    assert "is one already" in story.skips("average")[-1].why


def test_where_a_training_was_not_better_the_mean_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(1200.0, rows={"train": 9000}), "accepts": False})
    mean, *others = live("staged", "here").trials("average")
    assert isinstance(mean.action, Average) and mean.action.which == "mean" and mean.alpha > 0.01
    assert len(others) == 2, "it is not taken: the trunk's own averages are tried"


@pytest.mark.parametrize(
    "here",
    [
        {"problem": problem(1200.0, patience=3)}, {"problem": problem(1200.0, schedule={"kind": "plateau"})},
        {"problem": problem(1200.0, skip=("average",))}, {"problem": problem(1200.0, rows={"control": 10})},
        {"problem": problem(1200.0), "encoder": "scratch"}, {"problem": problem(9000, "updates")}, {"problem": problem(60.0)},
    ],
)  # fmt: skip
def test_one_training_where_the_mean_of_several_has_no_place(
    here: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SCENARIOS, "here", here)
    story = live("staged", "here")
    (trunk,) = story.trials("trunk")
    assert isinstance(trunk.action, FineTune) and not story.trials("again")
    if story.machine.problem.unit == "seconds" and not story.machine.problem.config.patience:
        enough = max(TRUNK_EPOCHS, TRUNK_EXAMPLES / story.machine.problem.rows["train"])
        most = MOST_EPOCHS if "plateau" in str(trunk.action) else enough
        plan = Plan(story.machine.problem)
        plan.facts, plan.max_length = story.machine.profile(), trunk.action.max_length
        plan.facts |= {"encoder": story.machine.encoder}
        assert plan.epochs(trunk.share, trunk.action.layers) <= most + 0.01


def test_little_data_is_seen_often_enough_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(1200.0, rows={"train": 2000})})
    story = live("staged", "here")
    (trunk,) = story.trials("trunk")
    assert isinstance(trunk.action, FineTune)
    plan = Plan(story.machine.problem)
    plan.facts, plan.max_length = story.machine.profile(), trunk.action.max_length
    assert 2000 * plan.epochs(trunk.share, trunk.action.layers) == pytest.approx(TRUNK_EXAMPLES, rel=0.01)


@pytest.mark.parametrize("budget, count", [(150.0, 1), (300.0, 2), (420.0, 3), (560.0, 4), (4000.0, 4)])
@pytest.mark.parametrize("soup", [False, True])
def test_each_of_several_is_long_enough_and_their_end_is_kept(budget: float, count: int, soup: bool) -> None:
    plan = Plan(problem(budget, rows={"train": 9000}, soup=soup))
    plan.facts, plan.max_length = Machine(problem=plan.problem).profile(), 64
    plan.choose_depth()
    found, share = trainings(plan, plan.prior())
    assert found == count
    seen = plan.epochs(share, plan.depth)
    assert (SHORTER if count > 1 else 0) * TRUNK_EPOCHS <= seen <= TRUNK_EPOCHS + 1e-9
    judged = plan.overhead() if count > 1 else 0.0
    assert count * (share + judged) + end_s(plan, count) <= plan.remaining + 1e-6


def test_a_large_control_split_leaves_one_training() -> None:
    plan = Plan(problem(300.0, rows={"train": 1000, "control": 50_000}))
    plan.facts, plan.max_length = Machine(problem=plan.problem).profile(), 64
    plan.choose_depth()
    count, share = trainings(plan, plan.prior())
    assert count == 1 and share > 0


def test_what_repeats_a_trunk_trains_at_the_rate_that_it_came_down_to(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Machine.run

    def restarted(machine: Machine, trial: Trial) -> Outcome:
        outcome = run(machine, trial)
        return outcome.with_(facts={**outcome.facts, "lr_scale": 0.1}) if trial.stage == "trunk" else outcome

    monkeypatch.setattr(Machine, "run", restarted)
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(1200.0, rows={"train": 9000})})
    story = live("staged", "here")
    (trunk,), (first, *_) = story.trials("trunk"), story.trials("again")
    assert isinstance(trunk.action, FineTune) and isinstance(first.action, FineTune)
    assert first.action.optimizer.lr == pytest.approx(0.1 * trunk.action.optimizer.lr)


def test_what_diverged_is_no_part_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Machine.run

    def diverged(machine: Machine, trial: Trial) -> Outcome:
        outcome = run(machine, trial)
        bad = {"diagnosis": {"name": "divergence"}} if trial.stage == "again" else {}
        return outcome.with_(facts={**outcome.facts, **bad})

    monkeypatch.setattr(Machine, "run", diverged)
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(1200.0, rows={"train": 9000})})
    story = live("staged", "here")
    assert len(story.trials("again")) == MEMBERS - 1
    assert [t.action.which for t in story.trials("average") if isinstance(t.action, Average)] == ["ema", "tail"]


def test_a_search_shares_the_epochs_among_its_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCENARIOS, "here", {"problem": problem(60.0), "tokens_s": 35_000.0})
    (tried, *_) = live("random", "here").trials("random")
    (trunk,) = live("staged", "here").trials("trunk")
    assert isinstance(tried.action, FineTune) and isinstance(trunk.action, FineTune)
    assert (tried.action.layers, trunk.action.layers) == (3, 6)


@pytest.mark.parametrize("seed", range(4))
def test_replay_knows_whose_place_a_mean_may_take_without_being_better(seed: int, tmp_path: Path) -> None:
    total = parse_budget("600s")
    lived = papers.live(tmp_path / "journal.jsonl", papers.problem(total), total, seed=seed)
    assert replay(lived).ok
    asked = next(r["trial"] for r in lived if r["kind"] == "Asked" and r["trial"]["action"].get("which") == "mean")
    place = next(n for n, r in enumerate(lived) if r["kind"] == "Told" and r["trial"] == asked["id"])
    before = next(r for r in reversed(lived[:place]) if "families" in r)
    facts = lived[place]["outcome"]["facts"]
    verdict = Verdict.parse(facts["family_verdict"], "family_verdict")
    of_member = before["families"]["encoder"] in asked["action"]["members"]
    assert isinstance(verdict.by, NotWorse) == of_member
    other = better if of_member else not_worse
    facts["family_verdict"] = other(verdict.evidence, asked["alpha"]).model_dump(mode="json")
    due = "unless it harms" if of_member else "had to be better"
    assert any(f.n == place and due in str(f) for f in replay(lived).findings)


def test_where_the_trunk_overfits_the_fork_that_won_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"problem": problem(1200.0, rows={"train": 9000}), "diagnosis": True}
    monkeypatch.setitem(SCENARIOS, "here", here)
    story = live("staged", "here")
    (trunk,), (stronger,), (going,) = (story.trials(s) for s in ("trunk", "regularize", "go on"))
    again, (mean, *_) = story.trials("again"), story.trials("average")
    assert again and isinstance(mean.action, Average) and mean.action.which == "mean"
    won = next(t for t in (stronger, going) if t.id == mean.action.members[0])
    assert isinstance(won.action, FineTune) and again[0].start == trunk.start
    assert again[0].action == won.action.with_(reshuffle=1)
