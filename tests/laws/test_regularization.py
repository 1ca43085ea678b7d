"""Laws of what shapes an update beside the optimizer: clipping by z-score, learning rates by layer, frozen parts, growing batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from test_modules import blobs, network, run

from multistep.budget import Budget
from multistep.config import FitConfig
from multistep.detect import Norms
from multistep.loader import rows_of
from multistep.objectives import FGM, CrossEntropy, Penalized, RDrop
from multistep.optimizers import GRADIENT_OPTIMIZERS, SGD
from multistep.state import TrainState
from multistep.strategy import TrainModule
from multistep.train import train
from multistep.types import UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")


def begun(model: Any, strategy: Any, updates: int = 14, seed: int = 3) -> TrainState:
    state = TrainState(model)
    state.counters.seed = seed
    state.begin(strategy, Budget(amount=updates, unit="updates"))
    return state


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in state.model.named_parameters()}


def scales(state: TrainState) -> dict[str, float]:
    assert state.optimizer is not None
    of = {id(p): g["lr_scale"] for g in state.optimizer.param_groups for p in g["params"]}
    return {n: of[id(p)] for n, p in state.trained}


def resumes_bitwise(model: Callable[[], Any], strategy: Any, rows: Any, stop: int = 6) -> TrainState:
    """Stopped, kept and restored is the straight run; the straight run's state."""
    straight, first = begun(model(), strategy), begun(model(), strategy)
    whole = list(train(straight, rows))
    measures = list(islice(train(first, rows), stop))
    again = begun(model(), strategy, seed=77)
    again.restore(first.snapshot())
    assert measures + list(train(again, rows)) == whole
    assert all(torch.equal(p, weights(again)[n]) for n, p in weights(straight).items())
    assert again.counters == straight.counters and again.norms == straight.norms
    return straight


# ---------------------------------------------------------------------------------------------- live fields


@pytest.mark.parametrize("wrap", [RDrop, FGM, Penalized, lambda inner: Penalized(inner=RDrop(inner=inner))])
def test_smoothing_is_live_inside_of_a_wrapper_too(wrap: Any, make_encoder: Callable, make_strategy: Callable) -> None:
    def smoothed(e: float, gamma: float = 0.0) -> Any:
        inner = CrossEntropy(label_smoothing=e, focal_gamma=gamma)
        return make_strategy(objective=wrap(inner=inner) if isinstance(wrap, type) else wrap(inner))

    assert smoothed(0.1).same_but_live(smoothed(0.0)) and not smoothed(0.1).same_but_live(smoothed(0.1, gamma=1.0))
    state = begun(make_encoder(), smoothed(0.0))
    optimizer = state.optimizer
    state.adjust(smoothed(0.2))
    assert state.optimizer is optimizer


# ---------------------------------------------------------------------------------------------- z-scores


def seen(norms: list[float]) -> Norms:
    found = Norms()
    for norm in norms:
        found.see(norm)
    return found


def test_only_a_norm_that_stands_out_is_cut_and_the_further_out_the_shorter() -> None:
    norms = seen(np.random.default_rng(0).normal(1.0, 0.1, 200).tolist())
    deviation = norms.variance**0.5
    assert norms.mean == pytest.approx(1.0, abs=0.05) and 0.05 < deviation < 0.15
    edge = norms.mean + 3 * deviation
    assert norms.limit(edge, 3.0) == edge and norms.limit(0.1, 3.0) == 0.1
    assert norms.limit(edge * (1 + 1e-9), 3.0) == pytest.approx(edge)  # no step at the edge
    cut = [norms.limit(edge * far, 3.0) for far in (1.1, 2.0, 10.0, 1e6)]
    assert edge > cut[0] > cut[1] > cut[2] > cut[3] == pytest.approx(norms.mean, rel=1e-3)
    assert norms.limit(1e6, 0.0) == 1e6
    assert math.isnan(norms.limit(float("nan"), 3.0)) and norms.limit(float("inf"), 3.0) == float("inf")


def test_the_first_norms_are_not_cut_and_equal_ones_have_no_deviation() -> None:
    assert seen([1.0] * 24).limit(9.0, 3.0) == 9.0
    assert seen([1.0] * 25).limit(9.0, 3.0) == pytest.approx(1.0)


class Loud:
    """Rows whose `at`-th batch has a loss a hundred times as steep."""

    def __init__(self, at: int):
        self.rows, self.at, self.count = rows_of(blobs(300, 0), "train", "cpu"), at, -1

    def load(self, rows: np.ndarray) -> Any:
        self.count += 1
        x, y = self.rows.load(rows)
        return (x[0] * (5.0 if self.count == self.at else 1.0),), y

    def order(self, batch_size: int, seed: int) -> Any:
        return self.rows.order(batch_size, seed)

    def outputs(self, model: Any, inputs: Any) -> torch.Tensor:
        return self.rows.outputs(model, inputs)

    def tokens(self, rows: np.ndarray) -> int:
        return len(rows)


def test_a_gradient_that_stands_out_moves_no_further_than_the_others() -> None:
    moved = []
    for clip_z in (0.0, 3.0):
        strategy = TrainModule(
            optimizer=SGD(lr=0.01), schedule={"kind": "constant", "warmup": 0.0}, clip=0.0, clip_z=clip_z
        )
        state = begun(network(), strategy, 60)
        steps, norms, before = [], [], weights(state)
        for measure in train(state, Loud(50)):
            now = weights(state)
            steps.append(float(sum(((now[n] - before[n]) ** 2).sum() for n in now) ** 0.5))
            norms.append(measure.grad_norm)
            before = now
        assert norms[50] > 2 * max(norms[25:50])  # what is measured is the norm as it was
        moved.append(steps[50] / max(steps[25:50]))
    assert moved[0] > 2 and moved[1] < 1.2


def test_clipping_by_z_resumes_and_goes_live() -> None:
    rows = rows_of(blobs(300, 0), "train", "cpu")
    strategy = TrainModule(optimizer=SGD(lr=0.1), clip=0.0, clip_z=0.5)
    state = resumes_bitwise(network, strategy, rows)
    assert state.norms.seen == 14
    optimizer = state.optimizer
    state.adjust(strategy.with_(clip_z=4.0))
    assert state.optimizer is optimizer and state.norms.seen == 14


# ---------------------------------------------------------------------------------------------- learning rates by layer


def test_the_encoder_by_depth(make_encoder: Callable, make_strategy: Callable) -> None:
    found = scales(begun(make_encoder(layers=3), make_strategy(layer_decay=0.5, head_lr=0.1)))
    for name, scale in found.items():
        layer = name.split("layer.")[1][0] if ".layer." in name else None
        depth = 0 if name.startswith("head.") else 4 if layer is None else 3 - int(layer)
        assert scale == pytest.approx(0.5**depth * (0.1 if name.startswith("head.") else 1.0)), name
    assert len(set(found.values())) == 5
    top = scales(begun(make_encoder(layers=3), make_strategy(layer_decay=0.5, trains="top", layers=1)))
    assert all(found[n] == s for n, s in top.items() if not n.startswith("head."))


class Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.layers = torch.nn.ModuleList(
            [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)) for _ in range(2)]
        )
        self.out = torch.nn.Linear(4, 3)


def test_a_module_by_its_blocks() -> None:
    found = scales(begun(Named(), TrainModule(layer_decay=0.5)))
    wanted = {"embed.weight": 3, "layers.0.0.weight": 2, "layers.0.1.bias": 2, "layers.1.0.bias": 1, "out.weight": 0}
    assert {n: found[n] for n in wanted} == {n: 0.5**d for n, d in wanted.items()}
    assert set(scales(begun(Named(), TrainModule())).values()) == {1.0}


@pytest.mark.parametrize("optimizer", GRADIENT_OPTIMIZERS, ids=lambda o: o.__name__)
def test_every_optimizer_takes_layer_decay_and_resumes(optimizer: Any) -> None:
    spec = optimizer(lr=optimizer.rates["scratch"].prior, weight_decay=0.01)
    strategy = TrainModule(optimizer=spec, layer_decay=0.5)
    state = resumes_bitwise(network, strategy, rows_of(blobs(300, 0), "train", "cpu"))
    assert state.optimizer is not None
    grouped = [id(p) for g in state.optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in state.model.parameters())
    for group in state.optimizer.param_groups:
        assert group["weight_decay"] == (0.01 if group["decays"] else 0.0)


def test_a_lower_layer_moves_by_its_factor() -> None:
    rows, moved = rows_of(blobs(300, 0), "train", "cpu"), []
    for decay in (1.0, 0.25):
        state = begun(network(), TrainModule(optimizer=SGD(lr=0.1), layer_decay=decay, clip=0.0))
        list(islice(train(state, rows), 1))  # the warm-up begins at zero
        before = weights(state)
        list(islice(train(state, rows), 1))
        moved.append({n: p - before[n] for n, p in weights(state).items()})
    for name in moved[0]:
        factor = 0.25 if name.startswith("0.") else 1.0
        assert torch.allclose(moved[1][name], factor * moved[0][name], rtol=1e-5, atol=1e-7), name


def test_a_solver_has_no_rates_to_scale() -> None:
    with pytest.raises(UserError, match="layer_decay: newton_cg"):
        run(optimizer="newton_cg", layer_decay=0.9)
    with pytest.raises(UserError, match="layer_decay: lbfgs"):
        FitConfig.parse({"data": "x.csv", "optimizer": {"kind": "lbfgs"}, "layer_decay": 0.9})


# ---------------------------------------------------------------------------------------------- frozen


def test_what_is_frozen_stays_and_the_module_is_as_it_was_given() -> None:
    module = network()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    result = run(module, freeze="0", budget="100 updates")
    after = dict(result.model.named_parameters())
    assert all(torch.equal(after[n], v) == n.startswith("0.") for n, v in before.items())
    assert all(p.requires_grad for p in module.parameters())
    profile = next(r for r in result.records() if r["kind"] == "Noted" and r["what"] == "profiled")
    assert profile["facts"]["parameters"] == 16 * 3 + 3


def test_a_tied_parameter_is_frozen_by_any_of_its_names() -> None:
    module = torch.nn.ModuleDict({"table": torch.nn.Embedding(5, 4), "out": torch.nn.Linear(4, 5, bias=False)})
    module["out"].weight = module["table"].weight
    assert TrainModule(freeze=("out",)).trained(module) == [] == TrainModule(freeze=("table",)).trained(module)


@pytest.mark.parametrize(
    "freeze, words", [(("0.weigth",), ("freeze", "'0.weight'")), (("0", "3"), ("freeze", "nothing is left"))]
)
def test_what_cannot_be_frozen_is_named(freeze: tuple[str, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        run(freeze=freeze)
    assert all(word in str(caught.value) for word in words)


# ---------------------------------------------------------------------------------------------- growing batches


class Told:
    """Rows that keep what was loaded."""

    def __init__(self, inner: Any):
        self.inner, self.loaded = inner, []

    def load(self, rows: np.ndarray) -> Any:
        self.loaded.append(rows)
        return self.inner.load(rows)

    def order(self, batch_size: int, seed: int) -> Any:
        return self.inner.order(batch_size, seed)

    def outputs(self, model: Any, inputs: Any) -> torch.Tensor:
        return self.inner.outputs(model, inputs)

    def tokens(self, rows: np.ndarray) -> int:
        return self.inner.tokens(rows)


def test_a_batch_doubles_and_every_example_comes_once_an_epoch(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable
) -> None:
    rows, growth = Told(make_rows(50)), (0.25, 0.5)
    state = begun(make_encoder(), make_strategy(batch_growth=growth), 8)
    measures = list(train(state, rows))
    assert state.counters.position == 2 * 1 + 2 * 2 + 4 * 4 == len(rows.loaded)
    sizes = np.diff([0, *(m.examples for m in measures)])
    assert (sizes[2:4] > 14).all() and (sizes[4:] > 28).all() and (sizes[:2] < 10).all()
    per_epoch = rows.order(8, 3).per_epoch
    for epoch in range(len(rows.loaded) // per_epoch):
        part = rows.loaded[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(np.concatenate(part).tolist()) == list(range(50))


def test_a_grown_batch_is_the_mean_of_its_pieces(
    make_encoder: Callable, make_rows: Callable, make_strategy: Callable
) -> None:
    rows = make_rows(40)
    grown = begun(make_encoder(), make_strategy(batch_growth=(1e-9,)), 4)
    list(islice(train(grown, rows), 1))  # at progress 0 it has not grown
    whole = begun(make_encoder(), make_strategy(), 4)
    list(islice(train(whole, rows), 1))
    order = rows.order(8, 3)
    losses = []
    with torch.no_grad():
        for n in (1, 2):
            inputs, targets = rows.load(order.at(n))
            losses.append(float(torch.nn.functional.cross_entropy(whole.model.eval()(*inputs), targets)))
    (measure,) = list(islice(train(grown, rows), 1))
    assert measure.loss_nats == pytest.approx(np.mean(losses), abs=1e-5) and grown.counters.position == 3


def test_growth_resumes_bitwise(make_encoder: Callable, make_rows: Callable, make_strategy: Callable) -> None:
    strategy = make_strategy(batch_growth=(0.3, 0.6), dropout=0.1)
    resumes_bitwise(make_encoder, strategy, make_rows(50), stop=5)
    resumes_bitwise(make_encoder, strategy, make_rows(50), stop=11)


@pytest.mark.parametrize("growth", [(0.5, 0.5), (0.0,), (1.0,), (0.7, 0.2)])
def test_growth_is_shares_that_rise(growth: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="'batch_growth': must be shares"):
        run(batch_growth=growth)
    with pytest.raises(UserError, match="'batch_growth': must be shares"):
        FitConfig.parse({"data": "x.csv", "batch_growth": list(growth)})


def test_all_of_it_through_the_door() -> None:
    result = run(network(dropout=0.1), clip_z=3.0, layer_decay=0.8, batch_growth=[0.5], budget="200 updates")
    action = next(
        r["trial"]["action"] for r in result.records() if r["kind"] == "Asked" and r["trial"]["stage"] == "trunk"
    )
    assert (action["clip_z"], action["layer_decay"], action["batch_growth"]) == (3.0, 0.8, [0.5])
    assert result.best.value > 0.7
