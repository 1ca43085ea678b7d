"""Laws of the objectives: closed form, finite differences, smoothing, masks, the mean, micro-batches that add up, JSON, extremes.

Over 400 lines: the independent reference of every member stands here beside the laws that use it.

Over 400 lines: one matrix of laws over all members, on cases and helpers that they share.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from scipy.special import log_expit, log_softmax, logsumexp, softmax
from torch import Tensor, nn

from multistep.objectives import (
    FGM,
    OBJECTIVES,
    WRAPPERS,
    BinaryCrossEntropy,
    CrossEntropy,
    Distill,
    Huber,
    MeanAbsoluteError,
    MeanSquaredError,
    NextToken,
    Objective,
    Penalized,
    RDrop,
    Seq2Seq,
    Span,
)  # fmt: skip
from multistep.types import UserError

pytestmark = pytest.mark.usefixtures("torch_seeded")
ADAPTER: TypeAdapter[Any] = TypeAdapter(Objective)
B, K, T, WORDS, WIDTH = 6, 4, 5, 11, 3  # examples, outputs, positions, input words, width
SMOOTHINGS = (0.0, 0.1, 0.3)
WEIGHTS = (0.5, 1.0, 2.0, 4.0)
NUMBERS = (MeanSquaredError, MeanAbsoluteError, Huber)
TOKENS = (NextToken, Seq2Seq)

PLAIN: list[Any] = [
    *(CrossEntropy(label_smoothing=e) for e in SMOOTHINGS),
    CrossEntropy(class_weights=WEIGHTS), CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.2), CrossEntropy(focal_gamma=2),
    CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.1, focal_gamma=0.5),
    *(BinaryCrossEntropy(label_smoothing=e) for e in SMOOTHINGS),
    BinaryCrossEntropy(positive_weights=WEIGHTS, label_smoothing=0.1),
    MeanSquaredError(), MeanAbsoluteError(), Huber(), Huber(delta=0.3),
    NextToken(), NextToken(label_smoothing=0.1, z_loss=0.01), Seq2Seq(), Seq2Seq(label_smoothing=0.3, z_loss=0.1),
    Span(), Distill(), Distill(alpha=0.0), Distill(alpha=0.9, temperature=4.0),
]  # fmt: skip
R_DROPS = [
    RDrop(inner=inner, alpha=alpha)
    for inner in (PLAIN[0], PLAIN[3], BinaryCrossEntropy(), NextToken(label_smoothing=0.1), Seq2Seq(), Distill())
    for alpha in (0.0, 3.0)
]
WRAPPED: list[Any] = [
    *R_DROPS, *(FGM(inner=inner, epsilon=0.3) for inner in (*PLAIN[::3], NextToken())),
    *(Penalized(inner=inner, l1=0.01, l2=0.1) for inner in PLAIN[::4]),
    Penalized(inner=FGM(inner=RDrop(inner=CrossEntropy(class_weights=WEIGHTS))), l1=0.01), RDrop(inner=FGM(inner=NextToken())),
]  # fmt: skip
EACH = pytest.mark.parametrize("objective", PLAIN, ids=repr)
EVERY = pytest.mark.parametrize("objective", [*PLAIN, *WRAPPED], ids=repr)


def case(objective: Any) -> tuple[Tensor, Any]:
    """Outputs (float64) and targets of one batch; of tokens a third is masked, and so is all of row 2."""
    core, g = objective.core(), torch.Generator().manual_seed(4)
    flat = 2 * torch.randn(B, K, generator=g).double()
    classes_B = torch.randint(0, K, (B,), generator=g)
    if isinstance(core, BinaryCrossEntropy):
        return flat, torch.rand(B, K, generator=g) > 0.5
    if isinstance(core, NUMBERS):
        return flat, torch.randn(B, K, generator=g)
    if isinstance(core, Distill):
        return flat, (classes_B, 2 * torch.randn(B, K, generator=g))
    if isinstance(core, CrossEntropy):
        return flat, classes_B
    outputs = 2 * torch.randn(B, T, 2 if isinstance(core, Span) else K, generator=g).double()
    if isinstance(core, Span):
        return outputs, torch.randint(0, T, (B, 2), generator=g)
    ids_BT = torch.randint(0, K, (B, T), generator=g)
    ids_BT[torch.rand(B, T, generator=g) < 0.3] = -100
    ids_BT[2] = -100
    return outputs, ids_BT


def as_numpy(targets: Any) -> Any:
    return tuple(t.numpy() for t in targets) if isinstance(targets, tuple) else targets.numpy()


def rows(targets: Any, take: slice) -> Any:
    return tuple(t[take] for t in targets) if isinstance(targets, tuple) else targets[take]


def by_hand(o: Any, z: np.ndarray, targets: Any) -> float:
    """The loss in float64, from its definition."""
    if isinstance(o, NUMBERS):
        r = np.abs(z - targets)
        if isinstance(o, Huber):
            r = np.where(r < o.delta, r**2 / 2, o.delta * (r - o.delta / 2))
        return float(np.mean(r**2 if isinstance(o, MeanSquaredError) else r))
    if isinstance(o, BinaryCrossEntropy):
        wanted = (1 - o.label_smoothing) * targets + o.label_smoothing / 2
        weights = 1.0 if o.positive_weights is None else np.array(o.positive_weights)
        return float(-(weights * wanted * log_expit(z) + (1 - wanted) * log_expit(-z)).mean())
    if isinstance(o, Span):
        log_p = log_softmax(z, axis=1)
        return float(np.mean([-log_p[b, targets[b, i], i] for b in range(len(z)) for i in (0, 1)]))
    if isinstance(o, Distill):
        classes, teacher = targets
        log_p, log_q = log_softmax(teacher / o.temperature, axis=1), log_softmax(z / o.temperature, axis=1)
        soft = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
        return float((1 - o.alpha) * by_hand(CrossEntropy(), z, classes) + o.alpha * o.temperature**2 * soft)
    e = o.label_smoothing
    if isinstance(o, TOKENS):
        z, ids = z[targets != -100], targets[targets != -100]
        wanted = (1 - e) * np.eye(K)[ids] + e / K
        return float((-(wanted * log_softmax(z, axis=1)).sum(1) + o.z_loss * logsumexp(z, axis=1) ** 2).mean())
    wanted = (1 - e) * np.eye(K)[targets] + e / K
    weights = np.ones(K) if o.class_weights is None else np.array(o.class_weights)
    loss_B = -(weights * wanted * log_softmax(z, axis=1)).sum(1)
    loss_B *= (1 - softmax(z, axis=1)[np.arange(len(z)), targets]) ** o.focal_gamma
    return float(loss_B.sum() / weights[targets].sum())


def slopes(function: Callable[[np.ndarray], float], at: np.ndarray, h: float = 1e-5) -> np.ndarray:
    found = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[index] += h
        down[index] -= h
        found[index] = (function(up) - function(down)) / (2 * h)
    return found


class Tiny(nn.Module):
    """Words -> outputs. Every other pass uses another mask, as dropout would, so that two passes differ and yet repeat."""

    def __init__(self, objective: Any):
        super().__init__()
        self.core = objective.core()
        n_outputs = 2 if isinstance(self.core, Span) else K
        g = torch.Generator().manual_seed(7)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(40 * WORDS, WIDTH)  # larger, but not of the batch
        self.head = nn.Linear(WIDTH, n_outputs)
        self.masks = (torch.tensor([1.5, 0.5, 1.0]), torch.tensor([0.5, 1.0, 1.5]))
        self.passes = 0
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g))

    def forward(self, ids_BT: Tensor) -> Tensor:
        self.passes += 1
        x_BTD = (self.words(ids_BT) + self.places(torch.arange(ids_BT.shape[1]))) * self.masks[self.passes % 2]
        per_position = isinstance(self.core, (*TOKENS, Span))
        return self.head(x_BTD.tanh() if per_position else x_BTD.mean(1).tanh())


def words() -> Tensor:
    return torch.randint(0, WORDS, (B, T), generator=torch.Generator().manual_seed(5))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return found


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


@pytest.mark.parametrize("objective", R_DROPS, ids=repr)
def test_r_drop_closed_form_and_gradient(objective: RDrop) -> None:
    a, targets = case(objective)
    b = a + torch.randn(a.shape, dtype=a.dtype)
    known, inner = as_numpy(targets), objective.inner

    def hand(a: np.ndarray, b: np.ndarray) -> float:
        if isinstance(inner, BinaryCrossEntropy):
            p = [np.stack([log_expit(z), log_expit(-z)], axis=-1) for z in (a, b)]
        else:
            p = [log_softmax(z, axis=-1) for z in (a, b)]
        there, back = ((np.exp(x) * (x - y)).sum(-1) for x, y in (p, p[::-1]))
        kl = there + back
        weights = np.ones(kl.shape)
        if isinstance(inner, TOKENS):
            weights = known != -100
        if isinstance(inner, CrossEntropy) and inner.class_weights:
            weights = np.array(inner.class_weights)[known]
        agree = (kl * weights).sum() / weights.sum()
        return (by_hand(inner, a, known) + by_hand(inner, b, known)) / 2 + objective.alpha / 4 * float(agree)

    a.requires_grad_()
    b.requires_grad_()
    passes = iter((a, b))
    loss = objective.of(lambda: next(passes), targets, nn.Linear(1, 1))
    loss.backward()
    z_a, z_b = a.detach().numpy(), b.detach().numpy()
    assert float(loss.detach()) == pytest.approx(hand(z_a, z_b), rel=3e-6) and a.grad is not None and b.grad is not None
    assert np.abs(a.grad.numpy() - slopes(lambda z: hand(z, z_b), z_a)).max() < 3e-6
    assert np.abs(b.grad.numpy() - slopes(lambda z: hand(z_a, z), z_b)).max() < 3e-6


class Bag(nn.Module):
    """The mean of the words' vectors times a matrix: so simple that FGM can be done by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, K, bias=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.head(self.words(ids_BT).mean(1))


def test_fgm_closed_form_and_gradient() -> None:
    model, ids_BT, (_, targets_B) = Bag(), words(), case(CrossEntropy())
    objective = FGM(inner=CrossEntropy(), epsilon=0.7)
    table, head = (p.detach().double().numpy() for p in model.parameters())
    ids, targets = ids_BT.numpy(), targets_B.numpy()
    p_BK = softmax(table[ids].mean(1) @ head.T, axis=1)
    g_BD = (p_BK - np.eye(K)[targets]) @ head  # of every word alike, up to a factor
    g_BTD = np.repeat(g_BD[:, None], T, axis=1)
    r_BTD = 0.7 * g_BTD / np.sqrt((g_BTD**2).sum((1, 2), keepdims=True))  # fixed from here on

    def hand(table: np.ndarray, head: np.ndarray) -> float:
        both = (by_hand(CrossEntropy(), (table[ids] + r).mean(1) @ head.T, targets) for r in (0.0, r_BTD))
        return sum(both) / 2

    loss = objective.of(lambda: model(ids_BT), targets_B, model)
    assert all(p.grad is None for p in model.parameters()), "looking is not training"
    loss.backward()
    assert float(loss.detach()) == pytest.approx(hand(table, head), rel=2e-6)
    assert float(loss.detach()) > by_hand(CrossEntropy(), table[ids].mean(1) @ head.T, targets)
    found = gradients(model)
    assert np.abs(found["words.weight"].numpy() - slopes(lambda w: hand(w, head), table)).max() < 2e-6
    assert np.abs(found["head.weight"].numpy() - slopes(lambda w: hand(table, w), head)).max() < 2e-6
    assert not any(m._forward_hooks for m in model.modules()), "the model is left as it was"


def test_penalized_closed_form_and_gradient() -> None:
    model, (outputs, targets) = Tiny(CrossEntropy()), case(CrossEntropy())
    model.places.requires_grad_(False)
    objective = Penalized(inner=CrossEntropy(), l1=0.02, l2=0.3)
    loss = objective.of(lambda: outputs, targets, model)
    loss.backward()
    words_, head = (p.detach().double().numpy() for p in (model.words.weight, model.head.weight))
    penalty = sum(0.02 * np.abs(w).sum() + 0.15 * (w**2).sum() for w in (words_, head))
    assert float(loss.detach()) == pytest.approx(
        by_hand(CrossEntropy(), outputs.numpy(), targets.numpy()) + penalty, rel=2e-6
    )
    assert float(objective.loss(outputs, targets)) == float(CrossEntropy().loss(outputs, targets))
    assert model.head.bias.grad is None and model.places.weight.grad is None
    found = gradients(model)
    assert found["head.weight"].numpy() == pytest.approx(0.02 * np.sign(head) + 0.3 * head, rel=1e-5)
    assert found["words.weight"].numpy() == pytest.approx(0.02 * np.sign(words_) + 0.3 * words_, rel=1e-5)


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


def test_fgm_moves_the_words_of_a_frozen_table_and_not_the_places() -> None:
    model, ids_BT, (_, targets) = Tiny(CrossEntropy()), words(), case(CrossEntropy())
    model.words.requires_grad_(False)
    heard: dict[nn.Module, list[Tensor]] = {model.words: [], model.places: []}
    objective = FGM(inner=CrossEntropy(), epsilon=0.5)

    def forward() -> Tensor:  # a hook that runs after those of the objective
        handles = [t.register_forward_hook(lambda m, _, out: heard[m].append(out.detach().clone())) for t in heard]
        found = model(ids_BT)
        for handle in handles:
            handle.remove()
        return found

    objective.of(forward, targets, model).backward()
    (words_before, words_after), (places_before, places_after) = heard.values()
    assert (
        torch.equal(places_before, places_after)
        and model.words.weight.grad is None
        and model.head.weight.grad is not None
    )
    assert (words_after - words_before).flatten(1).norm(dim=1) == pytest.approx(torch.full((B,), 0.5), rel=1e-5)


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
