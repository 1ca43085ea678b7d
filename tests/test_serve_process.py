"""The process and its limits: a real server on loopback, what clients do to it, how it ends."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import INFO, chat_bundle, label_bundle, numbers, serve_folder, served

from multistep import serve
from multistep.bundle import load_bundle
from multistep.serve import app as serve_app
from multistep.serve.numbers import Numbers
from multistep.serve.queue import Batcher
from multistep.types import Prediction, UserError


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label_bundle(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_bundle(tmp_path_factory.mktemp("chat"))


# ---------------------------------------------------------------------------------------------- served = evaluated


def test_what_is_served_is_what_was_evaluated_in_any_company(labels: Path) -> None:
    """The bound of docs/serving.md: 1e-5 of a probability in float32; the linear model does not know its company at all."""
    bundle = load_bundle(labels)
    rng = random.Random(0)
    texts = [
        " ".join(rng.choices(["up", "down", "left", "river", "stone", "好"], k=rng.randint(0, 20))) for _ in range(60)
    ]
    expected = dict(zip(texts, bundle.predict(texts), strict=True))
    with served(serve_folder(labels)) as address, httpx.Client() as client:

        def ask(some: list[str]) -> None:
            found = client.post(f"{address}/predict", json={"text": some}).json()["predictions"]
            for text, p in zip(some, found, strict=True):
                assert p["value"] == expected[text].value
                assert p["confidence"] == pytest.approx(expected[text].confidence, abs=1e-5)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, [rng.sample(texts, rng.choice([1, 1, 2, 7, 40])) for _ in range(80)]))


def test_an_encoder_answers_the_same_in_any_company(make_encoder: Any) -> None:
    import numpy as np

    from multistep.evaluate import EncoderText, Engine
    from multistep.predictors import Single, predict
    from multistep.tasks import Classify

    rng = random.Random(1)
    task = Classify(labels=("a", "b", "c"))
    tokenize = lambda texts: [np.array([2, *(10 + ord(c) % 80 for c in t)], np.int32) for t in texts]  # noqa: E731
    engine = Engine({"encoder": EncoderText(make_encoder(), tokenize, 0)})
    answer = lambda texts: predict(task, Single(model="encoder"), engine, texts)  # noqa: E731
    texts = ["x" * rng.randint(0, 50) + str(i) for i in range(40)]
    alone = {t: answer([t])[0] for t in texts}
    with served(serve.create_app(answer, INFO)) as address, httpx.Client() as client:
        for _ in range(30):
            some = rng.sample(texts, rng.randint(1, 40))
            found = client.post(f"{address}/predict", json={"text": some}).json()["predictions"]
            for t, p in zip(some, found, strict=True):
                assert p["value"] == alone[t].value
                assert p["scores"] == pytest.approx(dict(alone[t].scores), abs=1e-5)


def test_the_engine_of_a_bundle_is_obeyed(labels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from multistep.serve.server import _as_tuned

    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    assert _as_tuned(serve.Settings(), {"threads": 3, "batch": 5}).batch == 5 and set_to == [3]
    assert _as_tuned(serve.Settings(), {}) == serve.Settings() and set_to == [3]


# ---------------------------------------------------------------------------------------------- batches and the queue


def test_others_are_answered_together_and_one_alone_at_once() -> None:
    sizes: list[int] = []
    go = threading.Event()

    def answer(texts: list[str]) -> list[Prediction]:
        sizes.append(len(texts))
        go.wait(5)
        return [Prediction(t, 1.0) for t in texts]

    with served(serve.create_app(answer, INFO, serve.Settings(batch=8))) as address:
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            first = pool.submit(httpx.post, f"{address}/predict", json={"text": "0"})
            while not sizes:
                time.sleep(0.01)
            rest = [pool.submit(httpx.post, f"{address}/predict", json={"text": str(n)}) for n in range(1, 21)]
            while numbers(address)["multistep_queue_depth"] < 20:
                time.sleep(0.01)
            go.set()
            found = [f.result().json()["prediction"]["value"] for f in [first, *rest]]
        assert found == [str(n) for n in range(21)] and sizes == [1, 8, 8, 4]
        begun = time.perf_counter()
        took = httpx.post(f"{address}/predict", json={"text": "x"}).json()["took_ms"]
        assert took < 50 and time.perf_counter() - begun < 1
        assert len(httpx.post(f"{address}/predict", json={"text": ["a"] * 20}).json()["predictions"]) == 20
        assert sizes[-3:] == [8, 8, 4]


def test_one_bad_text_fails_its_own_request_only() -> None:
    go = threading.Event()

    def answer(texts: list[str]) -> list[Prediction]:
        go.wait(5)
        if "bad" in texts:
            raise UserError("this text is bad.")
        return [Prediction(t) for t in texts]

    with served(serve.create_app(answer, INFO)) as address, concurrent.futures.ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(httpx.post, f"{address}/predict", json={"text": t}) for t in ("a", "b", "bad", "c")]
        time.sleep(0.3)
        go.set()
        assert sorted(f.result().status_code for f in asked) == [200, 200, 200, 422]


def test_overload_is_429_with_a_time_and_passes() -> None:
    def answer(texts: list[str]) -> list[Prediction]:
        time.sleep(0.05)
        return [Prediction(t) for t in texts]

    app = serve.create_app(answer, INFO, serve.Settings(queue=4, batch=2))
    with served(app) as address, concurrent.futures.ThreadPoolExecutor(40) as pool:
        found = [
            f.result() for f in [pool.submit(httpx.post, f"{address}/predict", json={"text": "x"}) for _ in range(40)]
        ]
        refused = [r for r in found if r.status_code == 429]
        assert {r.status_code for r in found} == {200, 429} and len(refused) >= 10
        assert all(int(r.headers["retry-after"]) >= 1 for r in refused) and "waiting" in refused[0].json()["error"]
        begun = time.perf_counter()
        assert httpx.post(f"{address}/predict", json={"text": "x"}).status_code == 200
        assert time.perf_counter() - begun < 1
        assert (
            httpx.post(f"{address}/predict", json={"text": ["x"] * 9}).status_code == 200
        )  # more than the queue, but it is empty
        assert numbers(address)["multistep_requests_total{route=/predict,status=429}"] == len(refused)


def test_what_waits_too_long_is_dropped_unanswered() -> None:
    seen: list[str] = []

    def answer(texts: list[str]) -> list[Prediction]:
        seen.extend(texts)
        time.sleep(1.0 if "slow" in texts else 0)
        return [Prediction(t) for t in texts]

    app = serve.create_app(answer, INFO, serve.Settings(time_out=0.5, batch=1))
    with served(app) as address, concurrent.futures.ThreadPoolExecutor(4) as pool:
        slow = pool.submit(httpx.post, f"{address}/predict", json={"text": "slow"})
        time.sleep(0.1)
        late = pool.submit(httpx.post, f"{address}/predict", json={"text": ["late", "later"]})
        assert (slow.result().status_code, late.result().status_code) == (504, 503)
        assert int(late.result().headers["retry-after"]) >= 1
        time.sleep(0.6)
        assert httpx.post(f"{address}/predict", json={"text": "next"}).status_code == 200
        assert seen == ["slow", "next"] and numbers(address)["multistep_queue_depth"] == 0


def test_a_queued_request_whose_client_left_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "_WATCH_S", 0.1)
    seen: list[str] = []

    def answer(texts: list[str]) -> list[Prediction]:
        seen.extend(texts)
        time.sleep(1.0 if "slow" in texts else 0)
        return [Prediction(t) for t in texts]

    app = serve.create_app(answer, INFO, serve.Settings(batch=1))
    with served(app) as address, concurrent.futures.ThreadPoolExecutor(2) as pool:
        slow = pool.submit(httpx.post, f"{address}/predict", json={"text": "slow"})
        time.sleep(0.1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/predict", json={"text": "left"}, timeout=0.1)
        assert slow.result().status_code == 200
        assert httpx.post(f"{address}/predict", json={"text": "next"}).status_code == 200
        assert seen == ["slow", "next"]
        assert numbers(address)["multistep_requests_total{route=/predict,status=499}"] == 1


# ---------------------------------------------------------------------------------------------- token, numbers, reasons


def test_the_token_is_asked_for_everywhere_but_health_and_the_page() -> None:
    app = serve.create_app(lambda texts: [Prediction(t) for t in texts], INFO, token="correct-horse")
    with served(app) as address:
        for path in ("/metrics", "/explain", "/v1/models", "/openapi.json", "/nothing"):
            answer = httpx.get(address + path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", path
        for header in ("Bearer wrong", "Basic correct-horse", "correct-horse", "Bearer", "Bearer \xe9"):
            answer = httpx.post(f"{address}/predict", json={"text": "x"}, headers={"authorization": header.encode("latin-1")})  # fmt: skip
            assert answer.status_code == 401 and "Bearer" in answer.json()["error"]
        assert "error" in httpx.get(f"{address}/v1/models").json() and httpx.get(address).status_code == 200
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        known = {"authorization": "bearer correct-horse"}
        assert httpx.post(f"{address}/predict", json={"text": "x"}, headers=known).status_code == 200
        assert httpx.get(f"{address}/health", headers=known).json()["model"] == "m"
        assert numbers(address, headers=known)["multistep_requests_total{route=/predict,status=401}"] == 5


def test_what_is_counted() -> None:
    def answer(texts: list[str]) -> list[Prediction]:
        return [Prediction(t, 0.5, {}, "cheap" if len(t) < 3 else "costly") for t in texts]

    with served(serve.create_app(answer, INFO)) as address:
        httpx.post(f"{address}/predict", json={"text": ["a", "b", "long one"]})
        httpx.post(f"{address}/predict", json={"text": "a"})
        httpx.post(f"{address}/predict", json={"text": 3})
        httpx.get(f"{address}/a/b")
        found = numbers(address)
    assert found["multistep_requests_total{route=/predict,status=200}"] == 2
    assert found["multistep_requests_total{route=/predict,status=422}"] == 1
    assert found["multistep_requests_total{route=other,status=404}"] == 1
    assert found["multistep_request_seconds_count{route=/predict}"] == 3
    assert found["multistep_answers_total{stage=cheap}"] == 3 and found["multistep_answers_total{stage=costly}"] == 1
    assert found["multistep_batch_texts_sum"] == 4 and found["multistep_batch_texts_count"] == 2
    assert found["multistep_queue_depth"] == 0


def test_explain_gives_the_decisions_and_no_folder(labels: Path) -> None:
    with served(serve_folder(labels)) as address:
        told = httpx.get(f"{address}/explain").json()
    assert told["policy"] is None and told["model"] == "winds" and told["metric"] == "accuracy"
    assert "stands" in told["why"] and told["stands"]["predictor"]["kind"]
    assert told["decisions"][0]["status"] == "committed" and told["test"]["accuracy"]["stderr"] > 0
    assert told["scores"][0]["committed"] is True
    assert str(labels.parent) not in json.dumps(told)
    alone = labels.parent / "alone" / "copied"
    shutil.copytree(labels / "model", alone, dirs_exist_ok=True)
    with served(serve_folder(alone)) as address:
        told = httpx.get(f"{address}/explain").json()
    assert told["decisions"] == [] and "no journal" in told["why"]


def test_paths_are_shortened() -> None:
    from multistep.serve.story import _plain

    assert _plain({"a": "read /home/me/data/x.csv, then C:\\Users\\me\\y.csv", "path": "/home/me"}) == {
        "a": "read x.csv, then y.csv"
    }
    assert _plain(["1/2 of org/name", "http://x.org/a/b", float("nan")]) == [
        "1/2 of org/name",
        "http://x.org/a/b",
        None,
    ]


# ---------------------------------------------------------------------------------------------- the process


@pytest.fixture
def started(labels: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`multistep serve`, with answers that take a second."""
    program = (
        "import sys, time\nfrom multistep import bundle, cli\npredict = bundle.Bundle.predict\n"
        "def slow(self, texts):\n    time.sleep(1)\n    return predict(self, texts)\n"
        "bundle.Bundle.predict = slow\nsys.exit(cli.run(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, "serve", str(labels), "--port", "0", "--time-out", "5", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout is not None
    yield process, json.loads(process.stdout.readline())["address"]
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: int, started: tuple[subprocess.Popen[str], str]) -> None:
    """What was asked is answered, nothing new is taken, the exit code is 0."""
    process, address = started
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        httpx.post(f"{address}/predict", json={"text": "up"})
        asked = [pool.submit(httpx.post, f"{address}/predict", json={"text": f"up {n}"}, timeout=20) for n in range(6)]
        while sum(numbers(address).get(k, 0) for k in ("multistep_queue_depth", "multistep_batch_texts_sum")) < 2:
            time.sleep(0.01)  # the first is being answered, some others wait
        time.sleep(0.3)
        process.send_signal(number)
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
        assert [f.result().status_code for f in asked] == [200] * 6
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 0 and "Traceback" not in errors


def test_what_cannot_be_drained_in_time_is_cut_and_said(labels: Path) -> None:
    program = (
        "import sys, time\nfrom multistep import bundle, cli\n"
        "bundle.Bundle.predict = lambda self, texts: time.sleep(3)\nsys.exit(cli.run(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, "serve", str(labels), "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "--time-out", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address = json.loads(process.stdout.readline())["address"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{address}/predict", json={"text": "x"}, timeout=20)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)  # again: at once
        _, errors = process.communicate(timeout=10)
        assert asked.result().status_code == 503 and "the server stops" in asked.result().json()["error"]
    assert process.returncode == 1 and "before everything was answered" in errors and "Traceback" not in errors


def test_a_warning_where_others_can_reach_it_without_a_token(
    labels: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multistep.serve import server

    monkeypatch.setattr(server, "_run", lambda app, listening, settings: True)
    for host, token, warned in (("0.0.0.0", "", True), ("0.0.0.0", "some-token", False), ("127.0.0.1", "", False)):
        caplog.clear()
        assert server.serve(labels, host, 0, None, None, token)
        assert ("no token" in caplog.text) is warned, (host, token)


def test_a_client_that_hangs_up_while_it_sends_has_left() -> None:
    """499, and nothing is broken: no traceback in the log."""
    app = serve.create_app(lambda texts: [Prediction(t) for t in texts], INFO)
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    broken: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: broken.append(record.getMessage())  # pyright: ignore[reportAttributeAccessIssue]
    logging.getLogger("uvicorn.error").addHandler(handler)
    try:
        with served(app) as address:
            host, port = address.removeprefix("http://").split(":")
            for path in (b"/predict", b"/v1/completions"):
                with socket.create_connection((host, int(port))) as connection:
                    connection.sendall(head % path + b'{"text": "half')
                counted = f"multistep_requests_total{{route={path.decode()},status=499}}"
                until = time.monotonic() + 10
                while counted not in (found := numbers(address)) and time.monotonic() < until:
                    time.sleep(0.02)
                assert found.get(counted) == 1
            assert httpx.post(f"{address}/predict", json={"text": "x"}).status_code == 200
            assert not [name for name in numbers(address) if "status=5" in name]
    finally:
        logging.getLogger("uvicorn.error").removeHandler(handler)
    assert not broken


def test_a_request_that_fails_alone_after_its_client_left_fails_nobody_else() -> None:
    """Two are answered together and fail; the first is asked alone, leaves meanwhile, and fails again."""
    alone, go = threading.Event(), threading.Event()

    def work(texts: list[str]) -> list[str]:
        if len(texts) == 1 and texts != ["bad"]:
            return texts
        if len(texts) == 1:
            alone.set()
            go.wait(10)
        raise ValueError("bad")

    async def both() -> list[str]:
        batcher = Batcher[str, str](work, 8, 8, Numbers())
        first, second = (asyncio.create_task(batcher.ask([text], 60)) for text in ("bad", "good"))
        await asyncio.to_thread(alone.wait, 10)
        first.cancel()
        await asyncio.wait([first])
        go.set()
        try:
            return [*await asyncio.wait_for(second, 10), *await asyncio.wait_for(batcher.ask(["next"], 60), 10)]
        finally:
            batcher.close()

    assert asyncio.run(both()) == ["good", "next"]
