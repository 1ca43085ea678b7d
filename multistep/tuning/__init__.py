"""Tuning how a finished run predicts, under a limit on latency: `multistep tune`, again at any time, for other data or limits.

labels.py      models that give labels or numbers: engines, blends, calibration, thresholds, costs, cascades, promises
language.py    models that write: greedy, beams, draws, votes, examples, engines
common.py      the journal RUN/tuning.jsonl, and what both read of a run
"""

from __future__ import annotations

from pathlib import Path

from multistep.budget import parse_budget
from multistep.bundle import Bundle, load_bundle
from multistep.controllers.choices import CHOOSERS
from multistep.files import working_in
from multistep.policy import Limit, Policy
from multistep.report.progress import Progress
from multistep.tuning.labels import tune_labels
from multistep.tuning.language import tune_language
from multistep.types import UserError, nearest


def tune_run(
    run_dir: str | Path, *, metric: str | None = None, latency: str | None = None, budget: str | float = "1m",
    data: str | None = None, costs: str | Path | None = None, coverage: float | None = None, controller: str = "staged",
    progress: Progress | None = None,
) -> Policy:  # fmt: skip
    """Find the best way to predict with what a run trained, and serve it from now on. The test split is not read.

    `latency`: "p95=20ms"; `data`: labelled rows to judge on in place of the run's own calibration half; `costs`: a JSON file
    {"right label": {"label said": cost}}; `coverage`: the probability with which the right label is to be among the candidates;
    `controller`: what searches, as of `fit`. Raises UserError on bad input, Interrupted after a signal: the journal is saved, the same
    call goes on.
    """
    out, limit, given = Path(run_dir), None if latency is None else Limit.read(latency), parse_budget(budget)
    if given.unit != "seconds":
        raise UserError(f"budget: {given} is no time. Tuning measures time: give one such as 2m.")
    if coverage is not None and not 0 < coverage < 1:
        raise UserError(f"coverage: {coverage:g} is no probability to promise. Give one such as 0.95.")
    if controller not in ("staged", *CHOOSERS):
        raise UserError(f"controller: {controller!r} is not known.{nearest(controller, ['staged', *CHOOSERS])}")
    with working_in(out), progress or Progress(quiet=True) as shown:
        bundle = load_bundle(out)
        if isinstance(bundle, Bundle):
            read = None if costs is None else Path(costs)
            return tune_labels(out, bundle, metric, limit, given, data, read, coverage, shown, controller)
        for name, value in (("costs", costs), ("coverage", coverage)):
            if value is not None:
                raise UserError(f"{name}: for one label of several; this model writes texts. Leave it out.")
        return tune_language(out, metric, limit, given, data, shown, controller)


__all__ = ["tune_run"]
