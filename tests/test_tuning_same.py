"""Who is taken for being the same and cheaper: not by a few rows that agree, nor beside what broke the limit; and what is served keeps it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_tuning_fair import TEN, A, B, N, answering, drawn, lives

from multistep.controllers.answering import AnsweringProblem
from multistep.metrics import METRICS, Scored
from multistep.policy import Latency, Limit, admit
from multistep.predictors.recipe import Recipe
from multistep.standing import Stood
from multistep.strategy import Profile, Serving, TryRecipe
from multistep.tasks import Classify, Multilabel, Regress
from multistep.tune import answering as bench
from multistep.tune.answering import Answering
from multistep.tune.quality import Quality
from multistep.types import Comparison, Verdict


def right(n: int, wins: int = 0, losses: int = 0) -> Comparison:
    gain = np.repeat([1.0, -1.0, 0.0], [wins, losses, n - wins - losses])
    stderr = float(gain.std(ddof=1) / np.sqrt(n))
    return Comparison(
        metric="accuracy", candidate=0.9 + gain.mean(), incumbent=0.9, difference=gain.mean(), stderr=stderr, p=1.0, n=n,
        test="mcnemar", wins=wins, losses=losses,
    )  # fmt: skip


NO = Verdict(accept=False, rule="no gain")


def took(ms: float) -> Latency:
    return Latency(p50=ms, p95=2 * ms, p99=3 * ms, mean=ms, n=10)


@pytest.mark.parametrize(("n", "same"), [(21, False), (60, False), (111, False), (112, True), (400, True)])
def test_rows_that_agree_are_the_same_where_one_more_would_not_change_that(n: int, same: bool) -> None:
    verdict = admit(NO, right(n), took(1), took(10), None, made_up=True)
    assert verdict.accept == same and "with one row made up" in verdict.rule and f"± {1 / n:.4f}" in verdict.rule
    assert admit(NO, right(n), took(1), took(10), None).accept


def test_the_best_that_stood_has_its_row_too() -> None:
    verdict = admit(NO, right(400, wins=8), took(1), took(10), None, right(400, losses=1), made_up=True)
    assert verdict.accept and not admit(NO, right(400), took(1), took(10), None, right(60), made_up=True).accept


@pytest.mark.parametrize("metric", ["accuracy", "f1_macro", "mcc", "auroc", "log_loss", "cost"])
def test_a_cheaper_model_that_agrees_on_few_rows_does_not_take_the_place(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are right on all of the rows but some: there is no difference, and no error of it."""
    logits, targets = drawn(worth=6.0)
    targets = targets.copy()
    targets[:9] = (targets[:9] + 1) % 10
    logits["linear"] = logits["encoder"]
    monkeypatch.setattr(bench, "side_by_side", lambda *arguments: (took(1), took(10)))
    costs: Any = (1 - np.eye(10)).tolist() if metric == "cost" else None
    works = answering(B, logits, targets, metric=metric, costs=costs)
    lives(works, "measure", Profile())
    outcome = lives(works, "models", TryRecipe(recipe=Recipe(models=("linear",), calibration="none")))
    assert outcome.verdict is not None and outcome.verdict.evidence[0].difference == 0
    assert outcome.verdict.accept == (metric == "log_loss"), "of a loss every row says how far it is off"


def test_an_engine_that_was_found_to_agree_is_what_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "side_by_side", lambda *arguments: (took(1), took(10)))
    logits, targets = drawn(worth=6.0)
    works = answering(B, logits, targets)
    lives(works, "measure", Profile())
    engine = {"runtime": "onnx", "dtype": "fp32"}
    outcome = lives(works, "engine", TryRecipe(recipe=Recipe(models=("encoder",), calibration="none"), engine=engine))
    assert outcome.verdict is not None and outcome.verdict.accept and "made up" not in outcome.verdict.rule


def test_a_made_up_row_costs_what_a_mistake_does() -> None:
    problem = AnsweringProblem(
        task=Classify(labels=("a", "b")), metric="cost", models=("linear",), default=A, engine={}, limit=None, budget=9.0, rows=50,
        costs=((1.0, 3.0), (7.0, 1.0)),
    )  # fmt: skip
    targets = np.arange(50) % 2
    same = Scored(targets, np.zeros((50, 2)), targets)
    quality = Quality(problem)
    assert quality.compared(same, same, made_up=True).stderr == pytest.approx((2 + 6) / 2 / 50)
    assert quality.compared(same, same, made_up=False).stderr == 0 and not quality.right_or_wrong
    assert not quality.judged(same, same, 0.1).accept


def test_metrics_of_right_answers_are_all_but_losses() -> None:
    def right_or_wrong(metric: str, task: Any) -> bool:
        problem = AnsweringProblem(
            task=task, metric=metric, models=("linear",), default=A, engine={}, limit=None, budget=9.0, rows=50
        )
        return Quality(problem).right_or_wrong

    for task in (TEN, Multilabel(labels=("a", "b")), Regress()):
        for name, metric in METRICS.items():
            if task.kind in metric.tasks:
                expected = task.kind != "regress" and name not in ("log_loss", "calibration_error")
                assert right_or_wrong(name, task) == expected, (name, task.kind)


# ---------------------------------------------------------------------------------------------- limits


def test_what_broke_the_limit_is_no_measure_of_what_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing cheaper could take the place of what keeps it."""
    logits, targets = drawn(worth=6.0)
    targets = targets.copy()
    rng = np.random.default_rng(0)
    logits["linear"] = 4.0 * (0.5 * np.eye(10)[targets] + rng.normal(size=(N, 10)))
    works = answering(B, logits, targets, limit=Limit(ms=10), metric="accuracy")
    monkeypatch.setattr(bench, "one_by_one", lambda *arguments: took(9))  # p95 18 ms
    lives(works, "measure", Profile())
    monkeypatch.setattr(bench, "side_by_side", lambda *arguments: (took(4), took(9)))
    kept = lives(works, "models", TryRecipe(recipe=Recipe(models=("linear",), calibration="none")))
    assert kept.verdict is not None and kept.verdict.accept and "it keeps the limit" in kept.verdict.rule
    assert works.stood.best("accuracy", True, None).name == "as it stands"
    assert works.stood.best("accuracy", True, Limit(ms=10)).name == "linear"
    monkeypatch.setattr(bench, "side_by_side", lambda *arguments: (took(1), took(4)))
    cheaper = lives(works, "calibrate", TryRecipe(recipe=Recipe(models=("linear",), calibration="temperature")))
    assert cheaper.verdict is not None and "as the best that stood" not in cheaper.verdict.rule
    assert len(cheaper.verdict.evidence) == 1 or cheaper.verdict.accept


def test_nothing_that_stood_keeps_the_limit() -> None:
    works = answering(B, *drawn(), limit=Limit(ms=1e-9))
    lives(works, "measure", Profile())
    assert works.stood.best("accuracy", True, Limit(ms=1e-9)) == works.incumbent
    assert isinstance(works.stood, Stood)


@pytest.mark.parametrize(
    ("limit", "alone", "threads"),
    [
        (None, {1: 90.0, 2: 9.0}, 1),
        (20.0, {1: 90.0, 2: 9.0}, 2),
        (20.0, {1: 9.0, 2: 90.0}, 1),
        (1.0, {1: 90.0, 2: 9.0}, 2),
    ],
)
def test_what_is_served_keeps_the_limit_on_its_threads(
    limit: float | None, alone: dict[int, float], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread does for many texts together; a request alone may take longer on it than it was measured to."""
    clock = iter(range(10_000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))  # all are as fast
    monkeypatch.setattr(Answering, "_alone", lambda self, predictor, engine: took(alone[engine.threads] / 2))
    works = answering(B, *drawn(), limit=None if limit is None else Limit(ms=limit))
    lives(works, "measure", Profile())
    serving = lives(works, "serving", Serving()).facts["serving"]
    assert (serving["threads"], serving["batch"]) == (threads, 1)
    assert ("alone_ms" in serving) == (limit is not None)
