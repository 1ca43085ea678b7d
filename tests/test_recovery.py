"""What goes wrong in training, made to happen: seen before the next batch, journaled with numbers and rows, recovered from; and nothing
of that in runs that go well."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from test_modules import blobs, network
from test_modules import run as optimize
from test_state import assert_same, begun
from torch import nn

from multistep import api, loader
from multistep.budget import Budget, Clock, parse_budget
from multistep.detect import SIGMAS, Course, Detector, Norms
from multistep.evaluate import Rows
from multistep.loader import ModuleRows, rows_of
from multistep.optimizers.adamw import AdamW
from multistep.schedules import Linear
from multistep.strategy import TrainModule
from multistep.train import train
from multistep.tune import segment
from multistep.tune.segment import Keeper

pytestmark = pytest.mark.usefixtures("torch_seeded")


def events(result: Any, name: str, kind: str = "Event") -> list[dict[str, Any]]:
    """Those of the trainings; what is diagnosed of the whole run is not among them."""
    found = [r for r in result.records() if r["kind"] == kind and r.get("at") != "end"]
    return [r for r in found if r.get("event", r.get("name")) == name]


# ---------------------------------------------------------------------------------------------- the rules


def test_a_norm_explodes_where_it_is_out_of_all_proportion() -> None:
    rng, norms = np.random.default_rng(0), Norms()
    for norm in rng.lognormal(0.0, 1.0, 24):
        assert not norms.explodes(1e9)  # nobody knows yet
        norms.see(float(norm))
    for norm in 0.05 * rng.lognormal(
        0.0, 1.5, 2000
    ):  # heavy tails far below where they began: 100 times the median now and then
        assert not norms.explodes(float(norm))
        norms.see(float(norm))
    assert norms.explodes(1e3) and not norms.explodes(float("nan")) and not norms.explodes(float("inf"))


def test_a_detector_names_what_comes_first() -> None:
    detector = Detector()
    for _ in range(30):
        assert detector.see(1.0, 1.0) == ""
    known = Detector(**vars(detector))
    assert detector.see(1.0, 50.0, exploding=True) == "exploding gradient"
    assert detector.see(99.0, 50.0, exploding=True) == "spike" and detector.see(float("nan"), 1.0, True) == "nonfinite"
    assert detector == known


def course(losses: list[float] | np.ndarray, rates: Any = None) -> tuple[int, dict[str, Any]] | None:
    """At which update the losses were found to diverge, and the numbers."""
    seen = Course()
    for n, loss in enumerate(losses):
        seen.see(float(loss), 1.0 if rates is None else rates(n / len(losses)), n)
        if (found := seen.diverges()) is not None:
            return n + 1, found
    return None


def noisy(levels: Any, sd: float, seed: int) -> np.ndarray:
    return np.maximum(0.0, levels + sd * np.random.default_rng(seed).standard_normal(len(levels)))


@pytest.mark.parametrize("seed", range(20))
def test_curves_of_runs_that_go_well_do_not_diverge(seed: int) -> None:
    n = np.arange(400)
    curves = {
        "falls": noisy(4.3 * np.exp(-n / 150) + 0.5, 0.3, seed),
        "rises from a solved head, then falls": noisy(
            1.3 + 0.35 * (n / 25) * np.exp(1 - n / 25) - 0.001 * n, 0.2, seed
        ),
        "two classes, a little above the head": noisy(
            0.38 + 0.15 * np.exp(-((n - 20) ** 2) / 200) - 0.0005 * n, 0.12, seed
        ),
        "known by heart, warmed up again": noisy(0.02 + 0.2 * np.exp(-((n - 40) ** 2) / 400), 0.02, seed),
        "memorized, disturbed": noisy(np.interp(n, [0, 10, 40, 80, 400], [0.01, 0.3, 0.3, 0.05, 0.0]), 0.1, seed),
        "learns nothing": noisy(np.full(400, 0.69), 0.05, seed),
        "noise of small batches": noisy(np.full(400, 0.5), 0.4, seed),
    }
    assert {k: v for k, c in curves.items() if (v := course(c)) is not None} == {}


@pytest.mark.parametrize("seed", range(20))
def test_curves_that_blow_up_are_found_and_soon(seed: int) -> None:
    n = np.arange(200)
    solved = noisy(np.where(n < 3, 1.3, 4.4), 0.3, seed)  # from a solved head to chance
    assert (found := course(solved)) is not None and found[0] <= 80 and "above the" in found[1]["rule"]
    two = noisy(np.where(n < 8, 0.38, 0.8), 0.06, seed)
    assert (found := course(two)) is not None and found[0] <= 130
    lost = noisy(np.where(n < 60, 2.3 * np.exp(-n / 40), 2.3), 0.1, seed)
    assert (found := course(lost)) is not None and found[0] <= 110 and "where they began" in found[1]["rule"]
    assert found[1]["lowest_loss"] < found[1]["first_loss"]


def test_nobody_judges_while_the_rate_rises_or_the_loss_comes_down() -> None:
    high = np.full(100, 9.0)
    high[:5] = 1.0
    assert course(high, Linear(warmup=0.9)) is None
    found = course(high, Linear(warmup=0.2))
    assert found is not None and found[0] == 60  # 20 of warm-up, 20 that stand (at 50), and a second look
    assert course(np.concatenate([[1.0] * 5, np.linspace(60.0, 2.0, 95)])) is None


# ---------------------------------------------------------------------------------------------- updates that explode


@pytest.mark.parametrize("factor, event", [(1e3, "exploding update"), (float("nan"), "nonfinite"), (30.0, "")])
def test_an_update_that_explodes_is_seen_before_the_next_batch(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable, monkeypatch: pytest.MonkeyPatch, factor: float, event: str
) -> None:  # fmt: skip
    state, rows = begun(make_encoder(), make_strategy(lr=1e-4), Budget(amount=60, unit="updates")), make_rows()
    measures = list(islice(train(state, rows), 30))
    assert (
        not any(m.event for m in measures) and state.steps.seen == 29
    )  # under a budget in updates the first rate is 0
    known = state.steps.mean
    assert state.optimizer is not None
    original = state.optimizer.step

    def far(*given: Any) -> Any:
        before = [p.detach().clone() for _, p in state.trained]
        original(*given)
        with torch.no_grad():
            for (_, p), old in zip(state.trained, before, strict=True):
                p.copy_(old + factor * (p - old))

    snapshot = state.snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(state.optimizer, "step", far)
        (measure,) = islice(train(state, rows), 1)
    assert measure.event == event and measure.update == 30 + (not event) and bool(measure.rows) == bool(event)
    if event:
        assert state.steps.mean == known  # not remembered
        state.restore(snapshot)
    assert not any(m.event for m in train(state, rows))


def test_exploding_gradients_are_left_out_and_named(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable
) -> None:
    state, rows = begun(make_encoder(), make_strategy(clip=0.0), Budget(amount=60, unit="updates")), make_rows()
    list(islice(train(state, rows), 30))
    before = [p.detach().clone() for _, p in state.trained]
    hook = state.model.head.weight.register_hook(lambda g: 1e4 * g)
    (measure,) = islice(train(state, rows), 1)
    hook.remove()
    assert measure.event == "exploding gradient" and measure.grad_norm > 100 and len(measure.rows) == 8
    assert all(torch.equal(p, old) for (_, p), old in zip(state.trained, before, strict=True))
    assert not any(m.event for m in train(state, rows))


# ---------------------------------------------------------------------------------------------- runs


class Shifted(ModuleRows):
    """Rows of which one batch in the whole run comes changed."""

    at, calls = 90, 0

    def change(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As it is; what is made of it is each test's."""
        return x, y

    def load(self, rows: np.ndarray) -> tuple[Any, Any]:
        (x,), y = super().load(rows)
        type(self).calls += len(rows) == 32
        if type(self).calls == self.at:
            x, y = self.change(x, y)
        return (x,), y


class NaNs(Shifted):
    def change(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * float("nan"), y


class Flipped(Shifted):
    def change(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, (y + 1) % 3


def test_labels_that_are_flipped_are_a_spike_before_the_step() -> None:
    """Nothing but the labels of one batch is changed: a model that has learnt is surprised by them, and is not moved."""
    rows: Any = rows_of(blobs(320, 0, noise=0.5), "train", "cpu")
    state = begun(network(), TrainModule(optimizer=AdamW(lr=1e-2), batch_size=32), Budget(amount=120, unit="updates"))
    losses = [m.loss_nats for m in islice(train(state, rows), 80)]
    assert len(losses) == 80 and max(losses[-20:]) < 0.1 < min(losses[:3]), "it has converged"
    limit = max(state.detector.mean + SIGMAS * state.detector.variance**0.5, 2 * state.detector.worst_at_start)
    before, right = state.snapshot(), rows.load
    rows.load = lambda few: (lambda x, y: (x, (y + 1) % 3))(*right(few))
    (measure,) = islice(train(state, rows), 1)
    rows.load = right
    assert measure.event == "spike" and measure.loss_nats > limit and len(measure.rows) == 32
    for name, p in state.trained:
        assert torch.equal(p, before["tensors"][f"model.{name}"]), f"{name} was moved"
    assert not any(m.event for m in train(state, rows))


@pytest.mark.parametrize("name, rows", [("nonfinite", NaNs), ("spike", Flipped)])
def test_a_bad_batch_in_a_run(monkeypatch: pytest.MonkeyPatch, name: str, rows: type) -> None:
    monkeypatch.setattr(loader, "ModuleRows", rows)
    monkeypatch.setattr(rows, "calls", 0)
    bad_batch_in_a_run(name, network())


class Steep(nn.Module):
    """A network of which one gradient in the whole run is enormous, at no loss to speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = network(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.inner(x)
        self.calls += self.training
        if self.training and self.calls == 90:
            found = found + 1e4 * (found - found.detach())
        return found


def test_an_exploding_norm_in_a_run() -> None:
    bad_batch_in_a_run("exploding gradient", Steep())


def bad_batch_in_a_run(name: str, module: nn.Module) -> None:
    result = optimize(module, train=blobs(320, 0, noise=0.5), optimizer={"kind": "adamw", "lr": 1e-2}, batch_size=32)
    (event,) = events(result, name)
    assert len(event["rows"]) == 32 and event["lr_scale"] == 0.5 and "rolled back" in event["action"]
    assert event["back_to"] <= event["update"] and result.best.value > 0.9
    told = next(r["outcome"]["facts"] for r in result.records() if r["kind"] == "Told" and r["stage"] == "trunk")
    assert told["rollbacks"] == 1 and "restarts" not in told


def deep() -> nn.Module:
    """A network that a rate far too high really breaks."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [part for _ in range(4) for part in (nn.Linear(16, 16), nn.ReLU())]
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), *layers, nn.Linear(16, 3))


@pytest.mark.parametrize("kind, lr", [("adamw", 1.0), ("sgd", 30.0), ("sgd", 900.0)])
def test_a_rate_a_hundred_times_too_high_is_lowered_until_it_trains(kind: str, lr: float) -> None:
    result = optimize(
        deep(), optimizer={"kind": kind, "lr": lr}, budget="600 updates", clip=0.0, train=blobs(300, 0, noise=0.7),
        validation=blobs(200, 1, noise=0.7),
    )  # fmt: skip
    again = events(result, "divergence")
    assert 1 <= len(again) <= segment.MAX_RESTARTS
    for n, event in enumerate(again):
        assert event["lr_scale"] == pytest.approx(0.1 ** (n + 1)) and event["back_to"] == 0 and len(event["rows"]) >= 30
        assert event["numbers"]["rule"] and event["numbers"]["lr"] <= lr * 0.1**n * 1.001
    assert result.best.value > 0.9
    page = result.explain()
    assert "divergence" in page and "learning rate times 0.1" in page


def test_a_segment_that_begins_again_is_one_that_began_with_a_tenth_of_the_rate(tmp_path: Path) -> None:
    rows: Any = rows_of(blobs(300, 0), "train", "cpu")
    strategy = TrainModule(optimizer=AdamW(lr=0.1), dropout=0.2)
    state = begun(network(), strategy, Budget(amount=100, unit="updates"))
    keeper = Keeper(tmp_path, "01", Clock(parse_budget("100 updates")), None)
    keeper.load(state)
    list(islice(train(state, rows), 37))
    keeper.begin_again(state)
    other = begun(network(), strategy, Budget(amount=63, unit="updates"))
    other.counters.lr_scale = segment.RESTART_LR
    assert_same(state, other)
    assert list(train(state, rows)) == list(train(other, rows)) and state.counters.update == 63
    assert_same(state, other)


class Hopeless(nn.Module):
    """Trained for a while it says the wrong thing, whatever the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        return self.inner(x) + 20 * (self.calls > 8) * torch.eye(3)[0]


def test_what_diverges_at_any_rate_ends_with_a_diagnosis_and_the_incumbent_stays() -> None:
    result = optimize(Hopeless(), budget="600 updates", optimizer={"kind": "adamw", "lr": 1e-3}, controller="staged")
    again = events(result, "divergence")
    assert len(again) == segment.MAX_RESTARTS
    for n, event in enumerate(again):
        assert event["lr_scale"] == pytest.approx(0.1 ** (n + 1)) and event["numbers"]["recent_loss"] > 5
    (diagnosed,) = events(result, "divergence", "Diagnosed")
    assert (
        diagnosed["numbers"]["rule"] and diagnosed["numbers"]["rows"] and "lower learning rate" in diagnosed["action"]
    )
    assert diagnosed["numbers"]["rule"] in diagnosed["words"]
    told = next(r["outcome"] for r in result.records() if r["kind"] == "Told" and r["stage"] == "trunk")
    assert told["facts"]["diagnosis"]["name"] == "divergence" and told["facts"]["restarts"] == segment.MAX_RESTARTS
    assert result.model.calls == 0 and "divergence" in result.explain()
    (why,) = [r["why"] for r in result.records() if r["kind"] == "Skipped" and r["stage"] == "cool-down"]
    assert why.startswith("the training diverged, at learning rate 1e-06 too") and why in result.explain()
    assert "average" not in {r["trial"]["stage"] for r in result.records() if r["kind"] == "Asked"}, (
        "of what was not trained"
    )
    for mine, theirs in zip(result.model.parameters(), Hopeless().parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_probe_that_diverges_says_so_and_is_not_tried_again() -> None:
    result = optimize(Hopeless(), optimizer={"kind": "adamw"}, controller="race", budget="1100 updates")
    probes = [d for d in events(result, "divergence", "Diagnosed") if "probe" in d["action"]]
    asked = {r["trial"]["id"]: r["trial"] for r in result.records() if r["kind"] == "Asked"}
    assert len(probes) >= 2 and {asked[p["trial"]]["stage"] for p in probes} == {"race"}
    again = events(result, "divergence")
    assert {asked[e["trial"]]["stage"] for e in again} == {"trunk"} and len(again) == segment.MAX_RESTARTS


def test_texts_at_a_rate_a_hundred_times_too_high_end_at_least_at_the_incumbent(tmp_path: Path) -> None:
    rows, encoder = runs.write_rows(tmp_path / "rows.csv"), runs.tiny_encoder(tmp_path / "encoder")
    settings: dict[str, Any] = {"optimizer": {"lr": 0.5}, "clip": 0.0, "budget": "400 updates"}
    done = runs.run(runs.config(rows, tmp_path / "run", encoder, **settings))
    assert events(done, "divergence")
    head = next(r for r in done.records() if r["kind"] == "Told" and r["stage"] == "head")["outcome"]["metrics"]
    trunk = next(r for r in done.records() if r["kind"] == "Told" and r["stage"] == "trunk")["outcome"]
    assert trunk["metrics"]["accuracy"][0] >= head["accuracy"][0] - 0.1 and "diagnosis" not in trunk["facts"]
    assert runs.of_kind(done, "TestRead")[0]["metrics"]["accuracy"][0] > 0.5


def test_a_plain_run_has_no_events(tmp_path: Path) -> None:
    rows, encoder = runs.write_rows(tmp_path / "rows.csv"), runs.tiny_encoder(tmp_path / "encoder")
    done = runs.run(runs.config(rows, tmp_path / "run", encoder))
    assert not runs.of_kind(done, "Event") and not [
        d for d in runs.of_kind(done, "Diagnosed") if d["name"] == "divergence"
    ]


# ---------------------------------------------------------------------------------------------- killed and resumed


def test_killed_after_a_divergence_it_goes_on_as_the_straight_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment, "_SAVE_SHARE", 1e9)  # every snapshot is written
    rows, encoder = runs.write_rows(tmp_path / "rows.csv"), runs.tiny_encoder(tmp_path / "encoder")
    settings: dict[str, Any] = {"optimizer": {"lr": 0.5}, "clip": 0.0, "budget": "300 updates"}
    load, begin_again, calls, times = Rows.load, Keeper.begin_again, [0], []

    def counted(self: Rows, few: np.ndarray) -> Any:
        calls[0] += 1
        return load(self, few)

    def noting(self: Keeper, state: Any) -> None:
        times.append(calls[0])
        begin_again(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "load", counted)
        patch.setattr(Keeper, "begin_again", noting)
        straight = runs.run(runs.config(rows, tmp_path / "straight", encoder, **settings))
    assert events(straight, "divergence") and times

    class Killed(BaseException):
        pass

    for call in (times[0] + 5, times[0] + 2 * segment.SNAPSHOT_UPDATES):
        calls[0] = 0

        def dying(self: Rows, few: np.ndarray, call: int = call) -> Any:
            calls[0] += 1
            if calls[0] == call:
                raise Killed
            return load(self, few)

        out = tmp_path / f"run{call}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Rows, "load", dying)
            runs.run(runs.config(rows, out, encoder, **settings))
        (kept,) = (out / "states").glob("*.live.*")
        assert int(kept.name.rsplit(".", 1)[1]) >= segment._A_RESTART  # of the segment that began again
        again = api.resume(out)
        assert runs.committed(again) == runs.committed(straight) and all(r.ok for r in again.replay())
        runs.same_states(tmp_path / "straight", out)
