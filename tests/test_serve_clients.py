"""What clients do to a server: noise, halves of requests, bodies that trickle, answers that nobody reads."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from serving import INFO, ROUTES, chat_bundle, label_bundle, numbers, raw, serve_folder, served

from multistep import serve
from multistep.serve import limits
from multistep.serve import server as process
from multistep.types import Prediction


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label_bundle(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_bundle(tmp_path_factory.mktemp("chat"))


def _fuzzed(rng: random.Random) -> bytes:
    """A body: noise, JSON of any shape, or a good one with a few bytes changed."""
    leaf = [None, True, 0, -1, 1e308, 10**400, "x", "", "\u0000", "好" * 50, "\ud800", [], {}]
    keys = [
        "text",
        "messages",
        "prompt",
        "model",
        "stream",
        "n",
        "stop",
        "max_tokens",
        "temperature",
        "role",
        "content",
        "seed",
    ]

    def value(depth: int) -> Any:
        kind = rng.random()
        if depth > 3 or kind < 0.4:
            return rng.choice(leaf)
        if kind < 0.7:
            return [value(depth + 1) for _ in range(rng.randint(0, 4))]
        return {rng.choice(keys): value(depth + 1) for _ in range(rng.randint(0, 5))}

    good = rng.choice(
        [
            {"text": "a b"},
            {"prompt": "a", "max_tokens": 2},
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
        ]
    )
    match rng.randrange(4):
        case 0:
            return rng.randbytes(rng.randint(0, 300))
        case 1:
            return json.dumps(value(0)).encode()
        case 2:
            return json.dumps({**good, rng.choice(keys): value(1)}).encode()
    body = bytearray(json.dumps(good).encode())
    for _ in range(rng.randint(1, 4)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return bytes(body)


@pytest.mark.parametrize("which", ["labels", "talk"])
def test_a_thousand_fuzzed_bodies_are_4xx_and_never_5xx(which: str, labels: Path, talk: Path) -> None:
    rng = random.Random(7)
    statuses: dict[int, int] = {}
    with (
        served(serve_folder(labels if which == "labels" else talk, max_tokens=8)) as address,
        httpx.Client(timeout=20) as client,
    ):
        for _ in range(1000):
            answer = client.post(address + rng.choice(ROUTES), content=_fuzzed(rng))
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code < 500, answer.text
            if answer.status_code != 200:
                said = answer.json()["error"]
                line = said if isinstance(said, str) else said["message"]
                assert line and "\n" not in line and "Traceback" not in line
        assert statuses[400] > 100 and statuses[422] > 100 and statuses[200] >= 1
        assert httpx.get(f"{address}/health").json()["status"] == "ok"
        routes = {key for key in numbers(address) if key.startswith("multistep_requests_total")}
        assert len(routes) < 20  # whatever is sent makes no new series


HEADS: dict[str, tuple[bytes, bytes]] = {
    "noise": (bytes(range(256)) * 4, b"400"),
    "half a head": (b"POST /predict HTTP/1.1\r\nhost: x\r\n", b""),
    "length": (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n", b"400"),
    "large": (b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n", b"413"),
    "address": (b"GET /%00%ff%2e%2e/etc HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", b"404"),
    "method": (b"BREW /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", b"40"),
    "long head": (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"x" * 200_000 + b"\r\n\r\n", b""),
    "chunks": (b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n", b"400"),
}


def test_broken_http_harms_nobody() -> None:
    with served(serve.create_app(lambda texts: [Prediction(t) for t in texts], INFO)) as address:
        for name, (sent, status) in HEADS.items():
            try:
                found = raw(address, sent, 0.5)
            except ConnectionError:
                found = b""
            assert b"HTTP/1.1 5" not in found and status in found.split(b"\r\n")[0], name
        assert httpx.post(f"{address}/predict", json={"text": "x"}).status_code == 200


def test_a_body_that_trickles_is_timed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits.read_body, "__defaults__", (0.4,))
    with served(serve.create_app(lambda texts: [Prediction(t) for t in texts], INFO)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
            begun = time.perf_counter()
            connection.settimeout(0.05)
            found = b""
            while time.perf_counter() - begun < 3 and not found:
                try:
                    connection.sendall(b" ")
                    found = connection.recv(4096)
                except TimeoutError:
                    pass
            assert b" 408 " in found.split(b"\r\n")[0] and time.perf_counter() - begun < 1.5
        assert httpx.post(f"{address}/predict", json={"text": "x"}).status_code == 200


@contextlib.contextmanager
def impatient(app: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """The server that `serve` runs, with half a second of patience in place of ten."""
    monkeypatch.setattr(process, "BODY_S", 0.5)
    started: list[uvicorn.Server] = []
    plain = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: (started.append(self), plain(self, sockets)))
    listening = socket.create_server(("127.0.0.1", 0))
    address = listening.getsockname()
    thread = threading.Thread(target=process._run, args=(app, listening, serve.Settings()), daemon=True)
    thread.start()
    yield address
    started[0].should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_a_head_that_never_ends_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two such: one from the beginning, one after a good request on the same connection."""
    good = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with impatient(serve.create_app(lambda texts: [Prediction(t) for t in texts], INFO), monkeypatch) as address:
        for first in (b"", good):
            with socket.create_connection(address, timeout=6) as connection:
                if first:
                    connection.sendall(first)
                    assert b"200 OK" in connection.recv(4096)
                connection.sendall(b"GET /health HTTP/1.1\r\nx-a: ")
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(4096) == b""


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    app = serve.create_app(lambda texts: [], INFO, story={"long": "x" * 30_000_000})
    with impatient(app, monkeypatch) as address:
        with socket.create_connection(address, timeout=6) as connection:
            connection.sendall(b"GET /explain HTTP/1.1\r\nhost: x\r\n\r\n")
            time.sleep(3)
            got = 0
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(1 << 20):
                    got += len(part)
            assert got < 30_000_000
        assert httpx.get(f"http://127.0.0.1:{address[1]}/health").status_code == 200
