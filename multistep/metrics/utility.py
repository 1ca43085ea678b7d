"""How much several texts are alike, each as an answer with each other one as the right answer: the utility of minimum Bayes risk.

chrf, rougeL and f1 are those of metrics/texts.py for single texts. bleu is sacrebleu's sentence BLEU with effective orders: four
words have no 5-grams to get right. The n-grams of all texts are counted once, in one matrix; pairs are minima of its rows.
Shapes: N texts, G different n-grams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from multistep.metrics.texts import bleu_tokenizer, value
from multistep.metrics.words import common_subsequence, f1, rouge_words

_CHRF_ORDERS, _BLEU_ORDERS = 6, 4


def alike(name: str, texts: Sequence[str]) -> np.ndarray:
    """[N,N]: the metric of text i where text j is right, in the metric's own unit. Raises KeyError for another metric."""
    return _ALIKE[name](texts)


def _chrf(texts: Sequence[str]) -> np.ndarray:
    rows = ["".join(text.split()) for text in texts]
    sums = []
    for order in range(1, _CHRF_ORDERS + 1):
        both_NN, size_N = _shared([[row[i : i + order] for i in range(len(row) - order + 1)] for row in rows])
        sums += [np.broadcast_to(size_N[:, None], both_NN.shape), np.broadcast_to(size_N, both_NN.shape), both_NN]
    return value("chrf", np.stack(sums, -1))


def _bleu(texts: Sequence[str]) -> np.ndarray:
    """exp(mean over orders of log precision) x brevity; orders that no n-gram of the text has are left out, misses are halved."""
    from sacrebleu.metrics.bleu import BLEU

    tokenizer = BLEU(tokenize=bleu_tokenizer([(text,) for text in texts])).tokenizer
    rows = [tokenizer(text.rstrip()).split() for text in texts]
    n = len(rows)
    length_N = np.array([len(row) for row in rows], np.float64)
    log_NN, orders_N, missed_NN, any_NN = np.zeros((n, n)), np.zeros(n), np.zeros((n, n)), np.zeros((n, n), bool)
    for order in range(1, _BLEU_ORDERS + 1):
        right_NN, size_N = _shared([[tuple(row[i : i + order]) for i in range(len(row) - order + 1)] for row in rows])
        there_N1 = (size_N > 0)[:, None]
        orders_N += size_N > 0
        missed_NN += (right_NN == 0) & there_N1
        share = np.where(right_NN > 0, right_NN, 0.5**missed_NN) / np.maximum(size_N, 1)[:, None]
        log_NN += np.where(there_N1, np.log(share), 0.0)
        any_NN |= right_NN > 0
    brevity_NN = np.exp(np.minimum(0.0, 1.0 - length_N[None, :] / np.maximum(length_N, 1)[:, None]))
    return np.where(any_NN, 100.0 * brevity_NN * np.exp(log_NN / np.maximum(orders_N, 1)[:, None]), 0.0)


def _shared(grams: Sequence[Sequence[object]]) -> tuple[np.ndarray, np.ndarray]:
    """How many n-grams two texts share, each counted as often as both have it [N,N]; how many each has [N]."""
    size_N = np.array([len(row) for row in grams], np.float64)
    place = {gram: i for i, gram in enumerate(dict.fromkeys(chain.from_iterable(grams)))}
    counts_NG = np.zeros((len(grams), len(place)), np.float32)
    for row, found in enumerate(grams):
        if found:
            counts_NG[row] = np.bincount([place[gram] for gram in found], minlength=len(place))
    return np.stack([np.minimum(row_G, counts_NG).sum(1) for row_G in counts_NG]).astype(np.float64), size_N


def _rouge_l(texts: Sequence[str]) -> np.ndarray:
    rows = [rouge_words(text) for text in texts]

    def score(i: int, j: int) -> float:
        common = common_subsequence(rows[i], rows[j])
        return 2.0 * common / (len(rows[i]) + len(rows[j])) if common else 0.0

    return _symmetric(len(rows), score)


def _f1(texts: Sequence[str]) -> np.ndarray:
    return _symmetric(len(texts), lambda i, j: f1(texts[i], texts[j]))


def _symmetric(n: int, score: Callable[[int, int], float]) -> np.ndarray:
    found_NN = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1):
            found_NN[i, j] = found_NN[j, i] = score(i, j)
    return found_NN


_ALIKE: dict[str, Callable[[Sequence[str]], np.ndarray]] = {
    "chrf": _chrf, "bleu": _bleu, "rougeL": _rouge_l, "f1": _f1,
}  # fmt: skip
