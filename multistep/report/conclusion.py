"""What came out of a run in one paragraph of plain words: for those who have to decide, and do not read tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from multistep.metrics.verdicts import lower_is_better
from multistep.report.words import duration, number, plus_minus

TASKS: Mapping[str, str] = {
    "classify": "to give each text one label",
    "multilabel": "to give each text any number of labels",
    "regress": "to give each text a number",
    "lm": "to go on with a text",
    "translate": "to translate",
    "summarize": "to summarize",
    "answer": "to answer questions",
    "chat": "to answer in a conversation",
}
SHARES = ("accuracy", "exact_match", "choice_accuracy", "numbers")  # metrics that are a share of right answers
_SURE = 1.96  # standard errors to each side: 95 of 100 times


def conclusion(run: Mapping[str, Any]) -> list[str]:
    """Sentences, from a `summary`: the task, the score and how sure it is, against the simplest model, what it took, what to do next."""
    said = [_task(run), *_score(run), *_baseline(run), _took(run), next_step(run)]
    return [sentence for sentence in said if sentence]


def _task(run: Mapping[str, Any]) -> str:
    config, report = run["config"], run["data"]
    task = report.get("task") or config.get("task")
    learnt = TASKS.get(str(task))
    if learnt is None:
        what = config.get("model")
        learnt = f"with the module {what}" if what else ""
    train = _rows(report).get("train")
    labels = _labels(report)
    words = f"It learnt {learnt}" if learnt else "It was trained"
    words += f" of {labels}" if labels and task == "classify" else ""
    words += f", from {train:,} rows" if train else ""
    source = config.get("data")
    return f"{words}{f' of {short(source)}' if isinstance(source, str) else ''}."


def _rows(report: Mapping[str, Any]) -> dict[str, int]:
    """By split, whatever kind of report it is."""
    splits = report.get("splits")
    if isinstance(splits, Mapping):
        return {k: v["rows"] for k, v in splits.items() if isinstance(v, Mapping) and isinstance(v.get("rows"), int)}
    rows = report.get("rows")
    return {k: v for k, v in rows.items() if isinstance(v, int)} if isinstance(rows, Mapping) else {}


def _labels(report: Mapping[str, Any]) -> int:
    splits = report.get("splits")
    train = splits.get("train") if isinstance(splits, Mapping) else None
    classes = train.get("classes") if isinstance(train, Mapping) else None
    return len(classes) if isinstance(classes, Mapping) else 0


def _score(run: Mapping[str, Any]) -> list[str]:
    metric, test, best = run["metric"], run["test"], run["best"]
    if test and metric in test["metrics"]:
        value, stderr = test["metrics"][metric]
        rows = test.get("rows")
        where = f"On {rows:,} test rows" if isinstance(rows, int) else "On the test rows"
        return [f"{where} that it had never seen, and that decided nothing, {_valued(metric, value, stderr)}."]
    if best and best["value"] is not None:
        said = f"On validation rows {_valued(metric, best['value'], best['stderr'])}."
        return [
            said,
            "These rows also decided what was kept, so the score is a little too good; no test rows were read.",
        ]
    return ["Nothing has been measured yet."]


def _valued(metric: str, value: Any, stderr: Any) -> str:
    """The score, and between which values it would come out on 95 of 100 such sets of rows."""
    sure = isinstance(stderr, int | float) and stderr > 0
    if metric in SHARES and isinstance(value, int | float) and value <= 1:
        words = f"{100 * value:.1f} % of its answers are right"
        if not sure:
            return words
        low, high = (100 * min(1.0, max(0.0, value + s * _SURE * stderr)) for s in (-1, 1))
        return f"{words}; on 95 of 100 other samples of rows like these it would be between {low:.1f} and {high:.1f} %"
    words = f"its {metric} is {plus_minus(value, stderr)}{', where lower is better' if lower_is_better(metric) else ''}"
    if not sure:
        return words
    low, high = (value + s * _SURE * stderr for s in (-1, 1))
    return f"{words}; on 95 of 100 other samples of rows like these it would be between {number(low, 3)} and {number(high, 3)}"


def _baseline(run: Mapping[str, Any]) -> list[str]:
    """The first model that could be served, beside what stands: both on validation rows."""
    taken = [t for t in run["trials"] if t["status"] == "committed" and t["value"] is not None]
    if len(taken) < 2:
        return ["Nothing that was tried beat the first, simplest model, so that one stands."] if taken else []
    first, last = taken[0], taken[-1]
    old, new = (plus_minus(t["value"], t["stderr"]) for t in (first, last))
    after = duration(first["at_s"]) if first.get("at_s") is not None else ""
    when = f", which stood after {after}," if after else ""
    return [f"The simplest model{when} has {run['metric']} {old} on validation; what stands now has {new}."]


def _took(run: Mapping[str, Any]) -> str:
    trials, wall = run["trials"], duration(run["spent"].get("wall_s"))
    decided = [t for t in trials if t["status"] in ("committed", "rolled back")]
    kept = sum(t["status"] == "committed" for t in decided)
    tried = f"{len(decided)} candidates were judged and {kept} kept, each by a test against what stood before"
    ends = {"finished": f"The run took {wall}", "interrupted": f"The run was interrupted after {wall}"}
    return (
        f"{ends.get(run['status'], f'The run has not ended; its journal ends after {wall}')}; {tried}."
        if decided
        else ""
    )


def next_step(run: Mapping[str, Any]) -> str:
    """What the last diagnosis says to do; where there is none, whether anything is left to do."""
    actions = [d["action"] for d in run["diagnosed"] if d.get("action")]
    if actions:
        return f"What to do next: {actions[-1]}"
    if run["status"] == "finished":
        return "Nothing was diagnosed that has to be mended."
    return "What to do next: go on with it, by multistep resume."


def short(name: str) -> str:
    """Of a path its last part."""
    return PurePath(name).name or name


def counted(words: Sequence[str], most: int) -> str:
    """The first few, and how many there are."""
    return ", ".join(words[:most]) + (f" ... ({len(words)} in all)" if len(words) > most else "")
