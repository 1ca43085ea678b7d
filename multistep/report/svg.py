"""Pictures as SVG written by hand: what stood over time, losses and learning rates. Colours come from the page's style sheet, by class.

A picture is drawn for a width in pixels, so that its words keep their size: the page holds one for wide screens and one for narrow ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from multistep.report.words import number

TOP, BOTTOM, LEFT, RIGHT = 22, 34, 52, 14
_APART = 58  # pixels between two names above marks, at least
_BEYOND = 1.0  # times the span of what stood that a mark may lie outside of it; one further away stands at the edge


class Scale(NamedTuple):
    """From numbers to places: `low` is at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from low to high: a few less or more than `about`."""
    rough = ((high - low) or 1.0) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Mark(NamedTuple):
    """A trial's score: `kind` is "committed", "rolled" or "probe"; `words`: what a pointer over it is told; `other`: it was judged on the
    other half of the rows."""

    at_s: float
    value: float
    stderr: float
    kind: str
    name: str
    words: str
    other: bool = False


def scores(marks: Sequence[Mark], end_s: float, metric: str, width: int) -> str:
    """The score of what stood as a line with its error as a band, and every trial as a mark. `end_s`: of the run's clock."""
    height = 300 if width > 500 else 240
    stood = [m for m in marks if m.kind == "committed"]
    x = Scale(0.0, max(end_s, *(m.at_s for m in marks)), LEFT, width - RIGHT)
    y = _vertical(marks, stood or marks, height)
    parts = _frame(x, y, width, height, "seconds", metric)
    for n, now in enumerate(stood):
        then = stood[n + 1].at_s if n + 1 < len(stood) else x.high
        low, high = y(now.value - now.stderr), y(now.value + now.stderr)
        parts.append(
            f'<rect class="band" x="{x(now.at_s):.1f}" y="{high:.1f}" width="{x(then) - x(now.at_s):.1f}" height="{low - high:.1f}"/>'
        )
    for half, css in ((False, "line"), (True, "line other")):  # scores of the two halves are not joined
        here = [m for m in stood if m.other == half]
        if here:
            ends = min([m.at_s for m in stood if m.at_s > here[-1].at_s], default=x.high)
            steps = "".join(f"H{x(m.at_s):.1f}V{y(m.value):.1f}" for m in here[1:])
            parts.append(
                f'<path class="{css}" d="M{x(here[0].at_s):.1f} {y(here[0].value):.1f}{steps}H{x(ends):.1f}"/>'
            )
    named_to = -1e9
    for m in sorted(marks, key=lambda m: (m.kind == "committed", m.at_s)):
        inside = y.low <= m.value <= y.high
        a, b = x(m.at_s), y(min(max(m.value, y.low), y.high))
        parts.append(f'<g class="{m.kind}"><title>{escape(m.words)}</title>{_shape(a, b, m, y, inside)}</g>')
        if m.kind == "committed" and a - named_to >= _APART:
            parts.append(_name(a, b, m, y, width))
            named_to = a
    return _svg(parts, width, height, f"{metric} of what stood over time; {len(marks)} trials")


def _vertical(marks: Sequence[Mark], stood: Sequence[Mark], height: int) -> Scale:
    """All that stood with its errors; others as far as they do not squeeze it."""
    low, high = min(m.value - m.stderr for m in stood), max(m.value + m.stderr for m in stood)
    span = (high - low) or abs(high) * 0.1 or 1.0
    near = [m.value for m in marks if low - _BEYOND * span <= m.value <= high + _BEYOND * span]
    low, high = min([low, *near]), max([high, *near])
    spare = 0.08 * ((high - low) or span)
    return Scale(low - spare, high + spare, height - BOTTOM, TOP)


def _shape(a: float, b: float, m: Mark, y: Scale, inside: bool) -> str:
    if not inside:  # an arrow at the edge
        tip = 6 if m.value < y.low else -6
        return f'<path class="dot" d="M{a - 5:.1f} {b - tip:.1f}h10l-5 {tip}z"/>'
    low, high = (y(min(max(v, y.low), y.high)) for v in (m.value - m.stderr, m.value + m.stderr))
    error = f'<path class="error" d="M{a:.1f} {low:.1f}V{high:.1f}"/>'
    if m.kind == "probe":
        return f'{error}<path class="dot" d="M{a:.1f} {b - 5:.1f}l5 5l-5 5l-5 -5z"/>'
    return f'{error}<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="5"/>'


def _name(a: float, b: float, m: Mark, y: Scale, width: int) -> str:
    above = y(min(m.value + m.stderr, y.high)) - 6
    anchor = "end" if a > width - 60 else "start" if a < LEFT + 30 else "middle"
    return f'<text class="strong" x="{a:.1f}" y="{max(12.0, above):.1f}" text-anchor="{anchor}">{escape(m.name)}</text>'


class Curve(NamedTuple):
    """Of a training: updates, losses in nats and learning rates; `looks`: (update, loss on validation)."""

    name: str
    updates: list[float]
    losses: list[float]
    rates: list[float]
    looks: list[tuple[float, float]]


def curve(c: Curve, width: int) -> str:
    """The loss above, the learning rate below, over updates."""
    height, rates = 230, 44
    x = Scale(0.0, max([1.0, *c.updates, *(u for u, _ in c.looks)]), LEFT, width - RIGHT)
    known = [*c.losses, *(loss for _, loss in c.looks)]
    low, high = min(known), max(known)
    spare = 0.08 * ((high - low) or 1.0)
    y = Scale(low - spare, high + spare, height - BOTTOM - rates - 14, TOP)
    parts = _frame(x, y, width, height, "updates", "loss, nats", bottom=height - BOTTOM)
    parts.append(f'<path class="line" d="{_path(zip(map(x, c.updates), map(y, c.losses), strict=True))}"/>')
    if c.looks:
        parts.append(f'<path class="line second" d="{_path((x(u), y(v)) for u, v in c.looks)}"/>')
        parts += [f'<circle class="dot second" cx="{x(u):.1f}" cy="{y(v):.1f}" r="3"/>' for u, v in c.looks]
    top = height - BOTTOM - rates
    r = Scale(0.0, max(c.rates) or 1.0, height - BOTTOM, top)
    parts.append(f'<path class="grid" d="M{LEFT} {top:.1f}H{width - RIGHT}"/>')
    parts.append(f'<text x="{LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">{number(max(c.rates), 2)}</text>')
    parts.append(f'<text x="{LEFT - 8}" y="{height - BOTTOM:.1f}" text-anchor="end">lr 0</text>')
    parts.append(f'<path class="line soft" d="{_path(zip(map(x, c.updates), map(r, c.rates), strict=True))}"/>')
    return _svg(parts, width, height, f"loss and learning rate of {c.name}")


def _path(points: object) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)  # pyright: ignore[reportGeneralTypeIssues]


def _frame(
    x: Scale, y: Scale, width: int, height: int, below: str, above: str, bottom: float | None = None
) -> list[str]:
    """Grid, numbers and what they are."""
    at = y.start if bottom is None else bottom
    parts = [f'<text x="{LEFT - 8}" y="10" class="unit" text-anchor="start" dx="-40">{escape(above)}</text>']
    for tick in ticks(y.low, y.high, 5):
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{width - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(x.low, x.high, 8 if width > 500 else 4):
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {at:.1f}v4"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{at + 17:.1f}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{width - RIGHT}" y="{height - 2}" text-anchor="end" class="unit">{escape(below)}</text>')
    return parts


def _svg(parts: Sequence[str], width: int, height: int, words: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(words, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )
