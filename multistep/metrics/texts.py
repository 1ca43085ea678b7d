"""Metrics of written answers: BLEU, chrF, ROUGE, exact match, F1, numbers, choices; perplexity and bits per byte.

Every metric is a function of a sum over examples. An example is a row of sufficient statistics, so a corpus is a sum of
rows, a resampled corpus is one row of a matrix product, and two systems are compared without reading a text again.
- BLEU, chrF: the statistics are sacrebleu's own; the BLEU tokenizer is chosen from the references (`bleu_tokenizer`).
- ROUGE: F-measure of the best reference, mean over examples, no stemming. Latin text gives rouge-score's numbers: words
  are runs of a-z and 0-9. Elsewhere (where rouge-score sees nothing): runs of letters, and in scripts without spaces
  (Chinese) every character is a word. The longest common subsequence is found on the bits of integers.
- exact_match, f1: SQuAD's normalization, best reference. In a text with characters of scripts without spaces each of them
  is a word, and all punctuation goes, not only that of ASCII.
- numbers: the last number written equals that of a reference as a number ("#### 1,200" = "so 1200.0").
- choice_accuracy: the answer is one of the references, letter for letter but for white space around words.
Two systems are compared by exact McNemar (scores 0 or 1), paired t (other means) or the swap test (functions of sums).
Sources: Papineni et al. 2002 (BLEU); Popović 2015 (chrF); Post 2018, arXiv 1804.08771 (sacrebleu); Lin 2004 (ROUGE);
Rajpurkar et al. 2016, arXiv 1606.05250 (SQuAD); Cobbe et al. 2021, arXiv 2110.14168 (GSM8K); Hyyrö 2004 (bit-parallel
subsequences); Koehn 2004 (bootstrap of BLEU); Riezler and Maxwell 2005 (why the p-value comes from swaps).
Differs from the sources: nothing known but the scripts named above.
Shapes: N examples, S statistics, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from multistep.metrics.counts import ratio
from multistep.metrics.judge import counted, not_finite
from multistep.metrics.measure import stderr_of
from multistep.metrics.verdicts import ALPHA, better, large_gain, paired_t
from multistep.metrics.words import f1, last_number, normalized, rouge, rouge_words, unspaced
from multistep.text import unspaced_share
from multistep.types import Comparison, MetricValue, UserError, Verdict, nearest

RESAMPLES = 1000  # of the bootstrap
SWAPS = 999  # of the swap test: the smallest p is 1/1000
_CELLS = 4_000_000  # of a block of resamples: 32 MB
_ORDERS = 4  # of BLEU

References = Sequence[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class LanguageMetric:
    """`signature`: how it is counted, in words. `rows`: texts -> [N, S]; None when it is read off losses, not texts."""

    name: str
    higher_is_better: bool
    tasks: tuple[str, ...]
    signature: str
    value: Callable[[np.ndarray], np.ndarray]
    rows: Callable[[Sequence[str], References], np.ndarray] | None
    mean: bool = True  # value = sum of scores / examples
    zero_one: bool = False


# ---------------------------------------------------------------------------------------------- BLEU and chrF


def bleu_tokenizer(references: References) -> str:
    """sacrebleu's name: "13a"; "zh" for Chinese; "char" for other scripts without spaces (Japanese, Thai)."""
    texts = [text for row in references for text in row]
    if unspaced_share(texts) <= 0.3:
        return "13a"
    letters = [c for text in texts[:500] for c in text if unspaced().match(c)]
    return "zh" if 2 * sum("\u3400" <= c <= "\u9fff" for c in letters) > len(letters) else "char"


def _sacrebleu(name: str, references: References) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return CHRF() if name == "chrf" else BLEU(tokenize=bleu_tokenizer(references), force=True)


def _sacrebleu_rows(name: str, outputs: Sequence[str], references: References) -> np.ndarray:
    most = max(len(row) for row in references)
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    rows = _sacrebleu(name, references)._extract_corpus_statistics(list(outputs), streams)
    return np.asarray(rows, dtype=np.float64)


def _bleu_rows(outputs: Sequence[str], references: References) -> np.ndarray:
    return _sacrebleu_rows("bleu", outputs, references)


def _chrf_rows(outputs: Sequence[str], references: References) -> np.ndarray:
    return _sacrebleu_rows("chrf", outputs, references)


def _bleu(sums: np.ndarray) -> np.ndarray:
    """From [length, reference length, right x 4, written x 4], with exponential smoothing, in 0..100."""
    length, goal, right, written = sums[..., 0], sums[..., 1], sums[..., 2 : 2 + _ORDERS], sums[..., 2 + _ORDERS :]
    halved = np.where(right > 0, right, 0.5 ** np.cumsum(right == 0, axis=-1))
    precision = ratio(halved, written)
    known = np.asarray((right > 0).any(axis=-1) & (written > 0).all(axis=-1))
    geometric = np.exp(np.log(np.where(known[..., None], precision, 1.0)).mean(axis=-1))
    brevity = np.exp(np.minimum(1.0 - ratio(goal, length), 0.0))
    return np.where(known, 100.0 * brevity * geometric, 0.0)


def _chrf(sums: np.ndarray) -> np.ndarray:
    """From [written, in the reference, in both] x 6 orders: F with recall weighing 4 times precision, in 0..100."""
    written, wanted, both = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    present = (written > 0) & (wanted > 0)
    orders = np.maximum(present.sum(axis=-1), 1)
    precision = (ratio(both, written) * present).sum(axis=-1) / orders
    recall = (ratio(both, wanted) * present).sum(axis=-1) / orders
    return 100.0 * ratio(5.0 * precision * recall, 4.0 * precision + recall)


# ---------------------------------------------------------------------------------------------- scores of an example


def _best(score: Callable[[str, str], float], outputs: Sequence[str], references: References) -> np.ndarray:
    """[N, 2]: the score with the best reference, and 1."""
    best = [max(score(said, right) for right in row) for said, row in zip(outputs, references, strict=True)]
    return np.stack([np.asarray(best, np.float64), np.ones(len(best))], axis=1)


def _rouge_rows(order: int) -> Callable[[Sequence[str], References], np.ndarray]:
    def rows(outputs: Sequence[str], references: References) -> np.ndarray:
        best = []
        for said, row in zip(outputs, references, strict=True):
            written = rouge_words(said)
            best.append(max(rouge(order, written, rouge_words(right)) for right in row))
        return np.stack([np.asarray(best, np.float64), np.ones(len(best))], axis=1)

    return rows


def _exact_rows(outputs: Sequence[str], references: References) -> np.ndarray:
    return _best(lambda said, right: float(normalized(said) == normalized(right)), outputs, references)


def _f1_rows(outputs: Sequence[str], references: References) -> np.ndarray:
    return _best(f1, outputs, references)


def _number_rows(outputs: Sequence[str], references: References) -> np.ndarray:
    right = [{last_number(text) for text in row} - {None} for row in references]
    if not any(right):
        raise UserError("metric: numbers needs a number in the right answers; there is none. Use exact_match or f1.")
    hit = [float(last_number(said) in wanted) for said, wanted in zip(outputs, right, strict=True)]
    return np.stack([np.asarray(hit), np.ones(len(hit))], axis=1)


def _choice_rows(outputs: Sequence[str], references: References) -> np.ndarray:
    return _best(lambda said, right: float(said.split() == right.split()), outputs, references)


# ---------------------------------------------------------------------------------------------- the list


def _mean(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 0], sums[..., 1])


def _perplexity(sums: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums[..., 0], sums[..., 1]))


def _bits_per_byte(sums: np.ndarray) -> np.ndarray:
    return ratio(sums[..., 0], sums[..., 2]) / math.log(2.0)


_WRITES = ("translate", "summarize", "answer", "chat")
_ROUGE = "F-measure of the best reference, no stemming; words: a-z and 0-9, other letters, single characters of Chinese"
_LIST = (
    LanguageMetric("bleu", True, _WRITES, "sacrebleu, corpus, 4 orders, smoothed exp", _bleu, _bleu_rows, mean=False),
    LanguageMetric("chrf", True, _WRITES, "sacrebleu, corpus, chrF2, 6 orders", _chrf, _chrf_rows, mean=False),
    LanguageMetric("rouge1", True, _WRITES, _ROUGE, _mean, _rouge_rows(1)),
    LanguageMetric("rouge2", True, _WRITES, _ROUGE, _mean, _rouge_rows(2)),
    LanguageMetric("rougeL", True, _WRITES, _ROUGE, _mean, _rouge_rows(0)),
    LanguageMetric("exact_match", True, ("answer", "chat"), "SQuAD's normalization", _mean, _exact_rows, zero_one=True),
    LanguageMetric("f1", True, ("answer", "chat"), "SQuAD's normalization; Chinese by character", _mean, _f1_rows),
    LanguageMetric("numbers", True, ("answer", "chat"), "the last number is equal", _mean, _number_rows, zero_one=True),
    LanguageMetric(
        "choice_accuracy", True, ("answer",), "equal but for white space", _mean, _choice_rows, zero_one=True
    ),
    LanguageMetric("perplexity", False, ("lm", *_WRITES), "exp(nats / tokens)", _perplexity, None, mean=False),
    LanguageMetric("bits_per_byte", False, ("lm", *_WRITES), "bits / UTF-8 bytes", _bits_per_byte, None, mean=False),
)
LANGUAGE_METRICS: Mapping[str, LanguageMetric] = {m.name: m for m in _LIST}
LANGUAGE_ALIASES: Mapping[str, str] = {
    "em": "exact_match", "rouge": "rougeL", "rougel": "rougeL", "rouge_l": "rougeL", "rouge-l": "rougeL",
    "rouge-1": "rouge1", "rouge-2": "rouge2", "chrF": "chrf", "chrf2": "chrf", "BLEU": "bleu", "sacrebleu": "bleu",
    "ppl": "perplexity", "bpb": "bits_per_byte",
}  # fmt: skip


def check_language_metric(name: str, task_kind: str) -> str:
    """The metric's own name ("rouge" -> "rougeL"). Raises UserError when there is none, or it does not fit."""
    name = LANGUAGE_ALIASES.get(name, name)
    fitting = [m.name for m in _LIST if task_kind in m.tasks]
    if name not in LANGUAGE_METRICS:
        raise UserError(f"metric: {name!r} is not known.{nearest(name, [*LANGUAGE_METRICS, *LANGUAGE_ALIASES])}")
    if name not in fitting:
        raise UserError(f"metric: {name!r} does not fit the task {task_kind}. Use one of {', '.join(fitting)}.")
    return name


def _metric(name: str) -> LanguageMetric:
    name = LANGUAGE_ALIASES.get(name, name)
    if name not in LANGUAGE_METRICS:
        raise UserError(f"metric: {name!r} is not known.{nearest(name, list(LANGUAGE_METRICS))}")
    return LANGUAGE_METRICS[name]


def signature(name: str, references: References = ()) -> str:
    """How the metric is counted on these references; for bleu and chrf sacrebleu's signature, its version included."""
    metric = _metric(name)
    if metric.name not in ("bleu", "chrf") or not references:
        return metric.signature
    scorer = _sacrebleu(metric.name, references)
    sizes = {len(row) for row in references}
    scorer.num_refs = sizes.pop() if len(sizes) == 1 else -1  # sacrebleu's mark for "varies"
    return str(scorer.get_signature())


# ---------------------------------------------------------------------------------------------- statistics and values


def statistics(name: str, outputs: Sequence[str], references: References) -> np.ndarray:
    """[N, S] float64; the statistics of a corpus are the sum over its examples."""
    metric = _metric(name)
    if metric.rows is None:
        raise ValueError(f"statistics: {metric.name} is read off losses: use loss_statistics")
    if len(outputs) != len(references):
        raise ValueError(f"statistics: {len(outputs)} outputs for {len(references)} rows of references")
    if not outputs:
        raise UserError("metrics: there are no rows to measure. Give at least one row with a right answer.")
    for i, row in enumerate(references):
        if not row:
            raise UserError(f"metrics: row {i + 1} has no right answer to measure {metric.name} with. Leave it out.")
    return metric.rows(outputs, references)


def loss_statistics(nats_N: np.ndarray, tokens_N: np.ndarray, bytes_N: np.ndarray) -> np.ndarray:
    """[N, 3] for perplexity and bits_per_byte: the loss of each text in nats, its tokens, its UTF-8 bytes."""
    rows = np.stack([np.asarray(x, np.float64) for x in (nats_N, tokens_N, bytes_N)], axis=1)
    if len(rows) == 0 or (rows[:, 1:].sum(axis=0) == 0).any():
        raise UserError("metrics: there is no text to measure. Give at least one text that is not empty.")
    return rows


def value(name: str, sums: np.ndarray) -> np.ndarray:
    """[..., S] -> [...]: the metric of summed statistics; bleu and chrf in 0..100, scores and shares in 0..1."""
    return _metric(name).value(np.asarray(sums, np.float64))


def resampled(rows_NS: np.ndarray, seed: int) -> np.ndarray:
    """[RESAMPLES, S]: sums when the N examples are drawn again with replacement. Equal N and seed: the same draws."""
    n, rng = len(rows_NS), np.random.default_rng(seed)
    sums = []
    for size in _blocks(RESAMPLES, n):
        at = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        sums.append(np.bincount(at.ravel(), minlength=size * n).reshape(size, n) @ rows_NS)
    return np.concatenate(sums)


def _blocks(total: int, n: int) -> Iterator[int]:
    size = max(1, _CELLS // max(n, 1))
    for begin in range(0, total, size):
        yield min(size, total - begin)


def measure_rows(name: str, rows_NS: np.ndarray, seed: int = 0) -> MetricValue:
    """Value and bootstrap standard error from statistics. With one example the error is nan: unknown."""
    spread = float(value(name, resampled(rows_NS, seed)).std()) if len(rows_NS) > 1 else math.nan
    return MetricValue(float(value(name, rows_NS.sum(axis=0))), spread)


def measure_texts(
    names: Sequence[str], outputs: Sequence[str], references: References, seed: int = 0
) -> dict[str, MetricValue]:
    """Value and bootstrap standard error (1,000 resamples of the examples) of each metric, under the names given."""
    return {name: measure_rows(name, statistics(name, outputs, references), seed) for name in names}


# ---------------------------------------------------------------------------------------------- comparison


def compare_rows(name: str, candidate_NS: np.ndarray, incumbent_NS: np.ndarray, seed: int = 0) -> Comparison:
    """Paired over the examples. Differences: candidate - incumbent, signed so that higher is better; p one-sided."""
    metric, n, p_worse = _metric(name), len(candidate_NS), None
    if n == 0 or candidate_NS.shape != incumbent_NS.shape:
        raise ValueError("compare_rows: candidate and incumbent must be scored on the same rows, at least one")
    sign = 1.0 if metric.higher_is_better else -1.0
    new_S, old_S = candidate_NS.sum(axis=0), incumbent_NS.sum(axis=0)
    new, old = float(metric.value(new_S)), float(metric.value(old_S))
    gain = sign * (new - old)
    if metric.mean:
        gain_N = candidate_NS[:, 0] - incumbent_NS[:, 0]
        stderr = stderr_of(gain_N)
        if metric.zero_one:
            return counted(metric.name, new, old, gain, stderr, gain_N)
        p, test = paired_t(gain, stderr, n), "t"
    else:
        drawn = resampled(np.concatenate([candidate_NS, incumbent_NS], axis=1), seed)
        again = [metric.value(part) for part in np.split(drawn, 2, axis=1)]
        stderr = float((again[0] - again[1]).std()) if n > 1 else math.nan
        differ = (candidate_NS != incumbent_NS).any(axis=1)
        moved_BS = _swapped((candidate_NS - incumbent_NS)[differ], seed)
        by_chance = sign * (metric.value(new_S - moved_BS) - metric.value(old_S + moved_BS))
        near = 1e-9 * max(abs(new), abs(old))
        p, test = float((1 + np.sum(by_chance >= gain - near)) / (SWAPS + 1)), "swap"
        p_worse = float((1 + np.sum(by_chance <= gain + near)) / (SWAPS + 1))
    return Comparison(
        metric=metric.name, candidate=new, incumbent=old, difference=gain, stderr=stderr, p=p, n=n, test=test, p_worse=p_worse
    )  # fmt: skip


def _swapped(difference_NS: np.ndarray, seed: int) -> np.ndarray:
    """[SWAPS, S]: what changes sides when in each row the two answers change places with chance 1/2."""
    rng = np.random.default_rng(seed)
    blocks = _blocks(SWAPS, len(difference_NS))
    return np.concatenate([rng.integers(0, 2, (size, len(difference_NS))) @ difference_NS for size in blocks])


def judge_rows(
    name: str, candidate_NS: np.ndarray, incumbent_NS: np.ndarray, seed: int = 0, alpha: float = ALPHA
) -> Verdict:
    """Accept a candidate that is better beyond noise. Losses that are not finite lose to any that are. Few rows decide only for a large
    gain (`large_gain`)."""
    if refused := not_finite("losses", candidate_NS, incumbent_NS):
        return refused
    compared = compare_rows(name, candidate_NS, incumbent_NS, seed)
    return better((compared,), alpha, large_gain(compared))


def judge_texts(
    name: str,
    candidate: Sequence[str],
    incumbent: Sequence[str],
    references: References,
    seed: int = 0,
    alpha: float = ALPHA,
) -> Verdict:
    """The verdict on two systems' answers to the same examples."""
    new_NS, old_NS = (statistics(name, outputs, references) for outputs in (candidate, incumbent))
    return judge_rows(name, new_NS, old_NS, seed, alpha)
