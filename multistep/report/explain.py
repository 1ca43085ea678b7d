"""The journal of a run in words and tables: what was tried, why, what came of it, what was decided by which rule.

Says only what the journal says. `summary` gives the same as a dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from multistep.data import DataReport
from multistep.data.language import LanguageReport
from multistep.report.summary import how_to_go_on, measured, summary
from multistep.report.words import clip, duration, number, plus_minus, table

_WORST = 5  # classes and confusions named
_SIGNALS = {2: "SIGINT", 15: "SIGTERM"}


def explain(records: Sequence[Mapping[str, Any]]) -> str:
    """A page of Markdown that also reads well in a terminal. Works on a journal that has not come to its end."""
    run = summary(records)
    sections = (
        ("", _head(run)),
        ("Data", _data(run)),
        ("Machine", _machine(run)),
        ("Where the budget went", _budget(run)),
        ("What was tried", _tried(run)),
        ("What was decided, and why", _decisions(run)),
        ("What was chosen by rule", _chosen(run)),
        ("What was left out", _skipped(run)),
        ("Out of the ordinary", _events(run)),
        ("Diagnosis", _diagnosed(run)),
        ("Test", _test(run)),
    )
    parts = [f"## {title}\n\n{text}" if title else text for title, text in sections if text]
    return "\n\n".join(parts) + "\n"


def headline(run: Mapping[str, Any]) -> str:
    """The result in a few lines, from a `summary`: what `fit` prints when it ends."""
    lines = [_state_of(run)]
    best = run.get("best")
    if best:
        score = (
            f": {run['metric']} {plus_minus(best['value'], best['stderr'])} on validation"
            if best["value"] is not None
            else ""
        )
        lines.append(f"Incumbent: {best['id']} ({best['stage']}){score}.")
    if run.get("test"):
        scores = ", ".join(f"{name} {plus_minus(v, e)}" for name, (v, e) in run["test"]["metrics"].items())
        of = " (of what stood before)" if run["test_is_older"] else ""
        lines.append(f"Test, read {_times(run['test_reads'])}{of}: {scores}.")
    return "\n".join(lines)


def _head(run: Mapping[str, Any]) -> str:
    config = run["config"]
    asked = [f"{key} {config[key]}" for key in ("source", "data", "task", "metric", "seed", "controller", "model")
             if isinstance(config.get(key), str | int)]  # fmt: skip
    asked_line = f"Asked for: {', '.join(asked)}, budget {_amount(run['budget'])}." if asked else ""
    return "\n\n".join(p for p in ("# Run", asked_line, headline(run)) if p)


def _state_of(run: Mapping[str, Any]) -> str:
    wall, budget = duration(run["spent"].get("wall_s")), _amount(run["budget"])
    if run["status"] == "finished":
        return f"Finished after {wall} of {budget}."
    if run["status"] == "interrupted":
        signal = run["interruptions"][-1].get("signal", "")
        return f"Interrupted by {_SIGNALS.get(signal, signal)} after {wall} of {budget}; {how_to_go_on(run)} goes on with it."
    return f"Not finished: the journal ends after {wall} of {budget}."


def _data(run: Mapping[str, Any]) -> str:
    report = dict(run["data"])
    if lines := data_lines(report):
        return "\n".join(f"    {line}" for line in lines)
    warnings = report.pop("warnings", None) or []
    lines = [f"- {_words(key)}: {_value(value)}" for key, value in report.items() if value not in (None, "", [], {})]
    lines += [f"- **warning**: {_value(warning)}" for warning in warnings]
    return "\n".join(lines)


def data_lines(report: Mapping[str, Any]) -> list[str]:
    """The report on the data, a line each; none where it is that of another version."""
    try:
        return (LanguageReport if "shape" in report else DataReport).model_validate(dict(report)).lines()
    except ValidationError:
        return []


def _machine(run: Mapping[str, Any]) -> str:
    lines = [f"- {_words(k)}: {_value(v)}" for k, v in run["machine"].items() if v not in (None, "", [], {})]
    if run["versions"]:
        lines.append(f"- versions: {_value(run['versions'])}")
    return "\n".join(lines)


def _budget(run: Mapping[str, Any]) -> str:
    stages = run["stages"]
    if not stages:
        return ""
    wall_s = run["spent"].get("wall_s") or 0.0
    rows = [[s["stage"], s["trials"], s["committed"], s["wall_s"]] for s in stages]
    other_s = wall_s - sum(s["wall_s"] for s in stages)
    if other_s > 0:
        rows.append(["outside trials", "-", "-", other_s])
    whole_s = max(wall_s, sum(s["wall_s"] for s in stages)) or 1.0
    cells = [[stage, trials, committed, f"{s:.1f}", f"{100 * s / whole_s:.0f}"] for stage, trials, committed, s in rows]
    text = table(["stage", "trials", "committed", "seconds", "%"], cells)
    spent = run["spent"]
    counts = ", ".join(f"{spent[unit]} {unit}" for unit in ("updates", "tokens") if spent.get(unit))
    held = {r.get("name"): r.get("amount") for r in run["reserved"]}
    notes = [f"Training took {counts} in all."] if counts else []
    reserved = ", ".join(f"{name} {number(amount)}" for name, amount in held.items() if amount)
    notes += [f"Set aside before anything else could spend it: {reserved}."] if reserved else []
    return "\n\n".join([text, *notes])


def _tried(run: Mapping[str, Any]) -> str:
    if not run["trials"]:
        return ""
    metric = run["metric"] or "result"
    rows = []
    for t in run["trials"]:
        verdict = f"failed: {t['failure']}" if t["status"] == "failed" and t["failure"] else t["status"]
        rows.append([t["stage"], t["id"], clip(t["what"], 56), clip(t["why"], 56), plus_minus(t["value"], t["stderr"]),
                     clip(verdict, 40), clip(t["rule"], 48) or "-", _seconds(t["cost"].get("wall_s"))])  # fmt: skip
    return table(["stage", "trial", "what", "why", f"{metric} ± stderr", "verdict", "rule", "cost s"], rows)


def _decisions(run: Mapping[str, Any]) -> str:
    lines = []
    for t in run["trials"]:
        if t["status"] == "measured" and not t["evidence"]:
            continue
        said = "no outcome in the journal" if t["status"] == "unfinished" else t["status"]
        because = "; ".join(_compared(c) for c in t["evidence"] if isinstance(c, Mapping))
        line = f"- {t['id']} ({t['stage']}): {said}"
        line += f" because {because}" if because else ""
        line += f". Rule: {t['rule'].rstrip('.')}" if t["rule"] else ""
        line += f". Failure: {t['failure'].rstrip('.')}" if t["failure"] else ""
        if t["updates"]:
            line += f". {t['updates']} updates, training loss {number(t['first_loss'])} to {number(t['last_loss'])}"
        lines.append(line + ".")
    return "\n".join(lines)


def _compared(c: Mapping[str, Any]) -> str:
    """'accuracy +0.0120 ± 0.0040 (0.912 to 0.924), p=0.003, n=1500'."""
    words = f"{c.get('metric', '')} {plus_minus(c.get('difference'), c.get('stderr'), signed=True)}"
    if c.get("incumbent") is not None and c.get("candidate") is not None:
        words += f" ({number(c['incumbent'])} to {number(c['candidate'])})"
    words += f", p={number(c['p'], 2)}" if c.get("p") is not None else ""
    return words + (f", n={c['n']}" if c.get("n") is not None else "")


def _chosen(run: Mapping[str, Any]) -> str:
    """Each rule once: a profile that was made again says the same."""
    rules = dict.fromkeys(f"- {c['what']}: {(c.get('facts') or {}).get('rule', '')}" for c in run["chosen"])
    return "\n".join(rules)


def _skipped(run: Mapping[str, Any]) -> str:
    return "\n".join(f"- {s.get('stage', '')}: {s.get('why', '')}" for s in run["skipped"])


def _events(run: Mapping[str, Any]) -> str:
    lines = []
    for e in run["events"]:
        where = (
            f"{e.get('trial', '')}, update {e['update']}" if e.get("update") is not None else str(e.get("trial", ""))
        )
        rows = e.get("rows") or []
        shown = ", ".join(str(r) for r in rows[:8]) + (" ..." if len(rows) > 8 else "")
        line = f"- {e.get('event', '')} ({where})" + (f", rows {shown}" if rows else "")
        lines.append(line + (f": {e['action']}" if e.get("action") else ""))
    for stop in run["interruptions"]:
        signal = stop.get("signal", "")
        after = duration(_clock(stop).get("wall_s"))
        lines.append(f"- interrupted by {_SIGNALS.get(signal, signal)} after {after}")
    for again in run["resumptions"]:
        lines.append(f"- resumed after {duration(_clock(again).get('wall_s'))} of the clock")
    return "\n".join(lines)


def _diagnosed(run: Mapping[str, Any]) -> str:
    """What the run did about what it saw on its way, and at its end what a user can do."""
    lines = []
    for d in run["diagnosed"]:
        line = f"- {d.get('name', '')}: {d.get('words') or _value(d.get('numbers') or {})}"
        done = "Next" if d.get("at") == "end" else "Done"
        lines.append(line + (f". {done}: {d['action']}" if d.get("action") else ""))
        lines += _suspects((d.get("numbers") or {}).get("suspects") or [])
    clear = [f"- {name}: {found.get('words', '')}" for name, found in run["not_found"].items()]
    return "\n".join([*lines, *(["\nLooked for and not found:\n"] if clear else []), *clear])


def _suspects(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first rows whose label is likely to be wrong."""
    lines = [
        f"    row {r['row']}: {r['given']}, likely {r['likely']} ({number(r['probability'], 2)}): {r['text']}"
        for r in rows[:_WORST]
    ]
    return lines + ([f"    ... ({len(rows)} in the journal)"] if len(rows) > _WORST else [])


def _test(run: Mapping[str, Any]) -> str:
    test = run["test"]
    if not test:
        return "The test data has not been read." if run["trials"] else ""
    parts = [
        f"The test data was read {_times(run['test_reads'])}; {run['decided_after_test']} decisions came after it."
    ]
    if run["test_reads"] > 1:
        parts.append("The numbers are those of the newest reading.")
    parts.append(table(["metric", "value ± stderr"], [[k, plus_minus(v, e)] for k, (v, e) in test["metrics"].items()]))
    classes = [c for c in test.get("per_class") or [] if isinstance(c, Mapping)]
    if classes:
        worst = sorted(classes, key=lambda c: float("inf") if c.get("f1") is None else float(c["f1"]))[:_WORST]
        title = (
            f"The {len(worst)} worst of {len(classes)} classes:" if len(classes) > _WORST else "By class, worst first:"
        )
        rows = [[str(c.get("label", "")), *(_fixed(c.get(k)) for k in ("precision", "recall", "f1")), c.get("support")]
                for c in worst]  # fmt: skip
        parts += [title, table(["class", "precision", "recall", "f1", "rows"], rows)]
    most = confused(test.get("confusion"), [str(c.get("label", "")) for c in classes])
    if most:
        parts.append("Most often confused (right class, then predicted): " + "; ".join(most) + ".")
    return "\n\n".join(parts)


def confused(confusion: Any, names: list[str]) -> list[str]:
    """The largest cells off the diagonal. `confusion`: rows (right class) of counts, or {'labels', 'matrix'}."""
    if isinstance(confusion, Mapping):
        names = [str(label) for label in confusion.get("labels") or names]
        confusion = confusion.get("matrix")
    if not isinstance(confusion, list) or not all(
        isinstance(row, list) and len(row) == len(names) for row in confusion
    ):
        return []
    if not all(isinstance(count, int) for row in confusion for count in row):
        return []
    cells = [(count, i, j) for i, row in enumerate(confusion) for j, count in enumerate(row) if i != j and count]
    cells.sort(key=lambda cell: -cell[0])
    return [f"{names[i]} as {names[j]} {count}" for count, i, j in cells[:_WORST]]


def scores(metrics: Any) -> str:
    """A table of metrics with their standard errors, from {'name': {'value', 'stderr'}} or pairs."""
    return table(["metric", "value ± stderr"], [[k, plus_minus(v, e)] for k, (v, e) in measured(metrics).items()])


def _amount(budget: Mapping[str, Any]) -> str:
    if "text" in budget:
        return str(budget["text"])
    if budget.get("amount") is None:
        return "an unknown budget"
    unit = budget.get("unit", "seconds")
    return duration(budget["amount"]) if unit == "seconds" else f"{budget['amount']:.0f} {unit}"


def _value(value: Any) -> str:
    """A few words for a fact of any shape; long lists are cut and say so."""
    if isinstance(value, Mapping):
        items = [f"{_words(k)} {_value(v)}" for k, v in list(value.items())[:10]]
        return ", ".join(items) + (f" ... ({len(value)} in all)" if len(value) > 10 else "")
    if isinstance(value, list | tuple):
        items = [_value(v) for v in value[:5]]
        return "; ".join(items) + (f" ... ({len(value)} in all)" if len(value) > 5 else "")
    return clip(number(value), 200)


def _words(key: Any) -> str:
    return str(key).replace("_", " ")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _seconds(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}"


def _fixed(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def _clock(record: Mapping[str, Any]) -> Mapping[str, Any]:
    clock = record.get("clock")
    return clock if isinstance(clock, Mapping) else {}
