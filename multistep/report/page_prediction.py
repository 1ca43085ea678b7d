"""How a tuned model predicts, on the page of its run: what was picked and why, and every way that was measured, the fastest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from multistep.report.html import Html, bullets, folded, join, table, tag
from multistep.report.policy import again, against, over
from multistep.report.words import number, plus_minus


def prediction(policy: Mapping[str, Any]) -> Html:
    """From a policy as JSON (`multistep.json`)."""
    metric, entries = str(policy["metric"]), sorted(policy["entries"], key=lambda e: e["latency"]["mean"])
    limit = policy.get("limit")
    asked = f"{limit['statistic']} at most {number(limit['ms'])} ms a request" if limit else "no limit on latency"
    said = [f"Judged by {metric} on {policy['rows']:,} rows ({policy['data']}); {asked}."]
    pick, before = str(policy["pick"]), str(policy["default"])
    if pick == before:
        said.append(f"{pick} stays: nothing else was admitted.{over(limit, entries, pick)}")
    else:
        said += [f"{pick} takes the place of {before}: {policy['rule']}.", *against(metric, entries, pick, before)]
    said += again(entries, before)
    refused = [f"{r['name']}: {r['why']}" for r in policy.get("refused") or []]
    names = [e["name"] for e in entries]
    rows = [_row(e, metric, policy) for e in entries]
    heads = ("way", metric, "p95 ms", "mean ms", "why taken or not")
    ways = table(heads, rows, numbers=(1, 2, 3), marked=names.index(pick) if pick in names else None)
    return join([
        *[tag("p", line) for line in said], ways,
        folded(f"{len(refused)} not begun, or not measured to the end", bullets(refused)) if refused else "",
    ])  # fmt: skip


def _row(e: Mapping[str, Any], metric: str, policy: Mapping[str, Any]) -> Sequence[Any]:
    marks = [word for word, found in (("picked", policy["pick"]), ("before", policy["default"])) if e["name"] == found]
    marks += ["front"] if e["name"] in policy["front"] else []
    name = join(
        [e["name"], *[join([" ", tag("span", m, "chip committed" if m == "picked" else "chip")]) for m in marks]]
    )
    ms = [number(e["latency"][k], 3) for k in ("p95", "mean")]
    return [name, plus_minus(*e["metrics"][metric]), *ms, e.get("rule") or ""]
