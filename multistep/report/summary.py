"""The journal of a run as one plain dictionary: what `--json` prints and what `explain` puts into words.

Reads whatever is there: the journal of a run that was killed or still goes on has trials without outcome and no end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_KEYS_FIRST = ("model", "trains", "lr", "optimizer", "schedule", "updates", "l2", "temperature", "weights", "features")


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was asked, on what data and machine, what was tried and decided, what it cost, what the test said."""
    started = _last(records, "Started")
    config = _mapping(started.get("config"))
    trials = _trials(records)
    metric = started.get("metric") or config.get("metric") or _metric_of(trials)
    for trial in trials:
        trial["value"], trial["stderr"] = trial["metrics"].get(metric, (None, None))
    tests = _all(records, "TestRead")
    finished = _last(records, "Finished")
    clock = _mapping(records[-1].get("clock")) if records else {}
    wall_s = clock.get("wall_s", finished.get("wall_s"))  # a finished run may have gone on with more
    return {
        "status": _status(records),
        "config": dict(config),
        "metric": metric,
        "budget": _budget(records),
        "spent": {**clock, "wall_s": wall_s},
        "machine": dict(_mapping(started.get("machine"))),
        "versions": dict(_mapping(started.get("versions"))),
        "data": dict(_mapping(_last(records, "Data").get("report"))),
        "trials": trials,
        "best": _best(trials),
        "stages": _stages(trials),
        "chosen": [
            r for r in _all(records, "Noted") if r.get("what") in ("optimizer", "input", "size", "cut", "looks")
        ],
        "skipped": _all(records, "Skipped"),
        "reserved": _all(records, "Reserved"),
        "diagnosed": _diagnosed(records),
        "not_found": _not_found(records),
        "events": _all(records, "Event"),
        "interruptions": _all(records, "Interrupted"),
        "resumptions": _all(records, "Resumed"),
        "test": {**tests[-1], "metrics": measured(tests[-1].get("metrics"))} if tests else None,
        "test_reads": len(tests),
        "test_is_older": _test_is_older(records),
        "decided_after_test": _decided_after_test(records),
        "finished": finished,
    }


def _test_is_older(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether something was committed after the test was read last: its scores are of what stood before."""
    kinds = [r.get("kind") for r in records]
    last = max((n for n, kind in enumerate(kinds) if kind == "TestRead"), default=len(kinds))
    return "Committed" in kinds[last:]


def how_to_go_on(run: Mapping[str, Any]) -> str:
    """With a run that was stopped: one of `optimize` needs its module and its data again."""
    return "optimize with the same out=" if "problem" in run["config"] else "multistep resume"


def _status(records: Sequence[Mapping[str, Any]]) -> str:
    kinds = [r.get("kind") for r in records]
    ends = [k for k in kinds if k in ("Finished", "Interrupted", "Resumed")]
    if not ends or ends[-1] == "Resumed":
        return "unfinished"
    return "finished" if ends[-1] == "Finished" else "interrupted"


def _diagnosed(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was named on the way, and of what was named at an end the newest."""
    found, newest = _all(records, "Diagnosed"), _last_diagnosis(records)
    return [d for d in found if d.get("at") != "end" or d.get("trial") == newest]


def _not_found(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the last diagnosis looked for in vain, by name."""
    newest = _last_diagnosis(records)
    notes = [r for r in _all(records, "Noted") if r.get("what") == "not found" and r.get("trial") == newest]
    return dict(_mapping(notes[-1].get("facts"))) if notes else {}


def _last_diagnosis(records: Sequence[Mapping[str, Any]]) -> str:
    trials = [_mapping(r.get("trial")) for r in records if r.get("kind") == "Asked"]
    return next((_id(t) for t in reversed(trials) if _mapping(t.get("action")).get("kind") == "diagnose"), "")


def _decided_after_test(records: Sequence[Mapping[str, Any]]) -> int:
    """How many decisions came after the test data was read: none in an honest run."""
    kinds = [r.get("kind") for r in records]
    after = kinds[kinds.index("TestRead") :] if "TestRead" in kinds else []
    return sum(kind in ("Committed", "RolledBack") for kind in after)


def _budget(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The newest budget: a resumed run may have been given more."""
    budget: Any = None
    for record in records:
        if record.get("kind") in ("Started", "Resumed") and record.get("budget") is not None:
            budget = record["budget"]
    if isinstance(budget, Mapping):
        return dict(budget)
    return {} if budget is None else {"text": str(budget)}


def _trials(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One dictionary a trial, in the order they were asked for."""
    trials: dict[str, dict[str, Any]] = {}
    for record in records:
        kind = record.get("kind")
        if kind == "Asked":
            asked = _mapping(record.get("trial"))
            trials[_id(asked)] = _new_trial(asked)
            trials[_id(asked)]["records"].append(record.get("n"))
            continue
        if "trial" not in record:
            continue
        trial = trials.setdefault(
            _id(record["trial"]), _new_trial(_mapping(record["trial"]) or {"id": record["trial"]})
        )
        if kind in ("Told", "Committed", "RolledBack"):
            trial["records"].append(record.get("n"))
        if kind == "Measured":
            trial["updates"] = record.get("update", trial["updates"])
            if trial["first_loss"] is None:
                trial["first_loss"] = record.get("loss_nats")
            trial["last_loss"] = record.get("loss_nats")
        elif kind == "Told":
            _take_outcome(trial, _mapping(record.get("outcome")))
            trial["at_s"] = _mapping(record.get("clock")).get("wall_s")
        elif kind in ("Committed", "RolledBack"):
            trial["status"] = "committed" if kind == "Committed" else "rolled back"
            trial["state"] = record.get("state")
            trial["rule"] = record.get("rule") or trial["rule"]
            trial["evidence"] = record.get("evidence") or trial["evidence"]
    return list(trials.values())


def _new_trial(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": _id(asked), "stage": str(asked.get("stage", "")), "start": asked.get("start"),
        "what": describe(_mapping(asked.get("action"))), "action": dict(_mapping(asked.get("action"))),
        "why": str(asked.get("why") or ""), "share": asked.get("share"), "status": "unfinished", "state": None,
        "rule": "", "evidence": [], "metrics": {}, "failure": "", "cost": {}, "facts": {},
        "updates": None, "first_loss": None, "last_loss": None, "records": [], "at_s": None,
        "commit": asked.get("commit", True),
    }  # fmt: skip


def _take_outcome(trial: dict[str, Any], outcome: Mapping[str, Any]) -> None:
    verdict = _mapping(outcome.get("verdict"))
    failed = outcome.get("ok") is False
    trial["status"] = "failed" if failed else "measured"
    if "accept" in verdict and not failed:
        trial["status"] = "accepted" if verdict["accept"] else "rejected"
    trial["rule"] = verdict.get("rule", "")
    trial["evidence"] = list(verdict.get("evidence") or [])
    trial["failure"] = outcome.get("failure") or ""
    trial["metrics"] = measured(outcome.get("metrics"))
    trial["cost"] = dict(_mapping(outcome.get("cost")))
    trial["facts"] = dict(_mapping(outcome.get("facts")))


def _best(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The last trial that was committed: what is served."""
    committed = [t for t in trials if t["status"] == "committed"]
    if not committed:
        return None
    return {key: committed[-1][key] for key in ("id", "stage", "what", "value", "stderr", "metrics", "state")}


def _stages(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    stages: dict[str, dict[str, Any]] = {}
    for trial in trials:
        row = stages.setdefault(trial["stage"], {"stage": trial["stage"], "trials": 0, "committed": 0, "wall_s": 0.0})
        row["trials"] += 1
        row["committed"] += trial["status"] == "committed"
        row["wall_s"] += trial["cost"].get("wall_s") or 0.0
    return list(stages.values())


def _metric_of(trials: Sequence[Mapping[str, Any]]) -> str:
    """The metric that decided, when the configuration names none."""
    for trial in trials:
        for comparison in trial["evidence"]:
            return str(_mapping(comparison).get("metric", ""))
    return next((name for trial in trials for name in trial["metrics"]), "")


def measured(metrics: Any) -> dict[str, Any]:
    """{'accuracy': (0.93, 0.004)}; the journal holds pairs, or dictionaries with 'value' and 'stderr'."""
    pairs: dict[str, Any] = {}
    for name, value in _mapping(metrics).items():
        if isinstance(value, Mapping):
            pairs[name] = (value.get("value"), value.get("stderr"))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            pairs[name] = (value[0] if value else None, value[1] if len(value) > 1 else None)
        else:
            pairs[name] = (value, None)
    return pairs


def describe(action: Mapping[str, Any]) -> str:
    """'train model=encoder lr=0.0002 optimizer=adamw ...': the kind, then the fields that tell most."""
    leaves = _leaves({k: v for k, v in action.items() if k != "kind"})
    order = {key: place for place, key in enumerate(_KEYS_FIRST)}
    leaves.sort(key=lambda leaf: order.get(leaf[0], len(order)))
    words = [str(action.get("kind", "")), *(f"{key}={value}" for key, value in leaves)]
    return " ".join(w for w in words if w)


def _leaves(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            if "kind" in value:
                found.append((key, str(value["kind"])))
            found += _leaves({k: v for k, v in value.items() if k != "kind"})
        elif isinstance(value, list | tuple):
            if not value:
                continue
            short = len(value) <= 4 and not any(isinstance(v, Mapping | list) for v in value)
            found.append((key, ",".join(_plain(v) for v in value) if short else f"[{len(value)}]"))
        elif value not in (None, "", False):
            found.append((key, _plain(value)))
    return found


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _last(records: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """The newest record of a kind that is written once a process; {} when there is none."""
    return (_all(records, kind) or [{}])[-1]


def _all(records: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The fields of all records of a kind, without the record's own number and kind."""
    return [{k: v for k, v in r.items() if k not in ("n", "kind")} for r in records if r.get("kind") == kind]


def _id(trial: Any) -> str:
    return str(trial.get("id", "")) if isinstance(trial, Mapping) else str(trial)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
