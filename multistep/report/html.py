"""Pieces of an HTML page, from text: everything that is put in is escaped here, so that a label is text and never markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from multistep.report.words import without_folders


class Html(str):
    """Text that is markup already."""


def e(value: Any) -> Html:
    """Text as it is to be read; of a path only its last part."""
    return value if isinstance(value, Html) else Html(escape(without_folders(str(value)), quote=True))


def tag(name: str, inside: Any = "", css: str = "") -> Html:
    """`inside`: text, which is escaped, or markup."""
    attribute = f' class="{escape(css, quote=True)}"' if css else ""
    return Html(f"<{name}{attribute}>{e(inside)}</{name}>")


def join(parts: Sequence[Any], between: str = "") -> Html:
    return Html(between.join(e(p) for p in parts))


def section(title: str, *parts: Any, css: str = "") -> Html:
    """Nothing where there is nothing in it."""
    inside = join([p for p in parts if p])
    return tag("section", join([tag("h2", title) if title else "", inside]), css) if inside else Html("")


def table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = (), marked: int | None = None
) -> Html:
    """`numbers`: columns that stand to the right; `marked`: the row that is set apart."""
    css = ["num" if i in numbers else "" for i in range(len(heads))]
    head = tag("tr", join([tag("th", h, c) for h, c in zip(heads, css, strict=True)]))
    body = [
        tag("tr", join([tag("td", cell, c) for cell, c in zip(row, css, strict=True)]), "pick" if n == marked else "")
        for n, row in enumerate(rows)
    ]
    return tag("div", tag("table", join([tag("thead", head), tag("tbody", join(body))])), "scroll")


def pairs(values: Mapping[str, Any]) -> Html:
    """Names and values, those that are empty left out."""
    kept = {k: v for k, v in values.items() if v not in (None, "", [], {})}
    return tag("dl", join([join([tag("dt", k), tag("dd", v)]) for k, v in kept.items()])) if kept else Html("")


def bullets(lines: Sequence[Any]) -> Html:
    return tag("ul", join([tag("li", line) for line in lines])) if lines else Html("")


def folded(summary: Any, inside: Any, css: str = "more") -> Html:
    """What is read when it is opened."""
    return tag("details", join([tag("summary", summary), inside]), css)
