"""explain, summary, card and progress, fed with hand-written journal records."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from multistep import report
from multistep.data import load
from multistep.report.conclusion import conclusion
from multistep.report.summary import describe
from multistep.report.words import clip, duration, number, plus_minus, table


def clock(wall_s: float, updates: int = 0) -> dict[str, Any]:
    return {"wall_s": wall_s, "updates": updates, "tokens": 100 * updates}


def asked(trial: str, stage: str, why: str, **action: Any) -> dict[str, Any]:
    body = {"id": trial, "stage": stage, "start": None, "action": action, "share": 5.0, "why": why}
    return {"kind": "Asked", "trial": body, "clock": clock(1)}


def told(trial: str, accuracy: float, wall_s: float, **outcome: Any) -> dict[str, Any]:
    metrics = {"accuracy": [accuracy, 0.0061], "nll": [0.31, 0.01]}
    body = {"ok": True, "metrics": metrics, "cost": {"wall_s": wall_s, "updates": 10, "tokens": 99}, **outcome}
    return {"kind": "Told", "trial": trial, "outcome": body, "clock": clock(2)}


BETTER = {
    "metric": "accuracy", "candidate": 0.924, "incumbent": 0.912, "difference": 0.012, "stderr": 0.004, "p": 0.003,
    "n": 1500,
}  # fmt: skip

RECORDS: list[dict[str, Any]] = [
    {
        "kind": "Started",
        "config": {"data": "reviews.csv", "task": "classify", "metric": "accuracy", "seed": 0},
        "budget": {"amount": 120.0, "unit": "seconds"},
        "versions": {"torch": "2.13"},
        "machine": {"cores": 2, "bf16": True},
        "clock": clock(0),
    },
    {
        "kind": "Data",
        "report": {
            "rows": {"train": 9000, "test": 3000},
            "duplicates": 12,
            "leakage": {"train/test": 3},
            "warnings": ["3 test texts are also in train"],
        },
        "clock": clock(0.5),
    },
    {"kind": "Reserved", "name": "test", "amount": 4.0, "clock": clock(0.6)},
    asked("incumbent-1", "incumbent", "can be served at once", kind="fit_linear", model="linear", l2s=[1e-4]),
    told("incumbent-1", 0.912, 3.2),
    {"kind": "Committed", "trial": "incumbent-1", "state": "s1", "rule": "first incumbent", "evidence": [],
     "clock": clock(4)},
    asked("trunk-1", "trunk", "the best rate", kind="train", strategy={"optimizer": {"kind": "adamw", "lr": 2e-4}}),
    {"kind": "Measured", "trial": "trunk-1", "update": 1, "loss_nats": 4.31, "lr": 0.0, "clock": clock(5)},
    {"kind": "Event", "trial": "trunk-1", "event": "nonfinite", "update": 7, "rows": [3, 9],
     "action": "rolled back, halved", "clock": clock(6)},
    {"kind": "Measured", "trial": "trunk-1", "update": 200, "loss_nats": 0.21, "lr": 0.0, "clock": clock(60)},
    told("trunk-1", 0.924, 71.0),
    {"kind": "Committed", "trial": "trunk-1", "state": "s2", "rule": "accuracy better (p <= 0.1)", "evidence": [BETTER],
     "clock": clock(75)},
    {"kind": "Diagnosed", "name": "overfitting", "numbers": {"train_nll": 0.02, "valid_nll": 0.4},
     "action": "dropout 0.1", "clock": clock(76)},
    asked("average-1", "average", "tail average", kind="average"),
    told("average-1", 0.92, 2.0),
    {"kind": "RolledBack", "trial": "average-1", "state": "s2", "rule": "not better",
     "evidence": [{**BETTER, "difference": -0.004, "p": 0.84}], "clock": clock(80)},
    asked("broken-1", "calibrate", "temperature", kind="temperature"),
    told("broken-1", 0.0, 0.1, ok=False, failure="the search did not converge", metrics={}),
    {"kind": "Skipped", "stage": "race", "why": "12 s left, a race needs 40 s", "clock": clock(81)},
    {
        "kind": "TestRead",
        "metrics": {"accuracy": {"value": 0.9213, "stderr": 0.0049}},
        "per_class": [
            {"label": "billing", "precision": 0.9, "recall": 0.8, "f1": 0.847, "support": 40},
            {"label": "退款|refund", "precision": 0.5, "recall": 0.6, "f1": 0.545, "support": 30},
        ],
        "confusion": [[32, 8], [12, 18]],
        "clock": clock(115),
    },
    {"kind": "Finished", "wall_s": 117.5, "clock": clock(117.5, 200)},
]  # fmt: skip


def test_explain_says_what_was_decided_with_its_numbers() -> None:
    page = report.explain(RECORDS)
    for words in (
        "Finished after 1 min 58 s of 2 min 00 s.",
        "trunk-1 (trunk): committed because accuracy +0.0120 ± 0.0040 (0.912 to 0.924), p=0.003, n=1500",
        "Rule: accuracy better (p <= 0.1)",
        "200 updates, training loss 4.31 to 0.21",
        "average-1 (average): rolled back because accuracy -0.0040",
        "Failure: the search did not converge",
        "- race: 12 s left, a race needs 40 s",
        "- nonfinite (trunk-1, update 7), rows 3, 9: rolled back, halved",
        "- overfitting: train nll 0.02, valid nll 0.4. Done: dropout 0.1",
        "**warning**: 3 test texts are also in train",
        "Set aside before anything else could spend it: test 4.",
        "The test data was read once; 0 decisions came after it.",
        "0.9213 ± 0.0049",
        "退款|refund as billing 12",
        "lr=0.0002",
    ):
        assert words in page, words
    assert page.index("退款") < page.index("billing ")  # worst first


def test_tables_line_up_with_chinese_words_in_them() -> None:
    lines = table(["名", "n"], [["退款", 1.5], ["a|b", None]]).split("\n")
    assert lines == ["| 名   |   n |", "| ---- | --: |", "| 退款 | 1.5 |", "| a\\|b |   - |"]


def test_summary_is_the_same_as_data() -> None:
    run = report.summary(RECORDS)
    assert run["status"] == "finished" and run["test_reads"] == 1 and run["metric"] == "accuracy"
    assert run["best"]["id"] == "trunk-1" and run["best"]["value"] == 0.924
    assert [t["status"] for t in run["trials"]] == ["committed", "committed", "rolled back", "failed"]
    assert run["stages"][1] == {"stage": "trunk", "trials": 1, "committed": 1, "wall_s": 71.0}
    assert run["test"]["metrics"]["accuracy"] == (0.9213, 0.0049)
    assert report.headline(run).splitlines() == [
        "Finished after 1 min 58 s of 2 min 00 s.",
        "Incumbent: trunk-1 (trunk): accuracy 0.9240 ± 0.0061 on validation.",
        "Test, read once: accuracy 0.9213 ± 0.0049.",
    ]


@pytest.mark.parametrize("cut", range(len(RECORDS) + 1))
def test_explain_reads_a_journal_that_ends_anywhere(cut: int) -> None:
    page = report.explain(RECORDS[:cut])
    assert page.startswith("# Run")
    assert ("Not finished" in page) == (cut < len(RECORDS))


@pytest.mark.parametrize("place", range(len(RECORDS)))
def test_explain_does_without_any_single_record_or_field(place: int) -> None:
    assert report.explain(RECORDS[:place] + RECORDS[place + 1 :])
    for key in RECORDS[place]:
        if key != "kind":
            records = copy.deepcopy(RECORDS)
            del records[place][key]
            assert report.explain(records)


def test_explain_tells_of_a_stop_a_resumption_and_more_time() -> None:
    stop = {"kind": "Interrupted", "signal": 15, "clock": clock(40)}
    resumed = {"kind": "Resumed", "budget": {"amount": 420.0, "unit": "seconds"}, "clock": clock(41)}
    stopped = report.explain([*RECORDS[:6], stop])
    assert "Interrupted by SIGTERM after 40 s of 2 min 00 s; multistep resume goes on with it." in stopped
    again = report.explain([*RECORDS[:6], stop, resumed])
    assert "Not finished: the journal ends after 41 s of 7 min 00 s." in again and "resumed after 41 s" in again


def test_explain_is_honest_about_a_second_reading_of_the_test() -> None:
    second = {**RECORDS[-2], "metrics": {"accuracy": [0.99, 0.001]}}
    page = report.explain([*RECORDS, second])
    assert "read 2 times; 0 decisions" in page and "0.9213 ± 0.0049" not in page and "0.9900 ± 0.0010" in page


def test_explain_tells_of_a_decision_after_the_test() -> None:
    assert "1 decisions came after it" in report.explain([*RECORDS, RECORDS[5]])


def test_what_is_told_of_a_run_that_goes_on_is_of_what_stands() -> None:
    """A finished run was given more; something else stands now, and the test was read for what stood before."""
    more = {"kind": "Resumed", "budget": {"amount": 720.0, "unit": "seconds"}, "clock": clock(118)}
    again = [
        *RECORDS,
        more,
        {**RECORDS[RECORDS.index(next(r for r in RECORDS if r.get("state") == "s2"))], "clock": clock(500)},
    ]
    assert not report.summary(RECORDS)["test_is_older"] and not report.summary([*RECORDS, more])["test_is_older"]
    run = report.summary(again)
    assert run["test_is_older"] and run["spent"]["wall_s"] == 500
    page = report.explain(again)
    assert "(of what stood before)" in page and "500 s" in page.replace("8 min 20 s", "500 s")
    said = " ".join(conclusion(run))
    assert "validation rows" in said and "last read before it was kept" in said and "never seen" not in said
    assert "never seen" in " ".join(conclusion(report.summary(RECORDS)))


def test_explain_gives_the_data_report_its_own_words(tmp_path: Path) -> None:
    rows = [f"text number {n % 35},{'yes' if n % 2 else 'no'}" for n in range(40)]
    (tmp_path / "r.csv").write_text("\n".join(["text,label", *rows]))
    found = load(tmp_path / "r.csv").report
    page = report.explain([{"kind": "Data", "report": found.model_dump(mode="json")}])
    assert all(line in page for line in found.lines()) and "conflicts" in page


def test_a_budget_in_updates_is_said_in_updates() -> None:
    records = [{**RECORDS[0], "budget": {"amount": 5000, "unit": "updates"}}]
    assert "of 5000 updates" in report.explain(records)


def test_words() -> None:
    assert [number(v) for v in (None, float("nan"), 3.0, 0.123456, 12, "x", True)] == [
        "-",
        "-",
        "3",
        "0.1235",
        "12",
        "x",
        "True",
    ]
    assert plus_minus(0.93117, 0.00412) == "0.9312 ± 0.0041"
    assert plus_minus(123.4, 20.0) == "123 ± 20" and plus_minus(0.5, 0.0) == "0.5" and plus_minus(None, None) == "-"
    assert [duration(s) for s in (0.42, 9.99, 59.6, 125, 4800)] == [
        "0.4 s",
        "10 s",
        "1 min 00 s",
        "2 min 05 s",
        "1 h 20 min",
    ]
    assert clip("a  b\nc", 9) == "a b c" and clip("abcdef", 4) == "abc…"
    assert (
        describe({"kind": "blend", "weights": [0.25, 0.75], "offsets": list(range(77))})
        == "blend weights=0.25,0.75 offsets=[77]"
    )


# ---------------------------------------------------------------------------------------------- card

FACTS: dict[str, Any] = {
    "name": "reviews", "task": "classify", "labels": ["neg", "pos"], "base_model": "org/small-encoder",
    "license": "unknown", "dataset": "/home/someone/secret/reviews.csv", "rows": {"train": 900, "test": 100},
    "metrics": {"accuracy": {"value": 0.93, "stderr": 0.025}, "f1_macro": {"value": 0.92, "stderr": 0.03}},
    "per_class": [{"label": "neg", "precision": 0.9, "recall": 0.9, "f1": 0.9, "support": 5}],
    "decisions": ["trunk committed: accuracy +0.012 ± 0.004"], "predictor": "temperature 1.3 over the encoder",
    "max_length": 128, "budget": "5m", "wall_s": 290.0, "versions": {"torch": "2.13"},
}  # fmt: skip


def front(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def test_card_has_the_front_matter_hubs_read() -> None:
    head = front(report.card(FACTS))
    assert head["library_name"] == "multistep" and head["pipeline_tag"] == "text-classification"
    assert head["base_model"] == "org/small-encoder" and head["metrics"] == ["accuracy", "f1_macro"]
    assert "license" not in head and "datasets" not in head
    result = head["model-index"][0]["results"][0]
    assert result["dataset"]["name"] == "reviews.csv"
    assert result["metrics"][0] == {"type": "accuracy", "name": "accuracy", "value": 0.93, "args": {"stderr": 0.025}}


def test_card_body_tells_scores_decisions_and_limits_but_no_folders() -> None:
    text = report.card(FACTS)
    for words in (
        "0.930 ± 0.025",
        "trunk committed",
        "first 128 tokens",
        "4 min 50 s",
        "`neg`, `pos`",
        "fewer than 10 test rows",
    ):
        assert words in text, words
    assert "/home" not in text and "secret" not in text


def test_card_of_hardly_anything_and_with_a_licence() -> None:
    head = front(report.card({"task": "regress"}))
    assert "model-index" not in head
    assert front(report.card({**FACTS, "license": "mit", "dataset": "org/data"}))["license"] == "mit"
    assert front(report.card({**FACTS, "dataset": "org/data"}))["datasets"] == ["org/data"]
    assert "base_model" not in front(report.card({**FACTS, "base_model": "/models/mine"}))


# ---------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    def write(self, text: str, /) -> int:
        raise BrokenPipeError


def play(stream: io.StringIO, quiet: bool = False) -> str:
    times = iter(range(100))
    with report.Progress(quiet=quiet, stream=stream, now=lambda: float(next(times))) as progress:
        progress.remaining("1 min 12 s")
        progress.stage("trunk", "fine-tune at [2e-4]")
        for update in range(12):
            progress.tick(update / 12, f"loss {update}")
        progress.best("accuracy", 0.931, 0.004)
        progress.best("accuracy", 0.931, 0.004)
        progress.note("halved the rate")
    progress.close()
    return stream.getvalue()


def test_progress_off_a_terminal_is_sparse_plain_lines() -> None:
    assert play(io.StringIO()).splitlines() == [
        "trunk: fine-tune at [2e-4]",
        "  0 % loss 0, 1 min 12 s left",
        "  42 % loss 5, 1 min 12 s left",
        "  83 % loss 10, 1 min 12 s left",
        "  best accuracy 0.9310 ± 0.0040",
        "  halved the rate",
    ]


def test_progress_on_a_terminal_keeps_one_status_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = play(Terminal())
    assert "trunk: fine-tune at [2e-4]\n" in shown and "\x1b[" in shown and "best accuracy" in shown


def test_progress_quiet_says_nothing_and_a_closed_pipe_does_not_stop_it() -> None:
    assert play(io.StringIO(), quiet=True) == ""
    play(Closed())
