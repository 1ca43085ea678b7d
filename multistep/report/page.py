"""A run as one HTML page that needs no other file: at its top what came out, in plain words, for those who decide; below it every decision
with its evidence and its records in the journal, for those who check. Light and dark, for screens of any width. Needs no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multistep.data.report import NAMED
from multistep.report import svg
from multistep.report.conclusion import NEXT, conclusion, of_prediction, scored
from multistep.report.explain import confused, data_lines
from multistep.report.html import Html, bullets, e, folded, join, pairs, section, table, tag
from multistep.report.page_decisions import decisions, status
from multistep.report.page_prediction import prediction
from multistep.report.summary import summary
from multistep.report.words import clip, duration, number, plus_minus

Record = Mapping[str, Any]
Replays = Sequence[tuple[bool | None, str, Sequence[str]]]
_WIDTHS = (("wide", 800), ("narrow", 330))  # pixels
_POINTS, _CURVES = 160, 6  # of a curve; the longest ones
_WORST, _ROWS = 8, 12  # classes; rows named of an event


def page(records: Sequence[Record], name: str, replayed: Replays = (), policy: Any = None) -> str:
    """`replayed`: of each journal whether all of it follows from its evidence (None: that cannot be said), the same in words, and what
    does not follow. `policy`: of the run's bundle, where it was tuned to predict."""
    run = summary(records)
    body = [
        _head(run, name, replayed),
        section("The score over time", *_scores(run)),
        section("Where the budget went", *_budget(run)),
        section("Decisions", tag("p", _DECISIONS, "soft small"), decisions(run["trials"])) if run["trials"] else "",
        section("Diagnosis", _diagnosed(run)),
        section("Scores on the test data", *_test(run)),
        section("How it predicts", prediction(policy)) if isinstance(policy, Mapping) else "",
        section("Training", *_curves(records)),
        section("Left out", _skipped(records)),
        section("Out of the ordinary", _events(records)),
        section("Data", _data(run["data"])),
        section("Machine and settings", *_settings(run)),
        section("Replay", *_replayed(replayed)),
    ]
    title = e(f"{name}: a run of multistep")
    css = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main class=\"wrap\">\n" + "\n".join(b for b in body if b)
        + "\n</main>\n</body>\n</html>\n"
    )  # fmt: skip


_DECISIONS = (
    "Every candidate was compared with what stood, on the same rows. It was kept where it was better beyond noise; all else was rolled "
    "back. A line opens to its evidence, and to the numbers of its records in journal.jsonl."
)


# ---------------------------------------------------------------------------------------------- the top


def _head(run: Mapping[str, Any], name: str, replayed: Replays) -> Html:
    lead = join([tag("span", f"{said} ", "next" if said.startswith(NEXT) else "") for said in conclusion(run)])
    asked = [str(run["config"].get(k) or "") for k in ("task", "metric", "controller", "model")]
    line = " · ".join([a for a in asked if a and a != "auto"] + [f"budget {_amount(run['budget'])}"])
    top = tag("header", join([tag("h1", name), tag("div", line, "soft")]))
    return join([top, tag("section", join([tag("p", lead, "lead"), _tiles(run, replayed)]), "plain")])


def _tiles(run: Mapping[str, Any], replayed: Replays) -> Html:
    best, test, metric = run["best"], run["test"], run["metric"]
    tiles = []
    if test and not run["test_is_older"] and metric in test["metrics"]:
        value, stderr = test["metrics"][metric]
        tiles.append((*scored(metric, value, stderr, "on test"), "first"))
    elif best and best["value"] is not None:
        tiles.append((*scored(metric, best["value"], best["stderr"], "on validation"), "first"))
    decided = [t for t in run["trials"] if t["status"] in ("committed", "rolled back")]
    kept = sum(t["status"] == "committed" for t in decided)
    tiles.append((duration(run["spent"].get("wall_s")), f"of {_amount(run['budget'])}", ""))
    tiles.append((f"{kept} of {len(decided)}", "candidates kept", ""))
    answers = [ok for ok, _, _ in replayed]
    if False in answers:
        tiles.append(("fails", "the replay of its decisions", "bad"))
    elif None not in answers:
        tiles.append(("passes", "the replay of its decisions", ""))
    return tag(
        "div", join([tag("div", join([tag("b", b), tag("span", s)]), f"tile {css}") for b, s, css in tiles]), "tiles"
    )


# ---------------------------------------------------------------------------------------------- pictures


def _scores(run: Mapping[str, Any]) -> list[Html]:
    marks = [m for t in run["trials"] if (m := _mark(t, run["metric"])) is not None]
    if not marks:
        return []
    end_s = max(float(run["spent"].get("wall_s") or 0.0), *(m.at_s for m in marks))
    drawn = [tag("div", Html(svg.scores(marks, end_s, run["metric"], width)), css) for css, width in _WIDTHS]
    key = [
        tag("span", join([tag("i", "", f"key {css}"), words]), "keys")
        for css, words in _KEY
        if any(m.kind == css for m in marks)
    ]
    said = f"{run['metric']} on validation rows. Line: what stood; band and bars: one standard error."
    if any(m.other for m in marks):
        said += " Dashed: how it predicts, which is judged on the other half of these rows, so the two do not meet."
    return [tag("figure", join([*drawn, tag("figcaption", join([said, *key]))]))]


_KEY = (("committed", "kept"), ("rolled", "rolled back"), ("probe", "probe, or one of several for a mean"))


def _mark(t: Mapping[str, Any], metric: str) -> svg.Mark | None:
    known = t["value"], t["stderr"], t["at_s"]
    if t["action"].get("kind") == "read_test" or not all(_finite(v) for v in (known[0], known[2])):
        return None
    stderr = float(t["stderr"]) if _finite(t["stderr"]) else 0.0
    kind = "committed" if t["status"] == "committed" else "probe" if not t["commit"] else "rolled"
    words = f"{t['id']}: {status(t)}, {metric} {plus_minus(t['value'], t['stderr'])} after {duration(t['at_s'])}"
    return svg.Mark(float(t["at_s"]), float(t["value"]), stderr, kind, t["stage"], words, of_prediction(t))


def _curves(records: Sequence[Record]) -> list[Html]:
    found: dict[str, list[Record]] = {}
    looks: dict[str, list[tuple[float, float]]] = {}
    for r in records:
        if r.get("kind") == "Measured" and all(_finite(r.get(k)) for k in ("update", "loss_nats", "lr")):
            found.setdefault(str(r.get("trial")), []).append(r)
        if r.get("kind") == "Told":
            looks[str(r.get("trial"))] = _looks(r)
    longest = sorted((t for t in found if len(found[t]) > 1), key=lambda t: -len(found[t]))[:_CURVES]
    parts = []
    for trial in (t for t in found if t in longest):
        c = _curve(trial, found[trial], looks.get(trial, []))
        drawn = [tag("div", Html(svg.curve(c, width)), css) for css, width in (("wide", 390), ("narrow", 330))]
        said = f"loss {number(c.losses[0], 3)} to {number(c.losses[-1], 3)} in {found[trial][-1]['update']:,} updates"
        said += "; dashed: on validation" if c.looks else ""
        parts.append(tag("figure", join([tag("h3", trial), *drawn, tag("figcaption", said)])))
    left = sum(len(f) > 1 for f in found.values()) - len(longest)
    more = [tag("p", f"{left} shorter trainings are not drawn.", "soft small")] if left > 0 else []
    return [tag("div", join(parts), "curves"), *more] if parts else []


def _looks(told: Record) -> list[tuple[float, float]]:
    """(update, loss on validation), where the trial says what it saw while it trained."""
    facts = (told.get("outcome") or {}).get("facts") or {}
    seen = facts.get("looks") if isinstance(facts, Mapping) else None
    rows = [s for s in seen if isinstance(s, Mapping)] if isinstance(seen, list) else []
    pairs_ = [(s.get("updates"), s.get("validation_loss")) for s in rows]
    return [(float(u), float(v)) for u, v in pairs_ if _finite(u) and _finite(v)]  # pyright: ignore[reportArgumentType]


def _curve(trial: str, measured: Sequence[Record], looks: list[tuple[float, float]]) -> svg.Curve:
    """At most so many points, each the mean of its neighbours."""
    step = math.ceil(len(measured) / _POINTS)
    parts = [measured[i : i + step] for i in range(0, len(measured), step)]
    losses = [sum(float(r["loss_nats"]) for r in p) / len(p) for p in parts]
    return svg.Curve(trial, [float(p[-1]["update"]) for p in parts], losses, [float(p[-1]["lr"]) for p in parts], looks)


def _budget(run: Mapping[str, Any]) -> list[Html]:
    stages, wall_s = run["stages"], float(run["spent"].get("wall_s") or 0.0)
    if not stages:
        return []
    rows = [(s["stage"], s["wall_s"], "") for s in stages if s["wall_s"] > 0]
    rows.append(("outside trials", wall_s - sum(s["wall_s"] for s in stages), "other"))
    total = run["budget"].get("amount")
    if run["budget"].get("unit", "seconds") == "seconds" and _finite(total) and float(total) > wall_s:  # pyright: ignore[reportArgumentType]
        rows.append(("not used", float(total) - wall_s, "other"))  # pyright: ignore[reportArgumentType]
    whole_s, most_s = sum(max(0.0, s) for _, s, _ in rows) or 1.0, max(s for _, s, _ in rows) or 1.0
    cells = [
        join([tag("span", name), Html(f'<div class="bar {css}"><i style="width:{100 * s / most_s:.1f}%"></i></div>'),
              tag("span", f"{duration(s)} · {_percent(s / whole_s)}", "num")])
        for name, s, css in rows if s > 0.005
    ]  # fmt: skip
    spent = [f"{run['spent'][unit]:,} {unit}" for unit in ("updates", "tokens") if run["spent"].get(unit)]
    note = [tag("p", f"Training took {' and '.join(spent)} in all.", "soft small")] if spent else []
    return [tag("div", join(cells), "bars"), *[tag("div", n, "more") for n in note]]


def _percent(share: float) -> str:
    return "< 1 %" if share < 0.01 else f"{100 * share:.0f} %"


# ---------------------------------------------------------------------------------------------- lists


def _diagnosed(run: Mapping[str, Any]) -> Html:
    parts = []
    for d in run["diagnosed"]:
        numbers = dict(d.get("numbers") or {})
        suspects = [s for s in numbers.pop("suspects", None) or [] if isinstance(s, Mapping)]
        done = "To do" if d.get("at") == "end" else "Done"
        action = tag("p", join([tag("b", f"{done}: "), d["action"]])) if d.get("action") else ""
        known = pairs({k.replace("_", " "): _fact(v) for k, v in numbers.items()})
        parts.append(join([
            tag("h3", d.get("name", "")), tag("p", d["words"]) if d.get("words") else "", action,
            folded(f"{len(suspects)} rows whose label is likely to be wrong", _suspects(suspects)) if suspects else "",
            folded("its numbers", known) if known else "",
        ]))  # fmt: skip
    clear = [f"{name}: {found.get('words', '')}" for name, found in run["not_found"].items()]
    return join([*parts, folded("looked for and not found", bullets(clear)) if clear else ""])


def _suspects(rows: Sequence[Mapping[str, Any]]) -> Html:
    keys = ("row", "given", "likely", "probability", "text")
    return table(keys, [[str(s.get(k, "")) for k in keys] for s in rows], numbers=(0, 3))


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return clip(", ".join(f"{k.replace('_', ' ')} {_fact(v)}" for k, v in value.items()), 400)
    if isinstance(value, list | tuple):
        return "; ".join(_fact(v) for v in value[:_ROWS]) + (
            f" ... ({len(value)} in all)" if len(value) > _ROWS else ""
        )
    return clip(number(value), 300)


def _skipped(records: Sequence[Record]) -> Html:
    skipped = [r for r in records if r.get("kind") == "Skipped"]
    return bullets([join([tag("b", r.get("stage", "")), f": {r.get('why', '')} ", _record(r)]) for r in skipped])


def _record(r: Record) -> Html:
    return tag("span", f"record {r['n']}", "soft small") if r.get("n") is not None else Html("")


def _events(records: Sequence[Record]) -> Html:
    lines = []
    for r in records:
        match r.get("kind"):
            case "Event":
                rows = r.get("rows") or []
                update = f", update {r['update']}" if r.get("update") is not None else ""
                where = f" ({r.get('trial', '')}{update})"
                named = (
                    f" Rows {', '.join(map(str, rows[:_ROWS]))}{' ...' if len(rows) > _ROWS else ''}." if rows else ""
                )
                lines.append(
                    join(
                        [tag("b", r.get("event", "")), f"{where}: {r.get('action') or 'went on'}.{named} ", _record(r)]
                    )
                )
            case "Interrupted" | "Resumed" as kind:
                at = duration((r.get("clock") or {}).get("wall_s"))
                lines.append(join([tag("b", kind.lower()), f" after {at} of the clock ", _record(r)]))
    return bullets(lines)


def _test(run: Mapping[str, Any]) -> list[Html]:
    test = run["test"]
    if not test:
        return []
    times = "once" if run["test_reads"] == 1 else f"{run['test_reads']} times"
    said = f"Read {times}, at the end; {run['decided_after_test']} decisions came after it. ± is one standard error."
    scores = table(("metric", "test"), [(k, plus_minus(v, s)) for k, (v, s) in test["metrics"].items()], numbers=(1,))
    parts = [tag("p", said, "soft small"), scores]
    classes = [c for c in test.get("per_class") or [] if isinstance(c, Mapping)]
    if classes:
        worst = sorted(classes, key=lambda c: math.inf if c.get("f1") is None else float(c["f1"]))[:_WORST]
        keys = ("precision", "recall", "f1")
        rows = [
            [str(c.get("label", "")), *(number(c.get(k), 3) for k in keys), number(c.get("support"))] for c in worst
        ]
        title = (
            f"The {len(worst)} worst of {len(classes)} classes"
            if len(classes) > len(worst)
            else "By class, worst first"
        )
        parts += [tag("h3", title), table(("class", *keys, "rows"), rows, numbers=(1, 2, 3, 4))]
    if pairs_ := confused(test.get("confusion"), [str(c.get("label", "")) for c in classes]):
        parts += [tag("h3", "Most often confused: the right class, then what was said"), bullets(pairs_)]
    return parts


def _data(report: Mapping[str, Any]) -> Html:
    if lines := data_lines(report):
        named: dict[str, list[str]] = {}
        for line in lines:  # a name, and what is said of it; a line without one goes on
            name = line[:NAMED].strip() or list(named)[-1]
            named.setdefault(name, []).append(line[NAMED:].strip())
        return pairs({name: join(said, "<br>") for name, said in named.items()})
    return pairs({k.replace("_", " "): _fact(v) for k, v in report.items()})


def _settings(run: Mapping[str, Any]) -> list[Html]:
    known = {**run["machine"], **run["versions"]}
    line = tag("p", " · ".join(f"{k.replace('_', ' ')} {_fact(v)}" for k, v in known.items()))
    settings = {k: _fact(v) for k, v in run["config"].items()}
    parts = [line] if known else []
    return [*parts, folded("all settings", pairs(settings))] if settings else parts


def _replayed(replayed: Replays) -> list[Html]:
    intro = (
        "What was decided, done about trainings that went wrong and diagnosed was derived again from the numbers in the journal when this "
        "page was made. multistep replay does it again."
    )
    parts = [tag("p", intro, "soft small")]
    for ok, words, findings in replayed:
        parts += [tag("p", words, "ok" if ok else "bad" if ok is False else ""), bullets(findings)]
    return parts if replayed else []


def _amount(budget: Mapping[str, Any]) -> str:
    amount = budget.get("amount")
    if not _finite(amount):
        return str(budget.get("text", "an unknown budget"))
    unit = budget.get("unit", "seconds")
    return duration(amount) if unit == "seconds" else f"{amount:,.0f} {unit}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
