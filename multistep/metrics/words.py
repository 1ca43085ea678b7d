"""Scores of one written answer against one right answer: words in common, subsequences, numbers.

Sources: Lin 2004 (ROUGE); Hyyrö 2004, "Bit-parallel LCS-length computation revisited"; Rajpurkar et al. 2016, arXiv
1606.05250 (SQuAD: normalization, F1); Cobbe et al. 2021, arXiv 2110.14168 (GSM8K: the last number).
Differs from the sources: scripts without spaces, and ROUGE of letters that are not Latin, as metrics/texts.py says.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache

from multistep.text import UNSPACED


@lru_cache
def unspaced() -> re.Pattern[str]:
    return re.compile("[" + "".join(f"{chr(low)}-{chr(high)}" for low, high in UNSPACED) + "]")


@lru_cache
def _rouge_words() -> re.Pattern[str]:
    """Runs of a-z and 0-9; single characters of scripts without spaces; runs of letters that are not Latin."""
    single = unspaced().pattern
    marks = "".join(chr(c) for c in range(0x370, 0x10000) if unicodedata.category(chr(c))[0] == "M")
    latin = r"\x00-\u036f\u1e00-\u1eff\u2100-\u214f\ufb00-\ufb06\U0001d400-\U0001d7ff"  # separate, as in rouge-score
    return re.compile(rf"[a-z0-9]+|(?=\w){single}|(?:(?![{latin}]|{single})[\w{marks}])+")


def rouge_words(text: str) -> list[str]:
    return _rouge_words().findall(text.lower())


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: bit i of `row` is 0 where the table of the first i + 1 words steps up."""
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        met = row & where.get(word, 0)
        row = ((row + met) | (row - met)) & every
    return len(a) - row.bit_count()


def _f_measure(common: int, n_written: int, n_wanted: int) -> float:
    return 2.0 * common / (n_written + n_wanted) if common else 0.0


def rouge(order: int, written: list[str], wanted: list[str]) -> float:
    """ROUGE-n; order 0: ROUGE-L."""
    if order == 0:
        return _f_measure(common_subsequence(wanted, written), len(written), len(wanted))
    ours, theirs = (Counter(zip(*(words[i:] for i in range(order)), strict=False)) for words in (written, wanted))
    return _f_measure((ours & theirs).total(), ours.total(), theirs.total())


def normalized(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    text = text.lower()
    if unspaced().search(text):
        text = "".join(c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    else:
        text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(written: str, wanted: str) -> float:
    """Of words. Nothing against nothing is right: the question has no answer and none was given."""
    ours, theirs = (unspaced().sub(r" \g<0> ", normalized(text)).split() for text in (written, wanted))
    if not ours or not theirs:
        return float(ours == theirs)
    return _f_measure((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


_NUMBER = re.compile(r"(?:(?<![\w)\].])[-\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def last_number(text: str) -> Decimal | None:
    """The last number in the text; commas between groups of three digits are read over."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None
