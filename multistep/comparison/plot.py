"""Quality against seconds and against updates, as SVG written by hand: a line is the mean over seeds, a band reaches from the worst seed
to the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from multistep.comparison.book import Row
from multistep.comparison.page import sign_of, summary
from multistep.comparison.statistics import aligned
from multistep.report.svg import Scale, ticks
from multistep.report.words import number

# Twelve hues that differ in lightness too; then the same again, dashed.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7b5cd6", "#b8860b", "#56b4e9", "#8c2d04", "#4d4d4d", "#e7298a", "#66a61e",
    "#17a2a2",
)  # fmt: skip
WIDTH, HEIGHT = 1134, 470
TOP, BOTTOM, LEFT, GAP, LEGEND = 58, 52, 66, 60, 226
SPREAD = 6  # optimizers whose end is so many times further from the median one than the best are below the picture
AT_LEAST = 0.25  # progress up to which a curve may leave the picture: its start is far from where they are told apart


class Line(NamedTuple):
    name: str
    colour: str
    dashed: bool
    x: list[list[float]]  # for seconds and for updates: the mean at every mark
    mean: list[float]
    worst: list[float]
    best: list[float]


def svg(rows: Sequence[Row], title: str = "") -> str:
    """One picture of two panels that share their vertical axis. Optimizers are in the order of their final mean."""
    found = summary(rows)
    metric, sign = found["metric"], sign_of(found["metric"])
    lines = _lines(rows, [s["optimizer"] for s in found["standings"]], sign)
    panel = (WIDTH - LEFT - GAP - LEGEND) / 2
    y = _vertical(lines, sign)
    label = title or f"{metric} on validation, {found['settings']['budget']} a run"
    seeds = sorted({len(s["seeds"]) for s in found["standings"]})
    under = (
        f"lines: mean over {' or '.join(map(str, seeds))} seeds; bands: worst to best seed; {found['better']} is better"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#333">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="16" font-weight="bold" fill="#111">{escape(label)}</text>',
        f'<text x="{LEFT}" y="43" fill="#666">{escape(under)}</text>',
    ]
    for n, name in enumerate(("seconds of training", "updates")):
        left = LEFT + n * (panel + GAP)
        parts += _panel(n, name, lines, y, left, left + panel, metric if n == 0 else "")
    parts += _legend(lines, WIDTH - LEGEND + 18, sign)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _lines(rows: Sequence[Row], order: Sequence[str], sign: float) -> list[Line]:
    made = []
    for i, name in enumerate(order):
        curves = [r["curve"] for r in rows if r["kind"] == "run" and r["optimizer"] == name and not r["diverged"]]
        marks = [m for m in aligned(curves) if all(p[3] is not None for p in m)]
        if not marks:
            continue
        xs = [[sum(p[k] for p in m) / len(m) for m in marks] for k in (1, 2)]
        scores = [[sign * p[3] for p in m] for m in marks]
        made.append(
            Line(
                name, COLOURS[i % len(COLOURS)], i >= len(COLOURS), xs, [sign * sum(s) / len(s) for s in scores],
                [sign * min(s) for s in scores], [sign * max(s) for s in scores],
            )
        )  # fmt: skip
    return made


def _vertical(lines: Sequence[Line], sign: float) -> Scale:
    """All ends, and what the curves do after their first quarter; outliers among optimizers do not squeeze the others."""
    late = [v for line in lines for v in line.mean[int(AT_LEAST * len(line.mean)) :]] or [0.0, 1.0]
    ends = sorted(sign * line.mean[-1] for line in lines) or [0.0]
    best = max(sign * v for v in late)
    middle = ends[len(ends) // 2]  # the median optimizer's end
    worst = max(min(sign * v for v in late), middle - SPREAD * max(best - middle, 1e-9))
    spare = 0.06 * ((best - worst) or 1.0)
    low, high = sorted((sign * (best + spare), sign * (worst - spare)))
    return Scale(low, high, HEIGHT - BOTTOM, TOP)


def _panel(n: int, name: str, lines: Sequence[Line], y: Scale, left: float, right: float, metric: str) -> list[str]:
    seen = [[a for a, v in zip(line.x[n], line.mean, strict=True) if y.low <= v <= y.high] for line in lines]
    ends = [s[-1] for s in seen if s] or [1.0]  # of the lines that are in the picture
    # Few costly updates and many cheap ones do not fit on one linear axis.
    log = n == 1 and max(ends) > 8 * min(ends)
    first = min((s[0] for s in seen if s), default=1.0)
    x = Scale(math.log10(max(first, 0.5)) if log else 0.0, math.log10(max(ends)) if log else max(ends), left, right)
    top, bottom = TOP, HEIGHT - BOTTOM
    parts = [
        f'<clipPath id="p{n}"><rect x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{bottom - top}"/></clipPath>'
    ]
    for tick in ticks(y.low, y.high):
        parts.append(f'<path d="M{left:.1f} {y(tick):.1f}H{right:.1f}" stroke="#e6e6e6"/>')
        parts.append(f'<text x="{left - 8:.1f}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in _powers(x.low, x.high) if log else ticks(x.low, x.high):
        at = x(math.log10(tick) if log else tick)
        parts.append(f'<path d="M{at:.1f} {bottom}v5" stroke="#333"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 19}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<path d="M{left:.1f} {top}V{bottom}H{right:.1f}" fill="none" stroke="#333"/>')
    said = f"{name}{' (logarithmic)' if log else ''}"
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{bottom + 39}" text-anchor="middle">{said}</text>')
    if metric:
        middle = (top + bottom) / 2
        parts.append(
            f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(metric)}</text>'
        )
    parts.append(f'<g clip-path="url(#p{n})">')
    for line in reversed(lines):  # the best on top
        xs = [x(math.log10(max(v, 0.5)) if log else v) for v in line.x[n]]
        there = [f"{a:.1f} {y(v):.1f}" for a, v in zip(xs, line.best, strict=True)]
        back = [f"{a:.1f} {y(v):.1f}" for a, v in zip(reversed(xs), reversed(line.worst), strict=True)]
        parts.append(f'<path d="M{"L".join([*there, *back])}Z" fill="{line.colour}" fill-opacity="0.13"/>')
        along = "L".join(f"{a:.1f} {y(v):.1f}" for a, v in zip(xs, line.mean, strict=True))
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(
            f'<path d="M{along}" fill="none" stroke="{line.colour}" stroke-width="1.8" stroke-linejoin="round"{dash}/>'
        )
    return [*parts, "</g>"]


def _legend(lines: Sequence[Line], left: float, sign: float) -> list[str]:
    parts = [f'<text x="{left:.1f}" y="{TOP + 8}" fill="#666">at the end, best first</text>']
    for i, line in enumerate(lines):
        at = TOP + 30 + 19 * i
        dash = ' stroke-dasharray="6 4"' if line.dashed else ""
        parts.append(f'<path d="M{left:.1f} {at - 4}h20" stroke="{line.colour}" stroke-width="3"{dash}/>')
        parts.append(f'<text x="{left + 27:.1f}" y="{at}">{escape(line.name)}  {number(line.mean[-1])}</text>')
    return parts


def _powers(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, from 10^low to 10^high."""
    found = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    return [v for v in found if low - 1e-9 <= math.log10(v) <= high + 1e-9]
