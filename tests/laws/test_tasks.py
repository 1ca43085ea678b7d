"""Laws that every task keeps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import TypeAdapter

from multistep.metrics import METRICS, Scored, check_metric, measure
from multistep.tasks import TASKS, Classify, Multilabel, Regress, Task
from multistep.types import Spec, UserError

ADAPTER: TypeAdapter[Classify | Multilabel | Regress] = TypeAdapter(Task)
EXAMPLES: dict[str, tuple[Classify | Multilabel | Regress, list]] = {
    "classify": (Classify(labels=("a", "b", "c")), ["a", "c", "b", "a", "c", "c"]),
    "multilabel": (Multilabel(labels=("a", "b")), [("a",), (), ("a", "b"), ("b",), ("b",), ()]),
    "regress": (Regress(mean=1.0, scale=2.0), [1.0, -2.5, 0.0, 7.0, 3.0, 3.0]),
}
ALL = pytest.mark.parametrize("kind", [cls.model_fields["kind"].default for cls in TASKS])


def sure_logits(task: Classify | Multilabel | Regress, targets: np.ndarray) -> np.ndarray:
    if task.kind == "classify":
        return 50.0 * np.eye(task.n_outputs)[targets]
    return np.where(targets, 50.0, -50.0) if task.kind == "multilabel" else targets[:, None]


@ALL
def test_round_trip(kind: str) -> None:
    task, _ = EXAMPLES[kind]
    again = ADAPTER.validate_python(json.loads(task.model_dump_json()))
    assert again == task and type(again) is type(task)


@ALL
def test_unknown_field_is_named(kind: str) -> None:
    task, _ = EXAMPLES[kind]
    with pytest.raises(UserError, match=r"unknown key 'label'\. Did you mean 'labels'"):
        type(task).parse({**task.model_dump(), "label": 1})


@ALL
def test_unknown_field_inside_another_spec_is_named(kind: str) -> None:
    class Holder(Spec):
        task: Task

    with pytest.raises(UserError, match=r"labelz.*Did you mean 'labels'"):
        Holder.parse({"task": {**EXAMPLES[kind][0].model_dump(), "labelz": 1}})


@ALL
def test_target_scores_best(kind: str) -> None:
    task, labels = EXAMPLES[kind]
    targets = task.encode(labels)
    right = sure_logits(task, targets)
    names = [m.name for m in METRICS.values() if task.kind in m.tasks]
    best = measure(names, task, Scored(targets, right, task.decide(right)))
    assert set(task.metrics) <= set(names) and task.default_metric in task.metrics
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = right[rng.permutation(len(right))] * rng.uniform(0.2, 1.0) + rng.normal(size=right.shape)
        scored = measure(names, task, Scored(targets, other, task.decide(other)))
        for name in names:
            if METRICS[name].higher_is_better:
                assert scored[name].value <= best[name].value == 1.0
            else:
                assert scored[name].value >= best[name].value == pytest.approx(0.0, abs=1e-9)


@ALL
def test_answers_are_the_labels_again(kind: str) -> None:
    task, labels = EXAMPLES[kind]
    targets = task.encode(labels)
    logits = sure_logits(task, targets)
    decisions = task.decide(logits)
    assert decisions.dtype == targets.dtype and (decisions == targets).all()
    answers = task.predictions(logits, decisions)
    assert [a.value for a in answers] == labels
    assert (task.encode([a.value for a in answers]) == targets).all()
    for answer in answers:
        assert set(answer.scores) == set(task.labels)
        assert answer.confidence is None if kind == "regress" else answer.confidence == pytest.approx(1.0)
        assert all(type(p) is float for p in answer.scores.values())


@ALL
def test_shapes_and_probabilities(kind: str) -> None:
    task, labels = EXAMPLES[kind]
    targets = task.encode(labels)
    logits = np.random.default_rng(0).normal(size=(len(labels), task.n_outputs)) * 30
    p = task.probabilities(logits)
    assert p.shape == logits.shape and task.nll_N(logits, targets).shape == (len(labels),)
    if kind == "classify":
        assert p.sum(axis=1) == pytest.approx(np.ones(len(labels)))
    if kind != "regress":
        assert ((p >= 0) & (p <= 1)).all()
    assert np.isfinite(task.nll_N(logits * 100, targets)).all()  # 3,000 nats do not overflow
    assert check_metric(task.default_metric, task.kind) == task.default_metric


def test_no_texts_no_answers() -> None:
    for task, _ in EXAMPLES.values():
        nothing = np.zeros((0, task.n_outputs))
        assert task.predictions(nothing, task.decide(nothing)) == []


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("classify", ["a", "bb"], "label 'bb': not one the model was trained on"),
        ("classify", ["a", None], "label None"),
        ("multilabel", [("a", "zz")], "label 'zz': not one"),
        ("multilabel", ["a"], "needs a list of labels"),
        ("regress", [1.0, "many"], "label 'many': regression needs a finite number"),
        ("regress", [float("nan")], "label nan"),
        ("regress", [None], "label None"),
    ],
)
def test_bad_label_is_named(kind: str, labels: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EXAMPLES[kind][0].encode(labels)


@pytest.mark.parametrize("labels", [(), ("a",), ("a", "a")])
def test_labels_are_two_different(labels: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="'labels': give two different labels"):
        Classify.parse({"labels": labels})


def test_numbers_are_labels_too() -> None:
    assert Classify(labels=("0", "1")).encode([1, "0"]).tolist() == [1, 0]
