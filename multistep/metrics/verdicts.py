"""The rules that make a verdict of its evidence, and the same again from a verdict that was written down. No torch.

A verdict carries its rule as data (`by`), so that a journal alone says whether a decision follows: `derived` makes it again,
`unsound` says which number of a comparison does not fit the others.
Sources: as of judge.py; that the interval and the p-value of McNemar's test come from the two counts of rows that differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from multistep.metrics.known import METRICS
from multistep.metrics.power import FEWEST_ROWS, LARGE
from multistep.types import Admitted, Apart, Comparison, Finite, Gain, Looked, NotWorse, Slow, Verdict, Wanted

ALPHA = 0.1  # of a gain that is none, where nothing else is asked for
TIE = 0.25  # a loss on the metric that chance gives more often than this does not speak against a gain on the loss (LOG.md)
SAME = 0.01  # of the metric: a loss that is, with one standard error more, within this is no loss
CHEAPER = 0.9  # of the incumbent's mean latency: what counts as cheaper
TEXTS, POINTS = 0.98, 0.3  # of an engine's texts that are the same, at least; of 100 points that it may lose
_OF_100 = ("bleu", "chrf")  # all other metrics that are better when higher are in 0..1, or nearly
_OF_TOKENS = ("perplexity", "bits_per_byte")  # a text is not one answer there but many: few of them say enough
_LOWER = ("loss", "cost", "perplexity", "bits_per_byte")  # beside those metrics of labels that are better when lower
_CLOSE = 1e-9  # relative: the same number, computed again
_STEPS = 1000  # the p-values of both swap tests are whole numbers of thousandths

# ---------------------------------------------------------------------------------------------- p-values


def mcnemar_p(wins: int, losses: int) -> float:
    """Exact: of the rows where only one is right, at least this many won by the candidate, were each a coin toss."""
    from scipy.special import bdtrc

    return float(bdtrc(wins - 1, wins + losses, 0.5)) if wins else 1.0


def paired_t(gain: float, stderr: float, n: int) -> float:
    from scipy.special import stdtr

    if math.isnan(gain) or n < 2:
        return 1.0
    if stderr == 0:
        return 0.0 if gain > 0 else 1.0
    return float(stdtr(n - 1, -gain / stderr))


def lower_is_better(metric: str) -> bool:
    return metric in _LOWER or (metric in METRICS and not METRICS[metric].higher_is_better)


# ---------------------------------------------------------------------------------------------- rules


def better(evidence: Sequence[Comparison], alpha: float = ALPHA, least: float = 0.0) -> Verdict:
    """Accept what is better beyond noise on the first comparison; or does not look worse on it (`TIE`), and is better beyond noise on the
    second, if there is one, at half of alpha: the two of them together err no more often. All else stays with the incumbent, which is the
    cheaper.
    `least`: the gain that rows which are too few for less may decide on; 0: they are enough."""
    first, by, kept = evidence[0], Gain(alpha=alpha, least=least), tuple(evidence)
    said = f"{_said(first)}, p = {first.p:.2g}"
    if least:
        accept = first.difference >= least and first.difference > 0 and first.p <= alpha
        small = "worse" if first.difference < 0 else f"too few for less than {least:.2g}"
        rule = f"{said}, on {first.n} rows: {'better, and by much' if accept else small}"
        return Verdict(accept=accept, rule=rule, evidence=kept, by=by)
    if first.difference > 0 and first.p <= alpha:
        return Verdict(accept=True, rule=f"{said} <= {alpha:g}: better", evidence=kept, by=by)
    if len(evidence) > 1 and (first.difference >= 0 or mirrored(first).p > TIE):
        second = evidence[1]
        if second.difference > 0 and second.p <= alpha / 2:
            rule = f"{_said(first)}: not worse; {_said(second)}, p = {second.p:.2g} <= {alpha / 2:g}: better"
            return Verdict(accept=True, rule=rule, evidence=kept, by=by)
    if first.difference < 0:
        return Verdict(accept=False, rule=f"{_said(first)}: worse", evidence=kept, by=by)
    return Verdict(accept=False, rule=f"{said} > {alpha:g}: not better beyond noise", evidence=kept, by=by)


def not_worse(evidence: Sequence[Comparison], alpha: float = ALPHA) -> Verdict:
    """Accept unless a comparison finds it worse beyond noise. For what is expected to be better and too little so to be seen."""
    by, kept = NotWorse(alpha=alpha), tuple(evidence)
    said = "; ".join(_said(c) for c in evidence)
    p = min((mirrored(c).p for c in evidence if c.difference < 0), default=1.0)
    accept = p > alpha
    rule = f"{said}; harm: p = {p:.2g} {'>' if accept else '<='} {alpha:g}: {'not worse' if accept else 'worse'}"
    return Verdict(accept=accept, rule=rule, evidence=kept, by=by)


def large_gain(c: Comparison) -> float:
    """The least gain on which so few rows decide; 0 where they are enough."""
    return 0.0 if c.n >= FEWEST_ROWS else large(c.metric, c.incumbent)


def large(metric: str, incumbent: float) -> float:
    """`LARGE` on the metric's scale, or of what a loss was; 0 for what is read off the losses of single tokens."""
    if metric in _OF_TOKENS:
        return 0.0
    return LARGE * (100.0 if metric in _OF_100 else abs(incumbent) if lower_is_better(metric) else 1.0)


def mirrored(c: Comparison) -> Comparison:
    """The same from the other side: the incumbent against the candidate. What came out is in both tails of a count, so that its p is more
    than 1 - p. Swapped pairs of a journal that has only one of their tails say nothing from the other side."""
    match c.test:
        case "t":
            p = paired_t(-c.difference, c.stderr, c.n)
        case "mcnemar" if c.wins is not None and c.losses is not None:
            p = mcnemar_p(c.losses, c.wins)
        case "swap":
            p = 1.0 if c.p_worse is None else c.p_worse
        case _:
            p = 1 - c.p
    return c.with_(
        candidate=c.incumbent, incumbent=c.candidate, difference=-c.difference, p=p, wins=c.losses, losses=c.wins,
        p_worse=c.p if c.test == "swap" else None,
    )  # fmt: skip


def finite(by: Finite) -> Verdict:
    """What is not finite loses to anything that is."""
    if not by.candidate:
        return Verdict(accept=False, rule=f"the candidate's {by.what} are not finite: refused", by=by)
    return Verdict(accept=True, rule=f"the incumbent's {by.what} are not finite, the candidate's are: better", by=by)


def admitted(quality: Verdict, evidence: Sequence[Comparison], by: Admitted) -> Verdict:
    """Whether a way to predict takes the place of what stands: it has to keep the limit, and be better, or the same and cheaper.
    `evidence`: on the metric, with what stands, and perhaps with the best that has stood, so that small losses do not add up."""
    kept = tuple(evidence)
    if by.at_ms is not None and by.limit_ms is not None:
        if by.at_ms[0] > by.limit_ms:
            rule = f"{by.statistic} {by.at_ms[0]:.3g} ms > {by.limit_ms:g} ms: too slow"
            return Verdict(accept=False, rule=rule, evidence=kept, by=by)
        if by.at_ms[1] > by.limit_ms:
            rule = f"{quality.rule}; but it keeps the limit, what stood does not"
            return Verdict(accept=True, rule=rule, evidence=kept, by=by)
    share = by.mean_ms[0] / by.mean_ms[1]
    if quality.accept and (share <= CHEAPER or not by.saves):
        return Verdict(accept=True, rule=quality.rule, evidence=quality.evidence, by=by)

    def error(c: Comparison) -> float:
        return math.hypot(c.stderr, by.made_up / max(1, c.n))

    compared, worst = kept[0], min(kept, key=lambda c: c.difference - error(c) + SAME * abs(c.incumbent))
    floor, margin = worst.difference - error(worst), SAME * abs(worst.incumbent)
    more = " with one row made up" if by.made_up else ""
    said = f"{compared.metric} {compared.difference:+.4f} ± {error(compared):.4f}{more}, {share:.2f} of the time"
    if share <= CHEAPER and floor >= -margin:
        rule = f"{said}: the same within {margin:.4f}, and cheaper"
        return Verdict(accept=True, rule=rule, evidence=kept, by=by)
    if share > CHEAPER:
        rule = f"{quality.rule}; {share:.2f} of the time: not cheaper"
        return Verdict(accept=False, rule=rule, evidence=kept, by=by)
    than = "" if worst is compared else f" as the best that stood ({worst.difference:+.4f} ± {error(worst):.4f})"
    rule = f"{said}: not the same within {margin:.4f}{than}"
    return Verdict(accept=False, rule=rule, evidence=kept, by=by)


def slow(by: Slow) -> Verdict:
    """Refused before anything else is measured, where it is slower than the limit allows."""
    too = by.ms > by.times * by.limit_ms
    rule = f"{by.statistic} {by.ms:.3g} ms > {by.limit_ms:g} ms, over {by.n} requests: too slow"
    if by.times != 1.0:
        rule = (
            f"the {by.statistic} of the first {by.n} requests took {by.ms:.3g} ms, more than "
            f"{by.times:g} x {by.limit_ms:g} ms"
        )
    return Verdict(accept=not too, rule=rule, by=by)


def looked(by: Looked) -> Verdict:
    """A part of the rows decides nothing."""
    return Verdict(accept=False, rule=f"a look at {by.at} of {by.of} rows: nothing is taken by it", by=by)


def agrees(same: float, points: float | None) -> bool:
    """Whether another engine may write in place of our own: nearly all texts the same, or the metric loses nearly nothing."""
    return same >= TEXTS if points is None else same == 1.0 or points >= -POINTS


# ---------------------------------------------------------------------------------------------- from the journal


def derived(verdict: Verdict) -> Verdict | None:
    """The verdict that its rule makes of its evidence; None where it does not say by which rule it was made, or has no evidence left."""
    evidence = verdict.evidence
    match verdict.by:
        case Gain() as by if evidence:
            return better(evidence, by.alpha, by.least)
        case NotWorse() as by if evidence:
            return not_worse(evidence, by.alpha)
        case Finite() as by:
            return finite(by)
        case Admitted() as by if evidence and by.quality is not None:
            quality = derived(Verdict(accept=False, rule="", evidence=by.gain, by=by.quality))
            return None if quality is None else admitted(quality, evidence, by)
        case Slow() as by:
            return slow(by)
        case Apart() as by:
            return Verdict(accept=agrees(by.same, by.points), rule=by.words, by=by)
        case Looked() as by:
            return looked(by)
        case Wanted() as by:
            return Verdict(accept=True, rule=by.words, by=by)
    return None


def comparisons(verdict: Verdict) -> tuple[Comparison, ...]:
    """All that were read, each once."""
    more = verdict.by.gain if isinstance(verdict.by, Admitted) else ()
    return tuple(dict.fromkeys((*verdict.evidence, *more)))


def follows(verdict: Verdict) -> bool:
    """Whether the decision and its words are what the rule makes of the evidence, and every comparison is sound."""
    again = derived(verdict)
    same = again is not None and (again.accept, again.rule) == (verdict.accept, verdict.rule)
    return same and not problems(verdict)


def problems(verdict: Verdict) -> list[str]:
    """What of the evidence does not follow from the rest of it, in words."""
    read = comparisons(verdict)
    found = [problem for c in read if (problem := unsound(c))]
    by, first = verdict.by, read[:1]
    if isinstance(by, Admitted):
        by, first = by.quality, by.gain[:1]
    if isinstance(by, Gain) and first and by.least != large_gain(first[0]):
        found.append(
            f"a gain of {by.least:g} was asked for on {first[0].n} rows, it has to be {large_gain(first[0]):g}"
        )
    if len({c.n for c in read}) > 1:
        found.append(f"comparisons over the same rows have {' and '.join(str(c.n) for c in read)} of them")
    return found


def unsound(c: Comparison) -> str:
    """What of a comparison does not follow from the rest of it, in words; "" where all does. Swapped pairs cannot be swapped again
    without the rows: of them only the steps of p are known, and what both sides of it have in common."""
    apart = c.incumbent - c.candidate if lower_is_better(c.metric) else c.candidate - c.incumbent
    scale = max(1.0, abs(c.candidate), abs(c.incumbent))
    if math.isfinite(apart) and not abs(apart - c.difference) <= 1e-6 * scale:
        return f"{c.metric} {c.incumbent:.6g} and {c.candidate:.6g} are {apart:+.6g} apart, not {c.difference:+.6g}"
    match c.test:
        case "t":
            return _differs(c, paired_t(c.difference, c.stderr, c.n), f"a paired t of {c.n} rows")
        case "mcnemar":
            return _counted(c)
        case "swap":
            return _swapped(c)
    return ""


def _swapped(c: Comparison) -> str:
    """Both tails are counts, and have the draw that came out in common."""
    for p in (c.p,) if c.p_worse is None else (c.p, c.p_worse):
        steps = _STEPS * p
        if not (0.5 < steps < _STEPS + 0.5 and abs(steps - round(steps)) < 1e-6):
            return f"p = {p:.6g} is no count of swaps"
    if c.p_worse is not None and c.p + c.p_worse < 1 + 0.5 / _STEPS:
        return f"p = {c.p:.6g} and {c.p_worse:.6g} from the other side leave swaps out"
    return ""


def _counted(c: Comparison) -> str:
    """McNemar: difference, error and p, all from the counts."""
    if c.wins is None or c.losses is None:
        return "the counts of McNemar's test are missing"
    differ, mean = c.wins + c.losses, (c.wins - c.losses) / c.n
    if not (c.wins >= 0 <= c.losses and differ <= c.n) or abs(mean - c.difference) > 1e-6:
        return f"{c.wins} rows won and {c.losses} lost of {c.n} are {mean:+.6g}, not {c.difference:+.6g}"
    if c.n > 1:
        stderr = math.sqrt(max(0.0, differ - c.n * mean * mean) / (c.n - 1) / c.n)
        if abs(stderr - c.stderr) > 1e-6:
            return f"{c.wins} rows won and {c.losses} lost have the error {stderr:.6g}, not {c.stderr:.6g}"
    return _differs(c, mcnemar_p(c.wins, c.losses), f"{c.wins} rows won and {c.losses} lost")


def _differs(c: Comparison, p: float, by: str) -> str:
    same = math.isclose(p, c.p, rel_tol=_CLOSE, abs_tol=1e-300)
    return "" if same else f"{by} gives p = {p:.6g}, not {c.p:.6g}"


def _said(c: Comparison) -> str:
    """'accuracy +0.0120 ± 0.0040'; for errors and losses the sign says gain, so the word does too."""
    word = " gain" if lower_is_better(c.metric) else ""
    return f"{c.metric}{word} {c.difference:+.4f} ± {c.stderr:.4f}"
