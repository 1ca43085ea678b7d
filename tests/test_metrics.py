"""Values against scikit-learn and scipy, errors against a bootstrap by hand, p-values against scipy and noise."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk

from multistep.metrics import (
    METRICS,
    Scored,
    calibration_error,
    check_metric,
    compare,
    confusion,
    judge,
    log_softmax,
    measure,
    per_class,
)
from multistep.tasks import Classify, Multilabel, Regress
from multistep.types import UserError

BINARY = Classify(labels=("no", "yes"))
FIVE = Classify(labels=tuple("abcde"))
TAGS = Multilabel(labels=("x", "y", "z"))
NUMBER = Regress()


def classified(task: Classify, n: int, seed: int, noise: float = 1.5, targets: np.ndarray | None = None) -> Scored:
    rng = np.random.default_rng(seed)
    share = np.arange(1, task.n_outputs + 1) / sum(range(1, task.n_outputs + 1))
    targets = rng.choice(task.n_outputs, n, p=share) if targets is None else targets
    logits = 2.0 * np.eye(task.n_outputs)[targets] + noise * rng.normal(size=(n, task.n_outputs))
    return Scored(targets, logits, task.decide(logits))


def tagged(n: int, seed: int, targets: np.ndarray | None = None) -> Scored:
    rng = np.random.default_rng(seed)
    targets = rng.random((n, 3)) < [0.1, 0.3, 0.5] if targets is None else targets
    logits = 3.0 * targets - 1.5 + 1.5 * rng.normal(size=(n, 3))
    return Scored(targets, logits, TAGS.decide(logits))


def numbered(n: int, seed: int, noise: float = 0.8, targets: np.ndarray | None = None) -> Scored:
    rng = np.random.default_rng(seed)
    targets = np.round(rng.normal(size=n), 1) if targets is None else targets  # rounded: with ties
    logits = (targets + noise * rng.normal(size=n)).round(1)[:, None]
    return Scored(targets, logits, logits[:, 0])


def taken(s: Scored, rows: np.ndarray) -> Scored:
    return Scored(s.targets[rows], s.logits_NK[rows], s.decisions[rows])


def reference(name: str, kind: str, s: Scored) -> float:
    y, said, z = s.targets, s.decisions, s.logits_NK
    p = np.exp(log_softmax(z)) if kind == "classify" else 1 / (1 + np.exp(-z))
    if name == "auroc":
        if kind == "multilabel":
            return float(sk.roc_auc_score(y, z, average="macro"))
        return float(sk.roc_auc_score(y, p[:, 1]) if p.shape[1] == 2 else sk.roc_auc_score(y, p, multi_class="ovr"))
    if name == "log_loss":
        if kind == "classify":
            return float(sk.log_loss(y, p, labels=range(p.shape[1])))
        return float(np.mean([sk.log_loss(y[:, k], p[:, k]) for k in range(3)]))
    if name == "calibration_error":
        confidence, right = (p, y) if kind == "multilabel" else (p[range(len(y)), said], said == y)
        confidence, right, total = confidence.ravel(), right.ravel(), 0.0
        for low in np.arange(15) / 15:
            inside = (confidence >= low) & (confidence < low + 1 / 15)
            if inside.any():
                total += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
        return total
    functions = {
        "accuracy": lambda: sk.accuracy_score(y, said),
        "exact_match": lambda: sk.accuracy_score(y, said),
        "f1_macro": lambda: sk.f1_score(y, said, average="macro"),
        "f1_micro": lambda: sk.f1_score(y, said, average="micro"),
        "f1_weighted": lambda: sk.f1_score(y, said, average="weighted"),
        "precision_macro": lambda: sk.precision_score(y, said, average="macro"),
        "recall_macro": lambda: sk.recall_score(y, said, average="macro"),
        "mcc": lambda: sk.matthews_corrcoef(y, said),
        "mse": lambda: sk.mean_squared_error(y, said),
        "rmse": lambda: sk.root_mean_squared_error(y, said),
        "mae": lambda: sk.mean_absolute_error(y, said),
        "r2": lambda: sk.r2_score(y, said),
        "pearson": lambda: scipy.stats.pearsonr(y, said)[0],
        "spearman": lambda: scipy.stats.spearmanr(y, said)[0],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that is never said
        return float(functions[name]())


CASES = {
    "binary": (BINARY, classified(BINARY, 300, 0)),
    "five": (FIVE, classified(FIVE, 300, 1)),
    "five, three never right": (FIVE, classified(FIVE, 200, 2, targets=np.arange(200) % 2)),
    "tags": (TAGS, tagged(300, 3)),
    "number": (NUMBER, numbered(300, 4)),
}
FITTING = [
    (case, m.name)
    for case, (task, _) in CASES.items()
    for m in METRICS.values()
    if task.kind in m.tasks and not (m.name == "auroc" and "never" in case)  # scikit-learn does not define that one
]


@pytest.mark.parametrize(("case", "name"), FITTING)
def test_value_is_the_reference(case: str, name: str) -> None:
    task, s = CASES[case]
    assert measure([name], task, s)[name].value == pytest.approx(reference(name, task.kind, s), abs=1e-10)


@pytest.mark.parametrize(("case", "name"), [f for f in FITTING if f[0] in ("binary", "five", "tags", "number")])
def test_stderr_is_that_of_a_bootstrap_by_hand(case: str, name: str) -> None:
    task, s = CASES[case]
    rng = np.random.default_rng(7)
    draws = [rng.integers(0, len(s.targets), len(s.targets)) for _ in range(150)]
    again = [reference(name, task.kind, taken(s, rows)) for rows in draws]
    stderr = measure([name], task, s)[name].stderr
    assert stderr == pytest.approx(np.std(again), rel=0.35)  # two bootstraps of this size differ by as much


def test_stderr_of_accuracy_has_a_closed_form() -> None:
    task, s = CASES["five"]
    value, stderr = measure(["accuracy"], task, s)["accuracy"]
    assert stderr == pytest.approx(np.sqrt(value * (1 - value) / (len(s.targets) - 1)))


def test_mcnemar_is_exact() -> None:
    a = classified(FIVE, 200, 5)
    b = classified(FIVE, 200, 6, targets=a.targets)
    right_a, right_b = a.decisions == a.targets, b.decisions == b.targets
    won, lost = int((right_a & ~right_b).sum()), int((~right_a & right_b).sum())
    expected = scipy.stats.binomtest(won, won + lost, 0.5, alternative="greater").pvalue
    comparison = compare("accuracy", FIVE, a, b)
    assert comparison.p == pytest.approx(expected)
    assert comparison.difference == pytest.approx((won - lost) / 200)


def test_means_are_compared_with_a_paired_t_test() -> None:
    a = classified(FIVE, 200, 5)
    b = classified(FIVE, 200, 6, targets=a.targets)
    la, lb = FIVE.nll_N(a.logits_NK, a.targets), FIVE.nll_N(b.logits_NK, b.targets)
    comparison = compare("log_loss", FIVE, a, b)
    assert comparison.p == pytest.approx(scipy.stats.ttest_rel(la, lb, alternative="less").pvalue)
    assert comparison.difference == pytest.approx(lb.mean() - la.mean())  # a lower loss is a gain


def test_swapping_answers_gives_mcnemar_for_f1_micro() -> None:
    a = classified(FIVE, 300, 5)
    b = classified(FIVE, 300, 6, targets=a.targets)
    assert compare("f1_micro", FIVE, a, b).p == pytest.approx(compare("accuracy", FIVE, a, b).p, abs=0.07)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        *(("five", name) for name in ("accuracy", "f1_macro", "recall_macro", "mcc", "auroc", "log_loss")),
        *(("tags", name) for name in ("exact_match", "f1_macro", "f1_micro", "auroc")),
        *(("number", name) for name in ("mse", "pearson", "spearman")),
    ],
)
def test_noise_is_called_better_as_often_as_stated(case: str, name: str) -> None:
    task, called = CASES[case][0], 0
    for seed in range(400):
        if case == "five":
            targets = classified(FIVE, 150, 3 * seed).targets
            a, b = (classified(FIVE, 150, 3 * seed + i, targets=targets) for i in (1, 2))
        elif case == "tags":
            targets = tagged(150, 3 * seed).targets
            a, b = (tagged(150, 3 * seed + i, targets) for i in (1, 2))
        else:
            targets = numbered(150, 3 * seed).targets
            a, b = (numbered(150, 3 * seed + i, targets=targets) for i in (1, 2))
        called += compare(name, task, a, b, seed).p <= 0.1
    assert called <= 60  # 40 expected; more than 60 has a chance of 0.1 %


def test_same_answers_are_never_better() -> None:
    for task, s in CASES.values():
        for metric in METRICS.values():
            if task.kind in metric.tasks:
                comparison = compare(metric.name, task, s, s)
                assert (comparison.difference, comparison.stderr, comparison.p) == (0.0, 0.0, 1.0), metric.name


def test_77_classes_are_quick() -> None:
    task = Classify(labels=tuple(f"label {k}" for k in range(77)))
    s = classified(task, 5000, 0)
    start = time.perf_counter()
    measure(["f1_macro"], task, s)
    assert time.perf_counter() - start < 0.3


def test_judge_says_why() -> None:
    good = classified(FIVE, 400, 0, noise=1.0)
    poor = classified(FIVE, 400, 1, noise=2.0, targets=good.targets)
    verdict = judge("accuracy", FIVE, good, poor)
    assert verdict.accept and verdict.rule.startswith("accuracy +0.") and verdict.rule.endswith("<= 0.1: better")
    verdict = judge("f1", FIVE, poor, good)
    assert not verdict.accept and verdict.rule.startswith("f1_macro -0.") and verdict.rule.endswith(": worse")
    assert len(verdict.evidence) == 2
    assert not judge("accuracy", FIVE, good, good).accept


def test_judge_takes_a_better_loss_when_the_metric_is_not_worse() -> None:
    s = classified(FIVE, 400, 0)
    overconfident = Scored(s.targets, 5.0 * s.logits_NK, s.decisions)
    verdict = judge("accuracy", FIVE, s, overconfident)
    assert verdict.accept and "not worse; log_loss gain +" in verdict.rule
    assert not judge("accuracy", FIVE, overconfident, s).accept
    verdict = judge("log_loss", FIVE, s, overconfident)
    assert verdict.accept and len(verdict.evidence) == 1
    exact = numbered(300, 0)
    assert judge("spearman", NUMBER, exact, Scored(exact.targets, exact.logits_NK + 9, exact.decisions + 9)).accept


def test_outputs_that_are_not_finite_lose() -> None:
    s = classified(FIVE, 50, 0)
    broken = Scored(s.targets, np.where(np.arange(5) == 2, np.nan, s.logits_NK), s.decisions)
    assert not judge("accuracy", FIVE, broken, s).accept
    assert judge("accuracy", FIVE, s, broken).accept


def test_names_are_checked() -> None:
    assert check_metric("f1", "classify") == "f1_macro"
    assert list(measure(["f1"], *CASES["five"])) == ["f1"]
    with pytest.raises(UserError, match=r"'acuracy' is not known\. Did you mean 'accuracy'"):
        check_metric("acuracy", "classify")
    with pytest.raises(UserError, match=r"'mse' does not fit the task classify\. Use one of accuracy"):
        check_metric("mse", "classify")


def test_few_rows() -> None:
    _, s = CASES["five"]
    with pytest.raises(UserError, match="no rows"):
        measure(["accuracy"], FIVE, taken(s, np.arange(0)))
    one = measure([m.name for m in METRICS.values() if "classify" in m.tasks], FIVE, taken(s, np.arange(1)))
    assert all(np.isfinite(v.value) and np.isnan(v.stderr) for v in one.values())
    verdict = judge("f1_macro", FIVE, taken(s, np.arange(1)), taken(s, np.arange(1)))
    assert not verdict.accept


def test_constants_are_not_correlated() -> None:
    flat = Scored(np.arange(5.0), np.zeros((5, 1)), np.zeros(5))
    values = measure(["pearson", "spearman", "r2"], NUMBER, flat)
    assert values["pearson"] == values["spearman"] == (0.0, 0.0)
    assert values["r2"].value == pytest.approx(reference("r2", "regress", flat))


def test_tables_of_the_report() -> None:
    task, s = CASES["five"]
    assert (confusion(s.targets, s.decisions, 5) == sk.confusion_matrix(s.targets, s.decisions)).all()
    precision, recall, f1, support = map(np.asarray, sk.precision_recall_fscore_support(s.targets, s.decisions))
    rows = per_class(task, s)
    assert [r["label"] for r in rows] == list("abcde") and [r["support"] for r in rows] == list(support)
    for key, expected in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert [r[key] for r in rows] == pytest.approx(list(expected))
    assert [r["support"] for r in per_class(TAGS, CASES["tags"][1])] == list(CASES["tags"][1].targets.sum(axis=0))
    assert per_class(NUMBER, CASES["number"][1]) == []
    assert calibration_error(task, s) == pytest.approx(reference("calibration_error", "classify", s))
