"""A run as a page: it is one file that asks for nothing, what is in a journal is text and never markup, and a browser shows it."""

from __future__ import annotations

import copy
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from papers import live, problem
from test_report import RECORDS, asked, clock, told

from multistep import cli, journal
from multistep.budget import parse_budget
from multistep.explained import write_page
from multistep.report import svg
from multistep.report.conclusion import conclusion
from multistep.report.page import page
from multistep.report.summary import summary
from multistep.report.words import without_folders

PASSES = [(True, "journal.jsonl: all follows from its evidence (asks 9)", [])]
EVIL = "<script>alert(1)</script>&\"'"


class Outline(HTMLParser):
    """Tags that are open, headings, and text."""

    VOID = ("meta", "br", "path", "rect", "circle", "img")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, total = tmp_path_factory.mktemp("paged") / "winds", parse_budget("300s")
    live(folder / "journal.jsonl", problem(total), total)
    return folder


def test_it_has_all_that_a_run_has() -> None:
    found = Outline(page(RECORDS, "reviews", PASSES))
    assert not found.open
    for title in (
        "The score over time", "Where the budget went", "Decisions", "Diagnosis", "Scores on the test data", "Training", "Left out",
        "Out of the ordinary", "Data", "Machine and settings", "Replay",
    ):  # fmt: skip
        assert title in found.headings, title
    for words in (
        "92.1 % of its answers are right", "(95 % interval for the luck of the sample: 91.2 to 93.1 %)", "passes", "2 of 3candidates kept",
        "dropout 0.1", "12 s left, a race needs 40 s", "nonfinite", "Rows 3, 9.", "rolled back, halved", "退款|refund as billing 12",
        "+0.0120 ± 0.0040", "1500", "0.003", "asks 9",
    ):  # fmt: skip
        assert words in found.text, words
    assert found.tags.count("details") >= 6 and found.tags.count("svg") == 4


def test_it_asks_nobody_and_runs_nothing(run_dir: Path, tmp_path: Path) -> None:
    text = write_page(run_dir, tmp_path / "deep" / "run.html").read_text(encoding="utf-8")
    assert not re.search(
        r"http|//[a-z]|@import|url\(|<script|<link|<img|<iframe|src=|javascript|\son\w+=", text, re.IGNORECASE
    )
    assert text.startswith("<!doctype html>") and len(text) < 200_000
    assert not list((tmp_path / "deep").glob("*.new"))


def test_what_is_in_a_journal_is_text() -> None:
    records = copy.deepcopy(RECORDS)

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return f"{value}{EVIL}" if isinstance(value, str) else value

    poisoned = [{k: v if k == "kind" else poison(v) for k, v in r.items()} for r in records]
    for r in poisoned:
        if r["kind"] == "Started":
            r["budget"] = {"amount": 120.0, "unit": "seconds"}
    clean, dirty = Outline(page(records, "a", PASSES)), Outline(page(poisoned, f"a{EVIL}", [(False, EVIL, [EVIL])]))
    assert "script" not in dirty.tags and not dirty.open and set(dirty.tags) <= set(clean.tags)
    assert dirty.text.count("<script>alert(1)</script>") > 30


def test_diagnoses_name_what_to_do_and_the_rows() -> None:
    suspects = [{"row": 7, "text": f"a {EVIL}", "given": "up", "likely": "down", "probability": 0.97}]
    more = [
        asked("d", "diagnose", "w", kind="diagnose"),
        {"kind": "Diagnosed", "at": "end", "trial": "d", "name": "noisy labels", "words": "6 % are wrong", "action": "read row 7",
         "numbers": {"share": 0.06, "suspects": suspects}, "clock": clock(116)},
        {"kind": "Noted", "trial": "d", "what": "not found", "facts": {"leaking splits": {"words": "none leak"}}, "clock": clock(116)},
    ]  # fmt: skip
    said = Outline(page([*RECORDS[:-1], *more, RECORDS[-1]], "a", PASSES)).text
    for words in (
        "6 % are wrong",
        "To do: read row 7",
        "1 rows whose label",
        "0.97",
        f"a {EVIL}",
        "leaking splits: none leak",
        "Done: ",
    ):
        assert words in said, words


@pytest.mark.parametrize("cut", range(len(RECORDS) + 1))
def test_a_journal_may_end_anywhere(cut: int) -> None:
    assert not Outline(page(RECORDS[:cut], "a")).open


@pytest.mark.parametrize("place", range(len(RECORDS)))
def test_any_record_or_field_may_be_missing(place: int) -> None:
    assert page(RECORDS[:place] + RECORDS[place + 1 :], "a", PASSES)
    for key in RECORDS[place]:
        if key != "kind":
            records = copy.deepcopy(RECORDS)
            del records[place][key]
            assert not Outline(page(records, "a", PASSES)).open


def test_folders_of_the_machine_are_not_told() -> None:
    records = copy.deepcopy(RECORDS)
    records[0]["config"] |= {"data": "/home/jane/secret/reviews.csv", "model": "~/models/mini lm"}
    text = page(records, "a")
    assert "jane" not in text and "secret" not in text and "reviews.csv" in text
    assert without_folders("from /a/b/c.csv to x/y") == "from c.csv to x/y"


def test_the_paragraph() -> None:
    said = " ".join(conclusion(summary(RECORDS)))
    assert said.startswith("It learnt to give each text one label, from 9,000 rows of reviews.csv.")
    assert "The simplest model, which stood after 2.0 s, has accuracy 0.9120 ± 0.0061 on validation" in said
    assert "the best that was trained has 0.9240 ± 0.0061 on the same rows" in said
    assert said.endswith("3 candidates were judged and 2 kept; all but the first were tested against what stood.")
    without_test = [r for r in RECORDS if r["kind"] not in ("TestRead", "Diagnosed", "Finished")]
    said = " ".join(conclusion(summary(without_test)))
    assert "a little too good; no test rows were read" in said and "go on with it, by multistep resume" in said
    ends = [{"kind": "Diagnosed", "at": "end", "trial": "d", "name": name, "numbers": {}, "words": "w", "action": f"mend {name}"}
            for name in ("overfitting", "noisy labels")]  # fmt: skip
    ends.insert(0, asked("d", "diagnose", "w", kind="diagnose"))
    said = " ".join(conclusion(summary([*RECORDS[:-1], *ends, RECORDS[-1]])))
    assert said.endswith("What to do next: mend noisy labels (noisy labels; 1 more below).")
    alone = [RECORDS[0], asked("a", "incumbent", "first", kind="fit_linear"), told("a", 0.5, 1.0)]
    alone.append({"kind": "Committed", "trial": "a", "state": "a", "rule": "first", "evidence": [], "clock": clock(3)})
    assert "no other that was tried beat it" in " ".join(conclusion(summary(alone)))
    alone += [asked("b", "predict", "surer", kind="predict", what="calibrate"), told("b", 0.4, 1.0)]
    alone.append({"kind": "Committed", "trial": "b", "state": "b", "rule": "better", "evidence": [], "clock": clock(4)})
    said = " ".join(conclusion(summary(alone)))
    assert "no other that was tried beat it. Then its answers were improved (calibrate)." in said
    assert conclusion(summary([])) and "mean of several" not in said
    alone += [asked("c", "average", "mean", kind="average", which="mean"), told("c", 0.51, 1.0)]
    alone.append(
        {"kind": "Committed", "trial": "c", "state": "c", "rule": "not worse", "evidence": [], "clock": clock(5)}
    )
    said = " ".join(conclusion(summary(alone)))
    assert "It is the mean of several trainings, which is taken unless it is seen to be worse than one." in said
    lower = copy.deepcopy(RECORDS)
    lower[0]["config"]["metric"] = "nll"
    next(r for r in lower if r["kind"] == "TestRead")["metrics"] = {"nll": [2.31, 0.02]}
    assert "its nll is 2.31" in " ".join(conclusion(summary(lower)))


def test_pictures_hold_what_they_are_given() -> None:
    def mark(at: float, value: float, kind: str) -> svg.Mark:
        return svg.Mark(at, value, 0.01, kind, "s", f"{at}")

    marks = [mark(1, 0.8, "committed"), mark(2, 0.85, "committed"), mark(3, 0.84, "rolled"), mark(4, 0.1, "probe")]
    for width in (800, 330):
        drawn = svg.scores(marks, 10.0, "accuracy", width)
        assert drawn.count("<title>") == 4 and drawn.count("<circle") == 3 and drawn.count('class="band"') == 2
        xs = [float(x) for x in re.findall(r'cx="([\d.]+)"', drawn)]
        ys = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
        assert all(0 < x < width for x in xs) and all(0 < y < 300 for y in ys)
        rolled, first, second = ys  # drawn below what stood
        assert second < rolled < first  # higher is up
    assert svg.scores([mark(1, 0.5, "rolled")], 2.0, "m", 330)
    halves = [marks[0], marks[1]._replace(other=True)]
    drawn = svg.scores(halves, 10.0, "accuracy", 330)
    assert drawn.count('class="line other"') == 1 and not re.search(r'class="line"[^>]*V', drawn), (
        "the halves are not joined"
    )
    c = svg.Curve("t", [1.0, 2.0], [2.0, 1.0], [0.1, 0.0], [(1.0, 2.1), (2.0, 1.5)])
    assert svg.curve(c, 330).count('class="line') == 3
    assert svg.curve(svg.Curve("t", [1.0, 1.0], [2.0, 2.0], [0.0, 0.0], []), 330)


def test_the_command_writes_it_and_says_whether_it_replays(run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.html"
    assert cli.run(["explain", str(run_dir), "--page", str(file)]) == 0 and str(file) in capsys.readouterr().out
    assert "all follows from its evidence" in file.read_text(encoding="utf-8")
    assert cli.run(["explain", str(tmp_path / "no"), "--page", str(file)]) == 2
    assert cli.run(["explain", str(run_dir), "--page", str(tmp_path)]) == 2
    assert not list(tmp_path.parent.glob("*.new"))
    capsys.readouterr()
    records = journal.read(run_dir / "journal.jsonl")
    bad = tmp_path / "bad"
    shutil.copytree(run_dir, bad)
    text = (bad / "journal.jsonl").read_text(encoding="utf-8").replace('"accept": true', '"accept": false')
    (bad / "journal.jsonl").write_text(text, encoding="utf-8")
    said = Outline(write_page(bad, file).read_text(encoding="utf-8")).text
    assert "do not follow" in said and "fails" in said and "the journal says" in said and len(records) > 20


# ---------------------------------------------------------------------------------------------- in a browser


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(width: int, scheme: str, browser: Any, run_dir: Path, tmp_path: Path) -> None:
    file = write_page(run_dir, tmp_path / "run.html")
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked_for: list[str] = []
    wrong: list[str] = []
    shown.on("request", lambda request: asked_for.append(request.url))
    shown.on("console", lambda message: wrong.append(message.text))
    shown.goto(file.as_uri())
    assert asked_for == [file.as_uri()] and not wrong
    assert not shown.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    dark = shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")
    first = shown.locator("ol.steps details").nth(2)
    assert not first.locator(".inside").is_visible()
    first.locator("summary").click()
    assert first.locator(".inside").is_visible() and "Compared with what stood" in first.inner_text()
    assert not shown.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    sizes = shown.evaluate(
        "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width).filter(w => w > 0)"
    )
    assert len(sizes) >= 2 and all(200 < s <= width for s in sizes)
    shown.screenshot(path=str(tmp_path / "run.png"), full_page=True)
    assert (tmp_path / "run.png").stat().st_size > 30_000
    shown.close()
