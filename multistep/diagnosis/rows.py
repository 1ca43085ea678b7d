"""Rules about the data: what its rows allow to be learnt and to be decided.

    leaking splits        rows of validation or test whose text is in train, as it is or with its words in another order
    validation too small  the smallest gain that would be seen with a power of 80 % is no small one
    cannot be learnt      the best model is not better than guessing beyond noise
    too little data       a law fitted to models on parts of train says that twice the rows bring something beyond noise
    noisy labels          labels that models are sure are wrong, also where these models can be trusted

Every threshold is a constant here; docs/diagnosis.md says where each comes from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from multistep.diagnosis.base import Diagnosis, percent, with_error
from multistep.diagnosis.curves import Gain
from multistep.metrics.power import FEWEST_ROWS, detectable, least_wins
from multistep.metrics.verdicts import large
from multistep.types import Comparison, Spec

NEAR_SHARE = 0.01  # of a split: fewer rows of the same words in another order are chance
COARSE, COARSE_LOSS = 0.05, 0.2  # a gain that should be seen: of a metric of shares (or of 1), of a loss
GUESS_ALPHA = 0.05  # each of two tests against guessing
WORTH, MORE_ROWS = 0.01, 0.1  # of the errors: what is something, and what is worth the work of as many rows again
NOISE = 0.03  # of the labels: a smaller share is in every data set
MOST_ROWS = 20_000  # of train that a ridge is asked about: more would take seconds and tell little more
SHOWN = 50  # rows named in the journal
WIDTH = 100  # characters shown of a text


class Leaks(Spec):
    """By pair of splits such as "train-test": rows of the second whose text is in the first; `near`: whose words are, in another order."""

    rows: dict[str, int]  # of the splits
    exact: dict[str, int]
    near: dict[str, int] | None = None  # None: not looked for
    first: tuple[str, ...] = ()  # a few of them, in words


class Noise(Spec):
    """What models that have not seen a row say of its label. `share`: by confident learning; `sure`: of rows on which the model is surest,
    how many it contradicts, less `blind`, what it gets wrong there although a better model does not."""

    model: str
    rows: int
    share: float
    share_stderr: float
    sure: float
    blind: float
    stderr: float  # of sure - blind
    suspects: tuple[dict[str, Any], ...] = ()  # row, text, given, likely, probability


# ---------------------------------------------------------------------------------------------- splits


def leaks(found: Leaks) -> Diagnosis | None:
    """Exact ones always; near ones from 1 % of a split on."""
    near = {p: n for p, n in (found.near or {}).items() if n >= max(2, NEAR_SHARE * found.rows.get(p.split("-")[1], 0))}
    exact = {p: n for p, n in found.exact.items() if n}
    if not (exact or near):
        return None
    said = [f"{n:,} {_rows(p, found)} have a text of {p.split('-')[0]}" for p, n in exact.items()]
    said += [
        f"{n:,} {_rows(p, found)} have the words of a text of {p.split('-')[0]} in another order"
        for p, n in near.items()
    ]
    done = []
    if "train-validation" in exact:
        done.append("validation rows that are in train decided nothing")
    into_test = [p for p in (*exact, *near) if p.endswith("-test")]
    if into_test:
        done.append("test was read as it is, so its score is too good by up to their share")
    if "train-validation" in near:
        done.append("near ones took part in deciding")
    where = " and ".join(dict.fromkeys(p.split("-")[1] for p in (*exact, *near)))
    action = f"take these rows out of {where}, or out of train, and run again"
    numbers = {"exact": exact, "near": found.near, "rows": found.rows, "first": list(found.first)}
    return Diagnosis(
        name="leaking splits", numbers=numbers, words="; ".join([*said, *done]), action=action
    )  # fmt: skip


def _rows(pair: str, found: Leaks) -> str:
    name = pair.split("-")[1]
    return f"of {found.rows[name]:,} {name} rows" if name in found.rows else f"{name} rows"


def small_validation(
    metric: str, value: float, higher_is_better: bool, zero_one: bool, rows: int, stderr: float, halved: bool = True
) -> Diagnosis:
    """`value`: of the incumbent; `stderr`: of paired differences in this run, on `rows` rows. `halved`: these are half of the validation
    rows, and prediction was to be tuned on the others."""
    seen, noise = detectable(stderr, rows, zero_one), detectable(stderr, rows, False)
    wanted = COARSE * max(1.0, abs(value)) if higher_is_better else COARSE_LOSS * abs(value)
    numbers = {
        "rows": rows,
        "detectable": seen,
        "wanted": wanted,
        "alpha": 0.1,
        "power": 0.8,
        "fewest_rows": FEWEST_ROWS,
    }
    words = f"on {rows} rows a gain of {metric} below {seen:.2g} would be missed more than one time in five (alpha 0.1, power 0.8)"
    if rows >= FEWEST_ROWS and seen <= wanted:
        return Diagnosis(name="validation too small", numbers=numbers, words=words)
    if rows < FEWEST_ROWS and (least := large(metric, value)):
        words += f"; with fewer than {FEWEST_ROWS} rows only gains of {least:.3g} changed the course"
        words += ", and no blend, calibration or thresholds were fitted" if halved else ""
    needed = max(FEWEST_ROWS, math.ceil(rows * (noise / max(wanted, 1e-12)) ** 2))
    needed = max(needed, math.ceil(least_wins() / wanted)) if zero_one else needed
    wanted_rows = (
        f"{2 * needed:,} validation rows or more (half of them decide training)"
        if halved
        else f"{needed:,} validation rows or more"
    )
    action = f"give {wanted_rows}: then a gain of {wanted:.2g} is seen"
    return Diagnosis(name="validation too small", numbers={**numbers, "needed": needed}, words=words, action=action)


# ---------------------------------------------------------------------------------------------- what can be learnt


def cannot_be_learnt(against_guess: Sequence[Comparison], model: str, label: str) -> Diagnosis | None:
    """Paired comparisons of what stands with the best guess: each has its own test. None where the rows are too few to say."""
    rows = min((c.n for c in against_guess), default=0)
    if rows < FEWEST_ROWS:
        return None
    said = "; ".join(
        f"{c.metric} {c.candidate:.4g}, of a guess {c.incumbent:.4g} (difference {c.difference:+.3g} ± {c.stderr:.1g}, p = {c.p:.2g})"
        for c in against_guess
    )
    numbers = {"model": model, "comparisons": [c.model_dump() for c in against_guess]}
    if any(c.difference > 0 and c.p <= GUESS_ALPHA for c in against_guess):
        return Diagnosis(name="cannot be learnt", numbers=numbers, words=f"better than a guess: {said}")
    words = f"{model} is not better than guessing beyond noise on {rows} rows: {said}"
    action = (
        f"look at the column {label!r}: do its labels belong to these texts, row by row? Shuffled rows look like this"
    )
    return Diagnosis(name="cannot be learnt", numbers=numbers, words=words, action=action)


def few_rows(gain: Gain, rows: int, what: str, model: str) -> Diagnosis:
    """`gain`: of `what` (errors) when the rows of train are doubled."""
    numbers = {
        "rows": rows,
        "what": what,
        "errors": gain.now,
        "gain": gain.value,
        "stderr": gain.stderr,
        "low": gain.low,
    }
    words = (
        f"{model} on parts of the {rows:,} rows of train: twice the rows would take {with_error(gain.value, gain.stderr)} off "
        f"{what} of {gain.now:.3g}"
    )
    if gain.beyond_noise and gain.value >= MORE_ROWS * gain.now:
        return Diagnosis(
            name="too little data", numbers=numbers, words=words, action=f"label more rows: {rows:,} more would pay"
        )
    some = gain.beyond_noise and gain.value >= WORTH * gain.now
    reason = "too little to be worth the work" if some else "nothing beyond noise"
    return Diagnosis(name="too little data", numbers=numbers, words=f"{words}: {reason}")


def noisy_labels(found: Noise, label: str, where: str) -> Diagnosis:
    """`where`: the train split by a name that a user knows."""
    excess = found.sure - found.blind
    numbers = {
        "share": found.share, "share_stderr": found.share_stderr, "sure": found.sure, "blind": found.blind, "excess": excess,
        "stderr": found.stderr, "rows": found.rows,
    }  # fmt: skip
    words = (
        f"{found.model}, asked about rows that it had not seen, contradicts {percent(found.sure)} of the labels where it is surest"
        + (f", of which {percent(found.blind)} are its own blind spots" if found.blind > 0 else "")
        + f"; confident learning counts {percent(found.share)} ± {percent(found.share_stderr)} of the labels of train as wrong"
    )
    if excess - 2 * found.stderr <= NOISE:
        return Diagnosis(
            name="noisy labels", numbers=numbers, words=f"{words}: not more than {percent(NOISE)} beyond noise"
        )
    shown = [s["row"] for s in found.suspects[:5]]
    action = (
        f"read the {len(found.suspects)} rows named in the journal (first of them {', '.join(map(str, shown))} of {where}), mend their "
        f"{label!r}, and run again"
    )
    return Diagnosis(
        name="noisy labels", numbers={**numbers, "suspects": list(found.suspects)}, words=words, action=action
    )


def suspect(row: int, text: str, given: str, likely: str, probability: float) -> dict[str, Any]:
    """A row for the journal: its number in train, its text on one short line, its label and the likely one."""
    line = " ".join(text[: 4 * WIDTH].split())
    return {
        "row": row, "text": line if len(line) <= WIDTH else line[: WIDTH - 3] + "...", "given": given, "likely": likely,
        "probability": round(probability, 4),
    }  # fmt: skip


def leaks_of(report: Mapping[str, Any], near: Mapping[str, int] | None) -> Leaks:
    """From the data report as the journal has it."""
    first = [
        f"{p['split']} row {p['row']} ({p['note']}): {p['text']}"
        for finding in report.get("leakage", {}).values()
        for p in finding["first"]
    ]
    rows = {k: v["rows"] for k, v in report.get("splits", {}).items()}
    if "control" in rows:
        rows["validation"] = rows["control"] + rows["calibration"]
    return Leaks(
        rows=rows,
        exact={k: v["count"] for k, v in report.get("leakage", {}).items()},
        near=None if near is None else dict(near),
        first=tuple(first[:5]),
    )
