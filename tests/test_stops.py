"""Stop texts of several tokens leave nothing of themselves behind, whoever writes, and nothing of them is shown on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from serving import chat_bundle, serve_folder, served
from torch import Tensor

from multistep.bundle import load_bundle
from multistep.engines.writers import _Stop
from multistep.generate import generate, held, stream
from multistep.language_bundle import LanguageBundle
from multistep.lookup import look_up
from multistep.predictors.decoding import Beam, Decoding, Greedy, Sample
from multistep.talk import Talk

PIECES = ["a", "b", "\n", "User", ":", "s", "c"]
STOP: dict[str, Any] = {"max_new_tokens": 9, "stop": ("\nUser:", "never")}
PROMPT = np.array([0])
COMES, COMES_NOT = [0, 1, 2, 3, 4, 6, 6, 6, 6], [0, 1, 2, 3, 5, 6, 6, 6, 6]
# The end of a turn is text here: the tokenizer, a token a byte, has no such token.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Script:
    """A stepper whose likeliest tokens are these, whatever was written."""

    def __init__(self, tokens: Sequence[int], size: int):
        self.tokens, self.size, self.at, self.rows = tokens, size, 0, 1

    def start(self, prompts: Sequence[np.ndarray]) -> Tensor:
        self.at, self.rows = 0, len(prompts)
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        self.at += 1
        return self._logits()

    def several(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.step(tokens) for _ in tokens])

    def back(self, positions: int) -> None:
        self.at -= positions

    def keep(self, rows: Tensor) -> None:
        self.rows = len(rows)

    def _logits(self) -> Tensor:
        logits = torch.zeros(self.rows, self.size)
        logits[:, self.tokens[min(self.at, len(self.tokens) - 1)]] = 3.0
        return logits


def decode(ids: Sequence[int]) -> str:
    return "".join(PIECES[i] for i in ids)


def scripted(monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int], size: int) -> Script:
    script = Script(tokens, size)
    for place in ("multistep.generate", "multistep.serve.writer"):
        monkeypatch.setattr(f"{place}.stepper_of", lambda model: script)
    return script


NATS = float(Script(COMES, len(PIECES)).start([PROMPT]).log_softmax(-1)[0, 0])  # of each token


@pytest.mark.parametrize(
    "decoding", [Greedy(**STOP), Sample(top_k=1, **STOP), Beam(beams=2, **STOP)], ids=lambda d: d.kind
)
def test_a_stop_text_of_several_tokens_is_taken_back_whole(decoding: Decoding, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, COMES, len(PIECES))
    (written,) = generate(None, [PROMPT], decoding, [], decode=decode)
    assert written.ids == [0, 1] and written.ended
    assert written.score == pytest.approx(NATS, rel=1e-5)  # a mean over all five that were scored
    scripted(monkeypatch, COMES_NOT, len(PIECES))
    (written,) = generate(None, [PROMPT], decoding, [], decode=decode)
    assert written.ids == COMES_NOT and not written.ended and written.score == pytest.approx(NATS, rel=1e-5)


def test_lookup_and_ctranslate2_take_it_back_too() -> None:
    written, _ = look_up(Script(COMES, len(PIECES)), PROMPT, Greedy(**STOP), [], 3, decode)
    assert (written.ids, written.ended) == ([0, 1], True) and written.score == pytest.approx(NATS, rel=1e-5)
    stop = _Stop(1, Greedy(**STOP), set(), decode)
    said = [stop(SimpleNamespace(batch_id=0, token_id=t, log_prob=NATS)) for t in COMES]
    assert said == [False] * 4 + [True] * 5
    (written,) = stop.written()
    assert (written.ids, written.ended) == ([0, 1], True) and written.score == pytest.approx(NATS, rel=1e-5)


def test_the_first_of_two_stop_texts_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, COMES, len(PIECES))
    (written,) = generate(None, [PROMPT], Greedy(max_new_tokens=9, stop=(":", "b\nUser:")), [], decode=decode)
    assert written.ids == [0]


def test_a_stream_holds_back_what_may_be_a_stop_text(monkeypatch: pytest.MonkeyPatch) -> None:
    script = scripted(monkeypatch, COMES, len(PIECES))
    found = [(token, script.at) for token in stream(None, PROMPT, Greedy(**STOP), [], decode)]
    assert found == [(0, 0), (1, 1)]
    script = scripted(monkeypatch, COMES_NOT, len(PIECES))
    found = [(token, script.at) for token in stream(None, PROMPT, Greedy(**STOP), [], decode)]
    assert found == [(0, 0), (1, 1), (2, 4), (3, 4), (5, 4), (6, 5), (6, 6), (6, 7), (6, 8)]
    script = scripted(monkeypatch, COMES, len(PIECES))  # cut by its length: what was held was no stop text
    short = Greedy(max_new_tokens=4, stop=STOP["stop"])
    assert list(stream(None, PROMPT, short, [], decode)) == [0, 1, 2, 3]


def test_what_may_begin_a_stop_text() -> None:
    assert [held(text, ("\nUser:", "ab")) for text in ("", "x", "x\n", "x\nUser", "\nUser:", "xa")] == [
        0,
        0,
        1,
        5,
        0,
        1,
    ]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_k": 1}], ids=["greedy", "sample"])
def test_chat_shows_nothing_of_a_text_that_ends_a_turn(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(chat_bundle(tmp_path, template=CHATML, max_new_tokens=60, **how))
    assert isinstance(bundle, LanguageBundle)
    tokenizer: Any = bundle.speaker.codec.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    scripted(monkeypatch, tokenizer("Hi <|好.<|im_end|>\n<|im_start|>user\n" + "x" * 40).input_ids, len(tokenizer))
    talk = Talk(bundle)
    pieces = list(talk.say("Say one"))
    assert "".join(pieces) == "Hi <|好." and len(pieces) > 3
    assert [t.text for t in talk.turns] == ["Say one", "Hi <|好."]
    assert [p.value for p in bundle.predict(["Say one"])] == ["Hi <|好."]


def test_the_server_shows_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = chat_bundle(tmp_path, template=CHATML, max_new_tokens=60)
    tokenizer: Any = load_bundle(folder).speaker.codec.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    scripted(monkeypatch, tokenizer("Hi <|好.<|im_end|>\n<|im_start|>user\n" + "x" * 40).input_ids, len(tokenizer))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Say one"}]}
    with served(serve_folder(folder)) as address:
        whole = httpx.post(f"{address}/v1/chat/completions", json=body).json()["choices"][0]
        assert whole["message"]["content"] == "Hi <|好." and whole["finish_reason"] == "stop"
        lines = httpx.post(f"{address}/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    shown = [c["choices"][0]["delta"].get("content") or "" for c in chunks]
    assert "".join(shown) == "Hi <|好." and len([s for s in shown if s]) > 3
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
