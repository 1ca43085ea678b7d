"""Values against sacrebleu, rouge-score and examples by hand; errors against the textbook; verdicts on known gains."""

from __future__ import annotations

import logging
import math
import random

import numpy as np
import pytest
import scipy.stats

from multistep.metrics import texts
from multistep.metrics.texts import (
    LANGUAGE_METRICS,
    check_language_metric,
    compare_rows,
    judge_rows,
    judge_texts,
    loss_statistics,
    measure_rows,
    measure_texts,
    signature,
    statistics,
    value,
)
from multistep.metrics.words import common_subsequence, f1, last_number, normalized, rouge_words
from multistep.types import UserError

ENGLISH = [
    "The",
    "quick,",
    "brown",
    "fox",
    "doesn't",
    "jump",
    "over",
    "12",
    "lazy",
    "dogs",
    "-",
    "and",
    "naïve",
    "cats:",
    "(well)",
    "it's",
    '"fine"',
    ".",
]
CHINESE = list("战国无双系列的正统第三续作，是由光荣和开发。武田信玄等人为主3")
KANA = list("これはペンです。それは本ではありません")


def corpus(words: list[str], n: int, seed: int, right: float = 0.7, gap: str = " ", refs: int = 1):
    """Outputs that keep each word of the first reference with chance `right`."""
    rng = random.Random(seed)
    rows = [[rng.choices(words, k=rng.randint(1, 20)) for _ in range(refs)] for _ in range(n)]
    outputs = [gap.join(w if rng.random() < right else rng.choice(words) for w in row[0]) for row in rows]
    return outputs, [tuple(gap.join(r) for r in row) for row in rows]


def noisy(references: list[tuple[str, ...]], seed: int, right: float) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(w if rng.random() < right else "no" for w in row[0].split()) for row in references]


CASES = {
    "english": corpus(ENGLISH, 60, 0),
    "three references": corpus(ENGLISH, 40, 1, refs=3),
    "chinese": corpus(CHINESE, 40, 2, gap=""),
    "japanese": corpus(KANA, 40, 3, gap=""),
    "nothing right": (["x y z w", "v u"], [("a b c d e",), ("f g",)]),
    "words but no pairs right": (["a x b y c z"], [("a b c d e f",)]),
    "short and empty": (["a", "", "b c"], [("a b",), ("c",), ("b c",)]),
    "some with two": (["a b c d", "e f g h i"], [("a b c d", "a b c"), ("e f g x i",)]),
}
TOKENIZERS = {"chinese": "zh", "japanese": "char"}


def streams(references: list[tuple[str, ...]]) -> list[list[str | None]]:
    return [[r[i] if i < len(r) else None for r in references] for i in range(max(map(len, references)))]


@pytest.mark.parametrize("case", CASES)
def test_bleu_and_chrf_are_those_of_sacrebleu(case: str) -> None:
    from sacrebleu import corpus_bleu, corpus_chrf

    outputs, references = CASES[case]
    tokenizer = TOKENIZERS.get(case, "13a")
    found = measure_texts(["bleu", "chrf"], outputs, references)
    expected = corpus_bleu(outputs, streams(references), tokenize=tokenizer, force=True)  # type: ignore[arg-type]
    assert found["bleu"].value == pytest.approx(expected.score, abs=1e-9)
    assert found["chrf"].value == pytest.approx(corpus_chrf(outputs, streams(references)).score, abs=1e-9)  # type: ignore
    assert f"tok:{tokenizer}" in signature("bleu", references)


def test_resampled_corpora_are_scored_as_sacrebleu_scores_them() -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    outputs, references = CASES["english"]
    for name, scorer in (("bleu", BLEU()), ("chrf", CHRF())):
        sums = texts.resampled(statistics(name, outputs, references), 3)
        expected = [scorer._compute_score_from_stats(row.tolist()).score for row in sums[:50]]
        assert value(name, sums[:50]) == pytest.approx(expected, abs=1e-9)


def test_the_signature_is_that_of_sacrebleu() -> None:
    from sacrebleu.metrics.bleu import BLEU

    outputs, references = CASES["three references"]
    scorer = BLEU()
    scorer.corpus_score(outputs, streams(references))  # type: ignore[arg-type]
    assert signature("bleu", references) == str(scorer.get_signature())
    assert signature("bleu", CASES["some with two"][1]).startswith("nrefs:var|")
    assert "nc:6|nw:0" in signature("chrf", references) and "stemming" in signature("rougeL")


@pytest.mark.parametrize("case", ["english", "three references", "nothing right", "short and empty", "some with two"])
def test_rouge_of_latin_text_is_that_of_rouge_score(case: str) -> None:
    logging.disable(logging.INFO)
    from rouge_score.rouge_scorer import RougeScorer

    outputs, references = CASES[case]
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    found = [scorer.score_multi(list(row), said) for said, row in zip(outputs, references, strict=True)]
    logging.disable(logging.NOTSET)
    for name in names:
        rows = statistics(name, outputs, references)
        assert rows[:, 0] == pytest.approx([f[name].fmeasure for f in found], abs=1e-12)
        assert (rows[:, 1] == 1).all()


def test_rouge_reads_other_scripts() -> None:
    assert rouge_words("GPT-4不是人。OK") == ["gpt", "4", "不", "是", "人", "ok"]
    assert rouge_words("Привет, мир 5!") == ["привет", "мир", "5"]
    assert rouge_words("naïve don’t") == ["na", "ve", "don", "t"]  # as rouge-score
    found = measure_texts(["rouge1", "rouge2", "rougeL"], ["我爱你"], [("你爱我",)])
    assert [v.value for v in found.values()] == pytest.approx([1.0, 0.0, 1 / 3])


def test_the_longest_common_subsequence_is_that_of_the_table() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = (rng.choices("abc", k=rng.randint(0, 90)) for _ in range(2))
        row = [0] * (len(b) + 1)
        for x in a:
            new = [0]
            for j, y in enumerate(b):
                new.append(row[j] + 1 if x == y else max(new[-1], row[j + 1]))
            row = new
        assert common_subsequence(a, b) == row[-1]


def test_squad_normalization() -> None:
    assert normalized("The  Cat's (an) apple!") == "cats apple"
    assert normalized("“光荣”和 ω-Force。") == "光荣和 ωforce"
    assert f1("the cat sat", "a cat sat down") == pytest.approx(2 * 2 / 5)
    assert f1("光荣和", "光荣") == pytest.approx(0.8)
    assert f1("", "the") == 1.0 and f1("", "cat") == f1("cat", "") == f1("dog", "cat") == 0.0
    found = measure_texts(["exact_match", "f1"], ["The cat.", "dog"], [("a dog", "cat"), ("dogs",)])
    assert found["exact_match"].value == found["f1"].value == 0.5


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"), ("so 1,234.50 dollars", "1234.5"), ("3,4,5", "5"), ("10-5", "5"),
        ("x = -5.", "-5"), ("−7 度", "-7"), ("0.50", ".5"), ("-.5", "-0.5"), ("共１２个", "12"), ("12,3456", "3456"),
    ],
)  # fmt: skip
def test_the_last_number(text: str, number: str) -> None:
    assert last_number(text) == last_number(number) is not None


def test_numbers_and_choices() -> None:
    said = ["it is 1200.0", "none", "7 or 8"]
    assert measure_texts(["numbers"], said, [("#### 1,200",), ("3",), ("7",)])["numbers"].value == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="numbers needs a number in the right answers"):
        statistics("numbers", ["1"], [("one",)])
    choices = measure_texts(["choice_accuracy"], [" red  car", "Blue"], [("red car",), ("blue",)])
    assert choices["choice_accuracy"].value == 0.5


def test_losses() -> None:
    rows = loss_statistics(np.array([2.0, 6.0]), np.array([1, 3]), np.array([4, 4]))
    assert measure_rows("perplexity", rows).value == pytest.approx(math.exp(2.0))
    assert measure_rows("bits_per_byte", rows).value == pytest.approx(1.0 / math.log(2.0))
    better = loss_statistics(np.full(200, 1.9), np.ones(200), np.full(200, 4.0))
    worse = loss_statistics(np.full(200, 2.0), np.ones(200), np.full(200, 4.0))
    verdict = judge_rows("perplexity", better, worse)
    assert verdict.accept and verdict.rule.startswith("perplexity gain +0.70") and verdict.evidence[0].p == 0.001
    assert not judge_rows("bits_per_byte", worse, better).accept
    broken = better * np.nan
    assert not judge_rows("perplexity", broken, worse).accept and judge_rows("perplexity", worse, broken).accept
    with pytest.raises(UserError, match="no text to measure"):
        loss_statistics(np.zeros(1), np.zeros(1), np.zeros(1))


def test_the_bootstrap_error_of_a_mean_is_that_of_the_textbook() -> None:
    outputs, references = corpus(ENGLISH, 400, 5)
    rows = statistics("rouge1", outputs, references)
    found = measure_texts(["rouge1"], outputs, references, seed=1)["rouge1"]
    assert found.value == pytest.approx(rows[:, 0].mean())
    assert found.stderr == pytest.approx(rows[:, 0].std(ddof=1) / math.sqrt(400), rel=0.12)  # its own error is 2 %
    assert measure_texts(["rouge1"], outputs, references, seed=1)["rouge1"] == found


def test_the_bootstrap_error_of_bleu_is_the_spread_over_fresh_corpora() -> None:
    rows = statistics("bleu", *corpus(ENGLISH, 2000, 8)).reshape(40, 50, -1)
    again = [measure_rows("bleu", part) for part in rows]
    fresh = np.std([v.value for v in again], ddof=1)
    assert np.mean([v.stderr for v in again]) == pytest.approx(fresh, rel=0.35)


def test_a_block_at_a_time_draws_the_same_corpora(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = statistics("rouge1", *CASES["english"])
    whole = texts.resampled(rows, 2)
    monkeypatch.setattr(texts, "_CELLS", 1000)
    assert texts.resampled(rows, 2) == pytest.approx(whole)


def test_means_are_compared_as_elsewhere() -> None:
    _, references = corpus(ENGLISH, 100, 6)
    good, poor = noisy(references, 1, 0.75), noisy(references, 2, 0.7)
    a, b = (statistics("rouge1", said, references) for said in (good, poor))
    expected = scipy.stats.ttest_rel(a[:, 0], b[:, 0], alternative="greater").pvalue
    assert compare_rows("rouge1", a, b).p == pytest.approx(expected)
    a, b = (np.stack([x, np.ones(20)], axis=1) for x in (np.arange(20.0) < 15, np.arange(20.0) < 10))
    assert compare_rows("exact_match", a, b).p == pytest.approx(0.5**5)


@pytest.mark.parametrize("name", ["bleu", "chrf", "rougeL"])
def test_judge_says_why(name: str) -> None:
    _, references = corpus(ENGLISH, 150, 7)
    good, poor = noisy(references, 1, 0.8), noisy(references, 2, 0.6)
    verdict = judge_texts(name, good, poor, references)
    assert verdict.accept and verdict.rule.startswith(f"{name} +") and verdict.rule.endswith("<= 0.1: better")
    verdict = judge_texts(name, poor, good, references)
    assert not verdict.accept and verdict.rule.startswith(f"{name} -") and verdict.rule.endswith(": worse")
    same = judge_texts(name, good, good, references)
    assert not same.accept and same.rule.endswith("p = 1 > 0.1: not better beyond noise")
    assert (same.evidence[0].difference, same.evidence[0].stderr) == (0.0, 0.0)


def test_noise_is_called_better_as_often_as_stated() -> None:
    _, references = corpus(ENGLISH, 400, 9)
    pool = np.stack([statistics("bleu", noisy(references, i, 0.8), references) for i in (0, 1)])
    called = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        at, first = rng.choice(400, 40, replace=False), rng.integers(0, 2, 40)
        called += compare_rows("bleu", pool[first, at], pool[1 - first, at], seed).p <= 0.1
    assert called <= 36  # 20 expected; more than 36 has a chance of 0.02 %


def test_names_are_checked() -> None:
    assert check_language_metric("rouge", "summarize") == "rougeL"
    assert list(measure_texts(["em"], ["a b"], [("b",)])) == ["em"]
    with pytest.raises(UserError, match=r"'blue' is not known\. Did you mean 'bleu'"):
        check_language_metric("blue", "translate")
    with pytest.raises(UserError, match=r"'bleu' does not fit the task lm\. Use one of perplexity, bits_per_byte"):
        check_language_metric("bleu", "lm")
    assert all(m.name == name for name, m in LANGUAGE_METRICS.items())
    with pytest.raises(ValueError, match="use loss_statistics"):
        statistics("perplexity", ["a"], [("a",)])


def test_few_rows() -> None:
    with pytest.raises(UserError, match="no rows"):
        statistics("bleu", [], [])
    with pytest.raises(UserError, match="row 2 has no right answer"):
        statistics("bleu", ["a", "b"], [("a",), ()])
    for name, metric in LANGUAGE_METRICS.items():
        if metric.rows is not None:
            found = measure_texts([name], ["5 a"], [("5 a",)])[name]
            assert found.value >= 0 and math.isnan(found.stderr)
            assert not judge_texts(name, ["5 a"], ["5"], [("5 a",)]).accept
