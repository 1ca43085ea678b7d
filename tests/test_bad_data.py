"""Bad data: one line that names the thing and the mend, never a traceback."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from multistep.data import Columns, load, read_labelled, read_texts
from multistep.types import UserError

GOOD = "text,label\n" + "".join(f"good text {i},{'ab'[i % 2]}\n" for i in range(40))
COLUMNS = Columns(text=("text",), label="label")


class Bad(NamedTuple):
    name: str  # what is wrong
    files: dict[str, str | bytes]  # the first is loaded, or the folder when there are several or `folder`
    says: tuple[str, ...]  # parts of the message
    options: Mapping[str, Any] = MappingProxyType({})
    folder: bool = False


def lines(label: Callable[[int], Any], n: int = 40) -> str:
    return "".join(json.dumps({"text": f"text number {i}", "label": label(i)}) + "\n" for i in range(n))


BAD = [
    Bad("folder without data", {"notes.md": "x"}, ("no train file", "found no data file"), folder=True),
    Bad("folder without train", {"test.csv": GOOD}, ("no train file", "test.csv"), folder=True),
    Bad("two files for a split", {"train.csv": GOOD, "dev.csv": GOOD, "val.tsv": GOOD}, ("dev.csv and val.tsv", "Keep one")),
    Bad("two train files", {"train.csv": GOOD, "train.jsonl": GOOD}, ("train.csv and train.jsonl",)),
    Bad("not a datasets folder", {"dataset_dict.json": "{"}, ("not a whole `datasets` folder",), folder=True),
    Bad("empty file", {"x.csv": ""}, ("empty (0 bytes)",)),
    Bad("zero-byte gz", {"x.csv.gz": b""}, ("empty (0 bytes)",)),
    Bad("nothing in gz", {"x.csv.gz": gzip.compress(b"")}, ("nothing inside",)),
    Bad("corrupt gz", {"x.csv.gz": gzip.compress(GOOD.encode())[:60]}, ("damaged gzip", "again")),
    Bad("gz is not gzip", {"x.csv.gz": GOOD}, ("not gzip",)),
    Bad("corrupt parquet", {"x.parquet": b"PAR1 and so on"}, ("damaged or not Parquet",)),
    Bad("unknown extension", {"x.docx": b"PK\3\4"}, ("unknown kind of file", ".jsonl")),
    Bad("header only", {"x.csv": "text,label\n"}, ("no rows", "header")),
    Bad("blank lines only", {"x.jsonl": "\n\n"}, ("no rows",)),
    Bad("empty JSON array", {"x.json": "[]"}, ("no rows",)),
    Bad("no header", {"x.csv": "great film,1\nbad film,0\n" * 20}, ("no header", "text,label")),
    Bad("duplicate header", {"x.csv": "text,label,text\na,b,c\n"}, ("names 'text' twice",)),
    Bad("missing label column", {"x.csv": GOOD}, ("no column 'lable'", "Did you mean 'label'?"), {"label": "lable"}),
    Bad("missing text column", {"x.csv": GOOD}, ("no column 'txt'", "'text'"), {"text": ["txt"]}),
    Bad("label is text", {"x.csv": GOOD}, ("'text' is named as text and as label",), {"text": ["text"], "label": "text"}),
    Bad("one column", {"x.csv": "text\n" + "a few words\n" * 20}, ("no label column found", "--label")),
    Bad("no text column", {"x.csv": "size,label\n" + "1,2\n2,3\n" * 20}, ("no column of texts", "size")),
    Bad("text column holds lists", {"x.jsonl": '{"text": ["a"], "label": 1}\n' * 20}, ("not a text",), {"text": ["text"]}),
    Bad("ragged CSV", {"x.csv": GOOD + "one,two,three\n"}, ("line 42", "3 fields where the header has 2", "Quote")),
    Bad("unclosed quote", {"x.csv": GOOD + '"open,a\nb,c\n'}, ("line 42", "never closed")),
    Bad("huge field", {"x.csv": GOOD + "z" * (1 << 24) + "zz,a\n"}, ("line 42", "field larger")),
    Bad("broken UTF-8", {"x.csv": GOOD.encode() + b"caf\xe9,a\n"}, ("line 42", "byte 0xe9 at offset", "UTF-8")),
    Bad("broken UTF-8 after a mark", {"x.csv": b"\xef\xbb\xbftext,label\n\xff,a\n"}, ("line 2", "offset 14")),
    Bad("UTF-16", {"x.csv": GOOD.encode("utf-16")}, ("UTF-16", "UTF-8")),
    Bad("NUL byte", {"x.csv": GOOD + "a\0b,a\n"}, ("line 42", "NUL")),
    Bad("invalid JSON line", {"x.jsonl": lines(lambda i: i % 2) + '{"text": "a"\n'}, ("line 41", "not valid JSON")),
    Bad("JSON nested too deep", {"x.jsonl": "[" * 100_000 + "\n"}, ("line 1", "not valid JSON")),
    Bad("invalid JSON array", {"x.json": '[{"text": 1},'}, ("not valid JSON",)),
    Bad("JSON line not an object", {"x.jsonl": '{"text": "a", "label": 1}\n["b", 2]\n'}, ("line 2", "a list, not an object")),
    Bad("JSON element not an object", {"x.json": "[3]"}, ("element 1", "a number, not an object")),
    Bad("mixed labels", {"x.jsonl": lines(lambda i: 1 if i else "one")}, ("different kinds", "row 1", "row 2", "same way")),
    Bad("label is an object", {"x.jsonl": lines(lambda i: {"a": i})}, ("row 1", "an object")),
    Bad("list in list", {"x.jsonl": lines(lambda i: [["a"]])}, ("row 1", "inside a list of labels")),
    Bad("lists for classify", {"x.jsonl": lines(lambda i: ["a", "b"])}, ("is a list", "multilabel"), {"task": "classify"}),
    Bad("one class", {"x.jsonl": lines(lambda i: "a")}, ("only the label 'a'", "two different")),
    Bad("no labels at all", {"x.jsonl": lines(lambda i: None)}, ("no label", "--label"), {"label": "label"}),
    Bad("no labels, task asked", {"x.jsonl": lines(lambda i: None)}, ("no label", "--label"), {"label": "label", "task": "regress"}),
    Bad("three rows", {"x.jsonl": lines(lambda i: "ab"[i % 2], 3)}, ("3 usable rows", "At least 10")),
    Bad("all labels distinct", {"x.jsonl": lines(lambda i: f"label {i}")}, ("40 different labels", "looks like an id")),
    Bad("row numbers", {"x.jsonl": lines(lambda i: i)}, ("count up row by row", "--label")),
    Bad("all texts empty", {"x.csv": "text,label\n" + " ,a\n,b\n" * 20}, ("every text is empty", "--text")),
    Bad("one text only", {"x.csv": "text,label\n" + "same,a\nsame,b\n" * 20}, ("too few different rows",)),
    Bad("NaN target", {"x.jsonl": lines(lambda i: i / 3 if i % 9 else float("nan"))}, ("5 targets are NaN", "row 1, 10, 19 ...")),
    Bad("infinite target", {"x.csv": "text,label\n" + "a b,0.5\nc d,inf\n" * 20}, ("row 2, 4, 6 ...",), {"task": "regress"}),
    Bad("regress on names", {"x.csv": GOOD}, ("row 1", "'a' is not a number", "classify"), {"task": "regress", "label": "label"}),
    Bad("regress, nothing numeric", {"x.csv": GOOD}, ("no column of numbers",), {"task": "regress"}),
    Bad("constant target", {"x.csv": "text,label\n" + "".join(f"t {i},2\n" for i in range(40))}, ("all targets", "2"), {"task": "regress"}),
    Bad("unknown task", {"x.csv": GOOD}, ("unknown 'clasify'", "Did you mean 'classify'?"), {"task": "clasify"}),
    Bad("validation with unseen label", {"train.csv": GOOD, "dev.csv": "text,label\nx,a\ny,zebra\n"}, ("(validation): row 2", "'zebra'")),
    Bad("test without label", {"train.csv": GOOD, "test.csv": "text,id\nx,1\n"}, ("(test): no column 'label'",)),
    Bad("test labels empty", {"train.csv": GOOD, "test.csv": "text,label\nx,\ny,\n"}, ("(test): no row has a label",)),
    Bad("validation is train", {"train.csv": GOOD, "dev.csv": GOOD}, ("0 are not in train", "remove the validation file")),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_bad(bad: Bad, tmp_path: Path) -> None:
    for name, content in bad.files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = tmp_path if bad.folder or len(bad.files) > 1 else tmp_path / next(iter(bad.files))
    with pytest.raises(UserError) as caught:
        load(source, **bad.options)
    _check(caught.value, bad.says)


def _check(error: UserError, says: tuple[str, ...]) -> None:
    message = str(error)
    assert "\n" not in message and len(message) < 600
    assert all(part in message for part in says), message
    assert message[-1] in ".?", message


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text(GOOD)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "review.csv")
    _check(caught.value, ("no such file", "reviews.csv"))
    with pytest.raises(UserError) as caught:
        load(tmp_path / "none" / "zzz.csv")
    _check(caught.value, ("no such file", "Check the path"))


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "x.csv").write_text(GOOD)
    monkeypatch.setattr(Path, "read_bytes", refuse)  # chmod does not stop the superuser, whom CI may run as
    with pytest.raises(UserError) as caught:
        load(tmp_path / "x.csv")
    _check(caught.value, ("permission denied",))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, datasets = pytest.importorskip("huggingface_hub"), pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # and nothing was fetched before
    with pytest.raises(UserError) as caught:
        load("org/name")
    _check(caught.value, ("org/name: no such file or folder here", "Name or service not known", "network"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x.csv", ("no column 'text'", "Did you mean 'texts'?")),
        ("absent.txt", ("no such file",)),
        ("blank.txt", ("no text in it",)),
        ("", ("a folder",)),
    ],
)
def test_bad_texts(source: str, says: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("texts\na\n")
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(UserError) as caught:
        read_texts(str(tmp_path / source), COLUMNS)
    _check(caught.value, says)


def test_bad_stdin_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    for source in ("-", " ", ""):
        with pytest.raises(UserError) as caught:
            read_texts(source)
        _check(caught.value, ("no text in it",))


def test_bad_labelled(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,label\na,\nb,1\n")
    with pytest.raises(UserError) as caught:
        read_labelled(tmp_path / "x.csv", COLUMNS, "classify")
    _check(caught.value, ("1 rows have no 'label' (row 1)",))
    (tmp_path / "train.csv").write_text(GOOD)
    with pytest.raises(UserError) as caught:
        read_labelled(tmp_path, COLUMNS, "classify")
    _check(caught.value, ("no test split",))
