"""serve: what is answered, what is refused, and that nothing a client sends becomes a 5xx."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from multistep import serve
from multistep.types import Prediction, UserError

INFO = {"model": "reviews", "task": "classify", "labels": ["neg", "pos"]}


BUNDLE = {
    "format": 1, "multistep": "0.1.0", "task": {"kind": "classify", "labels": ["neg", "pos"]},
    "predictor": {"kind": "single", "model": "linear"}, "path": "/home/someone/runs/reviews",
}  # fmt: skip


def predict(texts: list[str]) -> list[Prediction]:
    return [Prediction(f"{len(t)}", 0.75, {str(k): k / 28 for k in range(8)}) for t in texts]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(serve.create_app(predict, INFO), raise_server_exceptions=False) as client:
        yield client


def test_a_single_text_gets_a_prediction(client: TestClient) -> None:
    answer = client.post("/predict", json={"text": "great"})
    assert answer.status_code == 200
    body = answer.json()
    assert body["model"] == "reviews" and body["took_ms"] >= 0 and "predictions" not in body
    assert body["prediction"]["value"] == "5" and body["prediction"]["confidence"] == 0.75
    assert list(body["prediction"]["scores"]) == ["7", "6", "5", "4", "3"]


def test_a_list_gets_a_list_in_its_order(client: TestClient) -> None:
    texts = ["", "电影很好", "a\x00b", "x" * 100_000]
    body = client.post("/predict", json={"text": texts}).json()
    assert [p["value"] for p in body["predictions"]] == ["0", "4", "3", "100000"] and "prediction" not in body
    assert len(client.post("/predict", json={"text": ["a"] * 256}).json()["predictions"]) == 256


@pytest.mark.parametrize(
    ("prediction", "shown"),
    [
        (
            Prediction(("a", "b"), 0.6, {"a": 0.6, "b": 0.7}),
            {"value": ["a", "b"], "confidence": 0.6, "scores": {"b": 0.7, "a": 0.6}, "stage": ""},
        ),
        (Prediction(2.5), {"value": 2.5, "confidence": None, "scores": {}, "stage": ""}),
        (Prediction(float("nan")), {"value": None, "confidence": None, "scores": {}, "stage": ""}),
        (
            Prediction("a", 0.6, {"a": 0.6}, "linear", ("a", "b")),
            {"value": "a", "confidence": 0.6, "scores": {"a": 0.6}, "stage": "linear", "candidates": ["a", "b"], "abstains": True},
        ),
    ],
)  # fmt: skip
def test_other_tasks(prediction: Prediction, shown: dict[str, Any]) -> None:
    client = TestClient(serve.create_app(lambda texts: [prediction], {}))
    assert client.post("/predict", json={"text": "x"}).json()["prediction"] == shown


def test_health_says_what_is_served(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok", **INFO}


def test_the_interface_is_described(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {
        "/predict",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/health",
        "/metrics",
        "/explain",
    } <= set(paths)
    text = paths["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]["text"]
    assert text["oneOf"][0]["maxLength"] == 100_000


BAD: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "not JSON"),
    "half": (b'{"text": "a', 400, "not JSON"),
    "latin-1": ('{"text": "é"}'.encode("latin-1"), 400, "not JSON"),
    "brackets": (b"[" * 100_000, 400, "not JSON"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    "list": (b'["a"]', 422, 'no "text"'),
    "null": (b"null", 422, 'no "text"'),
    "other key": (b'{"texts": "a"}', 422, 'no "text"'),
    "more keys": (b'{"text": "a", "top": 3}', 422, "'top'"),
    "number": (b'{"text": 3}', 422, "not a string"),
    "not a number": (b'{"text": NaN}', 422, "not a string"),
    "null text": (b'{"text": null}', 422, "not a string"),
    "object": (b'{"text": {"a": 1}}', 422, "not a string"),
    "list of numbers": (b'{"text": ["a", 3]}', 422, '"text"[1] is not a string'),
    "list of lists": (b'{"text": [["a"]]}', 422, "not a string"),
    "empty list": (b'{"text": []}', 422, "empty list"),
    "many": (json.dumps({"text": ["a"] * 257}).encode(), 413, "257 texts"),
    "long": (json.dumps({"text": "a" * 100_001}).encode(), 413, "100001 characters"),
    "large": (json.dumps({"text": "a" * 1_000_001}).encode(), 413, "1000000 bytes"),
    "surrogate": (b'{"text": "\\ud800"}', 422, "surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies_are_refused_in_a_line(name: str, client: TestClient) -> None:
    body, status, words = BAD[name]
    answer = client.post("/predict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and words in answer.json()["error"] and "\n" not in answer.json()["error"]


def test_a_body_of_unknown_size_is_cut_at_the_limit(client: TestClient) -> None:
    answer = client.post("/predict", content=(b"x" * 100_000 for _ in range(20)))
    assert answer.status_code == 413


def test_other_addresses_and_methods(client: TestClient) -> None:
    for answer, status in ((client.get("/nothing"), 404), (client.get("/predict"), 405), (client.post("/health"), 405)):
        assert answer.status_code == status and "POST /predict" in answer.json()["error"]


def test_what_predict_refuses_is_a_422(client: TestClient) -> None:
    def refuse(texts: list[str]) -> list[Prediction]:
        raise UserError("the text is empty.")

    answer = TestClient(serve.create_app(refuse, INFO)).post("/predict", json={"text": ""})
    assert answer.status_code == 422 and answer.json() == {"error": "the text is empty."}


def test_one_predicts_at_a_time_and_health_answers_meanwhile() -> None:
    running, most, go = [0], [0], threading.Event()

    def slow(texts: list[str]) -> list[Prediction]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        go.wait(5)
        time.sleep(0.01)
        running[0] -= 1
        return predict(texts)

    with TestClient(serve.create_app(slow, INFO)) as client:
        statuses: list[int] = []
        ask = lambda: statuses.append(client.post("/predict", json={"text": "a"}).status_code)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert client.get("/health").status_code == 200 and not statuses
        go.set()
        for thread in threads:
            thread.join(5)
    assert statuses == [200] * 4 and most[0] == 1


def test_a_real_server_answers_on_loopback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = ModuleType("multistep.bundle")
    monkeypatch.setattr(
        bundle, "load_bundle", lambda path: SimpleNamespace(predict=predict, info=BUNDLE), raising=False
    )
    monkeypatch.setitem(sys.modules, "multistep.bundle", bundle)
    announced: list[str] = []
    ready = threading.Event()

    def announce(address: str, info: object) -> None:
        announced.append(address)
        ready.set()

    threading.Thread(
        target=serve.serve, args=(tmp_path / "reviews" / "model", "127.0.0.1", 0, announce), daemon=True
    ).start()
    assert ready.wait(5)
    request = urllib.request.Request(announced[0] + "/predict", b'{"text": "four"}')
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
        assert json.load(answer)["prediction"]["value"] == "4"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(announced[0] + "/health") as answer:
        health = json.load(answer)
    assert health["task"] == "classify" and health["model"] == "reviews" and "/home" not in json.dumps(health)
    port = int(announced[0].rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"127.0.0.1:{port}: .*in use.*--port"):
        serve.serve(tmp_path, "127.0.0.1", port)


def test_without_the_extra_the_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r'uvicorn is not installed. Run: pip install "multistep\[serve\]"'):
        serve.serve(tmp_path)


def test_serving_does_not_import_training() -> None:
    code = "import sys, multistep.serve; print(*[m for m in sys.modules if m[:5] in ('multi', 'torch', 'fasta')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(found.split()) - {"multiprocessing"} == {
        "multistep",
        "multistep.types",
        "multistep.serve",
        "multistep.serve.app",
        "multistep.serve.gate",
        "multistep.serve.limits",
        "multistep.serve.server",
    }
