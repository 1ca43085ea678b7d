"""Laws of the objectives: closed form, finite differences, smoothing, masks, the mean, micro-batches that add up, JSON, extremes."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objective_cases import (
    PLAIN,
    R_DROPS,
    SMOOTHINGS,
    TOKENS,
    WEIGHTS,
    WRAPPED,
    B,
    K,
    T,
    Tiny,
    as_numpy,
    by_hand,
    case,
    gradients,
    slopes,
    words,
)
from pydantic import TypeAdapter
from torch import nn

from multistep.objectives import (
    FGM,
    OBJECTIVES,
    WRAPPERS,
    BinaryCrossEntropy,
    CrossEntropy,
    Distill,
    Huber,
    MeanSquaredError,
    NextToken,
    Objective,
    RDrop,
    Span,
)  # fmt: skip
from multistep.types import UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")
ADAPTER: TypeAdapter[Any] = TypeAdapter(Objective)
EACH = pytest.mark.parametrize("objective", PLAIN, ids=repr)
EVERY = pytest.mark.parametrize("objective", [*PLAIN, *WRAPPED], ids=repr)


def rows(targets: Any, take: slice) -> Any:
    return tuple(t[take] for t in targets) if isinstance(targets, tuple) else targets[take]


def test_every_member_is_here() -> None:
    assert [type(member()) for member in OBJECTIVES] == list(OBJECTIVES), "defaults will do"
    assert set(ADAPTER.json_schema()["discriminator"]["mapping"]) == {member().kind for member in OBJECTIVES}
    assert {type(o) for o in (*PLAIN, *WRAPPED)} == set(OBJECTIVES) and {type(o) for o in WRAPPED} == set(WRAPPERS)


# ---------------------------------------------------------------------------------------------- values and gradients


@EACH
def test_closed_form(objective: Any) -> None:
    outputs, targets = case(objective)
    wanted = by_hand(objective, outputs.numpy(), as_numpy(targets))
    assert float(objective.loss(outputs, targets)) == pytest.approx(wanted, rel=2e-6)
    of = objective.of(lambda: outputs, targets, nn.Linear(1, 1))
    assert torch.equal(of, objective.loss(outputs, targets))


@EACH
def test_gradient_against_finite_differences(objective: Any) -> None:
    outputs, targets = case(objective)
    outputs.requires_grad_()
    objective.loss(outputs, targets).backward()
    assert outputs.grad is not None
    wanted = slopes(lambda z: by_hand(objective, z, as_numpy(targets)), outputs.detach().numpy())
    assert np.abs(outputs.grad.numpy() - wanted).max() < 2e-6 and np.abs(wanted).max() > 1e-3


def test_bit_for_bit_what_torch_has() -> None:
    (z, y), (many, labels), (numbers, wanted) = (
        case(o) for o in (CrossEntropy(), BinaryCrossEntropy(), MeanSquaredError())
    )
    for e in SMOOTHINGS:
        assert torch.equal(CrossEntropy(label_smoothing=e).loss(z, y), F.cross_entropy(z.float(), y, label_smoothing=e))
        smooth = labels.float() * (1 - e) + e / 2
        found = BinaryCrossEntropy(label_smoothing=e).loss(many, labels)
        assert torch.equal(found, F.binary_cross_entropy_with_logits(many.float(), smooth))
    assert torch.equal(MeanSquaredError().loss(numbers, wanted), F.mse_loss(numbers.float(), wanted.float()))
    weighted = F.cross_entropy(z.float(), y, torch.tensor(WEIGHTS), label_smoothing=0.1)
    assert torch.equal(CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.1).loss(z, y), weighted)
    for seed in range(5):  # the bare loop of a language model, gradients too
        g = torch.Generator().manual_seed(seed)
        logits, ids = torch.randn(12, 64, 65, generator=g), torch.randint(0, 65, (12, 64), generator=g)
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        one, two = NextToken().loss(ours, ids), F.cross_entropy(theirs.flatten(0, 1), ids.flatten())
        one.backward()
        two.backward()
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(one, two) and torch.equal(ours.grad, theirs.grad)


# ---------------------------------------------------------------------------------------------- means, counts, masks


@EVERY
def test_the_loss_is_the_mean_over_what_counts(objective: Any) -> None:
    outputs, targets = case(objective)
    parts = [slice(i, i + 1) for i in range(B)]
    single = [float(objective.loss(outputs[p], rows(targets, p))) for p in parts]
    weights = [objective.count(rows(targets, p)) for p in parts]
    assert float(objective.loss(outputs, targets)) == pytest.approx(np.average(single, weights=weights), rel=1e-5)
    assert sum(weights) == pytest.approx(objective.count(targets)) and objective.count(targets) > 0


@EVERY
def test_each_is_the_loss_of_a_row_without_smoothing_and_weights(objective: Any) -> None:
    outputs, targets = case(objective)
    core = objective.core()
    bare = core.with_(alpha=0.0) if isinstance(core, Distill) else core if isinstance(core, Huber) else type(core)()
    each_B = objective.each(outputs, targets)
    assert each_B.shape == (B,) and each_B.dtype == torch.float32
    for i in range(B):
        wanted = float(bare.loss(outputs[i : i + 1], rows(targets, slice(i, i + 1))))
        assert float(each_B[i]) == pytest.approx(wanted, rel=1e-5)
    weights = [bare.count(rows(targets, slice(i, i + 1))) for i in range(B)]
    assert np.average(each_B.numpy(), weights=weights) == pytest.approx(float(bare.loss(outputs, targets)), rel=1e-5)


@EVERY
@pytest.mark.parametrize("cuts", [(0, 3, 6), (0, 2, 3, 6), (0, 1, 2, 3, 4, 5, 6)])  # row 2 alone is all masked
def test_micro_batches_add_up_to_the_whole(objective: Any, cuts: tuple[int, ...]) -> None:
    model, ids_BT, (_, targets) = Tiny(objective), words(), case(objective)

    def run(take: slice, weight: float) -> float:
        model.passes = 0
        part = objective.of(lambda: model(ids_BT[take]), rows(targets, take), model) * weight
        part.backward()
        return float(part.detach())

    whole = run(slice(0, B), 1.0)
    wanted = gradients(model)
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    n = objective.count(targets)
    assert sum(run(p, objective.count(rows(targets, p)) / n) for p in parts) == pytest.approx(whole, rel=3e-6)
    found = gradients(model)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-3
    for name, g in wanted.items():
        assert torch.allclose(found[name], g, rtol=1e-4, atol=2e-6), name


@pytest.mark.parametrize("objective", [o for o in (*PLAIN, *R_DROPS) if isinstance(o.core(), TOKENS)], ids=repr)
def test_masked_tokens_count_zero(objective: Any) -> None:
    outputs, ids_BT = case(objective)
    masked = ids_BT == -100
    other = torch.where(masked[..., None], 1e3 * torch.randn(outputs.shape).double(), outputs).requires_grad_()
    loss = objective.of(lambda: other, ids_BT, nn.Linear(1, 1))
    assert torch.equal(loss, objective.of(lambda: outputs, ids_BT, nn.Linear(1, 1)))
    loss.backward()
    assert other.grad is not None and not other.grad[masked].any() and other.grad[~masked].abs().sum(-1).all()
    assert torch.equal(objective.each(other, ids_BT), objective.each(outputs, ids_BT))
    assert objective.count(ids_BT) == int((~masked).sum())

    nothing, leaf = torch.full_like(ids_BT, -100), outputs.clone().requires_grad_()
    loss = objective.of(lambda: leaf, nothing, nn.Linear(1, 1))
    loss.backward()
    assert float(loss.detach()) == 0.0 == objective.count(nothing) and not objective.each(outputs, nothing).any()
    assert leaf.grad is not None and not leaf.grad.any()


# ---------------------------------------------------------------------------------------------- precision, extremes, JSON


@EVERY
def test_half_precision_outputs_are_summed_in_float32(objective: Any) -> None:
    outputs, targets = case(objective)
    assert objective.loss(outputs.bfloat16(), targets).dtype == torch.float32
    assert objective.each(outputs.bfloat16(), targets).dtype == torch.float32


@EVERY
@pytest.mark.parametrize("size", [0.0, 1e4, 1e5])
def test_extreme_outputs_stay_finite(objective: Any, size: float) -> None:
    outputs, targets = case(objective)
    leaf = (size * outputs.sign()).float().requires_grad_()
    passes = iter((leaf, -leaf))
    loss = (
        objective.of(lambda: next(passes), targets, nn.Linear(1, 1))
        if objective in R_DROPS
        else objective.loss(leaf, targets)
    )
    loss.backward()
    assert torch.isfinite(loss) and leaf.grad is not None and torch.isfinite(leaf.grad).all()
    assert torch.isfinite(objective.each(leaf, targets)).all()


def test_a_sure_wrong_answer_stays_finite() -> None:
    assert float(CrossEntropy().loss(torch.tensor([[1e4, 0.0]]), torch.tensor([1]))) == 1e4
    assert float(BinaryCrossEntropy().loss(torch.tensor([[1e4]]), torch.tensor([[False]]))) == 1e4


@EVERY
def test_round_trip(objective: Any) -> None:
    again = ADAPTER.validate_python(json.loads(objective.model_dump_json()))
    assert again == objective and type(again) is type(objective) and type(again.core()) is type(objective.core())
    assert again.model_dump_json() == objective.model_dump_json()
    assert 10 < len(objective.good_for) <= 120 and objective.good_for[-1] != "."


# ---------------------------------------------------------------------------------------------- what single members do


def test_smoothing_bounds_the_best_logit() -> None:
    """The smoothed loss is least where the probability is the smoothed target, and not lower for a surer answer."""
    e, k = 0.1, 4
    objective, target = CrossEntropy(label_smoothing=e), torch.tensor([0])
    p = 1 - e + e / k
    best = torch.tensor([[math.log(p), *[math.log((1 - p) / (k - 1))] * (k - 1)]])
    surer = best + torch.tensor([[3.0, 0.0, 0.0, 0.0]])
    less = best - torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    lowest = float(objective.loss(best, target))
    assert lowest < float(objective.loss(surer, target)) and lowest < float(objective.loss(less, target))
    plain = CrossEntropy()
    assert float(plain.loss(surer, target)) < float(plain.loss(best, target))


@pytest.mark.parametrize(
    "objective", [BinaryCrossEntropy(positive_weights=(3.0,)), MeanSquaredError(), Huber()], ids=repr
)
def test_one_output_has_one_shape(objective: Any) -> None:
    """[B] and [B,1] are the same thing, and are never broadcast to [B,B]."""
    outputs, targets = torch.randn(B), (torch.rand(B) > 0.5).float()
    for a in (outputs, outputs[:, None]):
        for b in (targets, targets[:, None], targets.bool()):
            assert torch.equal(objective.loss(a, b), objective.loss(outputs, targets))
            assert torch.equal(objective.each(a, b), objective.each(outputs, targets))


def test_a_place_outside_of_the_text_is_no_answer() -> None:
    outputs, places = case(Span())
    places[:3] = torch.tensor([[-1, -1], [3, T], [-1, 2]])
    for at in (0, 2):
        wanted = places.clone()
        wanted[:3] = at
        assert torch.equal(Span(no_answer=at).loss(outputs, places), Span(no_answer=at).loss(outputs, wanted))
    assert float(Span(no_answer=2).loss(outputs, places)) != float(Span().loss(outputs, places))


def test_mistakes_are_named() -> None:
    z, y = case(CrossEntropy())
    with pytest.raises(UserError, match=r"fgm: the model runs no torch\.nn\.Embedding.* Choose another objective"):
        linear = nn.Linear(K, K)
        FGM().of(lambda: linear(z.float()), y, linear)
    with pytest.raises(UserError, match="r_drop compares classes or tokens, and Huber has none"):
        RDrop.parse({"inner": {"kind": "penalized", "inner": {"kind": "huber"}}})
    with pytest.raises(UserError, match=r"unknown key 'inner\.huber\.deltaa'"):
        FGM.parse({"inner": {"kind": "huber", "deltaa": 1}})
    with pytest.raises(UserError, match="class_weights has 2 numbers, the outputs are 4: give one for each"):
        CrossEntropy(class_weights=(1.0, 2.0)).loss(z, y)
    with pytest.raises(UserError, match=r"'class_weights\.1'.*greater than 0"):
        CrossEntropy.parse({"class_weights": [1.0, 0.0]})
    with pytest.raises(UserError, match=r"targets are torch\.float32, but classes are whole numbers"):
        CrossEntropy().loss(z, y.float())
    with pytest.raises(UserError, match=r"outputs \[6, 4\] do not fit targets \[6\]"):
        MeanSquaredError().loss(z, y)
    with pytest.raises(UserError, match=r"distill: give targets as \(classes \[B\], teacher's logits \[6, 4\]\)"):
        Distill().loss(z, y)
    with pytest.raises(UserError, match=r"outputs \[6, 4\] do not fit targets \[6\]: give outputs \[rows, positions"):
        NextToken().loss(z, y)
    with pytest.raises(
        UserError, match=r"outputs \[6, 4\] do not fit targets \[6\]: give outputs \[examples, positions"
    ):
        Span().loss(z, y)
    with pytest.raises(UserError, match="no_answer is 9, the outputs have 5 positions"):
        Span(no_answer=9).loss(*case(Span()))
