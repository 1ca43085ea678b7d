"""OpenAI's API: the official client against a real server, and what its shapes refuse."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serving import chat_bundle, label_bundle, serve_folder, served

from multistep.serve import app as serve_app

openai = pytest.importorskip("openai")

USER = [{"role": "user", "content": "Say one"}]


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_bundle(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def address(talk: Path) -> Iterator[str]:
    with served(serve_folder(talk, max_tokens=200)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def conversed(talk: Path, turns: list[dict[str, str]], decoding: Any) -> str:
    from multistep.bundle import load_bundle
    from multistep.data.cells import Turn

    speaker = load_bundle(talk).speaker  # pyright: ignore[reportAttributeAccessIssue]
    return "".join(speaker.converse([Turn(t["role"], t["content"]) for t in turns], decoding))


def test_the_client_gets_a_chat_whole(client: Any, talk: Path) -> None:
    from multistep.predictors.decoding import Greedy

    found = client.chat.completions.create(model="talk", messages=USER, max_tokens=12)
    choice = found.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason == "length" and found.object == "chat.completion"
    assert choice.message.content == conversed(talk, USER, Greedy(max_new_tokens=12)).strip()
    assert found.usage.completion_tokens == 12 and found.usage.total_tokens == found.usage.prompt_tokens + 12
    prompt = "<s>User: Say one\nAssistant:"
    assert found.usage.prompt_tokens == len(prompt) - len("<s>") + 1  # a token a byte


def test_the_client_streams_what_it_gets_whole(client: Any) -> None:
    for options in (
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0},
        {"temperature": 1.5, "top_p": 0.9, "seed": 11},
    ):
        asked = {"model": "talk", "messages": USER, "max_tokens": 40, **options}
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage and not chunks[-1].choices
        assert len(chunks) > 5


def test_completions_models_and_choices(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["talk"] and client.models.retrieve("talk").id == "talk"
    found = client.completions.create(model="talk", prompt=["one", "two"], n=2, max_tokens=8, temperature=1, seed=3)
    assert [c.index for c in found.choices] == [0, 1, 2, 3] and found.usage.prompt_tokens == 8
    alone = client.completions.create(model="talk", prompt="two", n=2, max_tokens=8, temperature=1, seed=3)
    assert [c.text for c in alone.choices] == [c.text for c in found.choices[2:]]
    assert alone.choices[0].text != alone.choices[1].text
    pieces = client.completions.create(model="talk", prompt="two", max_tokens=8, temperature=1, seed=3, stream=True)
    assert "".join(c.choices[0].text for c in pieces) == alone.choices[0].text
    unseeded = [client.completions.create(model="talk", prompt="a", max_tokens=30, temperature=1) for _ in range(2)]
    assert unseeded[0].choices[0].text != unseeded[1].choices[0].text


def test_stop_texts_are_cut_off_streamed_or_not(client: Any) -> None:
    for seed in range(40):  # the model writes random bytes: until two letters stand together
        asked: dict[str, Any] = {"model": "talk", "prompt": "two", "max_tokens": 60, "temperature": 1, "seed": seed}
        text = client.completions.create(**asked).choices[0].text
        if pairs := [i for i in range(8, len(text) - 2) if text[i : i + 2].isascii()]:
            break
    stop = text[pairs[0] : pairs[0] + 2]
    cut = client.completions.create(**asked, stop=[stop, "never there"])
    assert cut.choices[0].finish_reason == "stop" and cut.choices[0].text == text[: text.index(stop)]
    pieces = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in pieces) == cut.choices[0].text
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 60


def test_what_a_request_gets_does_not_depend_on_its_company(client: Any) -> None:
    """Different lengths and prompts, at once and one after the other."""

    def ask(i: int) -> str:
        messages = [{"role": "user", "content": f"Say {'one ' * (i % 5)}{i}"}]
        options = {"temperature": 0.8, "seed": i % 3} if i % 2 else {}
        found = client.chat.completions.create(model="talk", messages=messages, max_tokens=10 + 3 * i, **options)
        return found.choices[0].message.content

    alone = [ask(i) for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone


def test_groups_are_written_together(client: Any, address: str) -> None:
    """Eight requests with the same settings need far fewer batches than requests."""

    def batches() -> tuple[float, float]:
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if line.startswith("multistep_batch_texts_"))
        return float(found["multistep_batch_texts_count"]), float(found["multistep_batch_texts_sum"])

    before = batches()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: client.completions.create(model="talk", prompt="x", max_tokens=150), range(16)))
    after = batches()
    assert after[1] - before[1] == 16 and after[0] - before[0] < 16


def test_predict_is_what_the_bundle_predicts(talk: Path, address: str) -> None:
    from multistep.bundle import load_bundle

    texts = ["one", "a longer one 好", "two"]
    expected = load_bundle(talk).predict(texts)
    found = httpx.post(f"{address}/predict", json={"text": texts}).json()["predictions"]
    assert [p["value"] for p in found] == [p.value for p in expected]
    assert [p["confidence"] for p in found] == pytest.approx([p.confidence for p in expected], rel=1e-4)
    assert httpx.post(f"{address}/predict", json={"text": " "}).status_code == 422


@pytest.mark.parametrize("how", [{"beams": 3}, {"temperature": 0.9, "seed": 4, "top_k": 30}])
def test_other_tuned_decodings(how: dict[str, Any], tmp_path: Path) -> None:
    from multistep.bundle import load_bundle

    folder = chat_bundle(tmp_path, "lm", **how)
    expected = [p.value for p in load_bundle(folder).predict(["one", "two three"])]
    with served(serve_folder(folder)) as address:
        found = httpx.post(f"{address}/predict", json={"text": ["one", "two three"]}).json()
        assert [p["value"] for p in found["predictions"]] == expected
        body = {"prompt": "one", "max_tokens": 16}
        whole = httpx.post(f"{address}/v1/completions", json=body).json()["choices"][0]
        if "beams" in how:
            assert whole["text"] == expected[0]
        streamed = httpx.post(f"{address}/v1/completions", json={**body, "stream": True, "seed": 1}).text
        assert streamed.rstrip().endswith("data: [DONE]")
        refused = httpx.post(f"{address}/v1/chat/completions", json={"messages": USER})
        assert refused.status_code == 422 and "does not take turns" in refused.json()["error"]["message"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": None}, "messages"),
    "empty": ({"messages": []}, "messages"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type text"),
    "last": ({"messages": [*USER, {"role": "assistant", "content": "x"}]}, "not the user's"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    "tokens": ({"max_tokens": 201}, "from 1 to 200"),
    "no tokens": ({"max_tokens": 0}, "from 1 to 200"),
    "true": ({"max_tokens": True}, "from 1 to 200"),
    "temperature": ({"temperature": "warm"}, "number from 0"),
    "nan": ({"temperature": float("nan")}, "number from 0"),
    "top_p": ({"top_p": 1.5}, "from 0 to 1"),
    "n": ({"n": 17}, "from 1 to 16"),
    "stop": ({"stop": ["a"] * 5}, "up to 4"),
    "stream": ({"stream": "yes"}, "neither true nor false"),
    "options": ({"stream_options": {"usage": True}}, "include_usage"),
    "tools": ({"tools": [{"type": "function"}]}, "'tools' cannot be obeyed"),
    "penalty": ({"frequency_penalty": 0.5}, "'frequency_penalty' cannot be obeyed"),
    "json": ({"response_format": {"type": "json_object"}}, "'response_format' cannot be obeyed"),
    "logprobs": ({"logprobs": True}, "'logprobs' cannot be obeyed"),
    "unknown": ({"temprature": 1}, "unknown key 'temprature'"),
    "long": ({"messages": [{"role": "user", "content": "x" * 300}]}, "the model reads 256"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_obeyed_is_refused_in_openais_shape(name: str, address: str) -> None:
    changes, words = BAD[name]
    body = json.dumps({"model": "talk", "messages": USER, **changes})
    answer = httpx.post(f"{address}/v1/chat/completions", content=body)
    error = answer.json()["error"]
    assert answer.status_code == 422 and words in error["message"] and error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}


def test_the_client_raises_its_own_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=USER)
    with pytest.raises(openai.UnprocessableEntityError, match="cannot be obeyed"):
        client.chat.completions.create(model="talk", messages=USER, presence_penalty=1)
    fine = client.chat.completions.create(
        model="talk", messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        max_completion_tokens=3, presence_penalty=0, response_format={"type": "text"}, user="u", seed=-1,
    )  # fmt: skip
    assert fine.usage.completion_tokens == 3


def test_the_oldest_exchanges_go_where_a_conversation_is_too_long(client: Any) -> None:
    turns = [{"role": "user", "content": "x" * 60}, {"role": "assistant", "content": "y" * 60}] * 3
    found = client.chat.completions.create(model="talk", messages=[*turns, *USER], max_tokens=100)
    assert found.usage.prompt_tokens <= 156


def test_a_bundle_of_labels_has_no_v1(tmp_path: Path) -> None:
    with served(serve_folder(label_bundle(tmp_path))) as address:
        for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": USER})):
            answer = httpx.post(f"{address}/v1/{path}", json=body)
            assert answer.status_code == 422 and "POST /predict" in answer.json()["error"]["message"]
        assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "winds"


# ---------------------------------------------------------------------------------------------- time and leaving


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[int]:
    """Every step of writing takes so long; the number of steps taken."""
    from multistep.models.llama_steps import LlamaSteps

    steps, step = [0], LlamaSteps.step

    def slower(self: Any, tokens: Any) -> Any:
        steps[0] += 1
        time.sleep(seconds)
        return step(self, tokens)

    monkeypatch.setattr(LlamaSteps, "step", slower)
    return steps


def test_a_client_that_leaves_stops_the_writing(talk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = slow(monkeypatch, 0.02)
    monkeypatch.setattr(serve_app, "_WATCH_S", 0.1)
    body = {"messages": USER, "max_tokens": 150, "stream": True}
    with served(serve_folder(talk)) as address:
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
            for n, _ in enumerate(answer.iter_lines()):
                if n > 8:
                    break
        time.sleep(0.3)
        then = steps[0]
        time.sleep(0.3)
        assert steps[0] == then < 60
        with pytest.raises(httpx.ReadTimeout):  # not streamed
            httpx.post(f"{address}/v1/chat/completions", json={**body, "stream": False}, timeout=0.6)
        time.sleep(0.3)
        then = steps[0]
        time.sleep(0.3)
        assert steps[0] == then


def test_the_time_out_ends_the_writing(talk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = slow(monkeypatch, 0.02)
    body = {"messages": USER, "max_tokens": 150}
    with served(serve_folder(talk, time_out=0.5)) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
        assert answer.status_code == 504 and answer.json()["error"]["type"] == "server_error"
        streamed = httpx.post(f"{address}/v1/chat/completions", json={**body, "stream": True})
        assert (
            streamed.status_code == 200 and "not whole within 0.5 s" in streamed.text and "[DONE]" not in streamed.text
        )
        time.sleep(0.2)
        then = steps[0]
        time.sleep(0.2)
        assert steps[0] == then


def test_a_full_queue_is_a_429_and_passes(talk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.01)
    with served(serve_folder(talk, queue=1, batch=1)) as address:
        found: list[httpx.Response] = []
        body = {"messages": USER, "max_tokens": 30}
        ask = lambda: found.append(httpx.post(f"{address}/v1/chat/completions", json=body))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(r.status_code for r in found)
        refused = [r for r in found if r.status_code == 429]
        assert statuses[0] == 200 and refused and all(int(r.headers["retry-after"]) >= 1 for r in refused)
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200


def test_what_may_be_shown_of_a_text() -> None:
    from multistep.serve.writer import Shown

    rng = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(rng.choice(list("ab \ufffd"), 20))
        stops = ["".join(rng.choice(list("ab "), rng.integers(1, 4))) for _ in range(2)]
        shown, given, strip = Shown(stops, bool(rng.integers(2))), "", bool(rng.integers(2))
        shown = Shown(stops, strip)
        whole, _ = shown.cut(text)
        whole = whole.strip() if strip else whole
        for end in range(1, 21):
            part, stopped = shown.cut(text[:end])
            if stopped:
                break
            given += shown.piece(part)
            assert whole.startswith(given)
        assert given + shown.last(whole) == whole
