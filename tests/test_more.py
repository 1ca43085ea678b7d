"""A finished run of labelled texts is given more budget: what the run learnt goes on, and what it had no time for comes first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import runs
from pydantic import TypeAdapter
from test_controllers import Machine, live, problem

from multistep.budget import Clock, parse_budget
from multistep.controllers.begin import begin
from multistep.controllers.phases import Left
from multistep.controllers.script import Problem, Reserve, Skip
from multistep.predictors import Predictor, Single
from multistep.standing import Stood, labels
from multistep.strategy import Average, FineTune, FitHead, FitLinear, Trial
from multistep.tasks import Classify
from multistep.tune.actions import Bench, decided
from multistep.tune.workbench import Workbench
from multistep.types import Outcome, Verdict

MORE = 600.0
YES, NO = (Verdict(accept=accept, rule="as the test says", evidence=()) for accept in (True, False))


class Story:
    """A run to its end, and on with so much more."""

    def __init__(self, machine: Machine, first: Problem, more: float = MORE, name: str = "staged"):
        given = {"amount": first.budget + more, "unit": first.unit}
        controller = begin(first, name, [{"kind": "Finished"}, {"kind": "Resumed", "budget": given}])
        self.machine, self.trials, self.skips = machine, [[], []], [[], []]
        phase, machine.problem = 0, first
        while (ask := controller.ask()) is not None:
            if isinstance(ask, Trial) and ask.id.startswith("2-") and phase == 0:
                phase, machine.spent, machine.problem = 1, 0.0, first.with_(budget=more)
            if isinstance(ask, Reserve):
                machine.reserved[ask.name] = ask.amount
            elif isinstance(ask, Skip):
                self.skips[phase].append(ask)
            elif isinstance(ask, Trial):
                self.trials[phase].append(ask)
                controller.tell(ask, machine.run(ask))

    def of(self, phase: int, stage: str) -> list[Trial]:
        return [t for t in self.trials[phase] if t.stage == stage]


def rate(trial: Trial) -> float:
    assert isinstance(trial.action, FineTune)
    return trial.action.optimizer.lr


@pytest.mark.parametrize("ratio", [1.0, 2.0, 0.5])
def test_the_rate_that_won_the_race_goes_on(ratio: float) -> None:
    first = problem(5000, "updates")
    story = Story(Machine(problem=first, better_rate=ratio), first, more=3000)
    (before,), (after,) = story.of(0, "trunk"), story.of(1, "trunk")
    prior = story.of(0, "race")[0]
    assert rate(before) == pytest.approx(ratio * rate(prior)) and rate(after) == pytest.approx(rate(before))
    assert not story.of(1, "race") and not story.of(1, "head")


def test_another_depth_has_another_prior_and_the_same_ratio() -> None:
    first, machine = problem(60.0), Machine(problem=problem(60.0), tokens_s=8_000.0)
    story = Story(machine, first, more=3600.0)
    (before,), (after,) = story.of(0, "trunk"), story.of(1, "trunk")
    assert isinstance(before.action, FineTune) and isinstance(after.action, FineTune)
    assert before.action.layers < 3 and after.action.layers == 6
    assert rate(before) == pytest.approx(6e-4) and rate(after) == pytest.approx(2e-4)


def test_a_rate_that_was_given_stays() -> None:
    first = problem(5000, "updates", optimizer={"lr": 1e-4})
    story = Story(Machine(problem=first), first, more=3000)
    assert rate(story.of(1, "trunk")[0]) == pytest.approx(1e-4)


def test_stronger_regularization_that_helped_goes_on() -> None:
    first = problem(5000, "updates")
    machine = Machine(problem=first, diagnosis=True)
    story = Story(machine, first, more=3000)
    (fork,), after = story.of(0, "regularize"), story.of(1, "trunk")[0]
    machine_kept = machine.families["encoder"]
    assert isinstance(fork.action, FineTune) and isinstance(after.action, FineTune) and machine_kept
    better = story.of(0, "go on")[0].action  # the machine says yes to whatever comes last
    assert isinstance(better, FineTune)
    assert after.action.optimizer.weight_decay == better.optimizer.weight_decay
    assert after.action.dropout == better.dropout


def test_an_encoder_that_was_never_begun_has_its_head_and_race() -> None:
    """Its head starts at zero, and what fine-tunes it takes a solved head for granted."""
    first = problem(2.0)
    story = Story(Machine(problem=first), first)
    assert not story.of(0, "head") and not story.of(0, "trunk")
    (head,), (trunk,) = story.of(1, "head"), story.of(1, "trunk")
    assert isinstance(head.action, FitHead) and trunk.start == head.id and story.of(1, "race")


def test_the_linear_model_sees_all_rows_when_there_is_time() -> None:
    first = problem(2.0, rows={"train": 500_000})
    story = Story(Machine(problem=first, encoder="none"), first)
    incumbent = story.of(0, "incumbent")[0].action
    assert isinstance(incumbent, FitLinear) and incumbent.max_rows, "for this the first budget is too small"
    fitted = [t.action for t in story.of(1, "linear")]
    assert isinstance(fitted[0], FitLinear) and fitted[0].max_rows is None
    assert [f.features for f in fitted if isinstance(f, FitLinear)] == list(first.linear)
    assert story.of(1, "refit"), "and the rows that judged it"


def test_features_that_were_tried_are_not_tried_again() -> None:
    first = problem(60.0)
    story = Story(Machine(problem=first, encoder="none"), first)
    assert len(story.of(0, "linear")) == len(first.linear) - 1 and not story.of(1, "linear")


def test_what_is_left_knows_the_training_behind_a_state() -> None:
    story = live("staged", "higher rate wins")
    left = Left()
    for trial, outcome in zip(story.trials(), story.outcomes, strict=True):
        left.made[outcome.state or ""] = trial, outcome
    (trunk,), average, ended = story.trials("trunk"), story.trials("average")[0], left.made
    assert isinstance(average.action, Average) and isinstance(trunk.action, FineTune)
    lr = rate(trunk)

    def learnt(state: str, at: FineTune) -> float:
        """The rate to ask for at a state, so that `at` trains at what the trunk's came down to."""
        left.families = {"encoder": state}
        found = left.training("encoder")
        assert found is not None and found.action == trunk.action
        return found.rate(at, lr)

    deeper = trunk.action.with_(layers=trunk.action.layers - 1)
    assert learnt(average.id, trunk.action) == learnt(trunk.id, trunk.action) == learnt(trunk.id, deeper) == lr
    ended[trunk.id] = trunk, ended[trunk.id][1].with_(facts={"restarts": 2, "lr_scale": 0.01})
    assert learnt(average.id, trunk.action) == pytest.approx(0.01 * lr), "an average carries nothing on"
    assert learnt(trunk.id, trunk.action) == pytest.approx(lr), "the state itself does"
    assert learnt(trunk.id, deeper) == pytest.approx(0.01 * lr), "but not to other layers"
    soup = average.with_(id="98-soup", start=None, action=Average(which="soup", members=("01", trunk.id)))
    ended[soup.id] = soup, ended[average.id][1].with_(facts={"members": [trunk.id]})
    assert learnt(soup.id, trunk.action) == pytest.approx(0.01 * lr), "the first that was taken in"
    slower = trunk.action.with_(optimizer=trunk.action.optimizer.with_(lr=0.001 * lr))
    cooled = trunk.with_(id="99-cool-down", stage="cool-down", start=trunk.id, action=slower)
    facts = {"stopped": {"event": "no improvement"}, "lr_scale": 0.01, "best_lr": 0.001 * lr}
    ended[trunk.id] = trunk, ended[trunk.id][1].with_(facts=facts)
    ended[cooled.id] = cooled, ended[trunk.id][1].with_(facts={"lr_scale": 1.0})
    assert learnt(cooled.id, trunk.action) == pytest.approx(0.01 * lr), (
        "the trunk's rate, not that which it was left at"
    )
    left.families = {"encoder": story.trials("head")[0].id}
    assert left.training("encoder") is None and Left().training("encoder") is None


# ---------------------------------------------------------------------------------------------- among several


BLEND = {
    "kind": "blend", "weights": (0.5, 0.5),
    "members": ({"kind": "single", "model": "encoder"}, {"kind": "single", "model": "linear"}),
}  # fmt: skip


@pytest.mark.parametrize("verdict, taken", [(YES, True), (NO, False)])
def test_a_better_member_takes_its_place(verdict: Verdict, taken: bool) -> None:
    stood = Stood(incumbent=BLEND, families={"encoder": "a", "linear": "b"})
    trial = Trial(id="c", stage="trunk", action=FineTune(trains="all"), share=1.0, why="more")
    facts: dict[str, Any] = {"family": "encoder", "in_place": True, "family_verdict": YES.model_dump()}
    now, changed = labels(stood, trial, Outcome(state="c", facts=facts, verdict=verdict))
    assert changed == taken and now.incumbent == BLEND
    assert now.families == {"encoder": "c" if taken else "a", "linear": "b"}


class Known:
    """What is asked of a workbench: answers of states. `linear` knows the first half of the rows, `encoder` the second, "c" better than "a"."""

    task, config = Classify(labels=("north", "south")), SimpleNamespace(seed=0)
    targets: ClassVar = {"control": np.random.default_rng(0).integers(0, 2, 400)}
    scored = Workbench.scored

    def logits(self, model: str, state: str, split: str, bf16: bool = False) -> np.ndarray:
        y_N, noise_N = self.targets[split], np.random.default_rng(1).normal(size=400)
        half = np.arange(400) < 200 if model == "linear" else np.arange(400) >= 200
        sure = {"a": 0.3, "b": 3.0, "c": 3.0}[state]
        z_N = np.where(half, sure * (2 * y_N - 1) + 0.5 * noise_N, 0.0)
        return np.stack([-z_N, z_N], 1)


@pytest.mark.parametrize("among", [True, False])
def test_a_member_is_judged_in_its_place(among: bool) -> None:
    """Alone "c" is right on three rows of four, which is worse than what stands; in the place of "a" it is right on all but a few."""
    incumbent: Predictor = TypeAdapter(Predictor).validate_python(BLEND) if among else Single(model="linear")
    bench = Bench(
        work=Known(), clock=Clock(parse_budget("1h")), stop=lambda: 0, metric="accuracy",  # pyright: ignore[reportArgumentType]
        families={"encoder": "a", "linear": "b"}, incumbent=incumbent,
    )  # fmt: skip
    trial = Trial(id="c", stage="trunk", action=FineTune(trains="all"), share=1.0, why="more", alpha=0.1)
    outcome = decided(bench, trial, "encoder", "c", 0.0)
    assert outcome.verdict is not None and outcome.verdict.accept == among
    assert outcome.facts.get("in_place", False) == among
    right = outcome.metrics["accuracy"].value
    assert right > 0.95 if among else 0.7 < right < 0.85


def test_more_budget_trains_on_and_replays(tmp_path: Path) -> None:
    rows, encoder = runs.write_rows(tmp_path / "rows.csv", noise=0.2), runs.tiny_encoder(tmp_path / "encoder")
    run = runs.run(runs.config(rows, tmp_path / "run", encoder, budget="60 updates"))
    run.resume("+60 updates")
    assert len([r for r in run.records() if r["kind"] == "Told" and r["stage"] == "trunk"]) == 2, "one in each part"
    assert all(replayed.ok for replayed in run.replay())


# ---------------------------------------------------------------------------------------------- what comes after a trunk


class Ends(Machine):
    """Its trunk ends so, half way."""

    facts: dict[str, Any]

    def run(self, trial: Trial) -> Outcome:
        outcome = super().run(trial)
        if trial.stage != "trunk":
            return outcome
        self.spent -= 0.5 * trial.share
        return outcome.with_(facts={**outcome.facts, **self.facts}, remaining=self.remaining())


def test_what_diverged_at_every_rate_is_not_averaged() -> None:
    first = problem(5000, "updates")
    machine = Ends(problem=first)
    machine.facts = {"diagnosis": {"name": "divergence"}, "best_lr": 3e-7, "best_progress": 0.0}
    story = Story(machine, first, more=100)
    assert story.of(0, "trunk") and not story.of(0, "average") and not story.of(0, "cool-down")
    assert "diverged" in next(s.why for s in story.skips[0] if s.stage == "average")


@pytest.mark.parametrize("event", ["no improvement", "bad batches"])
def test_a_trunk_that_stopped_early_decays_from_its_best_state(event: str) -> None:
    first = problem(5000, "updates")
    machine = Ends(problem=first)
    machine.facts = {"stopped": {"event": event}, "best_lr": 1e-4, "best_progress": 0.4}
    story = Story(machine, first, more=100)
    (trunk,), (cooled,) = story.of(0, "trunk"), story.of(0, "cool-down")
    assert cooled.start == trunk.id and rate(cooled) == 1e-4 and isinstance(cooled.action, FineTune)
    assert cooled.action.schedule.kind == "linear" and cooled.share == pytest.approx(0.15 * 0.4 * trunk.share, rel=1e-3)
    assert [t.start for t in story.of(0, "average")] == [cooled.id, cooled.id]
