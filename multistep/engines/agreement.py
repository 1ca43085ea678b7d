"""Whether an engine may stand in for another: it gives the same, or differs by less than what is stated here; else the numbers say why.

Labels: by |p - p'| of all probabilities, and the share of equal decisions; each text is judged in a batch and alone, and the worse counts.
Numbers (regression): by |v - v'| in standard deviations of the reference's values.
Texts: all the same, or the score of the metric (BLEU where there is one) at most 0.3 of 100 points below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from multistep.data.cells import Record
from multistep.evaluate import TextModel
from multistep.metrics import TaskLike
from multistep.metrics.texts import measure_rows, statistics
from multistep.metrics.verdicts import POINTS, TEXTS, agrees
from multistep.tasks.writing import LOSSES
from multistep.types import Spec
from multistep.writing import Speaker

DECISIONS = 0.99  # of decisions that are equal, at least
MEAN = 0.01  # |p - p'|, at most
LARGEST = 0.1
_SAME_LOGITS = 1e-3
_ALONE = 64  # texts that are judged alone too
_IN_POINTS = ("bleu", "chrf")  # metrics whose values are of 100, not of 1


class Agreement(Spec):
    """`same`: the share of equal decisions or texts; `mean`, `largest`: of |p - p'|; `points`: candidate - reference, of 100."""

    ok: bool
    n: int
    same: float
    mean: float | None = None
    largest: float | None = None
    points: float | None = None
    words: str


def agree_labels(task: TaskLike, reference: TextModel, candidate: TextModel, texts: Sequence[str]) -> Agreement:
    """Compare logits on texts. Raises ValueError without a text."""
    if not texts:
        raise ValueError("agree: give at least one text")
    a_NK, b_NK = reference.logits(texts), candidate.logits(texts)
    step = max(1, len(texts) // _ALONE)
    some = [*range(0, len(texts), step)][:_ALONE]
    alone_MK = np.concatenate([candidate.logits([texts[i]]) for i in some])
    apart = [_apart(task, a_NK, b_NK), _apart(task, a_NK[some], alone_MK)]
    if not (np.isfinite(b_NK).all() and np.isfinite(alone_MK).all()):
        return Agreement(ok=False, n=len(texts), same=0.0, words="refused: not all of its logits are finite")
    mean, largest, same = max(p[0] for p in apart), max(p[1] for p in apart), min(p[2] for p in apart)
    ok = same >= DECISIONS and mean <= MEAN and largest <= LARGEST
    what = "values, in standard deviations" if task.kind == "regress" else "probabilities"
    said = f"{what}: apart by {mean:.4f} on average, {largest:.4f} at most; {100 * same:.1f} % of decisions the same"
    rule = f"needs {MEAN}, {LARGEST} and {100 * DECISIONS:.0f} %"
    return Agreement(
        ok=ok, n=len(texts), same=same, mean=mean, largest=largest, words=said if ok else f"refused: {said}; {rule}"
    )


def _apart(task: TaskLike, a_NK: np.ndarray, b_NK: np.ndarray) -> tuple[float, float, float]:
    if task.kind == "regress":
        apart = np.abs(a_NK - b_NK) / max(float(a_NK.std()), 1e-12)
        return float(apart.mean()), float(apart.max()), 1.0
    apart = np.abs(task.probabilities(a_NK) - task.probabilities(b_NK))
    rows = (task.decide(a_NK) == task.decide(b_NK)).reshape(len(a_NK), -1).all(1)
    close = np.abs(a_NK - b_NK).max(1) <= _SAME_LOGITS  # a tie that rounding turns is no other decision
    return float(apart.mean()), float(apart.max()), float((rows | close).mean())


def agree_texts(
    reference: Speaker, candidate: Speaker, records: Sequence[Record], metric: str | None = None
) -> Agreement:
    """Compare what they write for records; where those have right answers, `metric`, one of texts, says what another text costs."""
    if not records:
        raise ValueError("agree: give at least one record")
    a, b = ([str(p.value) for p in s.write(records)] for s in (reference, candidate))
    same = float(np.mean([x == y for x, y in zip(a, b, strict=True)]))
    answers = [r.targets for r in records]
    points: float | None = None
    said = f"{100 * same:.1f} % of {len(records)} texts the same"
    rule = f"needs {100 * TEXTS:.0f} %"
    if metric is not None and metric not in LOSSES and all(answers):
        points = _points(metric, b, answers) - _points(metric, a, answers)
        said += f", {metric} {points:+.2f}"
        rule = f"needs {metric} {-POINTS} at least"
    ok = agrees(same, points)
    return Agreement(ok=ok, n=len(records), same=same, points=points, words=said if ok else f"refused: {said}; {rule}")


def _points(metric: str, texts: Sequence[str], answers: Sequence[Any]) -> float:
    value = measure_rows(metric, statistics(metric, texts, answers), 0).value
    return value if metric in _IN_POINTS else 100 * value
