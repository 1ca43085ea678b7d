"""The utility of minimum Bayes risk against sacrebleu's sentence scores and our own metrics of pairs."""

from __future__ import annotations

import random

import pytest
import sacrebleu

from multistep.metrics.texts import statistics, value
from multistep.metrics.utility import alike

WORDS = ("the", "cat", "sat", "on", "a", "mat", "The", "dog's", "don't", "42", ",", "ran.", "über", "naïve")


def texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    found = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12))) for _ in range(6)]
    return [*found, "", "a", found[0], f"{found[0]} again"]


@pytest.mark.parametrize("seed", range(5))
def test_chrf_and_bleu_are_those_of_sacrebleu(seed: int) -> None:
    some = texts(seed)
    chrf, bleu = alike("chrf", some), alike("bleu", some)
    for i, said in enumerate(some):
        for j, right in enumerate(some):
            assert chrf[i, j] == pytest.approx(sacrebleu.sentence_chrf(said, [right]).score, abs=1e-6), (said, right)
            wanted = sacrebleu.sentence_bleu(said, [right], use_effective_order=True).score
            assert bleu[i, j] == pytest.approx(wanted, abs=1e-6), (said, right)


def test_chinese_is_cut_as_the_metric_cuts_it() -> None:
    some = ["我们去北京。", "我们去上海。", "他们去北京"]
    bleu = alike("bleu", some)
    for i, said in enumerate(some):
        for j, right in enumerate(some):
            wanted = sacrebleu.sentence_bleu(said, [right], tokenize="zh", use_effective_order=True).score
            assert bleu[i, j] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", ["rougeL", "f1", "chrf"])
def test_others_are_the_metric_of_one_text(name: str) -> None:
    some = texts(7)
    found = alike(name, some)
    for i, said in enumerate(some):
        for j, right in enumerate(some):
            wanted = float(value(name, statistics(name, [said], [(right,)])[0]))
            assert found[i, j] == pytest.approx(wanted, abs=1e-9), (said, right)
