"""The decisions of a run as a list on its page: each opens to what was asked and why, to what it was compared with, and to its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from multistep.report.html import Html, e, join, pairs, table, tag
from multistep.report.words import duration, number, plus_minus

_TESTS = {"t": "paired t", "mcnemar": "exact McNemar", "swap": "swapped pairs"}
_COMPARED = ("metric", "before", "now", "gain ± error", "rows", "test", "p")
Trial = Mapping[str, Any]


def decisions(trials: Sequence[Trial]) -> Html:
    """One item a trial, in the order that they were asked for."""
    return tag("ol", join([tag("li", _item(t)) for t in trials]), "steps") if trials else Html("")


def _item(t: Trial) -> Html:
    score = plus_minus(t["value"], t["stderr"]) if t["value"] is not None else ""
    said = t["rule"] or t["failure"]
    said = "" if said == t["why"] else said
    head = join([
        tag("span", status(t), f"chip {_css(t)}"),
        tag("span", join([tag("b", t["stage"]), tag("small", t["why"]) if t["why"] else "", tag("small", said, "rule") if said else ""])),
        tag("span", score, "num"),
    ])  # fmt: skip
    return tag("details", join([tag("summary", head), tag("div", _inside(t), "inside")]))


def status(t: Trial) -> str:
    if t["status"] in ("accepted", "rejected", "measured") and not t["commit"]:
        return "for a mean" if t["stage"] == "again" else "probe"
    return t["status"]


def _css(t: Trial) -> str:
    return t["status"] if t["status"] in ("committed", "failed") else ""


def _inside(t: Trial) -> Html:
    spent = t["cost"]
    counts = [f"{spent[unit]:,} {unit}" for unit in ("updates", "tokens") if spent.get(unit)]
    loss = f"{number(t['first_loss'])} to {number(t['last_loss'])}" if t["updates"] else ""
    facts = pairs({
        "trial": t["id"], "asked for because": t["why"], "starts from": t["start"], "rule": t["rule"], "failure": t["failure"],
        "cost": ", ".join([duration(spent.get("wall_s")), *counts]) if spent else "", "training loss": loss,
        "records": ", ".join(str(n) for n in t["records"] if n is not None), "what": tag("span", t["what"], "mono"),
    })  # fmt: skip
    return join([*_compared("with what stood", t["evidence"]), *_others(t["facts"]), facts])


def _others(facts: Mapping[str, Any]) -> list[Html]:
    """Comparisons beside the one that decided: with the best of the family, and with a rival that the trial names."""
    found: list[Html] = []
    for key, words in (("family", "with the best of its family"), ("against", "with its rival")):
        verdict = facts.get(f"{key}_verdict")
        if isinstance(verdict, Mapping):
            rival = facts.get(f"{key}_rival")
            name = f"{words}{f', {rival}' if rival else ''}: {verdict.get('rule', '')}"
            found += _compared(name, verdict.get("evidence") or [])
    return found


def _compared(title: str, evidence: Sequence[Any]) -> list[Html]:
    rows = [_row(c) for c in evidence if isinstance(c, Mapping)]
    return [tag("h3", f"Compared {title}"), table(_COMPARED, rows, numbers=(1, 2, 3, 4, 6))] if rows else []


def _row(c: Mapping[str, Any]) -> list[Any]:
    test = _TESTS.get(str(c.get("test")), "")
    if c.get("wins") is not None:
        test += f": {c['wins']} won, {c['losses']} lost"
    gain = plus_minus(c.get("difference"), c.get("stderr"), signed=True)
    return [e(c.get("metric", "")), number(c.get("incumbent")), number(c.get("candidate")), gain, number(c.get("n")), test,
            number(c.get("p"), 2)]  # fmt: skip
