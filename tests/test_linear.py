"""Tests of models.linear: every task kind and script, saving bitwise, odd texts, deadlines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from multistep.models.linear import Linear, candidates, fit_linear, log_count_ratio
from multistep.optimizers.lbfgs import LBFGS
from multistep.text import NgramFeatures, TextFacts, Vectorizer
from multistep.types import TaskKind

ENGLISH = (("good", "great", "fine"), ("bad", "awful", "poor"), ("blue", "red", "green"))
CHINESE = (("很好", "喜欢", "不错"), ("很差", "讨厌", "难吃"), ("蓝色", "红的", "绿的"))


def made(n: int, n_classes: int, chinese: bool = False, seed: int = 0) -> tuple[list[str], np.ndarray]:
    generator = np.random.default_rng(seed)
    y = generator.integers(0, n_classes, n)
    filler = ("这个", "那里", "酒店", "房间") if chinese else ("the", "film", "was", "here", "and", "there")
    joint = "" if chinese else " "
    texts = []
    for k in y:
        said = [*generator.choice(filler, 5), str(generator.choice((CHINESE if chinese else ENGLISH)[k]))]
        texts.append(joint.join(generator.permutation(said)))
    return texts, y


@pytest.mark.parametrize("weight", ["tfidf", "nb", "nb_tfidf"])
@pytest.mark.parametrize("chinese", [False, True])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_classifies_and_saves_bitwise(tmp_path: Path, n_classes: int, chinese: bool, weight: str) -> None:
    texts, y = made(300, n_classes, chinese)
    valid = made(100, n_classes, chinese, seed=1)
    features = NgramFeatures.parse({"weight": weight})
    model, facts = fit_linear(texts, y, "classify", n_classes, features, valid)
    assert facts["features"]["unit"] == ("char" if chinese else "word")
    asked = [*valid[0], "", "   ", "zebra quux", "没见过"]
    logits = model.logits(asked)
    assert logits.dtype == np.float64 and logits.shape == (104, n_classes) and np.isfinite(logits).all()
    assert (logits[:100].argmax(1) == valid[1]).mean() > 0.95
    assert np.array_equal(logits[100], logits[101])  # nothing known: the bias alone
    model.save(tmp_path)
    assert np.array_equal(Linear.load(tmp_path).logits(asked), logits)


def test_multilabel() -> None:
    texts, y = made(300, 3)
    labels = np.stack([y == 0, y != 1], 1)
    for weight in ("tfidf", "nb"):
        model, _ = fit_linear(
            texts, labels, "multilabel", 2, NgramFeatures.parse({"weight": weight}), (texts[:80], labels[:80])
        )
        assert ((model.logits(texts) > 0) == labels).mean() > 0.95


@pytest.mark.parametrize("weight", ["tfidf", "nb", "nb_tfidf"])
def test_regress_answers_in_label_units(weight: str) -> None:
    texts, y = made(300, 3)
    values = 1000.0 + 50.0 * y
    features = NgramFeatures.parse({"weight": weight})
    model, _ = fit_linear(texts, values, "regress", 1, features, (texts[:80], values[:80]))
    found = model.logits(texts)
    assert found.shape == (300, 1) and np.abs(found[:, 0] - values).mean() < 10


def test_deadline_gives_a_model_that_answers() -> None:
    texts, y = made(200, 3)
    model, facts = fit_linear(texts, y, "classify", 3, NgramFeatures(), (texts, y), deadline=lambda: True)
    assert len(facts["path"]) == 1 and np.isfinite(model.logits(texts)).all()


def test_same_twice_and_either_solver() -> None:
    texts, y = made(200, 3)
    fits = [fit_linear(texts, y, "classify", 3, NgramFeatures(), (texts, y))[0] for _ in range(2)]
    assert np.array_equal(fits[0].weights_DK, fits[1].weights_DK)
    other, _ = fit_linear(texts, y, "classify", 3, NgramFeatures(), (texts, y), solver=LBFGS(tolerance=1e-3))
    assert (other.logits(texts).argmax(1) == y).mean() > 0.95


def test_log_count_ratio_by_hand() -> None:
    _, x = Vectorizer.fit(["a a", "a b", "b", "c"], NgramFeatures(unit="word", order=1, min_count=1, weight="nb"))
    ratio = log_count_ratio(x, np.array([[1], [1], [0], [0]]), alpha=1.0)
    inside, outside = np.array([3, 2, 1]) / 6, np.array([1, 2, 2]) / 5
    assert sorted(ratio[:, 0].tolist()) == pytest.approx(sorted(np.log(inside / outside).tolist()), rel=1e-6)


@pytest.mark.parametrize("kind", ["classify", "multilabel", "regress"])
@pytest.mark.parametrize("facts", [TextFacts(100, 10, 0.0), TextFacts(100, 300, 0.0), TextFacts(100, 50, 0.9)])
def test_candidates_are_distinct_and_usable(kind: TaskKind, facts: TextFacts) -> None:
    for outputs in (1,) if kind == "regress" else (2, 5):
        found = candidates(kind, outputs, facts)
        assert 2 <= len(found) <= 4 and len(set(found)) == len(found)
        assert facts.unspaced_share == 0 or all(f.unit == "char" for f in found)
