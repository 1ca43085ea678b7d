"""The model card: README.md of the bundle, with the front matter that model hubs read and a body for people.

Front matter follows the hub's model card metadata (library_name, pipeline_tag, base_model, metrics, model-index).
A licence is named only when one is known: the weights inherit what their data and base model ask for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from multistep.report.summary import measured
from multistep.report.words import duration, number, plus_minus, table

_TASKS = {
    "classify": "gives each text one label",
    "multilabel": "gives each text any number of labels",
    "regress": "gives each text a number",
    "lm": "goes on with a text",
    "translate": "translates",
    "summarize": "summarizes",
    "answer": "answers questions",
    "chat": "answers in a conversation",
}
_PIPELINES = {  # of the hub
    "lm": "text-generation", "translate": "translation", "summarize": "summarization", "answer": "question-answering",
    "chat": "text-generation",
}  # fmt: skip


def card(facts: Mapping[str, Any]) -> str:
    """The whole README.md.

    facts (all optional but `task`): name, task (kind), labels, base_model, license, language,
    dataset (file or hub name), rows ({"train": n, "test": n, ...}), warnings (of the data report),
    metrics ({name: {"value", "stderr"}} on test), per_class (list of {label, precision, recall, f1, support}),
    decisions (list of sentences), predictor (words), max_length (tokens), budget (words), wall_s, versions.
    """
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True, width=1000)
    sections = (
        ("", _intro(facts)),
        ("Scores", _scores(facts)),
        ("Data", _data(facts)),
        ("How it was made", _made(facts)),
        ("How to use it", _use(facts)),
        ("Limits", _limits(facts)),
    )
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections if text)
    return f"---\n{front}---\n\n{body}\n"


def with_section(text: str, title: str, body: str) -> str:
    """A card with a section at its end; one of the same title is replaced."""
    kept = re.sub(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL).rstrip()
    return f"{kept}\n\n## {title}\n\n{body.strip()}\n"


def _front_matter(facts: Mapping[str, Any]) -> dict[str, Any]:
    metrics = measured(facts.get("metrics"))
    front: dict[str, Any] = {"library_name": "multistep", "pipeline_tag": _pipeline(facts)}
    if facts.get("language"):
        front["language"] = facts["language"]
    if str(facts.get("license") or "unknown").lower() not in ("other", "unknown"):
        front["license"] = str(facts["license"])
    if _is_hub_name(facts.get("base_model")):
        front["base_model"] = facts["base_model"]
    if _is_hub_name(facts.get("dataset")):
        front["datasets"] = [facts["dataset"]]
    if metrics:
        front["metrics"] = list(metrics)
        front["model-index"] = [{"name": _name(facts), "results": [_result(facts, metrics)]}]
    return front


def _pipeline(facts: Mapping[str, Any]) -> str:
    return _PIPELINES.get(str(facts.get("task")), "text-classification")


def _result(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    dataset = _dataset(facts)
    return {
        "task": {"type": _pipeline(facts)},
        "dataset": {"type": dataset, "name": dataset, "split": "test"},
        "metrics": [
            {"type": name, "name": name, "value": _float(value), "args": {"stderr": _float(stderr)}}
            for name, (value, stderr) in metrics.items()
        ],
    }


def _intro(facts: Mapping[str, Any]) -> str:
    what = _TASKS.get(str(facts.get("task")), "predicts from text")
    text = f"# {_name(facts)}\n\nThis model {what}."
    if facts.get("base_model"):
        part = "It" if facts.get("task") in _PIPELINES else "Its encoder"
        text += f" {part} was trained further from `{_short(facts['base_model'])}`."
    labels = facts.get("labels") or ()
    if labels:
        shown = ", ".join(f"`{_inline(label)}`" for label in labels[:20])
        text += f" Labels ({len(labels)}): {shown}{' ...' if len(labels) > 20 else ''}."
    return text


def _scores(facts: Mapping[str, Any]) -> str:
    metrics = measured(facts.get("metrics"))
    if not metrics:
        return "No test data has been read."
    reads = int(facts.get("test_reads") or 1)
    read = (
        "read once, at the end" if reads == 1 else f"read {reads} times, as the run was given more, the last time here"
    )
    parts = [f"On the test data, {read}. The second number is the standard error."]
    parts.append(table(["metric", "test ± stderr"], [[k, plus_minus(v, e)] for k, (v, e) in metrics.items()]))
    classes = [c for c in facts.get("per_class") or () if isinstance(c, Mapping)]
    if classes:
        rows = [[str(c.get("label", "")), *(_fixed(c.get(k)) for k in ("precision", "recall", "f1")), c.get("support")]
                for c in classes]  # fmt: skip
        parts.append(table(["class", "precision", "recall", "f1", "rows"], rows))
    return "\n\n".join(parts)


def _data(facts: Mapping[str, Any]) -> str:
    rows = facts.get("rows") or {}
    lines = [f"- from: {_dataset(facts)}"] if facts.get("dataset") else []
    if rows:
        lines.append("- rows: " + ", ".join(f"{split} {number(count)}" for split, count in rows.items()))
    lines += [f"- warning: {_inline(warning)}" for warning in facts.get("warnings") or ()]
    return "\n".join(lines)


def _made(facts: Mapping[str, Any]) -> str:
    lines = []
    if facts.get("budget"):
        took = f", of which {duration(facts['wall_s'])} were used" if facts.get("wall_s") is not None else ""
        lines.append(f"By multistep within a budget of {facts['budget']}{took}. What was decided, in order:")
    lines.append("\n".join(f"- {_inline(sentence)}" for sentence in facts.get("decisions") or ()))
    if facts.get("predictor"):
        lines.append(f"It predicts with: {_inline(facts['predictor'])}.")
    if facts.get("versions"):
        lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".")
    return "\n\n".join(line for line in lines if line)


def _use(facts: Mapping[str, Any]) -> str:
    return (
        "```python\nimport multistep\n\nrun = multistep.load(\"path/to/this/folder\")\n"
        "for prediction in run.predict([\"a text\"]):\n    print(prediction.value, prediction.confidence)\n```\n\n"
        "```\nmultistep predict path/to/this/folder \"a text\"\nmultistep serve path/to/this/folder\n```"
    )  # fmt: skip


def _limits(facts: Mapping[str, Any]) -> str:
    lines = ["- The scores hold for texts like those of the test data; for others they say nothing."]
    if facts.get("max_length"):
        lines.append(f"- The encoder reads the first {facts['max_length']} tokens of a text.")
    if facts.get("task") in ("classify", "multilabel"):
        lines.append("- It knows only the labels above; a text that fits none of them still gets an answer.")
    if facts.get("task") in _PIPELINES:
        lines.append("- What it writes may be wrong and sound right; nobody has checked it but by the scores above.")
    if facts.get("writer") == "writer":
        lines.append("- No trained model stands behind it: none was better on held-out data than this cheap writer.")
    rare = [c for c in facts.get("per_class") or () if isinstance(c, Mapping) and (c.get("support") or 0) < 10]
    if rare:
        lines.append(f"- {len(rare)} of the classes have fewer than 10 test rows; their scores are hardly known.")
    return "\n".join(lines)


def _name(facts: Mapping[str, Any]) -> str:
    return str(facts.get("name") or "multistep model")


def _dataset(facts: Mapping[str, Any]) -> str:
    return _short(facts.get("dataset") or "a local file")


def _short(name: Any) -> str:
    """A hub name as it is, of a path only its last part: a card is published and must not show a person's folders."""
    return str(name) if _is_hub_name(name) else PurePath(str(name)).name or str(name)


def _is_hub_name(name: Any) -> bool:
    """'org/name', but not a file or folder of this machine such as 'data/reviews.csv'."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return False
    return not re.search(r"\.(csv|tsv|jsonl?|parquet|gz|txt|ya?ml)$", name) and not Path(name).exists()


def _inline(text: Any) -> str:
    return " ".join(str(text).split()).replace("`", "'")


def _float(value: Any) -> float | None:
    return None if value is None else round(float(value), 6)


def _fixed(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"
