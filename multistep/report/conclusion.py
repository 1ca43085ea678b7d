"""What came out of a run in one paragraph of plain words: for those who have to decide, and do not read tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from multistep.metrics.verdicts import lower_is_better
from multistep.report.summary import how_to_go_on
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
NEXT = "What to do next: "
_GRAVE = (  # diagnoses, the one first that makes the others idle
    "cannot be learnt", "divergence", "validation too small", "noisy labels", "budget too small", "underfitting", "too little data",
    "leaking splits", "overfitting", "plateau",
)  # fmt: skip
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
    if test and not run["test_is_older"] and metric in test["metrics"]:
        value, stderr = test["metrics"][metric]
        rows = test.get("rows")
        where = f"On {rows:,} test rows" if isinstance(rows, int) else "On the test rows"
        return [f"{where} that it had never seen, and that decided nothing, {_valued(metric, value, stderr)}."]
    if best and best["value"] is not None:
        said = f"On validation rows {_valued(metric, best['value'], best['stderr'])}."
        unread = "the test rows were last read before it was kept" if test else "no test rows were read"
        return [said, f"These rows also decided what was kept, so the score is a little too good; {unread}."]
    return ["Nothing has been measured yet."]


def _valued(metric: str, value: Any, stderr: Any) -> str:
    """The score, and how far chance may have moved it: which rows are in the sample."""
    sure = isinstance(stderr, int | float) and stderr > 0
    if metric in SHARES and isinstance(value, int | float) and value <= 1:
        low, high = (100 * min(1.0, max(0.0, value + s * _SURE * (stderr if sure else 0.0))) for s in (-1, 1))
        said, interval = f"{100 * value:.1f} % of its answers are right", f"{low:.1f} to {high:.1f} %"
    else:
        where = " (lower is better)" if lower_is_better(metric) else ""
        said = f"its {metric}{where} is {plus_minus(value, stderr).partition(' ± ')[0]}"
        interval = f"{number(value - _SURE * stderr, 3)} to {number(value + _SURE * stderr, 3)}" if sure else ""
    return f"{said} (95 % interval for the luck of the sample: {interval})" if sure else said


def scored(metric: str, value: Any, stderr: Any, where: str) -> tuple[str, str]:
    """A score as it is shown large, and what it is with its error."""
    if metric in SHARES and isinstance(value, int | float) and value <= 1:
        error = f" ± {100 * stderr:.1f} points" if isinstance(stderr, int | float) and stderr > 0 else ""
        return f"{100 * value:.1f} %", f"{metric} {where}{error}"
    shown, _, error = plus_minus(value, stderr).partition(" ± ")
    return shown, f"{metric} {where}{f' ± {error}' if error else ''}"


def _baseline(run: Mapping[str, Any]) -> list[str]:
    """The first model that could be served, beside the best that was trained: both on the half of validation that judges training."""
    taken = [t for t in run["trials"] if t["status"] == "committed" and t["value"] is not None]
    trained = [t for t in taken if not of_prediction(t)]
    if not trained:
        return []
    first, last = trained[0], trained[-1]
    old, new = (plus_minus(t["value"], t["stderr"]) for t in (first, last))
    when = f", which stood after {duration(first['at_s'])}," if first.get("at_s") is not None else ""
    said = f"The simplest model{when} has {run['metric']} {old} on validation; the best that was trained has {new} on the same rows."
    if first is last:
        said = f"The simplest model{when} has {run['metric']} {old} on validation, and no other that was tried beat it."
    if last["action"].get("which") == "mean" and first is not last:
        said += " It is the mean of several trainings, which is taken unless it is seen to be worse than one."
    kinds = [str(t["action"].get("what") or t["action"].get("kind")) for t in taken if of_prediction(t)]
    tuned = [kind for kind in kinds if kind != "refit"]
    more = [f"Then its answers were improved ({', '.join(tuned)})."] if tuned else []
    if "refit" in kinds:
        more.append(
            "At the end its linear model learnt from the validation rows too, which is not shown to be better, only not worse."
        )
    return [said, *more]


def of_prediction(trial: Mapping[str, Any]) -> bool:
    """Whether it changes how a model predicts, which other rows of validation judge than its training."""
    return trial["action"].get("kind") in ("predict", "decode", "mix", "recount", "refit")


def _took(run: Mapping[str, Any]) -> str:
    trials, wall = run["trials"], duration(run["spent"].get("wall_s"))
    decided = [t for t in trials if t["status"] in ("committed", "rolled back")]
    kept = sum(t["status"] == "committed" for t in decided)
    tried = f"{len(decided)} candidates were judged and {kept} kept; all but the first were tested against what stood"
    ends = {"finished": f"The run took {wall}", "interrupted": f"The run was interrupted after {wall}"}
    return (
        f"{ends.get(run['status'], f'The run has not ended; its journal ends after {wall}')}; {tried}."
        if decided
        else ""
    )


def next_step(run: Mapping[str, Any]) -> str:
    """What the gravest diagnosis at the end of the run says to do; where there is none, whether anything was looked for."""
    at_end = [d for d in run["diagnosed"] if d.get("at") == "end" and d.get("action")]
    if at_end:
        worst = min(at_end, key=lambda d: _GRAVE.index(d["name"]) if d.get("name") in _GRAVE else len(_GRAVE))
        more = f"; {len(at_end) - 1} more below" if len(at_end) > 1 else ""
        return f"{NEXT}{worst['action']} ({worst.get('name', '')}{more})."
    if run["status"] != "finished":
        return f"{NEXT}go on with it, by {how_to_go_on(run)}."
    return "Nothing was found that has to be mended." if run["not_found"] else ""


def short(name: str) -> str:
    """Of a path its last part."""
    return PurePath(name).name or name
