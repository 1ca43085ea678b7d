"""Votes and prompts where they are meant for: answers in numbers, and the published tiny Llama as a chat."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from multistep import journal
from multistep.budget import Clock, parse_budget
from multistep.controllers.decoding import DecodingProblem, tuning
from multistep.controllers.script import Scripted
from multistep.data.cells import Record, Turn
from multistep.examples import Examples
from multistep.generate import Written
from multistep.journal import Journal
from multistep.policy import Latency
from multistep.predictors.decoding import Greedy
from multistep.predictors.few_shot import FewShot
from multistep.predictors.ways import Way, texts
from multistep.tasks.writing import Writing
from multistep.tune import tune
from multistep.tune.decoding import LanguagePrediction
from multistep.types import Prediction
from multistep.voting import answers, shown
from multistep.writing import Neural


@pytest.fixture(autouse=True)
def _one_thread(torch_seeded: None) -> None: ...


class Guesses:
    """Solves every problem with chance 0.55, anew in every draw; wrong answers differ. Its likeliest text is one more guess."""

    task = Writing(kind="answer", answers="number")
    examples = Examples((), lambda r: r.source)
    decoding: Way = Greedy()

    def candidates(self, records: Sequence[Record], decoding: Any, n: int) -> list[list[Written]]:
        rows = []
        for record in records:
            right, rng = int(record.source), random.Random(f"{record.source} {getattr(decoding, 'temperature', 0)}")
            said = [right if rng.random() < 0.55 else rng.randrange(10**6) for _ in range(n)]
            rows.append([Written([number], -1.0, True) for number in said])
        return rows

    def said(self, written: Written) -> Prediction:
        return Prediction(f"so it is #### {written.ids[0]}", 0.5)

    def write(self, records: Sequence[Record]) -> list[Prediction]:
        return answers(self, records, self.decoding)  # pyright: ignore[reportArgumentType]


def takes(ms: float) -> Latency:
    return Latency(p50=ms, p95=ms, p99=ms, mean=ms, n=9)


def test_votes_win_where_right_answers_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows like GSM8K's, a model that is right half of the time: self-consistency is taken, by its numbers."""
    monkeypatch.setattr(LanguagePrediction, "_latency", lambda self, way, engine: takes(texts(way)))
    records = [Record(str(7 * i), (f"thus #### {7 * i}",)) for i in range(200)]
    problem = DecodingProblem(
        task=Guesses.task,
        metric="numbers",
        default=Greedy(),
        prompts=False,
        examples=0,
        limit=None,
        budget=600.0,
        seed=0,
    )
    clock, shipped = Clock(parse_budget("5m")), []
    works = LanguagePrediction(
        Guesses(), problem, records, "sums", clock, lambda: 0, lambda way, engine, policy: shipped.append(way)  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    list(tune(works, Scripted(tuning(problem)), Journal(tmp_path / "tuning.jsonl"), []))
    told = [r["outcome"]["verdict"] for r in journal.read(tmp_path / "tuning.jsonl") if r["kind"] == "Told"]
    assert all(v["by"]["made_up"] for v in told if v), "answers are right or wrong: a few that agree are no certainty"
    policy = works.policy()
    vote = next(e for e in policy.entries if e.predictor["kind"] == "vote")
    assert vote.metrics["numbers"].value > policy.entry(policy.default).metrics["numbers"].value + 0.1
    assert (
        shipped
        and shipped[-1].kind == "vote"
        and "better" in policy.rule
        and policy.entry(policy.pick).predictor["kind"] == "vote"
    )
    found = answers(Guesses(), records[:9], shipped[-1])  # pyright: ignore[reportArgumentType]
    assert all(p.confidence is not None and 0 < p.confidence <= 1 for p in found)


def test_stories_takes_examples_and_looks_again(shared: Path, tmp_path: Path) -> None:
    """stories260K as a chat: a prompt longer than its context loses examples, not the request."""
    from transformers import AutoModelForCausalLM

    from multistep import dialogue
    from multistep.codec import Codec
    from multistep.models.llama2c import convert
    from multistep.predictors.draft_revise import DraftRevise

    source = shared / "models" / "stories260K"
    if not source.is_dir():
        pytest.skip("no stories260K beside the repository")
    convert(source / "stories260K.bin", source / "tok512.bin", tmp_path)
    codec = Codec.load(tmp_path)
    dialogue.ensure_template(codec.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    greedy = Greedy(max_new_tokens=12)
    neural = Neural(model, codec, Writing(kind="chat"), "prompts", 200, greedy)
    tales = [Record(f"Tell of a {w}", (f"Once there was a {w}. " * 6,), turns=(Turn("user", f"Tell of a {w}"),))
             for w in ("dog", "cat", "bird", "fish")]  # fmt: skip
    neural.pool = Examples(tales, neural.task.reads)
    ask = [Record("Tell of a big dog", (), turns=(Turn("user", "Tell of a big dog"),)), tales[1]]
    zero = [p.value for p in neural.write(ask)]
    for way in (FewShot(inner=greedy, k=1), FewShot(inner=greedy, k=4, template="text"), DraftRevise(inner=greedy)):
        neural.decoding = way
        said = [p.value for p in neural.write(ask)]
        assert said != zero and said == [p.value for r in ask for p in neural.write([r])]
    neural.decoding = FewShot(inner=greedy, k=4)
    (long,) = neural.prompts(shown(neural, ask[:1], neural.decoding))
    text = codec.text(long.tolist())
    assert (
        len(long) <= 200 - 12 and text.rstrip().endswith("Tell of a big dog\nAssistant:") and "Once there was a" in text
    )
