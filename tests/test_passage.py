"""Tests of the lexical answers: verbatim spans, questions without an answer, Chinese, choices, and the way to disk and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from multistep.data.cells import Record
from multistep.models.baselines import load_writer
from multistep.models.choose import Choose
from multistep.models.passage import Passage, answer_threshold, question_kind
from multistep.models.ranking import Encode
from multistep.types import UserError

NAMES = ["Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jonas"]  # fmt: skip
PLACES = ["Paris", "London", "Berlin", "Madrid", "Vienna", "Oslo", "Dublin", "Athens", "Prague", "Lisbon"]  # fmt: skip


def facts(n: int, seed: int = 0, unanswerable: bool = False) -> list[Record]:
    """Who, where and when of something that happened to several people."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(n):
        people, towns = rng.choice(NAMES, 3, replace=False), rng.choice(PLACES, 3, replace=False)
        years = rng.integers(1900, 2000, 3)
        context = " ".join(
            f"{p} moved to {t} in {y}, and stayed." for p, t, y in zip(people, towns, years, strict=True)
        )
        k = int(rng.integers(3))
        question, answer = [
            (f"Where did {people[k]} move to?", towns[k]),
            (f"When did {people[k]} move?", str(years[k])),
            (f"Who moved to {towns[k]}?", people[k]),
        ][i % 3]
        if unanswerable and i % 4 == 3:
            records.append(Record("Why is the moon made of green cheese?", ("",), context, (-1,)))
        else:
            records.append(Record(question, (str(answer),), context, (context.index(str(answer)),)))
    return records


@pytest.mark.parametrize(
    ("question", "same"),
    [("How many cars are there?", "多少辆车？"), ("Who was it?", "他是谁？"), ("When did it end?", "何时结束？"),
     ("Where is it?", "在哪里？"), ("Why so?", "为什么？"), ("Name it.", "请说。")],
)  # fmt: skip
def test_kinds_of_questions_in_two_languages(question: str, same: str) -> None:
    assert question_kind(question) == question_kind(same)


def test_answers_are_found_and_verbatim(tmp_path: Path) -> None:
    model, known = Passage.fit(facts(120))
    held = facts(60, seed=1)
    found = model.write(held)
    assert all(p.value in r.context for p, r in zip(found, held, strict=True))
    right = [p.value == r.targets[0] for p, r in zip(found, held, strict=True)]
    sure = np.array([p.confidence for p in found])
    assert np.mean(right) > 0.8 and known["no_answer"] == 0 and model.least == 0
    assert (sure >= 0).all() and (sure <= 1).all() and abs(sure.mean() - np.mean(right)) < 0.2
    model.save(tmp_path)
    odd = [*held, Record("Who?", (), ""), Record("", (), "One word."), Record("谁？", (), "是\ud800他。")]
    assert load_writer(tmp_path).write(odd) == model.write(odd)
    assert model.write(odd)[60].value == ""


def test_no_answer_where_none_fits() -> None:
    model, known = Passage.fit(facts(160, unanswerable=True))
    held = facts(80, seed=1, unanswerable=True)
    found = model.write(held)
    empty = np.array([r.targets[0] == "" for r in held])
    said_nothing = np.array([p.value == "" for p in found])
    assert known["no_answer"] == 40 and model.least > 0
    assert said_nothing[empty].mean() > 0.8 and said_nothing[~empty].mean() < 0.2


def test_the_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    sure, empty = rng.random(200), rng.random(200) < 0.4
    gain = np.where(empty, 0.0, rng.random(200))

    def worth(least: float) -> float:
        return float(np.where(sure >= least, gain, empty).sum())

    best = answer_threshold(sure, gain, empty)
    assert worth(best) == pytest.approx(max(worth(t) for t in [0.0, *sure, 2.0]))
    assert answer_threshold(sure, np.ones(200), np.zeros(200, dtype=bool)) == 0.0


def test_chinese_by_characters() -> None:
    rng = np.random.default_rng(0)
    names, towns = ["王明", "李华", "张伟", "刘洋", "陈静", "赵磊"], ["北京", "上海", "广州", "成都", "南京", "西安"]
    records = []
    for i in range(90):
        people, places = rng.choice(names, 3, replace=False), rng.choice(towns, 3, replace=False)
        years = rng.integers(1900, 2000, 3)
        context = "".join(f"{p}于{y}年迁居{t}。" for p, t, y in zip(people, places, years, strict=True))
        k = int(rng.integers(3))
        question, answer = [
            (f"{people[k]}在哪一年迁居？", f"{years[k]}年"),
            (f"{people[k]}迁居哪里？", str(places[k])),
        ][i % 2]
        records.append(Record(question, (answer,), context, (context.index(answer),)))
    found = Passage.fit(records[:60])[0].write(records[60:])
    assert all(p.value in r.context for p, r in zip(found, records[60:], strict=True))
    assert np.mean([p.value == r.targets[0] for p, r in zip(found, records[60:], strict=True)]) > 0.7


@pytest.mark.parametrize("n", [1, 2, 10])
def test_few_rows_are_enough(n: int) -> None:
    records = facts(n)
    assert all(p.value in r.context for p, r in zip(Passage.fit(records)[0].write(records), records, strict=True))
    with pytest.raises(UserError, match="no answer of train"):
        Passage.fit([Record("Who?", ("Bob",), "Nobody here.", (-1,))])


# ---------------------------------------------------------------------------------------------- choices


def choices(n: int, seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    records = []
    for _ in range(n):
        right, *wrong = rng.choice(PLACES, 4, replace=False)
        order = [str(c) for c in rng.permutation([right, *wrong])]
        records.append(
            Record("Where did she go?", (str(right),), f"She went to {right} by train.", choices=tuple(order))
        )
    return records


def letters(texts: Sequence[str]) -> np.ndarray:
    return np.array([[t.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts], dtype=np.float64)


@pytest.mark.parametrize("encode", [None, letters], ids=["words", "encoder"])
def test_the_choice_that_the_passage_speaks_of(encode: Encode | None, tmp_path: Path) -> None:
    model, known = Choose.fit(choices(60), encode)
    held = choices(30, seed=1)
    found = model.write(held)
    assert [p.value for p in found] == [r.targets[0] for r in held] and known["held_out"] > 0.95
    assert all(p.confidence is not None and 0.5 < p.confidence <= 1 for p in found)
    model.save(tmp_path)
    odd = [*held, Record("Why?", (), choices=("Same", "Same", "")), Record("Why?", ())]
    again = load_writer(tmp_path, encode).write(odd)
    assert again == model.write(odd) and again[-1].value == ""
    if encode is not None:
        with pytest.raises(UserError, match="fitted with an encoder"):
            load_writer(tmp_path).write(held)
    with pytest.raises(UserError, match="choices"):
        Choose.fit([Record("a", ("b",))])
