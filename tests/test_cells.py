"""Cells to records: what is asked in a conversation, texts that look like data, starts that are no numbers, choices by any name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_records import N, ask, every, talk, write

from multistep.data.records import Layout, load_language, read_records, read_sources
from multistep.types import UserError


def test_a_conversation_to_answer_keeps_what_the_user_says_last(tmp_path: Path) -> None:
    rows = [{"messages": [*ask(i), *talk(("user", f"v {i}"))]} for i in range(N)]
    path = write(tmp_path / "x.jsonl", rows)
    data = load_language(path, task="chat")
    assert {len(r.turns) for r in every(data)} == {len(r.turns) for r in read_records(path, data.layout)} == {2}
    found = read_sources(path, data.layout)
    assert [t.text for t in found[7].asked] == ["u 7", "a 7", "v 7"]
    assert (found[7].source, found[7].targets) == ("v 7", ())
    answered = read_sources(write(tmp_path / "y.jsonl", [{"messages": ask(3)}]), data.layout)[0]
    assert [t.text for t in answered.asked] == ["u 3"]
    for indent in (None, 1):  # one conversation is one row, not as many as it has messages
        (tmp_path / "one.json").write_text(json.dumps(rows[7], indent=indent))
        assert read_sources(tmp_path / "one.json", data.layout) == found[7:8]


@pytest.mark.parametrize(
    ("cell", "targets"),
    [
        ('{"name": "in"}', None), ("[12]", None), ("{}", None), ("{{1}}", None), ("[{[1]}]", None), ('["in", 1]', None),
        ('[{"name": "in"}]', None), ("{'in'}", None), ('{"text": 1}', None), ('["on", "in"]', ("on", "in")),
        ("{'text': ['on'], 'answer_start': [3]}", ("on",)), ('[{"text": "on", "answer_start": 3}]', ("on",)),
        ('{"text": "on"}', ("on",)), ("[]", ("",)), ('{"text": [], "answer_start": []}', ("",)),
    ],
)  # fmt: skip
def test_a_text_that_looks_like_data_is_an_answer_all_the_same(
    cell: str, targets: tuple[str, ...] | None, tmp_path: Path
) -> None:
    rows = [{"context": f"in on {cell} {i}", "question": f"q {i}", "answers": cell} for i in range(N)]
    data = load_language(write(tmp_path / "x.jsonl", rows), task="answer")
    assert {r.targets for r in every(data)} == {targets or (cell,)}
    assert (data.report.remarks != {}) is (targets == ("",))


def test_an_answer_that_is_no_answer_at_all_is_said(tmp_path: Path) -> None:
    rows = [{"context": f"in {i}", "question": "q", "answers": {"text": ["in"], "answer_start": [0]}} for i in range(N)]
    rows[6]["answers"] = {"name": "in"}  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"row 7: 'answers' holds {'name': 'in'}, not a text"):
        load_language(write(tmp_path / "x.jsonl", rows), task="answer")


@pytest.mark.parametrize("start", [float("nan"), float("inf"), -float("inf"), "nan", None])
def test_a_start_that_is_no_number_is_unknown(start: Any, tmp_path: Path) -> None:
    rows = [{"context": f"on in {i}", "question": f"q {i}", "answers": "in", "answer_start": start} for i in range(N)]
    rows[0]["answer_start"] = 3
    data = load_language(write(tmp_path / "x.jsonl", rows), task="answer")
    assert {(r.targets, r.starts) for r in every(data)} == {(("in",), (3,))} and not data.report.remarks


DIGITS, WORDS, LETTERS = ["1", "2", "3", "4"], ["w", "x", "y", "z"], ["B", "A", "D", "C"]
NAMED = [  # the choices of even and of odd rows, the answer of a row, what it is, the right place
    ("place", DIGITS, WORDS, lambda i: i % 4, lambda i: i % 4),
    ("place", DIGITS, WORDS, lambda i: str(i % 4), lambda i: i % 4),  # as CSV has it
    ("place", DIGITS, DIGITS, lambda i: i % 4, lambda i: i % 4),
    ("text", DIGITS, DIGITS, lambda i: str(i % 4 + 1), lambda i: i % 4),
    ("text", DIGITS, WORDS, lambda i: (WORDS if i % 2 else DIGITS)[i % 4], lambda i: i % 4),
    ("text", [3, 7, 12, 20], [20, 12, 7, 3], lambda i: [20, 12, 7, 3][i % 4], lambda i: i % 4 if i % 2 else 3 - i % 4),
    ("letter", LETTERS, WORDS, lambda i: "abcd"[i % 4], lambda i: i % 4),
    ("letter", {"text": DIGITS, "label": [2, 3, 4, 5]}, {"text": WORDS, "label": [2, 3, 4, 5]}, lambda i: i % 4 + 2, lambda i: i % 4),
    (None, DIGITS, DIGITS, lambda i: "4" if i % 2 else i % 4, lambda i: 3 if i % 2 else i % 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "even", "odd", "answer", "right"), NAMED, ids=[f"{n[0]}-{i}" for i, n in enumerate(NAMED)]
)
def test_what_names_the_right_choice_is_decided_for_the_column(
    how: str | None, even: Any, odd: Any, answer: Any, right: Any, tmp_path: Path
) -> None:
    choices = [odd if i % 2 else even for i in range(N)]
    rows = [{"question": f"q {i}", "choices": choices[i], "answer": answer(i)} for i in range(N)]
    data = load_language(path := write(tmp_path / "x.jsonl", rows), task="answer")
    assert data.layout.named_by == how and (f"by its {how}" in data.shape) is (how is not None)
    layout = Layout.parse(data.layout.model_dump(mode="json"))
    texts = [c["text"] if isinstance(c, dict) else c for c in choices]
    expected = [(str(texts[i][right(i)]),) for i in range(N)]
    assert [r.targets for r in read_records(path, layout)] == expected
    one = write(tmp_path / "one.jsonl", rows[1:2])  # what the column was, though a row alone could be something else
    assert read_records(one, layout)[0].targets == expected[1]
