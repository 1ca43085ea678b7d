"""A policy and a tuning's journal in words."""

from __future__ import annotations

from typing import Any

from multistep.policy import Entry, Latency, Limit, Policy
from multistep.report.card import with_section
from multistep.report.policy import explain_policy, explain_tuning
from multistep.types import MetricValue


def entry(name: str, value: float, ms: float, rule: str, engine: dict[str, Any] | None = None) -> Entry:
    latency = Latency(p50=ms, p95=2 * ms, p99=3 * ms, mean=ms, n=20)
    metrics = {"bleu": MetricValue(value, 0.5)}
    return Entry(name=name, predictor={}, engine=engine or {}, metrics=metrics, latency=latency, rule=rule)


def policy(pick: str, limit: Limit | None) -> dict[str, Any]:
    entries = (
        entry("greedy", 30.0, 10.0, "what stood before"),
        entry("beam 4", 31.5, 25.0, "bleu +1.5: better", {"runtime": "ctranslate2", "dtype": "int8"}),
    )
    return Policy(
        metric="bleu", limit=limit, rows=1234, data="the calibration half", default="greedy", pick=pick, rule="bleu +1.5: better",
        entries=entries, front=("greedy", "beam 4"), refused=({"name": "mbr", "why": "p95 90 ms > 60 ms: too slow"},),
    ).model_dump(mode="json")  # fmt: skip


def test_a_policy_says_what_was_taken_and_why() -> None:
    said = explain_policy(policy("beam 4", Limit(ms=60)))
    first, second, third = said.splitlines()[:3]
    assert first == "Judged by bleu on 1,234 rows (the calibration half); p95 at most 60 ms."
    assert second == "beam 4 takes the place of greedy: bleu +1.5: better."
    assert third == "bleu 30.00 ± 0.50 before, 31.50 ± 0.50 now; a request takes 2.5 of the time, on average."
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert rows[2] == ["greedy", "30.00 ± 0.50", "10", "20", "10", "yes", "before", "what stood before"]
    assert rows[3] == [
        "beam 4 on ctranslate2-int8",
        "31.50 ± 0.50",
        "25",
        "50",
        "25",
        "yes",
        "picked",
        "bleu +1.5: better",
    ]
    assert said.endswith("- mbr: p95 90 ms > 60 ms: too slow")


def test_what_stays_is_said_and_that_it_breaks_the_limit() -> None:
    assert "greedy stays: nothing else was admitted.\n" in explain_policy(policy("greedy", None))
    assert "It does not keep the limit (p95 20 ms)" in explain_policy(policy("greedy", Limit(ms=15)))
    assert "does not keep" not in explain_policy(policy("greedy", Limit(ms=20)))


def test_a_journal_says_how_far_it_came() -> None:
    def told(trial: str, **facts: Any) -> dict[str, Any]:
        return {
            "kind": "Told",
            "trial": trial,
            "outcome": {"metrics": {"bleu": [30, 1]}, "facts": facts, "cost": {"wall_s": 2}},
        }

    clock = {"wall_s": 65.0}
    records = [
        {"kind": "Started", "metric": "bleu"}, {"kind": "Asked", "trial": {"id": "01-measure", "why": "what stands"}},
        told("01-measure", ms=5), told("02-ladder", ms=7), {"kind": "Committed", "trial": "02-ladder", "rule": "it is better"},
        told("03-ladder", refused="mbr", ms=900), {"kind": "RolledBack", "trial": "03-ladder", "rule": "too slow"},
        {"kind": "Skipped", "why": "mbr of 64: 3 s are left"}, {"kind": "Interrupted", "clock": clock},
    ]  # fmt: skip
    said = explain_tuning(records)
    assert said.startswith("Interrupted after 1 min 05 s; the same command goes on.")
    rows = {
        c[0]: c for c in ([x.strip() for x in line.split("|")[1:-1]] for line in said.splitlines() if line[:1] == "|")
    }
    assert rows["01-measure"][1:6] == ["what stands", "30.0 ± 1.0", "5", "measured", "-"]
    assert rows["02-ladder"][4:6] == ["taken", "it is better"] and rows["03-ladder"][4:6] == ["refused", "too slow"]
    assert said.endswith("- mbr of 64: 3 s are left")
    assert explain_tuning(records[:-1]).startswith("Not finished") and "no beginning" in explain_tuning([])


def test_a_section_of_a_card_is_replaced() -> None:
    once = with_section("# m\n\n## Limits\n\n- none\n", "How", "one")
    assert once == "# m\n\n## Limits\n\n- none\n\n## How\n\none\n"
    assert with_section(once, "How", "two") == once[: -len("one\n")] + "two\n"
    middle = with_section("# m\n\n## How\n\nold\n\n## Limits\n\n- x\n", "How", "new")
    assert middle == "# m\n\n## Limits\n\n- x\n\n## How\n\nnew\n"
