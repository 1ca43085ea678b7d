"""The table of course.py, from its rows: every cell, ranks over all of them, and how our test error stands to the best peer's.

A system's score in a cell is its mean over seeds on the test: accuracy, or nats a character (lower is better, and it stands for the error).
Ranks: 1 is best, equal means share. Compared with ours-staged example by example (_paired.py), Holm over the systems of a cell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from _common import EXTRA_TESTS, Row, markdown, mean_sd, seconds, select, values
from _paired import Difference, compared, holm, unpack_nats, unpack_right
from course_rows import CELLS, HERO, OURS, TEXT, Cell

ALPHA, BAR = 0.05, 0.85  # of a difference that counts; the ratio of errors that was asked for


class Standing(NamedTuple):
    """One system in one cell. `against`: theirs - ours-staged, higher is better for them; `p`: after Holm."""

    system: str
    rows: list[Row]
    scores: list[float]
    error: float  # mean; 1 - accuracy, or nats a character
    rank: float
    against: Difference | None
    p: float | None


def metric(cell: Cell) -> str:
    return "nats_a_character" if cell.dataset == TEXT else "accuracy"


def per_example(row: Row) -> np.ndarray:
    """Scores of the test's examples, higher is better; their mean is the row's score (a text: minus it)."""
    if "right" in row:
        return unpack_right(row["right"])
    nats_N = unpack_nats(row["nats"])
    return -nats_N * len(nats_N) / row["characters"]


def standings(rows: Sequence[Row], cell: Cell) -> list[Standing]:
    """Best first; none where the cell has no rows."""
    mine = select(rows, dataset=cell.dataset, budget=cell.budget)
    systems = list(dict.fromkeys(row["system"] for row in mine))
    by_system = {system: select(mine, system=system) for system in systems}
    scores = {system: values(found, metric(cell)) for system, found in by_system.items()}
    errors = {s: statistics.fmean(n) if cell.dataset == TEXT else 1 - statistics.fmean(n) for s, n in scores.items()}
    ranks = dict(zip(systems, rankdata([round(errors[s], 9) for s in systems]), strict=True)) if systems else {}
    examples = {s: {row["seed"]: per_example(row) for row in found} for s, found in by_system.items()}
    against = {s: compared(examples[s], examples[HERO]) for s in systems if s != HERO and HERO in examples}
    adjusted = holm({s: found.p for s, found in against.items() if found is not None})
    made = [
        Standing(
            s, by_system[s], scores[s], errors[s], float(ranks[s]), against.get(s), adjusted.get(s)
        )
        for s in systems
    ]  # fmt: skip
    return sorted(made, key=lambda found: (found.rank, found.system))


def best_peer(found: Sequence[Standing], own: bool) -> Standing | None:
    """Of those that are not ours; `own`: or ours, but not ours-staged."""
    peers = [s for s in found if s.system != HERO and (own or not s.system.startswith(OURS))]
    return min(peers, key=lambda s: s.error, default=None)


def table(rows: list[Row]) -> str:
    cells = list(dict.fromkeys(Cell(r["dataset"], r["budget"], ()) for r in rows))
    known = [(c.dataset, c.budget) for c in CELLS]
    cells.sort(key=lambda c: known.index((c.dataset, c.budget)) if (c.dataset, c.budget) in known else len(known))
    found = {cell: standings(rows, cell) for cell in cells}
    parts = [_ranks(found), _ratios(found)]
    parts += [_cell(cell, standing) for cell, standing in found.items()]
    return "\n\n".join(parts)


def _ranks(found: Mapping[Cell, Sequence[Standing]]) -> str:
    ranks: dict[str, list[float]] = {}
    for standing in found.values():
        for s in standing:
            ranks.setdefault(s.system, []).append(s.rank)
    body = sorted(((statistics.fmean(r), len(r), system) for system, r in ranks.items()))
    head = ["system", "mean rank", "cells"]
    return "## Ranks over all cells\n\n" + markdown(head, [[s, f"{r:.2f}", n] for r, n, s in body])


def _ratios(found: Mapping[Cell, Sequence[Standing]]) -> str:
    head = ["cell", "ours-staged", "best peer", "its score", "ours against it", "error / its error"]
    head += ["best of ours and peers", "error / its error"]
    body, ratios = [], []
    for cell, standing in found.items():
        ours = next((s for s in standing if s.system == HERO), None)
        peer, own = best_peer(standing, own=False), best_peer(standing, own=True)
        if ours is None or peer is None or own is None:
            continue
        ratios.append((_ratio(ours.error, peer.error), _ratio(ours.error, own.error)))
        body.append(
            [f"{cell.dataset} {cell.budget}", mean_sd(ours.scores), peer.system, mean_sd(peer.scores), _ours_is(peer),
             f"{ratios[-1][0]:.3f}", own.system, f"{ratios[-1][1]:.3f}"]
        )  # fmt: skip
    text = "## Our test error against the best peer's\n\n" + markdown(head, body)
    if ratios:
        outside, all_ = (statistics.fmean(column) for column in zip(*ratios, strict=True))
        said = "reached" if outside <= BAR else "not reached"
        text += f"\n\nOn average {outside:.3f} of the best peer's error ({BAR} was asked for: {said}); "
        text += f"{all_:.3f} with our own others among the peers."
    return text


def _ours_is(peer: Standing) -> str:
    """Significantly better or worse than this peer, or neither."""
    if peer.against is None or peer.p is None:
        return "-"
    word = "not told apart" if peer.p >= ALPHA else "SIGNIFICANTLY WORSE" if peer.against.value > 0 else "better"
    return f"{word} (p = {peer.p:.2g})"


def _ratio(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else 1.0 if not ours else math.inf


def _cell(cell: Cell, standing: Sequence[Standing]) -> str:
    what = "nats a character, lower is better" if cell.dataset == TEXT else "test accuracy"
    extras = () if cell.dataset == TEXT else EXTRA_TESTS.get(cell.dataset, ())
    head = ["rank", "system", "seeds", f"{what} ± sd over seeds", *extras, "- ours-staged ± se", "p (Holm)", "verdict"]
    head += ["longest wall s", "over budget", "settings that were chosen"]
    body = []
    for s in standing:
        longest_s = max(values(s.rows, "wall_s"))
        allowed_s = s.rows[0].get("given_s", seconds(cell.budget))
        over = f"{max(0.0, longest_s / allowed_s - 1):.1%}"
        body.append([
            f"{s.rank:g}", s.system, len(s.rows), mean_sd(s.scores),
            *(mean_sd(values(s.rows, f"accuracy_{name}")) for name in extras), *_against(cell, s), f"{longest_s:.1f}", over,
            _chosen(s.rows),
        ])  # fmt: skip
    return f"## {cell.dataset}, {cell.budget}\n\n{markdown(head, body)}"


def _against(cell: Cell, s: Standing) -> tuple[str, str, str]:
    if s.against is None or s.p is None:
        return "-", "-", "-"
    value = -s.against.value if cell.dataset == TEXT else s.against.value  # in the units of the score
    word = "not told apart" if s.p >= ALPHA else "better" if s.against.value > 0 else "worse"
    return f"{value:+.4f} ± {s.against.stderr:.4f}", f"{s.p:.2g}", word


def _chosen(rows: Sequence[Row]) -> str:
    """What a system took, seed by seed."""
    found = []
    for row in rows:
        facts = row.get("facts") or {}
        best = facts.get("best", facts.get("C", facts.get("stands", "-")))
        if isinstance(best, dict):
            best = " ".join(f"{k}={v:.2g}" if isinstance(v, float) else f"{k}={v}" for k, v in best.items())
        found.append(str(best))
    return "; ".join(dict.fromkeys(found))
