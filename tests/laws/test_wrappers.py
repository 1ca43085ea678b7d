"""Laws of the objectives around others: R-Drop, FGM and penalties by hand, in value and gradient, and the model left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from objective_cases import (
    R_DROPS,
    TOKENS,
    WIDTH,
    WORDS,
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
from scipy.special import log_expit, log_softmax, softmax
from torch import Tensor, nn

from multistep.objectives import FGM, BinaryCrossEntropy, CrossEntropy, Penalized, RDrop

pytestmark = pytest.mark.usefixtures("torch_seeded")


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
