"""doctor: the facts are there, survive JSON, and the hub is asked politely."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from multistep import doctor


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return doctor.examine()


def test_facts_survive_json_and_become_a_table(facts: dict[str, Any]) -> None:
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["cpu"]["logical"] >= 1 and 0 < facts["cpu"]["usable"] <= facts["cpu"]["logical"]
    assert 0 < facts["memory"]["available_bytes"] <= facts["memory"]["total_bytes"]
    assert facts["torch"]["installed"] and facts["torch"]["threads"] >= 1
    text = doctor.table(facts)
    for words in ("cores", "memory", "disk", "torch", "GPU", "optional: serve", "model hub", "HF_HUB_OFFLINE is set"):
        assert words in text, words


def test_offline_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor, "_ask", lambda *_: pytest.fail("the hub was asked"))
    assert doctor._hub(3.0)["state"] == "not asked"


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (401, True), (404, True), (403, False), (502, False)])
def test_hub_answers(status: int, reachable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        hub = doctor._hub(3.0)
    assert hub["reachable"] is reachable and (reachable or str(status) in hub["why"])


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(doctor, "_ask", lambda *_: time.sleep(1.0))
    start = time.perf_counter()
    hub = doctor._hub(0.05)
    assert time.perf_counter() - start < 0.5 and hub["why"] == "no answer in time"


def test_an_unknown_address_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service\nnot known")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(doctor.urllib.request, "urlopen", fail)
    assert doctor._hub(1.0)["why"] == "Name or service not known"


def test_a_missing_part_comes_with_its_command(monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any]) -> None:
    monkeypatch.setattr(doctor, "_extras", lambda: {"serve": ("fastapi", "no-such-thing")})
    part = doctor._optional()["serve"]
    assert part == {"installed": False, "missing": ["no-such-thing"], "install": 'pip install "multistep[serve]"'}
    assert 'missing no-such-thing: pip install "multistep[serve]"' in doctor.table(
        {**facts, "optional": {"serve": part}}
    )


def test_extras_are_read_from_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2", "fastapi>=0.100; extra == 'serve'", 'uvicorn; extra == "serve"', "pytest; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: lines)
    assert doctor._extras() == {"serve": ("fastapi", "uvicorn")}
