"""Why this is served: the policy with its numbers, and the story of the run from its journal. What /explain says and the page shows.

    {"model", "why": a line, "stands": {task, predictor, engine ...}, "policy": multistep.json's or null, "metric",
     "test": {name: {value, stderr}}, "decisions": [...], "curves": [...], "scores": [...], "status", "wall_s"}

Folders of this machine are not told: of a path only its last part is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multistep import journal
from multistep.report.summary import summary
from multistep.report.words import plus_minus, without_folders
from multistep.types import UserError

_POINTS = 160  # of a curve
_CURVES = 12  # the longest ones


def explain(path: Path, info: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """`path`: the run's folder or its bundle; `info`: multistep.json; `about`: what /health says."""
    folder = path.resolve()
    run = folder if (folder / "journal.jsonl").is_file() else folder.parent
    policy = info.get("policy")
    stands = {"predictor": _without_numbers(info.get("predictor") or {}), "engine": info.get("engine") or {}}
    stands |= {key: info[key] for key in ("encoder", "standing", "metric") if key in info}
    found: dict[str, Any] = {**about, "stands": stands, "policy": policy, "metric": info.get("metric")}
    found |= _of_run(_records(run))
    found["why"] = _why(policy, found)
    return _plain(found)


def _records(run: Path) -> list[dict[str, Any]]:
    """The journal; nothing where the bundle came alone, or its journal cannot be read."""
    try:
        return journal.read(run / "journal.jsonl")
    except (UserError, OSError):
        return []


def _why(policy: Any, found: Mapping[str, Any]) -> str:
    if isinstance(policy, Mapping):
        return f"{policy.get('pick')} was picked: {policy.get('rule')}"
    taken = [d for d in found["decisions"] if d["status"] == "committed"]
    if taken:
        last = taken[-1]
        return f"{last['id']} ({last['stage']}) stands: {last['rule'] or 'the last that was committed'}"
    return "the bundle has no journal beside it, so only what stands is known"


def _of_run(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not records:
        return {"status": "no journal", "test": {}, "decisions": [], "curves": [], "scores": []}
    run = summary(records)
    read = None if run["test_is_older"] else run["test"]  # else its scores are of what stood before
    test = read["metrics"] if read else {}
    found: dict[str, Any] = {
        "status": run["status"],
        "wall_s": run["spent"].get("wall_s"),
        "budget": run["budget"],
        "test": {name: {"value": v, "stderr": e, "words": plus_minus(v, e)} for name, (v, e) in test.items()},
        "test_rows": read.get("rows") if read else None,
        "decisions": [_decision(t) for t in run["trials"] if t["status"] != "measured" or t["evidence"]],
        "curves": _curves(records),
        "scores": _scores(records, run["metric"]),
    }
    return {**found, "metric": run["metric"]} if run["metric"] else found


def _decision(trial: Mapping[str, Any]) -> dict[str, Any]:
    score = plus_minus(trial["value"], trial["stderr"]) if trial["value"] is not None else ""
    keys = ("id", "stage", "what", "why", "status", "rule", "failure", "evidence", "value", "stderr")
    return {**{k: trial[k] for k in keys}, "score": score, "wall_s": trial["cost"].get("wall_s")}


def _curves(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Training losses over the run's clock: {"trial", "points": [[seconds, nats], ...]}, thinned out."""
    found: dict[str, list[list[float]]] = {}
    for r in records:
        if r.get("kind") == "Measured":
            at, loss = (r.get("clock") or {}).get("wall_s"), r.get("loss_nats")
            if _finite(at) and _finite(loss):
                found.setdefault(str(r.get("trial")), []).append([float(at), float(loss)])  # pyright: ignore[reportArgumentType]
    longest = sorted(found, key=lambda trial: -len(found[trial]))[:_CURVES]
    return [{"trial": t, "points": _thin(p)} for t, p in found.items() if t in longest and len(p) > 1]


def _thin(points: list[list[float]]) -> list[list[float]]:
    """At most so many points, each the mean of its neighbours."""
    step = math.ceil(len(points) / _POINTS)
    parts = [points[i : i + step] for i in range(0, len(points), step)]
    return [[round(p[-1][0], 3), round(sum(v for _, v in p) / len(p), 5)] for p in parts]


def _scores(records: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The metric on held-out data of what was committed or rolled back, over the run's clock."""
    found = []
    for r in records:
        pair = (r.get("metrics") or {}).get(metric) if r.get("kind") in ("Committed", "RolledBack") else None
        at = (r.get("clock") or {}).get("wall_s")
        if isinstance(pair, Sequence) and len(pair) == 2 and all(map(_finite, (at, *pair))):
            row = {"trial": r.get("trial"), "stage": r.get("stage"), "wall_s": at, "value": pair[0], "stderr": pair[1]}
            found.append({**row, "committed": r["kind"] == "Committed"})
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _without_numbers(tree: Any) -> Any:
    """A predictor without its long lists of weights."""
    if isinstance(tree, Mapping):
        return {k: _without_numbers(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_numbers(v) for v in tree] if len(tree) <= 8 else f"[{len(tree)}]"
    return tree


def _plain(value: Any) -> Any:
    """JSON: no number that is not finite, no path."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k != "path"}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return without_folders(value)
    return value if value is None or isinstance(value, int) else str(value)
