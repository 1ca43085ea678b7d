"""Language data: every shape is recognised and said, splits and text are kept, bad input is one line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from multistep.data import tables
from multistep.data.records import LanguageData, LanguageReport, Turn, load_language, read_records, read_sources
from multistep.types import UserError

N = 40


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def every(data: LanguageData) -> list[Any]:
    return [*data.train, *data.control, *data.calibration, *data.test]


def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def ask(i: int) -> list[dict[str, str]]:
    return talk(("user", f"u {i}"), ("assistant", f"a {i}"))


def lettered(i: int) -> dict[str, list[str]]:
    return {"text": ["x", f"y {i}"], "label": ["A", "B"]}


class Shape(NamedTuple):
    task: str
    row: Any  # number -> row
    says: str
    source: str  # of row 7
    target: str


SHAPES = [
    Shape("translate", lambda i: {"source": f"cat {i}", "target": f"Katze {i}"}, "source/target", "cat 7", "Katze 7"),
    Shape("translate", lambda i: {"id": i, "de": f"Katze {i}", "zh-CN": f"猫{i}"}, "'de' to 'zh-CN'", "Katze 7", "猫7"),
    Shape("translate", lambda i: {"this": f"cat {i}", "that": f"Katze {i}"}, "a guess", "cat 7", "Katze 7"),
    Shape("summarize", lambda i: {"highlights": f"h {i}", "article": f"a long {i}"}, "document/summary", "a long 7", "h 7"),
    Shape("summarize", lambda i: {"source": ["One.", f"Two {i}."], "target": [f"t {i}", "u"]}, "document/summary", "One. Two 7.", "t 7"),
    Shape("answer", lambda i: {"question": f"what {i}", "answer": f"it {i}"}, "question/answer", "what 7", "it 7"),
    Shape("answer", lambda i: {"question": f"q {i}", "choices": ["x", f"y {i}"], "answer": 1}, "choices", "q 7", "y 7"),
    Shape("answer", lambda i: {"question": f"q {i}", "choices": lettered(i), "answerKey": "B"}, "choices", "q 7", "y 7"),
    Shape("answer", lambda i: {"question": f"q {i}", "A": f"x {i}", "B": "y", "answer": "a"}, "choices", "q 7", "x 7"),
    Shape("chat", lambda i: {"instruction": f"add {i}", "input": "1", "output": f"{i}"}, "instruction/input/output", "add 7\n\n1", "7"),
    Shape("chat", lambda i: {"prompt": f"say {i}", "completion": f"so {i}"}, "prompt/completion", "say 7", "so 7"),
    Shape("chat", lambda i: {"question": f"q {i}", "answer": f"a {i}"}, "prompt/completion", "q 7", "a 7"),
    Shape("chat", lambda i: {"messages": ask(i)}, "messages", "u 7", "a 7"),
    Shape("chat", lambda i: {"conversations": [{"from": "human", "value": f"u {i}"}, {"from": "gpt", "value": "a"}]}, "messages", "u 7", "a"),
    Shape("chat", lambda i: {"messages": json.dumps(ask(i))}, "messages", "u 7", "a 7"),
    Shape("lm", lambda i: {"text": f"a text of number {i} and of more than a few words"}, "plain text", "", ""),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=[f"{s.task}-{i}" for i, s in enumerate(SHAPES)])
def test_shapes(shape: Shape, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [shape.row(i) for i in range(120)])
    data = load_language(path, task=shape.task)
    assert shape.says in data.shape and (data.kind, data.splits_given) == (shape.task, ())
    if shape.task == "lm":
        assert all(r.source == "" and len(r.targets) == 1 for r in every(data))
        return
    assert len(every(data)) == 120
    found = next(r for r in every(data) if r.source == shape.source)
    assert found.targets[0] == shape.target
    assert LanguageReport.model_validate_json(data.report.model_dump_json()) == data.report
    asked = read_sources(path, data.layout)
    assert [r.source for r in asked][7] == shape.source
    assert read_records(path, data.layout)[7] == found
    assert load_language(path, task=shape.task).fingerprint == data.fingerprint


def test_chat_keeps_the_conversation_and_ends_with_the_assistant(tmp_path: Path) -> None:
    spoken = [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "How?"),
        ("assistant", "So."),
        ("user", "Bye"),
    ]
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": r, "content": f"{c} {i}"} for r, c in spoken]} for i in range(N)
    ]
    rows += [{"messages": [{"role": "user", "content": "alone"}]}, {"messages": [{"role": "tool", "content": "x"}]}]
    data = load_language(write(tmp_path / "x.jsonl", rows), task="chat")
    record = data.train[0]
    assert [t.role for t in record.turns] == [r for r, _ in spoken[:5]]
    assert record.targets == (record.turns[-1].text,) and record.source == record.asked[-1].text
    said = "\n".join(data.report.lines())
    assert "40 rows: conversations went on" in said
    assert "1 rows: conversations without an assistant turn" in said and "row 41" in said
    assert "1 rows: conversations with a role other" in said
    assert len(every(data)) == N
    assert read_sources("Hi there", data.layout)[0].turns == (Turn("user", "Hi there"),)


def squad(questions: int, paragraphs: int = 30) -> dict[str, Any]:
    def qas(p: int) -> list[dict[str, Any]]:
        return [
            {"id": f"{p}-{q}", "question": f"where is {p} {q}?", "answers": [{"text": f"town {p}", "answer_start": 9}]}
            for q in range(questions)
        ]

    articles = [
        {"title": "t", "paragraphs": [{"context": f"It is in town {p}, they say.", "qas": qas(p)}]}
        for p in range(paragraphs)
    ]
    return {"version": "1.1", "data": articles}


@pytest.mark.parametrize("indent", [None, 1])
def test_squad_json_and_passages_stay_together(indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(squad(4), indent=indent))
    data = load_language(tmp_path / "x.json", task="answer")
    assert all(r.context[s : s + len(t)] == t for r in every(data) for t, s in zip(r.targets, r.starts, strict=True))
    assert len(every(data)) == 120 and not data.report.leakage and not data.report.passages
    sides = [{r.context for r in side} for side in (data.train, data.control, data.calibration, data.test)]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 30
    with pytest.raises(UserError, match="columns question, context"):
        read_sources("where is it?", data.layout)


def test_squad_folder_of_versions(tmp_path: Path) -> None:
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / name).write_text(json.dumps(squad(2)))
    with pytest.raises(UserError, match="0 are not in train"):  # the same questions
        load_language(tmp_path, task="answer")
    other = json.loads(json.dumps(squad(2)).replace("where", "say where"))
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(other))
    data = load_language(tmp_path, task="answer")
    assert data.splits_given == ("train", "validation")
    assert data.report.passages["train-validation"] > 0  # the passages are the same, and that is said


def test_answers_are_found_moved_or_spokento_be_missing(tmp_path: Path) -> None:
    context = "aa bb cc bb dd"
    row = {"context": context, "question": "?"}
    rows: list[dict[str, Any]] = [
        row | {"question": f"q {i}", "answers": {"text": ["cc"], "answer_start": [6]}} for i in range(N)
    ]
    rows.append(row | {"question": "moved", "answers": {"text": ["bb"], "answer_start": [10]}})
    rows.append(row | {"question": "none", "answers": {"text": [], "answer_start": []}})
    rows.append(row | {"question": "outside", "answers": {"text": ["zz", "dd"], "answer_start": [0, 12]}})
    rows.append(row | {"question": "nowhere", "answers": {"text": ["zz"], "answer_start": [3]}})
    data = load_language(write(tmp_path / "x.jsonl", rows), task="answer")
    found = {r.source: (r.targets, r.starts) for r in every(data)}
    assert found["q 1"] == (("cc",), (6,))
    assert found["moved"] == (("bb",), (9,))
    assert found["none"] == (("",), (-1,))
    assert found["outside"] == (("dd", "zz"), (12, -1))  # what can be pointed at comes first
    assert found["nowhere"] == (("zz",), (-1,))
    counts = sorted((what, f.count, [p.row for p in f.first]) for what, f in data.report.remarks.items())
    assert [(c, rows) for _, c, rows in counts] == [(2, [43, 44]), (1, [41]), (1, [42])]


def test_references_that_only_the_test_has(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"document": f"long text {i}", "summary": f"s {i}"} for i in range(N)])
    write(
        tmp_path / "test.jsonl",
        [{"document": f"other {i}", "summary": "s", "references": ["s", "t"]} for i in range(5)],
    )
    data = load_language(tmp_path, task="summarize")
    assert [r.targets for r in data.test] == [("s", "t")] * 5
    assert data.splits_given == ("train", "test")


def test_without_train_the_next_split_is_divided_and_that_is_said(tmp_path: Path) -> None:
    write(tmp_path / "validation.jsonl", [{"source": f"a {i}", "target": f"b {i}"} for i in range(N)])
    write(tmp_path / "test.jsonl", [{"source": f"c {i}", "target": f"d {i}"} for i in range(5)])
    data = load_language(tmp_path, task="translate")
    assert data.splits_given == ("test",) and len(data.test) == 5
    assert "no train split came" in "\n".join(data.report.lines())


def test_equal_sources_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"source": f"Same {i % 30}" if i % 2 else f"same  {i % 30}", "target": f"t {i}"} for i in range(120)]
    data = load_language(write(tmp_path / "x.jsonl", rows), task="translate")
    sides = [
        {r.source.casefold().split()[1] for r in side}
        for side in (data.train, data.control, data.calibration, data.test)
    ]
    assert sum(map(len, sides)) == 30 and not data.report.leakage
    assert data.report.conflicts.count == 120


# ---------------------------------------------------------------------------------------------- plain text, line-aligned files


@pytest.mark.parametrize(
    "text", ["a\n\nb\n", "\n\n a\n\n\n  b\n\n", "one two " * 900, "x" * 5000, "l\r\n\r\nm\r\n" * 400, "猫。" * 4000]
)
def test_pieces_give_the_text_back(text: str) -> None:
    for pieces in (tables.cut(text)[0], tables.documents_of(text), tables.blocks_of(text)):
        assert "".join(pieces) == text and all(pieces)


@pytest.mark.parametrize(("gap", "says"), [("\n\n", "blank lines"), ("\n", "one stream")])
def test_plain_text_is_split_from_the_end_in_order(gap: str, says: str, tmp_path: Path) -> None:
    text = "".join(f"line {i} says the same again{gap}" for i in range(400))
    (tmp_path / "x.txt").write_text(text)
    data = load_language(tmp_path / "x.txt", task="lm", seed=3)
    assert data.stream and says in data.shape
    assert "".join(r.targets[0] for r in every(data)) == text
    share = sum(len(r.targets[0]) for r in data.test) / len(text)
    assert 0.05 < share <= 0.1
    with pytest.raises(UserError, match="plain text is for --task lm"):
        load_language(tmp_path / "x.txt", task="chat")
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "dev.txt.gz").write_bytes(gzip.compress(text[:3000].encode()))
    (tmp_path / "x.txt").unlink()
    data = load_language(tmp_path, task="lm")
    assert data.splits_given == ("train", "validation")
    assert "".join(r.targets[0] for r in (*data.control, *data.calibration)) == text[:3000]


def test_without_test_none_is_made_and_none_is_read(tmp_path: Path) -> None:
    text = "".join(f"line {i} says the same again\n" for i in range(400))
    (tmp_path / "x.txt").write_text(text)
    data = load_language(tmp_path / "x.txt", task="lm", test=False)
    assert not data.test and "".join(r.targets[0] for r in every(data)) == text
    rows = [{"source": f"text number {i}", "target": f"texte numero {i}"} for i in range(200)]
    folder = tmp_path / "pairs"
    folder.mkdir()
    write(folder / "train.jsonl", rows[:150])
    write(folder / "test.jsonl", rows[150:])
    data = load_language(folder, task="translate", test=False)
    assert not data.test and sum(map(len, (data.train, data.control, data.calibration))) == 150
    assert any("no test split, as asked" in line for line in data.report.lines())
    (folder / "train.jsonl").unlink()
    with pytest.raises(UserError, match="only a test split is there"):
        load_language(folder, task="translate", test=False)


def test_few_long_texts_are_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"body": "many words and so on " * 500}] * 2)
    data = load_language(path, task="lm")
    assert data.stream and "2 texts cut in" in data.shape
    assert "".join(r.targets[0] for r in every(data)) == "many words and so on " * 1000
    assert [r.source for r in read_sources(path, data.layout)] == ["many words and so on " * 500] * 2


def test_line_aligned_files(tmp_path: Path) -> None:
    en, de = ["".join(f"{word} {i}\n" for i in range(N)) for word in ("cat", "Katze")]
    (tmp_path / "train.de").write_text(de)
    (tmp_path / "train.en").write_text(en)
    data = load_language(tmp_path, task="translate")
    assert "'en' to 'de'" in data.shape
    turned = load_language(tmp_path, task="translate", text="de", label="en")
    assert turned.train[0].source.startswith("Katze")
    named = load_language(f"{tmp_path}/train.{{de,en}}", task="translate")
    assert "'de' to 'en'" in named.shape and len(every(named)) == N
    (tmp_path / "train.de").write_text("Katze 0\n\n" + "Katze\n" * (N - 4))
    with pytest.raises(UserError) as caught:
        load_language(tmp_path, task="translate")
    message = str(caught.value)
    assert all(part in message for part in ("40 lines", "38", "line 2 is empty", "line 39 of train.en: 'cat 38'")), (
        message
    )


# ---------------------------------------------------------------------------------------------- bad input


class Bad(NamedTuple):
    name: str
    task: str
    content: str | bytes
    says: tuple[str, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    file: str = "x.jsonl"


def jsonl(*rows: Mapping[str, Any], times: int = N) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows * times)


QA = {"context": "a b", "question": "q"}
BAD = [
    Bad("empty", "lm", "", ("empty (0 bytes)",), file="x.txt"),
    Bad("unknown task", "chatt", "", ("no language task", "'chat'")),
    Bad("little text", "lm", "few words", ("9 characters", "1,000"), file="x.txt"),
    Bad("broken UTF-8", "lm", b"good\ncaf\xe9\n", ("line 2", "byte 0xe9"), file="x.txt"),
    Bad("three rows", "translate", jsonl({"source": "a", "target": "b"}, times=3), ("3 usable rows", "At least 10")),
    Bad("no pair", "translate", jsonl({"n": 1, "one": "a b"}), ("no pair of columns", "--text and --label")),
    Bad("missing column", "summarize", jsonl({"document": "a", "summary": "b"}), ("no column 'sumary'", "'summary'"), {"label": "sumary"}),
    Bad("same column", "summarize", jsonl({"summary": "b"}), ("as text and as label",), {"text": "summary", "label": "summary"}),
    Bad("no question", "answer", jsonl({"a": "x y", "answer": "b"}), ("no question column", "--text")),
    Bad("no answer", "answer", jsonl({"question": "x"}), ("no answer column", "--label")),
    Bad("no conversation", "chat", jsonl({"n": 1}), ("no conversation found", "--text")),
    Bad("no assistant", "chat", jsonl({"messages": talk(("user", "x"))}), ("no row is of use", "40 rows", "without an assistant")),
    Bad("odd message", "chat", jsonl({"messages": ["hello"]}), ("row 1", "not an object")),
    Bad("message without role", "chat", jsonl({"messages": [{"text": "x"}]}), ("row 1", "no role and content")),
    Bad("starts missing", "answer", jsonl(QA | {"answers": {"text": ["a", "b"], "answer_start": [0]}}), ("row 1", "2 answers with 1 starts")),
    Bad("no such choice", "answer", jsonl({"question": "q", "choices": ["a", "b"], "answer": 2}), ("row 1", "none of the 2 choices")),
    Bad("one choice", "answer", jsonl({"question": "q", "choices": ["a"], "answer": 0}), ("row 1", "At least two")),
    Bad("empty targets", "translate", jsonl({"source": "a", "target": ""}), ("no row is of use", "without an answer"), {"label": "target"}),
    Bad("odd SQuAD", "answer", json.dumps({"data": [{"paragraphs": [{"qas": []}, {"context": "x"}]}]}), ("article 1", "qas"), file="x.json"),
    Bad("one source", "translate", jsonl({"source": "a", "target": "b"}), ("too few different rows to make",)),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_bad(bad: Bad, tmp_path: Path) -> None:
    path = tmp_path / bad.file
    path.write_bytes(bad.content if isinstance(bad.content, bytes) else bad.content.encode())
    with pytest.raises(UserError) as caught:
        load_language(path, task=bad.task, **bad.options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and message[-1] in ".?", message
    assert all(part in message for part in bad.says), message


def test_a_row_without_answer_cannot_be_evaluated(tmp_path: Path) -> None:
    data = load_language(
        write(tmp_path / "x.jsonl", [{"source": f"a {i}", "target": "b"} for i in range(N)]), task="translate"
    )
    gap = write(tmp_path / "y.jsonl", [{"source": "a", "target": "b"}, {"source": "c", "target": ""}])
    with pytest.raises(UserError, match=r"1 rows have no usable answer \(row 2\)"):
        read_records(gap, data.layout)
    assert [r.source for r in read_sources(gap, data.layout)] == ["a", "c"]
    with pytest.raises(UserError, match="no such file"):
        read_sources(str(tmp_path / "none.csv"), data.layout)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "task", "rows"),
    [("scitldr_a", "summarize", (1992, 618, 618)), ("xquad_en", "answer", (952, 119, 119)), ("cmrc2018", "answer", (899, 101, 3219)),
     ("gsm8k", "answer", (7000, 473, 1319)), ("tinyshakespeare", "lm", (5604, 940, 679))],
)  # fmt: skip
def test_shared(name: str, task: str, rows: tuple[int, ...], shared: Path) -> None:
    data = load_language(shared / "data" / name, task=task)
    assert (len(data.train), len(data.control) + len(data.calibration), len(data.test)) == rows
