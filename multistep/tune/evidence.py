"""What a diagnosis of labelled texts measures: the gap between train and control, guessing, out-of-fold answers, a learning curve.

Models here are convex and cheap: a ridge on the frozen encoder's features, whose answers for rows left out come with the fit, or the
linear model on n-grams, fitted four times without a fourth of the rows. None of them is ever served.
Shapes: N rows of train, V control rows, K outputs, S sizes of train.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from multistep.diagnosis import Gain, doubled_rows, suspects
from multistep.diagnosis.rows import MOST_ROWS, SHOWN, Noise, suspect
from multistep.diagnosis.training import GAP_ROWS, Fit
from multistep.metrics import Scored, compare
from multistep.models.linear import fit_linear
from multistep.models.ridge import fit_ridge, logits, one_hot, sharpness
from multistep.strategy import FitHead, FitLinear, Trial
from multistep.tasks import Task
from multistep.tune.actions import Bench, subsample
from multistep.types import Comparison, Interrupted, Outcome

FOLDS = 4
PARTS = ((0.125, 4), (0.25, 2), (0.5, 1))  # of train, and how many models on different rows
LINEAR_PARTS = (0.25, 0.5)  # where a model has to count its n-grams first
LEAST_PART = 20  # rows, and two for each output
SUREST = 0.2  # of the rows: hard texts are hardly among them, wrong labels as often as elsewhere
FAR = 4.0  # robust standard deviations: a number so far off contradicts
NEAR_WORDS, NEAR_CHARACTERS = 4, 5_000_000  # shorter texts agree by chance; more text takes over half a second
WHAT = {"classify": "wrong answers", "multilabel": "wrong labels", "regress": "squared error"}
_WORDS = re.compile(r"\w+")


class OutOfFold(NamedTuple):
    """`rows_N`: places in train; logits of models that have not seen the row [N,K], and on control [V,K] of one that has seen all;
    errors on control [S,V] of models on so many rows of train [S]."""

    model: str
    stands: bool  # what is served is the same model, so that nothing is known of where it is blind
    rows_N: np.ndarray
    left_out_NK: np.ndarray
    control_VK: np.ndarray
    sizes_S: np.ndarray
    error_SV: np.ndarray


def errors(task: Task, decisions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of each row: 0 or 1, the share of labels that are wrong, or the squared error."""
    match task.kind:
        case "classify":
            return (decisions != targets).astype(np.float64)
        case "multilabel":
            return (decisions != targets).mean(1)
        case "regress":
            return (decisions - targets) ** 2


# ---------------------------------------------------------------------------------------------- what stands


def gap(bench: Bench) -> Fit | None:
    """The encoder that stands, on rows of train and on control, beside the best guess. None where there is none: a linear model on
    n-grams knows its rows by heart and is none the worse for it."""
    work, predictor = bench.work, bench.incumbent
    assert predictor is not None
    if "encoder" not in predictor.models():
        return None
    task, n = work.task, len(work.texts["train"])
    take = np.sort(np.random.default_rng(work.config.seed).permutation(n)[:GAP_ROWS])
    state, rows = bench.families["encoder"], work.rows("train", work.max_length).subset(take)
    seen = task.decide(work.encoder_logits(work.encoder(state), rows, bench.bf16))
    control = bench.control("encoder", state)
    seen_N, new_N = errors(task, seen, work.targets["train"][take]), errors(task, control.decisions, control.targets)
    guess = guessed(task, work.targets["train"], control.targets)
    return Fit(
        model="encoder", what=WHAT[task.kind], train=float(seen_N.mean()), train_stderr=_stderr(seen_N, task),
        train_rows=len(take), validation=float(new_N.mean()), validation_stderr=_stderr(new_N, task),
        validation_rows=len(new_N), guess=float(errors(task, guess.decisions, guess.targets).mean()),
    )  # fmt: skip


def _stderr(error_N: np.ndarray, task: Task) -> float:
    """Of wrong answers with one made-up error, so that a few rows without any are not taken for certainty."""
    made_up = 0.0 if task.kind == "regress" else 1.0
    return float(np.sqrt(((error_N - error_N.mean()) ** 2).sum() + made_up) / max(1, len(error_N)))


def guessed(task: Task, train: np.ndarray, targets: np.ndarray) -> Scored:
    """The best answer without a text: the largest class, labels by their share, the mean."""
    n = len(targets)
    if task.kind == "regress":
        z_NK = np.full((n, 1), float(train.mean()))
    elif task.kind == "classify":
        count_K = np.bincount(train, minlength=task.n_outputs)
        z_NK = np.tile(np.log((count_K + 0.5) / (len(train) + 0.5 * len(count_K))), (n, 1))
    else:
        share_K = (train.sum(0) + 0.5) / (len(train) + 1)
        z_NK = np.tile(np.log(share_K / (1 - share_K)), (n, 1))
    return Scored(targets, z_NK, task.decide(z_NK))


def against_guess(bench: Bench) -> list[Comparison]:
    """What stands against a guess on both halves of validation: nothing is decided with them any more."""
    task, halves = bench.work.task, [bench.of_incumbent(s) for s in ("control", "calibration")]
    known = [h for h in halves if h is not None]
    stands = Scored(*(np.concatenate([h[i] for h in known]) for i in range(3)))
    guess = guessed(task, bench.work.targets["train"], stands.targets)
    names = {"classify": ("accuracy", "log_loss"), "multilabel": ("exact_match", "log_loss"), "regress": ("mse",)}
    return [compare(name, task, stands, guess, bench.work.config.seed) for name in names[task.kind]]


def near(texts: Mapping[str, Sequence[str]]) -> dict[str, int] | None:
    """By pair of splits: rows of the second with the words of a text of the first in another order. None where there is too much text."""
    if sum(len(t) for part in texts.values() for t in part) > NEAR_CHARACTERS:
        return None
    groups = {"train": ("train",), "validation": ("control", "calibration"), "test": ("test",)}
    bags: dict[str, list[tuple[str, str]]] = {}
    for name, parts in groups.items():
        words = [_WORDS.findall(t.casefold()) for part in parts for t in texts[part]]
        bags[name] = [(" ".join(w), " ".join(sorted(w))) for w in words if len(w) >= NEAR_WORDS]
    found = {}
    for earlier, later in (("train", "validation"), ("train", "test"), ("validation", "test")):
        exact, any_order = {text for text, _ in bags[earlier]}, {bag for _, bag in bags[earlier]}
        if count := sum(bag in any_order and text not in exact for text, bag in bags[later]):
            found[f"{earlier}-{later}"] = count
    return found


# ---------------------------------------------------------------------------------------------- out of fold


def by_head(bench: Bench, action: FitHead) -> OutOfFold:
    """A ridge on the features of the frozen encoder that the head was solved on."""
    work, length = bench.work, bench.work.max_length
    take = subsample(work, action.max_rows)
    train_ND, _ = work.features("train", action.max_length, bf16=action.bf16, take=take)
    control_VD, _ = work.features("control", action.max_length, bf16=action.bf16)
    work.use_length(length)
    task, (scale, mean) = work.task, work.units
    rows_N = np.arange(len(work.texts["train"])) if take is None else take
    if len(rows_N) > MOST_ROWS:
        some = np.sort(np.random.default_rng(work.config.seed).permutation(len(rows_N))[:MOST_ROWS])
        rows_N, train_ND = rows_N[some], train_ND[some]
    targets = work.targets["train"][rows_N]
    target_NK = one_hot((targets - mean) / scale if task.kind == "regress" else targets, task.n_outputs)
    ridge = fit_ridge(train_ND, target_NK)
    exclusive = task.kind == "classify"
    factor = 1.0 if task.kind == "regress" else sharpness(ridge.left_out_NK, target_NK, exclusive)

    def as_logits(score_NK: np.ndarray) -> np.ndarray:
        return score_NK * scale + mean if task.kind == "regress" else logits(score_NK, factor, exclusive)

    control_VK, rng = as_logits(ridge.scores(control_VD)), np.random.default_rng(work.config.seed)
    sizes, curve = [], []
    for share, times in PARTS:
        size = int(share * len(rows_N))
        if size < max(LEAST_PART, 2 * task.n_outputs):
            continue
        found = []
        for _ in range(times):
            some = rng.permutation(len(rows_N))[:size]
            part = fit_ridge(train_ND[some], target_NK[some], (ridge.l2 * share,))
            found.append(errors(task, task.decide(as_logits(part.scores(control_VD))), work.targets["control"]))
        sizes.append(size)
        curve.append(np.mean(found, axis=0))
    sizes.append(len(rows_N))
    curve.append(errors(task, task.decide(control_VK), work.targets["control"]))
    name = "a ridge on the frozen encoder"
    return OutOfFold(
        name, False, rows_N, as_logits(ridge.left_out_NK), control_VK, np.array(sizes, np.float64), np.array(curve)
    )


def by_linear(bench: Bench, trial: Trial, outcome: Outcome, seconds: float) -> OutOfFold | str:
    """The linear model of that trial on folds and parts of train, at its strength; or why not: `seconds` would not do."""
    assert isinstance(trial.action, FitLinear)
    action, work, task = trial.action, bench.work, bench.work.task
    texts, targets, n = work.texts["train"], work.targets["train"], len(work.texts["train"])
    strength = float(outcome.facts["strength"])
    control, right = work.texts["control"], work.targets["control"]
    order, begun = np.random.default_rng(work.config.seed).permutation(n), time.monotonic()

    def fitted(rows: np.ndarray, others: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        model, _ = fit_linear(
            [texts[i] for i in rows.tolist()], targets[rows], task.kind, task.n_outputs, features=action.features, l2s=(strength / len(rows),),
            solver=action.solver, valid=(control, right),
        )  # fmt: skip
        if signal := bench.stop():
            raise Interrupted(signal)
        return model.logits(others) if others else np.zeros((0, task.n_outputs)), model.logits(control)

    left_out_NK, of_folds = np.zeros((n, task.n_outputs)), []
    for fold in range(FOLDS):
        here, rest = order[fold::FOLDS], np.delete(order, np.s_[fold::FOLDS])
        left_out_NK[here], control_VK = fitted(np.sort(rest), [texts[i] for i in here.tolist()])
        of_folds.append(errors(task, task.decide(control_VK), right))
        took = time.monotonic() - begun
        if fold == 0 and took * (FOLDS + sum(LINEAR_PARTS) / (1 - 1 / FOLDS)) > seconds:
            return f"the first of {FOLDS} folds took {took:.1f} s of the {seconds:.1f} s that there are, and parts of train come after them"
    sizes, curve = [], []
    for share in LINEAR_PARTS:
        size = int(share * n)
        if size >= max(LEAST_PART, 2 * task.n_outputs):
            sizes.append(size)
            curve.append(errors(task, task.decide(fitted(np.sort(order[:size]), ())[1]), right))
    control_VK = work.logits("linear", trial.id, "control", bench.bf16)
    sizes += [n - n // FOLDS, n]
    curve += [np.mean(of_folds, axis=0), errors(task, task.decide(control_VK), right)]
    assert bench.incumbent is not None
    return OutOfFold(
        "the linear model",
        bench.incumbent.models() == ("linear",),
        np.arange(n),
        left_out_NK,
        control_VK,
        np.array(sizes, np.float64),
        np.array(curve),
    )


def more_rows(found: OutOfFold, seed: int) -> Gain | None:
    """What twice the rows would bring; None where there are too few sizes for a law."""
    return doubled_rows(found.sizes_S, found.error_SV, seed) if len(found.sizes_S) >= 3 else None


# ---------------------------------------------------------------------------------------------- labels


def noise(bench: Bench, found: OutOfFold) -> Noise:
    """How often the model contradicts labels where it is surest, how often it is blind there, and the rows themselves."""
    work, task = bench.work, bench.work.task
    given, right = work.targets["train"][found.rows_N], work.targets["control"]
    stands = bench.of_incumbent("control")
    assert stands is not None
    if task.kind == "regress":
        off_N = found.left_out_NK[:, 0] - given
        centre, spread = float(np.median(off_N)), _spread(off_N)
        said_N, against_N = np.ones(len(given), bool), np.abs(off_N - centre) > FAR * spread
        sure_V, wrong_V, better_V = (
            np.ones(len(right), bool),
            np.abs(found.control_VK[:, 0] - right - centre) > FAR * spread,
            np.abs(stands.decisions - right) > FAR * spread,
        )
        share, share_stderr = float(against_N.mean()), float(against_N.std() / len(against_N) ** 0.5)
        rows = _far_off(bench, found, given, (off_N - centre) / spread)
    else:
        sure_N, sure_V = _certainty(task, found.left_out_NK), _certainty(task, found.control_VK)
        bar = float(np.quantile(sure_N, 1 - SUREST))
        said_N, sure_V = sure_N >= bar, sure_V >= bar
        against_N = _differ(task.decide(found.left_out_NK), given)
        wrong_V, better_V = _differ(task.decide(found.control_VK), right), _differ(stands.decisions, right)
        share, share_stderr, rows = _contradicted(bench, found, given)
    apart_S = wrong_V[sure_V].astype(np.float64) - better_V[sure_V]
    n, s, rate = int(said_N.sum()), len(apart_S), float(against_N[said_N].mean())
    blind, variance = 0.0, rate * (1 - rate) / max(1, n)
    if not found.stands:
        blind = max(0.0, float(apart_S.mean())) if s else 0.0
        variance += ((apart_S**2).sum() + 1) / (s + 2) / (s + 1)  # with one made-up row of control
    return Noise(
        model=found.model, rows=len(given), share=share, share_stderr=share_stderr, sure=rate, blind=blind,
        stderr=float(variance) ** 0.5, suspects=tuple(rows[:SHOWN]),
    )  # fmt: skip


def _certainty(task: Task, logits_NK: np.ndarray) -> np.ndarray:
    """The probability of the answer; of several labels, that of the least certain."""
    p_NK = task.probabilities(logits_NK)
    return p_NK.max(1) if task.kind == "classify" else np.maximum(p_NK, 1 - p_NK).min(1)


def _differ(a_N: np.ndarray, b_N: np.ndarray) -> np.ndarray:
    return a_N != b_N if a_N.ndim == 1 else (a_N != b_N).any(1)


def _spread(off_N: np.ndarray) -> float:
    """A standard deviation that a few numbers far off do not move."""
    return max(1.4826 * float(np.median(np.abs(off_N - np.median(off_N)))), 1e-12)


def _contradicted(bench: Bench, found: OutOfFold, given: np.ndarray) -> tuple[float, float, list[dict]]:
    """(share, its standard error, rows) by confident learning: of classes, or of each label by itself."""
    task, seed = bench.work.task, bench.work.config.seed
    p_NK = task.probabilities(found.left_out_NK)
    if task.kind == "classify":
        s = suspects(p_NK, given, seed)
        rows = [
            _row(bench, found, i, task.labels[given[i]], task.labels[j], float(p_NK[i, j]))
            for i, j in zip(s.rows_M[:SHOWN].tolist(), s.likely_M.tolist(), strict=False)
        ]
        return s.share, s.stderr, rows
    shares, variances, all_rows = [], [], []
    for k, label in enumerate(task.labels):
        if 0 < given[:, k].sum() < len(given):
            s = suspects(np.stack([1 - p_NK[:, k], p_NK[:, k]], axis=1), given[:, k].astype(np.int64), seed)
            shares.append(s.share)
            variances.append(s.stderr**2)
            names = (f"not {label}", label)
            all_rows += [
                _row(bench, found, i, names[1 - j], names[j], float(p_NK[i, k] if j else 1 - p_NK[i, k]))
                for i, j in zip(s.rows_M[:SHOWN].tolist(), s.likely_M.tolist(), strict=False)
            ]
    all_rows.sort(key=lambda row: -row["probability"])
    return min(1.0, sum(shares)), sum(variances) ** 0.5, all_rows


def _far_off(bench: Bench, found: OutOfFold, given: np.ndarray, deviations_N: np.ndarray) -> list[dict]:
    from scipy.special import ndtr

    order = np.argsort(-np.abs(deviations_N), kind="stable")[:SHOWN]
    return [
        _row(
            bench,
            found,
            i,
            f"{given[i]:g}",
            f"{found.left_out_NK[i, 0]:.4g}",
            float(1 - 2 * ndtr(-abs(deviations_N[i]))),
        )
        for i in order.tolist()
        if abs(deviations_N[i]) > FAR
    ]


def _row(bench: Bench, found: OutOfFold, i: int, given: str, likely: str, probability: float) -> dict:
    place, numbers = int(found.rows_N[i]), bench.work.dataset.train_rows
    number = numbers[place] if numbers else place + 1
    return suspect(number, bench.work.texts["train"][place], given, likely, float(probability))
