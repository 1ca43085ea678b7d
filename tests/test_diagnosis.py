"""Every rule of a diagnosis with numbers on both sides of its threshold."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch

from multistep.diagnosed import _floor
from multistep.diagnosis import NAMES, Diagnosis, Gain, Name
from multistep.diagnosis import rows as of_rows
from multistep.diagnosis import training as of_training
from multistep.diagnosis.rows import Leaks, Noise
from multistep.diagnosis.training import Advice, Curve, Fit, Look, Trained
from multistep.metrics.power import FEWEST_ROWS
from multistep.objectives import CrossEntropy
from multistep.types import Comparison

ADVICE = Advice(
    more_time="multistep resume runs/x --budget +60s", regularized="multistep fit x.csv dropout=0.1",
    at_rate="multistep fit x.csv optimizer.lr=LR", other_model="multistep fit x.csv --model NAME",
)  # fmt: skip


def found(diagnosis: Diagnosis | None, name: Name) -> bool:
    """Whether it was found; what is said has words, and what is found has something to do."""
    if diagnosis is None:
        return False
    assert diagnosis.name == name and len(diagnosis.words) > 20 and diagnosis.numbers
    return diagnosis.found


def trained(**fields: Any) -> Trained:
    return Trained(**{"trial": "05-trunk", "stage": "trunk", "lr": 3e-4, **fields})


def looks(validation: list[float], train: list[float] | None = None, stderr: float = 0.01) -> tuple[Look, ...]:
    """At even shares of a training of 1,000 updates."""
    n, train = len(validation), train or validation
    return tuple(
        Look(progress=(i + 1) / n, updates=round(1000 * (i + 1) / n), train_loss=t, validation_loss=v, change_stderr=stderr * (i > 0))
        for i, (v, t) in enumerate(zip(validation, train, strict=True))
    )  # fmt: skip


def fit(
    train: float, validation: float, *, what: str = "wrong answers", stderr: float = 0.01, guess: float = 0.6
) -> Fit:
    return Fit(
        model="encoder", what=what, train=train, train_stderr=stderr, train_rows=400, validation=validation,
        validation_stderr=stderr, validation_rows=500, guess=guess,
    )  # fmt: skip


def test_the_names_are_the_ten() -> None:
    assert get_args(Name) == NAMES and len(set(NAMES)) == 10


DIVERGED = {
    "diagnosed": "divergence",
    "failed_lr": 3e-7,
    "restarts": 3,
    "rule": "20 losses in a row stand 4 above the first",
}


@pytest.mark.parametrize(
    ("fields", "advised"),
    [
        ({"rollbacks": 2}, ""), ({"rollbacks": 3}, "0.0001"), ({"rollbacks": 4, "stopped": True}, "0.0001"),
        ({"rollbacks": 3, "restarts": 2}, "1e-06"), ({"restarts": 3}, ""),
        (DIVERGED, "1e-07"), ({**DIVERGED, "failed_lr": 3e-4, "restarts": 0}, "0.0001"), ({"diagnosed": "overfitting"}, ""),
    ],
)  # fmt: skip
def test_divergence(fields: dict[str, Any], advised: str) -> None:
    """A third of the rate that failed last is advised: that with which a training began, or began again."""
    said = of_training.divergence([trained(), trained(served=True, **fields)], ADVICE)
    assert found(said, "divergence") == bool(advised)
    assert said is None or said.action.endswith(f"multistep fit x.csv optimizer.lr={advised}")
    assert of_training.divergence([], ADVICE) is None


def test_restarts_and_bad_batches_have_words_of_their_own() -> None:
    def words(**fields: Any) -> str:
        said = of_training.divergence([trained(served=True, **fields)], ADVICE)
        assert said is not None and said.numbers["restarts"] == fields.get("restarts", 0)
        return said.words

    again = words(**DIVERGED)
    assert "bad batches" not in again and "diverged at learning rate 0.0003, began again 3 times" in again
    assert "diverged at 3e-07 too: 20 losses in a row stand 4 above the first" in again
    assert "again" not in words(**{**DIVERGED, "restarts": 0})
    assert words(rollbacks=3).endswith(
        "at learning rate 0.0003 went back 3 times for bad batches, with its learning rate halved each time"
    )
    assert words(rollbacks=4, stopped=True).endswith("went back 4 times for bad batches, and was stopped")
    both = words(rollbacks=3, restarts=1)
    assert "at learning rate 3e-05 went back 3 times" in both and "had diverged at 0.0003 and began again once" in both


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([{"stage": "race"}], False), ([{"stage": "race"}, {"served": True, "diagnosed": ""}], False),  # a probe of the race
        ([{"stage": "bayes"}, {"served": True, "diagnosed": ""}], False), ([{"stage": "bayes"}, {"diagnosed": ""}], False),  # a member
        ([{"stage": "bayes"}, {"stage": "bayes"}], True),  # all of them
        ([{"stage": "race", "diagnosed": ""}, {}], True),  # the trunk, although a probe went well
        ([{"served": True}, {"diagnosed": ""}], True), ([{"served": True}, {"served": True, "diagnosed": ""}], True),
    ],
)  # fmt: skip
def test_only_what_is_served_diverges_or_all_that_might_have_been(others: list[dict[str, Any]], expected: bool) -> None:
    runs = [trained(**{**DIVERGED, **fields}) for fields in others]
    assert found(of_training.divergence(runs, ADVICE), "divergence") == expected


@pytest.mark.parametrize(
    ("gap", "expected"),
    [
        (fit(0.02, 0.10), True), (fit(0.03, 0.10), False),  # a quarter
        (fit(0.01, 0.07), True), (fit(0.01, 0.055), False),  # five points
        (fit(0.0, 0.07, stderr=0.02), True), (fit(0.0, 0.07, stderr=0.03), False),  # noise
        (fit(0.2, 1.0, what="squared error", guess=10.0), True), (fit(0.1, 0.5, what="squared error", guess=10.0), False),
    ],
)  # fmt: skip
def test_overfitting_by_the_gap(gap: Fit, expected: bool) -> None:
    assert found(of_training.overfitting([], gap, ADVICE), "overfitting") == expected


def test_overfitting_by_the_watch_or_the_losses() -> None:
    rise = trained(diagnosed="overfitting", looks=looks([0.5, 0.6, 0.7], [0.4, 0.3, 0.2]))
    said = of_training.overfitting([rise], fit(0.05, 0.06), ADVICE)  # what stands has no gap: the run went back
    assert found(said, "overfitting") and said is not None
    assert "0.5000 at 33%" in said.words and "0.7000 at 100%" in said.words and "dropout=0.1" in said.action
    near, far = (trained(looks=looks([0.8] * 4, [train] * 4)) for train in (0.21, 0.19))
    assert not found(of_training.overfitting([near], None, ADVICE), "overfitting")
    assert found(of_training.overfitting([far], None, ADVICE), "overfitting")
    smoothed = far.with_(comparable=False)
    assert not found(of_training.overfitting([smoothed], None, ADVICE), "overfitting")


FALLING = looks([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])


@pytest.mark.parametrize(
    ("seen", "gap", "expected"),
    [
        (FALLING, fit(0.40, 0.42), True),
        (FALLING, fit(0.30, 0.42), False),  # a gap
        (FALLING, fit(0.25, 0.26), False),  # not bad: a guess has 0.6
        (looks([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], stderr=0.045), fit(0.40, 0.42), True),
        (looks([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], stderr=0.06), fit(0.40, 0.42), False),  # may be noise
        (looks([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], [0.9] * 6), fit(0.40, 0.42), False),  # train stands still
        (FALLING, None, True),
        (looks([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), None, False),
    ],
)
def test_underfitting(seen: tuple[Look, ...], gap: Fit | None, expected: bool) -> None:
    said = of_training.underfitting([trained(looks=seen)], gap, ADVICE)
    assert found(said, "underfitting") == expected
    if said is not None:
        assert "+60s" in said.action and "optimizer.lr=0.0006" in said.action
    assert of_training.underfitting([trained(looks=seen, diagnosed="overfitting")], gap, ADVICE) is None
    smoothed = of_training.underfitting([trained(looks=seen, comparable=False)], gap, ADVICE)
    assert found(smoothed, "underfitting") == (expected and gap is not None)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (looks([1.0, 0.8, 0.6, 0.6, 0.6, 0.6]), True),
        (looks([1.0, 0.8, 0.6, 0.6, 0.6, 0.56]), False),
        (looks([1.0, 0.8, 0.6, 0.6, 0.6, 0.56], stderr=0.02), True),
        (looks([1.0, 0.6, 0.6]), False),  # too few looks to say
    ],
)
def test_plateau(seen: tuple[Look, ...], expected: bool) -> None:
    assert found(of_training.plateau([trained(looks=seen)], ADVICE), "plateau") == expected
    assert of_training.plateau([trained(looks=seen, diagnosed="overfitting")], ADVICE) is None


def curve(power: float, noise: float, n: int = 12, seed: int = 0) -> list[float]:
    t = (np.arange(n) + 1) / n
    return (0.3 + 0.2 * t**-power + noise * np.random.default_rng(seed).standard_normal(n)).tolist()


@pytest.mark.parametrize(
    ("losses", "expected"), [(curve(0.5, 0.002), True), (curve(0.0, 0.05), False), (curve(0.0, 0.002), False)]
)
def test_budget(losses: list[float], expected: bool) -> None:
    seen = looks(losses)
    said = of_training.budget([trained(looks=seen)], "", ADVICE)
    assert said is not None and found(said, "budget too small") == expected
    assert ("nothing beyond noise" in said.words) == (not expected)
    if expected:
        assert abs(said.numbers["gain"] - 0.2 * (1 - 2**-0.5)) < 3 * said.numbers["stderr"] + 0.02
        assert said.action.endswith("multistep resume runs/x --budget +60s")
    points = tuple(Curve(progress=k.progress, updates=k.updates, train_loss=k.train_loss) for k in seen)
    of_train = of_training.budget([trained(curve=points), trained(stage="race", looks=seen)], "", ADVICE)
    assert of_train is not None and of_train.found == expected and of_train.numbers["loss_of"] == "training"


@pytest.mark.parametrize(
    ("loss", "floor", "end", "by_heart"),
    [
        (0.1997, 0.1985, 0.42, True),  # two classes, labels smoothed by 0.1: a run of sst2 that saw train ten times
        (0.1985 + 0.104, 0.1985, 0.42, True),
        (0.1985 + 0.106, 0.1985, 0.42, False),
        (0.1997, None, 0.42, False),  # weighted, or no classifier
        (0.1997, 0.1985, None, False),
    ],
)
def test_who_knows_train_by_heart_at_the_end_overfits_and_needs_no_more_time(
    loss: float, floor: float | None, end: float | None, by_heart: bool
) -> None:
    fall = [loss + 0.3 * (1 - i / 9) ** 2 for i in range(10)]
    points = tuple(Curve(progress=(i + 1) / 10, updates=100 * (i + 1), train_loss=t) for i, t in enumerate(fall))
    mine = trained(curve=points, floor=floor, end=end, comparable=False)
    said = of_training.overfitting([mine], None, ADVICE)
    assert found(said, "overfitting") == by_heart
    assert said is None or f"it cannot be below {floor:.4f}" in said.words
    assert not found(of_training.overfitting([mine], fit(0.1, 0.12), ADVICE), "overfitting"), "a gap was measured"
    law = of_training.budget([mine], "", ADVICE)
    assert law is not None and found(law, "budget too small") != by_heart
    assert ("knows train by heart" in law.words) == by_heart


def test_the_least_loss_of_a_classifier_is_the_entropy_of_its_smoothed_labels() -> None:
    for classes, smoothing in ((2, 0.1), (77, 0.1), (5, 0.0)):
        labels = torch.arange(classes)
        shares = torch.full((classes, classes), smoothing / classes) + (1 - smoothing) * torch.eye(classes)
        least = CrossEntropy(label_smoothing=smoothing).loss(shares.clamp_min(1e-30).log(), labels)
        told = CrossEntropy(label_smoothing=smoothing).model_dump()
        assert _floor(told, classes) == pytest.approx(float(least), abs=1e-5)
        assert _floor(told, 0) is None and _floor({**told, "focal_gamma": 2.0}, classes) is None
    assert _floor({"kind": "mse"}, 3) is None and _floor({"kind": "fgm", "inner": told}, 5) is None


def test_the_law_is_that_of_the_trunk_not_of_its_cool_down() -> None:
    """A trunk that stands still, and a cool-down whose curve falls with its rate: nothing says that more time would help."""

    def curved(losses: list[float]) -> tuple[Curve, ...]:
        return tuple(Curve(progress=k.progress, updates=k.updates, train_loss=k.train_loss) for k in looks(losses))

    trunk = trained(curve=curved(curve(0.0, 0.002)))
    cool = trained(trial="06-cool-down", stage="cool-down", curve=curved(curve(0.5, 0.002)))
    for runs in ([trunk, cool], [trunk, cool, trained(trial="07-race", stage="race", looks=looks(curve(0.5, 0.002)))]):
        said = of_training.budget(runs, "", ADVICE)
        assert said is not None and not said.found and said.numbers["trial"] == "05-trunk"
    alone = of_training.budget([trained(), cool], "", ADVICE)
    assert alone is not None and alone.found and alone.numbers["trial"] == "06-cool-down", "nothing else has a curve"


def test_a_budget_that_bought_no_training() -> None:
    assert found(
        of_training.budget([], "no training fitted into 5s: the encoder is as it came", ADVICE), "budget too small"
    )
    assert of_training.budget([], "", ADVICE) is None
    assert of_training.budget([trained(looks=looks([1.0, 0.9, 0.8]))], "", ADVICE) is None


# ---------------------------------------------------------------------------------------------- rows

ROWS = {"train": 9000, "validation": 1000, "test": 1000}


@pytest.mark.parametrize(
    ("exact", "near", "expected"),
    [
        ({}, None, False), ({}, {}, False), ({"train-test": 1}, {}, True), ({}, {"train-test": 9}, False),
        ({}, {"train-test": 10}, True), ({"train-validation": 2}, None, True),
    ],
)  # fmt: skip
def test_leaks(exact: dict[str, int], near: dict[str, int] | None, expected: bool) -> None:
    said = of_rows.leaks(Leaks(rows=ROWS, exact=exact, near=near))
    assert found(said, "leaking splits") == expected
    if said is not None:
        where = "validation" if "train-validation" in exact else "test"
        assert said.action.startswith(f"take these rows out of {where}")
        assert ("decided nothing" in said.words) == ("train-validation" in exact)


@pytest.mark.parametrize(
    ("rows", "stderr", "expected"),
    [(500, 0.0230, False), (500, 0.0240, True), (FEWEST_ROWS, 0.001, True), (FEWEST_ROWS - 1, 0.001, True), (90, 0.001, False)],
)  # fmt: skip
def test_validation_too_small(rows: int, stderr: float, expected: bool) -> None:
    """A gain of 0.05 is seen with a standard error of 0.0235; on 21 rows right or wrong comes in steps of four rows."""
    said = of_rows.small_validation("accuracy", 0.9, True, True, rows, stderr)
    assert found(said, "validation too small") == expected
    assert ("only gains of 0.25" in said.words) == (rows < FEWEST_ROWS)
    assert not expected or said.numbers["needed"] >= FEWEST_ROWS


def test_where_all_validation_rows_decide_no_more_are_asked_for() -> None:
    half, whole = (of_rows.small_validation("accuracy", 0.9, True, True, 15, 0.1, halved) for halved in (True, False))
    needed = half.numbers["needed"]
    assert needed == whole.numbers["needed"]
    assert f"give {2 * needed:,} validation rows" in half.action and "half of them decide" in half.action
    assert f"give {needed:,} validation rows or more:" in whole.action
    assert "no blend" in half.words and "no blend" not in whole.words


@pytest.mark.parametrize(
    ("metric", "said"), [("bleu", "only gains of 25 "), ("mse", "only gains of 7.5 "), ("bits_per_byte", "")]
)
def test_what_few_rows_may_decide_is_on_the_scale_of_the_metric(metric: str, said: str) -> None:
    words = of_rows.small_validation(metric, 30.0, metric == "bleu", False, 12, 1.0).words
    assert said in words if said else "only gains" not in words


@pytest.mark.parametrize(("stderr", "expected"), [(0.9, False), (1.0, True)])
def test_validation_too_small_for_a_loss(stderr: float, expected: bool) -> None:
    """Of a loss of 10, a gain of 2 should be seen: it is with a standard error of 0.94."""
    said = of_rows.small_validation("mse", 10.0, False, False, 200, stderr)
    assert found(said, "validation too small") == expected


def against(p: float, difference: float = 0.02, n: int = 60) -> Comparison:
    return Comparison(metric="accuracy", candidate=0.4, incumbent=0.38, difference=difference, stderr=0.02, p=p, n=n)


@pytest.mark.parametrize(
    ("compared", "expected"),
    [
        ([against(0.06), against(0.3)], True), ([against(0.04), against(0.3)], False), ([against(0.3), against(0.04)], False),
        ([against(0.01, difference=-0.1)], True), ([against(0.6, n=FEWEST_ROWS - 1)], False), ([], False),
    ],
)  # fmt: skip
def test_cannot_be_learnt(compared: list[Comparison], expected: bool) -> None:
    said = of_rows.cannot_be_learnt(compared, "linear", "label")
    assert found(said, "cannot be learnt") == expected
    assert not expected or (said is not None and "'label'" in said.action)


@pytest.mark.parametrize(
    ("value", "low", "expected"), [(0.011, 0.002, True), (0.009, 0.002, False), (0.011, -0.002, False)]
)
def test_too_little_data(value: float, low: float, expected: bool) -> None:
    gain = Gain(value=value, stderr=0.004, low=low, now=0.1, factor=2.0, points=4)
    said = of_rows.few_rows(gain, 9000, "wrong answers", "a ridge")
    assert found(said, "too little data") == expected
    assert ("nothing beyond noise" in said.words) == (low < 0)


@pytest.mark.parametrize(
    ("sure", "blind", "stderr", "expected"),
    [(0.08, 0.0, 0.02, True), (0.06, 0.0, 0.02, False), (0.08, 0.04, 0.005, False), (0.08, 0.03, 0.005, True)],
)
def test_noisy_labels(sure: float, blind: float, stderr: float, expected: bool) -> None:
    rows = tuple(of_rows.suspect(n, f"a text {'x' * 200}", "a", "b", 0.9) for n in range(1, 4))
    noise = Noise(
        model="a ridge", rows=900, share=0.1, share_stderr=0.01, sure=sure, blind=blind, stderr=stderr, suspects=rows
    )
    said = of_rows.noisy_labels(noise, "label", "train")
    assert found(said, "noisy labels") == expected
    assert not expected or (
        "1, 2, 3 of train" in said.action and len(said.numbers["suspects"][0]["text"]) <= of_rows.WIDTH
    )
