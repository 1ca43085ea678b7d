"""Why a model predicts as it does, in words and a table: from a policy (`multistep.json`) or from the journal of a tuning.

Both are read as JSON, so that what another version wrote is shown as far as it can be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from multistep.report.words import clip, duration, number, plus_minus, table

_NAME, _WHY = 64, 110  # columns of a cell at most


def explain_policy(policy: Mapping[str, Any]) -> str:
    """What was picked, for which limit and why; every way that was measured, the fastest first; what was refused."""
    metric, entries = str(policy["metric"]), list(policy["entries"])
    pick, before = str(policy["pick"]), str(policy["default"])
    limit = policy.get("limit")
    asked = f"{limit['statistic']} at most {number(limit['ms'])} ms" if limit else "no limit on latency"
    lines = [f"Judged by {metric} on {policy['rows']:,} rows ({policy['data']}); {asked}."]
    if pick == before:
        lines.append(f"{pick} stays: nothing else was admitted." + over(limit, entries, pick))
    else:
        lines.append(f"{pick} takes the place of {before}: {policy['rule']}.")
        lines += against(metric, entries, pick, before)
    lines += again(entries, before)
    parts = ["\n".join(lines), _table(metric, entries, policy)]
    if serving := policy.get("serving"):
        speeds = ", ".join(f"{number(v)} ({k})" for k, v in serving.get("texts_s", {}).items())
        parts.append(
            f"Served on {serving['threads']} threads, {serving['batch']} texts together. Texts a second: {speeds}."
        )
    refused = [f"- {r['name']}: {r['why']}" for r in policy.get("refused") or []]
    if refused:
        parts.append("Not measured to the end, or not begun:\n" + "\n".join(refused))
    return "\n\n".join(parts)


def against(metric: str, entries: Sequence[Mapping[str, Any]], pick: str, before: str) -> list[str]:
    """The pick beside what stood before, as far as both were measured."""
    found = {e["name"]: e for e in entries}
    if pick not in found or before not in found:
        return []
    new, old = found[pick], found[before]
    cost = number(new["latency"]["mean"] / old["latency"]["mean"], 3) if old["latency"]["mean"] else "-"
    values = " before, ".join(plus_minus(*e["metrics"][metric]) for e in (old, new))
    return [f"{metric} {values} now; a request takes {cost} of the time, on average."]


def again(entries: Sequence[Mapping[str, Any]], before: str) -> list[str]:
    """That what stood before was judged with numbers other than those it has, where it was."""
    found = next((e for e in entries if e["name"] == before), {})
    if not (found.get("facts") or {}).get("out_of_fold"):
        return []
    return [
        f"{before} may have been fitted to these rows: it was judged out of fold, as all others, its numbers fitted again each time."
    ]


def over(limit: Mapping[str, Any] | None, entries: Sequence[Mapping[str, Any]], pick: str) -> str:
    """That what is picked breaks the limit, where it does."""
    took = next((e["latency"][limit["statistic"]] for e in entries if limit and e["name"] == pick), None)
    if limit is None or took is None or took <= limit["ms"]:
        return ""
    return f" It does not keep the limit ({limit['statistic']} {number(took, 3)} ms); nothing that was measured does."


def _table(metric: str, entries: Sequence[Mapping[str, Any]], policy: Mapping[str, Any]) -> str:
    rows = []
    for e in sorted(entries, key=lambda e: e["latency"]["mean"]):
        marks = ["picked"] if e["name"] == policy["pick"] else []
        marks += ["before"] if e["name"] == policy["default"] else []
        engine = "-".join(str(e["engine"][k]) for k in ("runtime", "dtype") if k in (e.get("engine") or {}))
        name = e["name"] if not engine or engine in e["name"] else f"{e['name']} on {engine}"
        ms = [number(e["latency"][k], 3) for k in ("p50", "p95", "mean")]
        rows.append([clip(name, _NAME), plus_minus(*e["metrics"][metric]), *ms,
                     "yes" if e["name"] in policy["front"] else "no", ", ".join(marks) or "-",
                     clip(e.get("rule") or "", _WHY) or "-"])  # fmt: skip
    return table(["way", f"{metric} ± stderr", "p50 ms", "p95 ms", "mean ms", "front", "", "why taken or not"], rows)


def explain_tuning(records: Sequence[Mapping[str, Any]]) -> str:
    """The journal of a tuning: what it was for, how far it came, every trial with what was decided and why."""
    started = next((r for r in records if r["kind"] == "Started"), None)
    if started is None:
        return "The journal has no beginning."
    metric = str(started["metric"])
    rules = {r["trial"]: r for r in records if r["kind"] in ("Committed", "RolledBack")}
    whys = {r["trial"]["id"]: r["trial"].get("why", "") for r in records if r["kind"] == "Asked"}
    rows = []
    for told in (r for r in records if r["kind"] == "Told"):
        outcome, settled = told["outcome"], rules.get(told["trial"])
        value = outcome["metrics"].get(metric)
        decided = {"Committed": "taken", "RolledBack": "not taken"}[settled["kind"]] if settled else "measured"
        decided = "refused" if "refused" in outcome["facts"] else decided
        rows.append([told["trial"], clip(whys.get(told["trial"], ""), _NAME), plus_minus(*value) if value else "-",
                     number(outcome["facts"].get("ms"), 3), decided, clip(settled["rule"], _WHY) if settled else "-",
                     number(outcome["cost"].get("wall_s"), 3)])  # fmt: skip
    last = records[-1]
    spent = duration((last.get("clock") or {}).get("wall_s"))
    ended = {
        "Finished": f"Finished after {spent}.",
        "Interrupted": f"Interrupted after {spent}; the same command goes on.",
    }
    parts = [ended.get(last["kind"], f"Not finished: the journal ends after {spent}.")]
    if rows:
        heads = ["trial", "what", f"{metric} ± stderr", "ms", "decided", "why", "cost s"]
        parts.append(table(heads, rows))
    skipped = [f"- {r['why']}" for r in records if r["kind"] == "Skipped"]
    return "\n\n".join(parts + (["Not begun:\n" + "\n".join(skipped)] if skipped else []))
