"""A comparison's rows as one dictionary, as a table and in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from multistep.comparison.book import Row
from multistep.comparison.statistics import against_best, mean_curve, mean_of, reaches
from multistep.metrics import METRICS
from multistep.report.words import number, plus_minus, size, table

LEAST_STDERR = 1e-6  # no smaller one is written out
LEADERS = 3  # the level whose time is told is what the worst of so many best means ends at


def sign_of(metric: str) -> float:
    """+1 where higher is better."""
    return 1.0 if metric in METRICS and METRICS[metric].higher_is_better else -1.0


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Standings, best first; those with a run that diverged come last and are not compared."""
    settings = rows[0]["settings"]
    metric, sign = settings["metric"], sign_of(settings["metric"])
    names = list(dict.fromkeys(r["optimizer"] for r in rows if r["kind"] in ("run", "probe")))
    runs = {n: [r for r in rows if r["kind"] == "run" and r["optimizer"] == n] for n in names}
    runs = {n: sorted(found, key=lambda r: r["seed"]) for n, found in runs.items() if found}
    sound = {n: found for n, found in runs.items() if not any(r["diverged"] for r in found)}
    scores = {n: {r["seed"]: r["score"] for r in found} for n, found in sound.items()}
    order = _ranked(scores, sign)
    best = order[0] if order else None
    rivals = against_best(scores, best, sign) if best is not None else {}
    curves = {n: mean_curve([r["curve"] for r in found]) for n, found in sound.items()}
    level = min((curves[n][-1][3] for n in order[:LEADERS] if curves[n]), key=lambda v: sign * v, default=None)
    standings = []
    for name in [*order, *(n for n in runs if n not in sound)]:
        found = runs[name]
        reached = None if level is None or name not in curves else reaches(curves[name], level, sign)
        seconds, updates = (sum(r[k] for r in found) for k in ("seconds", "updates"))
        standings.append(
            {
                "optimizer": name, "seeds": [r["seed"] for r in found], "knob": found[0]["knob"], "value": found[0]["value"],
                "edge": found[0]["edge"], "diverged": sum(bool(r["diverged"]) for r in found),
                "score": mean_of([r["score"] for r in found])._asdict() if name in sound else None,
                "against": rivals[name].model_dump() if name in rivals else None,
                "reaches_level": None if reached is None else {"seconds": reached[0], "updates": reached[1]},
                "updates": updates / len(found), "seconds": seconds / len(found), "update_s": seconds / max(1, updates),
                "state_bytes": found[0]["state_bytes"], "parameters": found[0]["parameters"],
                "batch_size": found[0]["batch_size"],
            }
        )  # fmt: skip
    tuning_s = {n: sum(r["seconds"] for r in rows if r["kind"] == "probe" and r["optimizer"] == n) for n in names}
    versions = sorted({str(r["version"]) for r in rows if r["kind"] == "run"})
    machines = list(dict.fromkeys(r["machine"] for r in rows if r["kind"] == "run"))
    return {
        "metric": metric, "better": "higher" if sign > 0 else "lower", "best": best, "level": level, "settings": settings,
        "standings": standings, "tuning_s": tuning_s, "versions": versions, "machines": machines,
    }  # fmt: skip


def _ranked(scores: Mapping[str, Mapping[int, float]], sign: float) -> list[str]:
    """By mean over all seeds; but one with fewer seeds does not come before the best of those with the most of them unless it is
    better on the seeds that both have."""
    order = sorted(scores, key=lambda n: -sign * statistics.fmean(scores[n].values()))
    if not order:
        return order
    most = max(map(len, scores.values()))
    lead = next(n for n in order if len(scores[n]) == most)
    gains = [sign * (v - scores[order[0]][s]) for s, v in scores[lead].items() if s in scores[order[0]]]
    return [lead, *(n for n in order if n != lead)] if gains and statistics.fmean(gains) >= 0 else order


def markdown(found: Mapping[str, Any]) -> str:
    """The table, and under it what it means."""
    metric = found["metric"]
    head = [
        "optimizer", "tuned to", f"{metric}, mean ± se", "95 % interval", "seeds", "against the best", "to the level",
        "updates", "an update", "optimizer state",
    ]  # fmt: skip
    lines = [_line(s, found) for s in found["standings"]]
    return f"{table(head, lines)}\n\n" + "\n".join(words(found))


def _line(s: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    tuned = f"{s['knob']} {s['value']:.3g}" if s["knob"] else f"{s['value']:.3g}"
    tuned += " *" if s["edge"] else ""
    memory = f"{size(s['state_bytes'])}"
    cost = f"{1e3 * s['update_s']:.3g} ms" if s["update_s"] < 1 else f"{s['update_s']:.3g} s"
    if s["score"] is None:
        said = f"diverged ({s['diverged']} of {len(s['seeds'])})"
        return [s["optimizer"], tuned, said, "-", str(len(s["seeds"])), "-", "-", _count(s["updates"]), cost, memory]
    score, reached = s["score"], s["reaches_level"]
    interval = (
        "-" if not _finite(score["low"]) else f"{_digits(score['low'], score)} to {_digits(score['high'], score)}"
    )
    return [
        s["optimizer"], tuned, _score(score), interval, str(len(s["seeds"])), _verdict(s, found),
        "-" if reached is None else f"{number(reached['seconds'], 3)} s", _count(s["updates"]), cost, memory,
    ]  # fmt: skip


def _verdict(s: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if s["optimizer"] == found["best"]:
        return "best mean"
    if s["against"] is None:
        return "no seed in common"
    against = s["against"]
    if against["apart"]:
        return f"worse, p = {number(against['p'], 2)}"
    return f"not distinguishable, p = {number(against['p'], 2)}"


def words(found: Mapping[str, Any]) -> list[str]:
    """What can be said, a sentence a line."""
    settings, best = found["settings"], found["best"]
    said = []
    if best is not None:
        near = [s["optimizer"] for s in found["standings"] if s["against"] and not s["against"]["apart"]]
        worse = [s for s in found["standings"] if s["against"] and s["against"]["apart"]]
        said.append(f"Best mean {found['metric']}: {best}.")
        if near:
            said.append(f"Not distinguishable from {best} on these seeds: {', '.join(near)}.")
        for s in worse:
            a = s["against"]
            unit = f"{abs(a['gain']):.3g} ({abs(a['high']):.3g} to {abs(a['low']):.3g})"
            said.append(f"{s['optimizer']} is worse than {best} by {unit}, p = {number(a['p'], 2)}, {a['n']} seeds.")
    if found["level"] is not None:
        said.append(
            f"The level is {number(found['level'])}: what the worst of the best {LEADERS} ends at, on the sample of validation that "
            "curves use."
        )
    for s in found["standings"]:
        if s["diverged"]:
            said.append(f"{s['optimizer']}: {s['diverged']} of {len(s['seeds'])} runs diverged, so it is not compared.")
    edges = [f"{s['optimizer']} ({s['edge']})" for s in found["standings"] if s["edge"] and s["edge"] != "given"]
    given = [s["optimizer"] for s in found["standings"] if s["edge"] == "given"]
    if edges:
        said.append(
            f"* The value chosen lies at the edge of what was searched, so a better one may lie beyond: {', '.join(edges)}."
        )
    if given:
        said.append(f"* Not tuned, for its value was given: {', '.join(given)}.")
    for what in ("machines", "versions"):
        if len(found[what]) > 1:
            said.append(f"Runs of several {what}, which may not be comparable: {'; '.join(found[what])}.")
    said.append(
        f"{settings['budget']} of training a run after {settings['probes']} probes of {settings['probe']} for each optimizer; "
        f"{settings['schedule']['kind']} schedule; validation {settings['rows']['validation']} rows; threads: "
        f"{settings['threads']}; ± is the standard error over seeds, the interval Student's, p two-sided, paired by seed, Holm-corrected."
    )
    return said


def _count(value: float) -> str:
    return f"{value:.0f}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _digits(value: float, score: Mapping[str, Any]) -> str:
    """As many decimals as two significant digits of the standard error, six at most."""
    return f"{value:.{_decimals(score['stderr'])}f}" if score["stderr"] else f"{value:.4g}"


def _score(score: Mapping[str, Any]) -> str:
    """A mean with its standard error; one that is nothing beside the mean is said to be small."""
    if _finite(score["stderr"]) and 0 < score["stderr"] < LEAST_STDERR:
        return f"{score['value']:.6f} ± <{LEAST_STDERR:g}"
    return plus_minus(score["value"], score["stderr"])


def _decimals(stderr: float) -> int:
    return min(6, max(0, 1 - math.floor(math.log10(stderr))))
