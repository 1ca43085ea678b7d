"""The page: opened in a headless Chromium, used as a person would, looked at in two widths."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from serving import chat_bundle, label_bundle, serve_folder, served

from multistep import serve
from multistep.types import Prediction

PAGE = Path(serve.__file__).parent / "page" / "index.html"


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = label_bundle(tmp_path_factory.mktemp("labels"))
    path = folder / "model" / "multistep.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "policy": policy(), "engine": {"batch": 8}}))
    return folder


def policy() -> dict[str, Any]:
    from multistep.policy import Entry, Latency, Limit, Policy
    from multistep.types import MetricValue

    def entry(name: str, value: float, ms: float, rule: str) -> Entry:
        latency = Latency.of([ms / 1000 * k for k in (0.9, 1.0, 1.1, 1.4)])
        metrics = {"accuracy": MetricValue(value, 0.012)}
        return Entry(name=name, predictor={"kind": "single"}, metrics=metrics, latency=latency, rule=rule)

    entries = (
        entry("linear", 0.81, 0.4, "where it began"),
        entry("cascade", 0.893, 2.1, "accuracy +0.0830 ± 0.0140: better"),
        entry("encoder", 0.895, 8.0, "the same within 0.0089, not cheaper"),
        entry("slow blend", 0.89, 11.0, "not better"),
    )
    found = Policy(
        metric="accuracy", limit=Limit(ms=20), rows=436, data="calibration split", default="linear", pick="cascade",
        rule="accuracy +0.0830 ± 0.0140: better, p95 2.9 ms within 20 ms", entries=entries, front=("linear", "cascade", "encoder"),
        refused=({"name": "int8", "why": "answers differ by more than 0.01"},),
    )  # fmt: skip
    return found.model_dump(mode="json")


def opened(browser: Any, address: str, width: int, height: int = 900, **more: Any) -> tuple[Any, list[str], list[str]]:
    """The page, the addresses it asked for, and what went wrong in it."""
    page = browser.new_page(viewport={"width": width, "height": height}, **more)
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(address)
    return page, asked, wrong


def too_wide(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


def test_it_is_one_file_that_asks_nobody_else() -> None:
    text = PAGE.read_text(encoding="utf-8")
    addresses = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]{2,}[^\s\"'`]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name space, which is not fetched
    assert not re.search(r"@import|<script[^>]+src|<link[^>]+stylesheet|url\(|innerHTML|eval\(", text)


@pytest.mark.parametrize("width", [1280, 375])
def test_a_text_is_typed_and_its_answer_read(width: int, browser: Any, labels: Path, tmp_path: Path) -> None:
    with served(serve_folder(labels)) as address:
        page, asked, wrong = opened(browser, address, width)
        page.get_by_label("Text").fill("river stone up cloud 7")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#value")
        assert page.inner_text("#value") == "north"
        answer = page.inner_text("#answer")
        assert re.search(r"confidence \d+\.\d %", answer) and re.search(r"server \d+\.\d ms", answer)
        story = page.inner_text("#story")
        for words in (
            "Scores on the test data",
            "accuracy",
            "±",
            "Why this is served",
            "cascade was picked",
            "front",
            "p95 ms",
        ):
            assert words in story, words
        assert page.locator("ol.steps > li").count() >= 2 and page.locator("figure svg circle").count() >= 4
        assert not too_wide(page) and not wrong
        assert asked and all(url.startswith((address, "data:")) for url in asked)
        picture = tmp_path / f"{width}.png"
        page.screenshot(path=str(picture), full_page=True)
        assert picture.stat().st_size > 20_000
        page.close()


def test_what_a_client_types_is_text_and_never_markup(browser: Any, labels: Path) -> None:
    def predict(texts: list[str]) -> list[Prediction]:
        value = texts[0]
        return [Prediction(value, 0.5, {value: 0.5}, "<b>cheap</b>", (value, "b"))]

    with served(serve.create_app(predict, {"model": "<i>m</i>", "labels": ["a"]})) as address:
        page, _, wrong = opened(browser, address, 800)
        page.get_by_label("Text").fill("<img src=x onerror=alert(1)>")
        page.get_by_role("button", name="Predict").click()
        page.wait_for_selector("#value")
        assert page.inner_text("#value") == "<img src=x onerror=alert(1)>" and page.locator("main img").count() == 0
        answer = page.inner_text("#answer")
        assert "answered by <b>cheap</b>" in answer and "abstains" in answer and "One of these is right" in answer
        assert page.inner_text("#name") == "<i>m</i>" and not wrong
        page.get_by_label("Text").fill(" ")
        page.get_by_role("button", name="Predict").click()
        assert "Write a text first" in page.inner_text("#error")
        page.close()


def test_the_keyboard_is_enough_and_dark_is_dark(browser: Any, labels: Path) -> None:
    with served(serve_folder(labels)) as address:
        page, _, _ = opened(browser, address, 1280, color_scheme="dark")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "To the input"
        for _ in range(6):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "text":
                break
        page.keyboard.type("metal down wood")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#value")
        assert page.inner_text("#value") == "south"
        light = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(light)
        page.get_by_role("button", name="Light or dark").click()
        assert dark == "rgb(20, 23, 26)" and page.evaluate(light) == "rgb(251, 250, 247)"
        page.close()


@pytest.mark.parametrize("width", [1280, 375])
def test_a_conversation_is_streamed(width: int, browser: Any, tmp_path: Path) -> None:
    expect = pytest.importorskip("playwright.sync_api").expect
    with served(serve_folder(chat_bundle(tmp_path, max_new_tokens=24))) as address:
        page, asked, wrong = opened(browser, address, width)
        for n in (1, 2):
            page.get_by_label("Message").fill(f"Say {n}")
            page.keyboard.press("Enter")
            page.wait_for_selector("#answer .chip")
            expect(page.locator(".turn")).to_have_count(
                2 * n
            )  # a function to wait for would be against the page's own rules
            expect(page.locator(".going")).to_have_count(0)
        assert page.inner_text(".turn.user >> nth=1") == "Say 2" and page.inner_text(".turn.assistant >> nth=1")
        assert "tokens/s" in page.inner_text("#answer") and not too_wide(page) and not wrong
        assert sum(url.endswith("/v1/chat/completions") for url in asked) == 2
        page.get_by_role("button", name="Start anew").click()
        assert page.locator(".turn").count() == 0
        page.close()


def test_a_token_is_asked_for(browser: Any) -> None:
    app = serve.create_app(lambda texts: [Prediction("a", 1.0)], {"model": "m", "labels": ["a"]}, token="of the server")
    with served(app) as address:
        page, _, _ = opened(browser, address, 800)
        page.wait_for_selector("#door:not([hidden])")
        page.get_by_label("Token").fill("another")
        page.get_by_role("button", name="Enter").click()
        page.wait_for_selector("#door-error:not([hidden])")
        page.get_by_label("Token").fill("of the server")
        page.get_by_role("button", name="Enter").click()
        page.wait_for_selector("#door", state="hidden")
        page.get_by_label("Text").fill("x")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#value")
        assert page.inner_text("#value") == "a" and page.inner_text("#name") == "m"
        page.close()
