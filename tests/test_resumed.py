"""A segment that goes back: killed and resumed, rolled back, begun again, short of memory in a step. What it then knows is what it knew."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_modules import blobs, network
from test_modules import run as optimize
from test_state import assert_same, begun
from test_transaction import bits, strategy, trial

from multistep import processes
from multistep.budget import Budget, Clock, parse_budget
from multistep.loader import ModuleRows, rows_of
from multistep.optimizers.adamw import AdamW
from multistep.schedules import Plateau
from multistep.state import TrainState, seeded_rng, sweep
from multistep.strategy import TrainModule, Trial
from multistep.train import train
from multistep.tune import segment
from multistep.tune.fine_tune import GAP_CHECKS, _GapWatch
from multistep.tune.segment import Keeper, run_segment
from multistep.tune.watch import Looks, checks
from multistep.types import Interrupted

pytestmark = pytest.mark.usefixtures("torch_seeded")
ACTION = TrainModule(optimizer=AdamW(lr=1e-2), dropout=0.2, batch_size=32)
TRIAL = Trial(id="01", stage="trunk", action=ACTION)
Records = Generator[tuple[str, dict[str, Any]], None, dict[str, Any]]


def rows(bad: tuple[int, ...] = ()) -> Any:
    """320 rows, of which these are not numbers: each spoils one batch of every epoch."""
    x, y = blobs(320, 0)
    x[list(bad)] = float("nan")
    return rows_of((x, y), "train", "cpu")


def started(
    folder: Path, data: Any, watch: Looks | None = None, budget: str = "100 updates", clock: str = "1000 updates",
    module: Any = None,
) -> tuple[TrainState, Keeper, Records]:  # fmt: skip
    """A segment that begins, or goes on from what is in the folder; and its records."""
    state = begun(module or network(), ACTION, parse_budget(budget))
    keeper = Keeper(folder, "01", Clock(parse_budget(clock)), watch)
    keeper.load(state)
    return state, keeper, run_segment(TRIAL, state, data, keeper, watch, lambda: 0)


def end(records: Records, stop: str = "", at: int = 1, said: list[Any] | None = None) -> dict[str, Any]:
    """The facts at the end; where `stop` is given, the segment is left at the `at`-th event of that name: its record."""
    said = [] if said is None else said
    while True:
        try:
            kind, fields = next(records)
        except StopIteration as done:
            return done.value
        if kind != "Measured":
            said.append({k: v for k, v in fields.items() if k != "trial"})
        if stop and [f.get("event") for f in said].count(stop) == at:
            return fields


def looks(folder: Path, **more: Any) -> Looks:
    """Looks at the losses of 50 points."""
    x, y = blobs(50, 1)

    def validate(state: TrainState) -> np.ndarray:
        state.model.eval()
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(state.model(x), y, reduction="none").double().numpy()

    return Looks(folder / "01.best", validate, checks(), **more)


# ---------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize("close", [10, 100], ids=["the training ends", "it has diverged"])
@pytest.mark.parametrize("how", ["signal", "kill"])
def test_stopped_at_the_fourth_bad_batch_it_decides_as_the_straight_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, close: int
) -> None:
    monkeypatch.setattr(segment, "_SAVE_SHARE", 1e9)  # every snapshot is written
    monkeypatch.setattr(segment, "CLOSE_UPDATES", close)
    monkeypatch.setattr(segment, "SNAPSHOT_UPDATES", 5)
    straight, _, records = started(tmp_path / "straight", rows(bad=(7,)), budget="400 updates")
    said: list[Any] = []
    facts = end(records, said=said)
    events = [f["event"] for f in said if "event" in f]
    assert events[:4] == ["nonfinite"] * 4 and ("divergence" in events) == (close == 100)
    assert facts["rollbacks"] == 4 and ("diagnosis" in facts) == (close == 100)
    _, _, records = started(tmp_path / "again", rows(bad=(7,)), budget="400 updates")
    last = end(records, "nonfinite", at=4)
    assert "too many" in last["action"]
    if how == "signal":
        with pytest.raises(Interrupted):
            records.throw(Interrupted(15))
    else:
        records.close()
    state, keeper, records = started(tmp_path / "again", rows(bad=(7,)), budget="400 updates")
    assert keeper.rollbacks == segment.MAX_ROLLBACKS
    assert repr(end(records)) == repr(facts)  # a loss that is not a number is among them
    assert_same(state, straight)


def test_killed_while_it_deletes_its_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    rmtree = shutil.rmtree

    def dying(path: Any, **more: Any) -> None:
        if ".live." in str(path) and Path(path).exists():
            (Path(path) / "tensors.safetensors").unlink()
            raise Killed
        rmtree(path, **more)

    trial(tmp_path / "straight", "01", strategy(), None)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(segment, "_SAVE_SHARE", 1e9)
        patch.setattr(segment, "SNAPSHOT_UPDATES", 10)
        patch.setattr(shutil, "rmtree", dying)
        trial(tmp_path / "killed", "01", strategy(), None)
    sweep(tmp_path / "killed")
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["01"]
    trial(tmp_path / "killed", "01", strategy(), None)
    one, two = bits(tmp_path / "straight", "01"), bits(tmp_path / "killed", "01")
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


def test_the_best_state_goes_with_its_trial(tmp_path: Path) -> None:
    result = optimize(
        train=blobs(60, 0, noise=3.0), validation=blobs(200, 1, noise=3.0), metric="loss", patience=2, schedule="constant",
        optimizer={"kind": "adamw", "lr": 0.01}, budget="400 updates", out=tmp_path / "run",
    )  # fmt: skip
    assert any("best_progress" in r["outcome"]["facts"] for r in result.records() if r["kind"] == "Told")
    names = [p.name for p in (tmp_path / "run" / "states").iterdir()]
    assert names and not [n for n in names if ".best" in n or ".live" in n or n.startswith(".")]


# ---------------------------------------------------------------------------------------------- rolled back


def test_a_roll_back_keeps_the_place_in_the_data_and_the_examples(tmp_path: Path) -> None:
    state, _, records = started(tmp_path, rows(bad=(7,)))
    end(records, "nonfinite", at=2)
    assert state.counters.position > 10 and state.counters.examples == 32 * state.counters.position
    place = state.counters.position
    assert state.counters.update < place
    state.begin(ACTION.with_(batch_size=16), Budget(amount=5, unit="updates"))
    assert state.counters.position == 2 * place


def test_a_resumed_segment_in_seconds_that_rolls_back_keeps_its_end(tmp_path: Path) -> None:
    state, keeper, _ = started(tmp_path, rows(), budget="1000s", clock="1000s")
    list(islice(train(state, rows()), 20))
    keeper.snapshot(state)
    keeper.save()
    progress = state.segment.progress()
    state, _, records = started(tmp_path, rows(bad=tuple(range(320))), budget="1000s", clock="10s")
    assert state.counters.update == 20 and state.segment.left() <= 10
    end(records, "nonfinite")
    assert state.segment.left() <= 10 and progress <= state.segment.progress() < 0.9


def test_weights_that_the_samples_have_missed_are_not_kept(tmp_path: Path) -> None:
    state, _, records = started(tmp_path, rows(), module=network(hidden=200))
    assert state.optimizer is not None
    step, calls = state.optimizer.step, [0]

    def spoiled(*given: Any) -> Any:
        calls[0] += 1
        found = step(*given)
        if calls[0] == segment.SNAPSHOT_UPDATES:
            with torch.no_grad():
                state.model[0].weight[0, 0] = float("nan")  # 1,600 entries, of which the middle is looked at
        return found

    state.optimizer.step = spoiled  # pyright: ignore[reportAttributeAccessIssue]
    said: list[Any] = []
    facts = end(records, said=said)
    assert [(f["event"], f["update"], f["back_to"]) for f in said] == [("nonfinite", segment.SNAPSHOT_UPDATES, 0)]
    assert facts["rollbacks"] == 1 and facts["update"] == 100 - segment.SNAPSHOT_UPDATES
    assert all(torch.isfinite(p).all() for p in state.model.parameters())


# ---------------------------------------------------------------------------------------------- begun again


@pytest.mark.parametrize(
    "more", [{"patience": 6}, {"plateau": Plateau(factor=0.5, patience=1, floor=0.25)}], ids=["patience", "plateau"]
)
def test_a_segment_that_begins_again_looks_as_one_that_begins(tmp_path: Path, more: dict[str, Any]) -> None:
    watch = looks(tmp_path / "one", **more)
    state, keeper, _ = started(tmp_path / "one", rows(), watch)
    losses: list[float] = []
    for measure in islice(train(state, rows()), 37):
        losses.append(measure.loss_nats)
        watch.look(state, losses)
    assert len(watch.looks()) == 7
    keeper.begin_again(state)
    assert watch.looks() == []
    fresh = looks(tmp_path / "two", **more)
    other = begun(network(), ACTION, Budget(amount=63, unit="updates"))
    other.counters.lr_scale = segment.RESTART_LR
    anew = Keeper(tmp_path / "two", "01", Clock(parse_budget("1000 updates")), fresh)
    anew.load(other)
    said: tuple[list[Any], list[Any]] = ([], [])
    facts = end(run_segment(TRIAL, state, rows(), keeper, watch, lambda: 0), said=said[0])
    facts.pop("restarts")
    assert facts == end(run_segment(TRIAL, other, rows(), anew, fresh, lambda: 0), said=said[1])
    assert said[0] == said[1] and watch.looks() == fresh.looks() and fresh.looks()
    assert_same(state, other)


def test_the_watch_over_the_gap_forgets_and_remembers() -> None:
    level = iter(range(9))
    work = SimpleNamespace(
        rows=lambda *_: SimpleNamespace(ids=range(30), beginning=lambda count: None),
        encoder_logits=lambda *_: np.zeros((30, 3)),
        task=SimpleNamespace(nll_N=lambda logits_NK, targets: np.full(30, next(level))),
        targets={"control": np.zeros(30)},
    )

    def watch() -> Any:
        bench: Any = SimpleNamespace(work=work)
        return _GapWatch(bench, SimpleNamespace(max_length=8, bf16=False))  # pyright: ignore[reportArgumentType]

    def at(updates: int) -> TrainState:
        state.segment.updates = updates
        return state

    state, one = begun(network(), ACTION, Budget(amount=100, unit="updates")), watch()
    unseen = one.memory()
    one.look(at(50), [1.0])  # two of its places at once: a long update
    then = one.memory()
    one.look(at(60), [0.9])
    assert [s["progress"] for s in one.looks()] == [0.5, 0.6] and len(then[0]["seen"]) == 1
    resumed = watch()
    resumed.remember(*then)
    assert resumed.look(at(55), [1.0]) is None and len(resumed.looks()) == 1  # not yet
    resumed.look(at(60), [0.9])
    assert [s["progress"] for s in resumed.looks()] == [0.5, 0.6]
    one.remember(*unseen)
    assert one.looks() == [] and one.checks == list(GAP_CHECKS)
    one.look(at(30), [1.0])
    assert len(one.looks()) == 1 and unseen[0]["seen"] == []


# ---------------------------------------------------------------------------------------------- memory that ends in a step


def short_in_a_step(state: TrainState, at: int) -> None:
    """Memory runs out in the `at`-th step, after it has changed half of the weights."""
    assert state.optimizer is not None
    step, calls = state.optimizer.step, [0]

    def short(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            with torch.no_grad():
                state.model[0].weight.zero_()
            raise MemoryError
        return step(*given)

    state.optimizer.step = short  # pyright: ignore[reportAttributeAccessIssue]


def test_memory_that_ends_in_a_step_undoes_what_was_seen_since_the_snapshot(tmp_path: Path) -> None:
    watch = looks(tmp_path, plateau=Plateau(factor=0.5, patience=1, floor=1e-6))
    watch._validate = lambda state: np.ones(50)  # no look is a gain
    state, keeper, records = started(tmp_path, rows(), watch)
    short_in_a_step(state, 42)
    said: list[Any] = []
    end(records, "out of memory", said=said)
    assert state.counters.update == 25 and keeper.course.seen == 25 and len(keeper.losses) == 25
    assert keeper.spent["updates"] == keeper.clock.updates == 25
    assert keeper.spent["tokens"] == keeper.clock.tokens == 32 * 25
    assert [s["updates"] for s in watch.looks()] == [5, 10, 15, 20, 25] and state.counters.lr_scale == 0.5**4
    wall_s = state.segment.wall_s
    facts = end(records, said=said)
    assert facts["update"] == 100 == keeper.spent["updates"] == keeper.clock.updates and state.segment.wall_s > wall_s
    assert [s["updates"] for s in watch.looks()] == [5 * (n + 1) for n in range(19)]
    assert state.counters.lr_scale == 0.5**18


def test_what_was_undone_leaves_no_trace(tmp_path: Path) -> None:
    """Short of memory twice from the same snapshot: what is remembered with it stays as it was."""
    state, _, records = started(tmp_path / "one", rows())
    short_in_a_step(state, 30)
    end(records, "out of memory")
    short_in_a_step(state, 4)
    facts = end(records)
    other, keeper, records = started(tmp_path / "two", rows())
    short_in_a_step(other, 26)  # at once, before anything is seen that would have to be undone
    end(records, "out of memory")
    short_in_a_step(other, 1)
    assert end(records) == facts and facts["micro_batch"] == 8 and keeper.spent["updates"] == 100
    assert_same(state, other)


def test_the_micro_batch_that_is_halved_is_the_one_that_was_tried(tmp_path: Path) -> None:
    state = begun(network(), ACTION.with_(micro_batch=4), Budget(amount=40, unit="updates"))
    state.counters.micro_batch = 16
    keeper = Keeper(tmp_path, "01", Clock(parse_budget("1000 updates")), None)
    keeper.load(state)
    short_in_a_step(state, 3)
    event = end(run_segment(TRIAL, state, rows(), keeper, None, lambda: 0), "out of memory")
    assert (event["micro_batch_before"], event["micro_batch"]) == (4, 2)


# ---------------------------------------------------------------------------------------------- running statistics, random numbers


@pytest.mark.parametrize("how", ["not a number", "no memory in the second part"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_batch_that_is_left_out_leaves_no_trace_in_running_statistics(how: str, at: int) -> None:
    """At any place of one loop."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    state = begun(model, TrainModule(batch_size=8, micro_batch=4), Budget(amount=12, unit="updates"))
    (x, y), loaded, passed = blobs(96, 0), [0], [0]

    class Wrong(ModuleRows):
        def load(self, few: np.ndarray) -> tuple[Any, Any]:
            (values,), targets = super().load(few)
            loaded[0] += 1
            wrong = how == "not a number" and loaded[0] == 2 * at + 2
            return (values * float("nan") if wrong else values,), targets

    def full(*_: Any) -> None:
        passed[0] += 1
        if how != "not a number" and passed[0] == 2 * at + 2:
            raise MemoryError

    model[2].register_forward_hook(full)
    data: Any = Wrong(torch.utils.data.TensorDataset(x, y), "cpu", None)
    kept, seen = {n: b.clone() for n, b in model.named_buffers()}, []
    for n, measure in enumerate(train(state, data)):
        seen.append(measure.event)
        now = {name: b.clone() for name, b in model.named_buffers()}
        same = [torch.equal(now[name], value) for name, value in kept.items()]
        assert all(same) if measure.event else not any(same), n
        kept = now
    assert [n for n, event in enumerate(seen) if event] == [at]


def test_beside_a_gpu_the_random_numbers_of_the_cpu_go_on_too(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.Generator()  # stands for the card's
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: card.get_state()[:16])
    held: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", held.append)
    torch.manual_seed(5)
    then = processes.get_rng(cuda=True)
    drawn = torch.rand(3)
    processes.set_rng(then, cuda=True)
    assert torch.equal(torch.rand(3), drawn) and torch.equal(held[0], card.get_state()[:16])
    processes.set_rng(then[:16], cuda=True)  # kept by an earlier version
    assert torch.equal(held[1], held[0])
    made, generator = [], torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda kind: made.append(kind) or generator())
    seeded = seeded_rng(5, "cuda")
    assert made == ["cuda", "cpu"]
    torch.set_rng_state(seeded[len(seeded) // 2 :].clone())
    assert torch.equal(torch.rand(3), drawn)
