"""Which candidate is given back, what a model is asked again, and which examples it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multistep.data.cells import Record, Turn
from multistep.examples import Examples
from multistep.generate import Written
from multistep.metrics.texts import statistics, value
from multistep.predictors.best_of import BestOf
from multistep.predictors.decoding import Greedy, Sample
from multistep.predictors.draft_revise import DraftRevise
from multistep.predictors.few_shot import FewShot
from multistep.predictors.vote import Vote
from multistep.tasks.writing import Writing
from multistep.types import Prediction
from multistep.voting import answers, grounded, least_risk, majority

SHOTS = [
    Record(s, (t,)) for s, t in (("red apple", "fruit"), ("blue sky", "air"), ("red apples", "fruits"), ("car", "iron"))
]


class Says:
    """A model whose texts are given; it keeps what it was asked. Long texts are less likely."""

    def __init__(self, *said: str, scores: Sequence[float] = ()):
        self.task = Writing(kind="chat")
        self.examples = Examples(SHOTS, lambda r: r.source)
        self.texts, self.scores = said, scores or [-float(len(t)) for t in said]
        self.asks: list[tuple[tuple[str, str], ...]] = []

    def candidates(self, records: Sequence[Record], decoding: Any, n: int) -> list[list[Written]]:
        self.asks += [tuple((t.role, t.text) for t in self.asked(r)) for r in records]
        first = (len(self.asks) - 1) % len(self.texts) if n == 1 else 0
        row = [Written([i], score, True) for i, score in list(enumerate(self.scores))[first : first + n]]
        return [row for _ in records]

    def said(self, written: Written) -> Prediction:
        return Prediction(self.texts[written.ids[0]], 0.5)

    def asked(self, record: Record) -> tuple[Turn, ...]:
        return record.asked or (Turn("user", record.source),)

    def shortened(self, text: str, tokens: int) -> str:
        return " ".join(text.split()[:tokens])


def test_the_most_typical_text_is_that_of_a_search_by_hand() -> None:
    texts = ["a cat sat", "the cat sat here", "the cat sat", "dogs", "the cat sat", "a cat sat here"]
    for metric in ("chrf", "rougeL", "f1"):
        risk = []
        for i, said in enumerate(texts):
            others = [(t,) for j, t in enumerate(texts) if j != i]
            risk.append(np.mean([value(metric, statistics(metric, [said], [o])[0]) for o in others]))
        assert risk[least_risk(texts, metric)] == pytest.approx(max(risk))
        assert texts[least_risk(texts, metric)] not in ("dogs", "a cat sat here")
    assert least_risk(["x", "x"], "chrf") == 0 and least_risk(["", "y", "y"], "chrf") == 1


def test_votes_are_counted_by_their_answers() -> None:
    texts = ["2 and 3: 5", "I say 6.", "so #### 5.0", "none", "5"]
    assert majority(texts, [-3, -1, -2, 0, -4], "number") == (2, 3 / 5)
    assert majority(["c", "The b!", "b", "d"], [-1, -3, -2, 0], "text") == (2, 2 / 4)
    assert majority(["x", "y"], [-2.0, -1.0], "number") == (
        1,
        1 / 2,
    )  # no number anywhere: texts vote, the likelier wins
    found = answers(Says("7", "seven", "it is 7"), [Record("?", ())], Vote(inner=Sample(), n=3, reads="number"))
    assert (found[0].value, found[0].confidence) == ("7", pytest.approx(2 / 3))


def test_scorers_rank_as_they_say() -> None:
    says = Says("sky is red", "the blue sky", "green", scores=(-1.0, -2.0, -0.5))
    record = Record("a blue sky", (), turns=(Turn("user", "a blue sky"),))
    assert answers(says, [record], BestOf(inner=Sample(), n=3))[0].value == "green"
    assert answers(says, [record], BestOf(inner=Sample(), n=3, scorer="grounded"))[0].value == "the blue sky"
    assert grounded("Blue, blue sea", "the blue sky") == pytest.approx(2 / 3) and grounded("", "x") == 0.0


def test_a_length_penalty_weighs_sums() -> None:
    says = Says("short", "long")
    rows = [Written([0], -1.0, True), Written([1, 1, 1, 1, 1], -0.9, True)]  # means: sums are -2 and -5.4
    says.candidates = lambda records, decoding, n: [rows for _ in records]  # pyright: ignore[reportAttributeAccessIssue]
    says.said = lambda w: Prediction(says.texts[w.ids[0]])  # pyright: ignore[reportAttributeAccessIssue]
    said = [answers(says, [Record("", ())], BestOf(inner=Sample(), n=2, length_penalty=p))[0].value for p in (0.0, 1.0)]
    assert said == ["short", "long"]


def test_a_draft_stands_before_the_second_ask() -> None:
    says = Says("draft", "better", "best")
    found = answers(says, [Record("Why?", ())], DraftRevise(inner=Greedy(), rounds=2, again="Again."))
    assert found[0].value == "best"
    assert says.asks == [
        (("user", "Why?"),),
        (("user", "Why?"), ("assistant", "draft"), ("user", "Again.")),
        (("user", "Why?"), ("assistant", "draft"), ("user", "Again."), ("assistant", "better"), ("user", "Again.")),
    ]


def test_examples_stand_before_the_request_the_nearest_last() -> None:
    record = Record("a red apple now", (), turns=(Turn("system", "Be brief."), Turn("user", "a red apple now")))
    says = Says("x")
    answers(says, [record], FewShot(k=2))
    assert says.asks[-1] == (
        ("system", "Be brief."), ("user", "red apples"), ("assistant", "fruits"), ("user", "red apple"), ("assistant", "fruit"),
        ("user", "a red apple now"),
    )  # fmt: skip
    answers(says, [record], FewShot(k=1, template="text", keep=2))
    assert says.asks[-1] == (("system", "Be brief."), ("user", "red apple\nfruit\n\na red"))
    for _ in range(2):
        answers(says, [Record("q", ()), Record("car", ())], FewShot(k=2, choose="seed", seed=4))
    assert len({ask[:-1] for ask in says.asks[-4:]}) == 1  # the same for every request
    assert says.asks[-1][:-1] != says.asks[0][:-1]


def test_nearness_is_that_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = ["Red apples  fall", "the sky is blue", "a blue bird", "apple pie", "好的 apple", "x"]
    asks = ["An apple", "blue skies", "好的", "zzz"]
    padded = [f" {' '.join(t.lower().split())} " for t in [*texts, *asks]]
    model = TfidfVectorizer(analyzer="char", ngram_range=(3, 3)).fit(padded[: len(texts)])
    cosine = (model.transform(padded[len(texts) :]) @ model.transform(padded[: len(texts)]).T).toarray()
    examples = Examples([Record(t, (t,), turns=(Turn("user", t),)) for t in texts], lambda r: r.source)
    wanted = [np.argsort(-np.round(row, 12), kind="stable").tolist() for row in cosine]
    assert [examples.nearest(Record(ask, ()), len(texts)) for ask in asks] == wanted
    examples.save(tmp_path)
    assert Examples.load(tmp_path, lambda r: r.source).records == examples.records
    assert len(Examples.load(tmp_path / "nowhere", lambda r: r.source)) == 0
