"""Reading: every format gives the same rows; odd but legal files are read as a spreadsheet or a person would."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest

from multistep.data import load, read_labelled, read_rows, read_texts
from multistep.data.columns import Columns
from multistep.data.records import read_records
from multistep.data.shapes import Layout
from multistep.types import UserError

ROWS = [
    {"text": 'plain, with "quotes"', "label": "a"},
    {"text": "two\nlines\tand a tab", "label": "b"},
    {"text": "这家酒店很好 😀", "label": "a"},
]
COLUMNS = Columns(text=("text",), label="label")


def table(delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(("text", "label"))
    writer.writerows((row["text"], row["label"]) for row in ROWS)
    return out.getvalue()


CONTENT = {
    "x.csv": table(","),
    "x.tsv": table("\t"),
    "x.jsonl": "\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    "x.ndjson": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "x.json": json.dumps(ROWS, indent=1),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CONTENT)
def test_text_formats(tmp_path: Path, name: str, packed: bool) -> None:
    data = CONTENT[name].encode()
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_rows(path) == {"all": ROWS}


def test_parquet_names_its_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    whole = [{"text": row["text"], "label": "ab".index(row["label"])} for row in ROWS] + [{"text": "t", "label": -1}]
    made = datasets.Dataset.from_list(whole, features=features)
    made.to_parquet(tmp_path / "x.parquet")
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": made, "dev": made}).save_to_disk(str(tmp_path / "splits"))
    expected = [*ROWS, {"text": "t", "label": None}]
    assert read_rows(tmp_path / "x.parquet") == {"all": expected}
    assert read_rows(tmp_path / "saved") == {"all": expected}
    assert read_rows(tmp_path / "splits") == {"train": expected, "validation": expected}


def test_folder_knows_splits_and_shards_and_leaves_the_rest(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.csv", "train-00001-of-00002.csv", "dev.csv", "test_dedup.csv", "notes.md"):
        (tmp_path / name).write_text("text,label\nhello,1\n")
    splits = read_rows(tmp_path)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2, "validation": 1}


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("bom.csv", "\ufefftext,label\nhi,1\n", {"text": "hi", "label": "1"}),
        ("crlf.csv", "text,label\r\nhi,1\r\n\r\n", {"text": "hi", "label": "1"}),
        ("semicolon.csv", 'text;label\n"a, b";1\n', {"text": "a, b", "label": "1"}),
        ("bare.tsv", 'text\tlabel\n"good" he said\t1\n', {"text": '"good" he said', "label": "1"}),
        ("half.json", '[{"text": "\\ud83d!", "label": 1}]', {"text": "?!", "label": 1}),
        ("lines.json", '{"text": "a", "label": 1}\n', {"text": "a", "label": 1}),
        ("wrapped.json", '{"version": 1, "Data": [{"text": "a", "label": 1}]}', {"text": "a", "label": 1}),
        ("reviews.json", '{"reviews": [{"text": "a", "label": 1}]}', {"text": "a", "label": 1}),
        (
            "talks.json",
            '{"conversations": [{"id": 1, "messages": []}]}',
            {"id": 1, "messages": []},
        ),
        (
            "one.json",
            '{"messages": [{"role": "user"}, {"role": "assistant"}]}',
            {"messages": [{"role": "user"}, {"role": "assistant"}]},
        ),
        (
            "indented.json",
            '{\n "id": 1,\n "answers": [\n  {"text": "a"}\n ]\n}\n',
            {"id": 1, "answers": [{"text": "a"}]},
        ),
        ("noname.csv", ",text,label\n0,hi,1\n", {"column 1": "0", "text": "hi", "label": "1"}),
    ],
)
def test_odd_but_legal(tmp_path: Path, name: str, content: str, row: dict[str, object]) -> None:
    (tmp_path / name).write_text(content, newline="")
    assert read_rows(tmp_path / name) == {"all": [row]}


def test_bare_quotes_do_not_swallow_rows_of_tsv(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('label\ttext\n1\t"open\n0\tand "closed"\n1\tclosed"\n')
    assert [row["text"] for row in read_rows(path)["all"]] == ['"open', 'and "closed"', 'closed"']


def test_long_field_is_read_and_the_global_limit_left_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "x.csv").write_text(f"text,label\n{'a' * 300_000},1\n")
    assert len(read_rows(tmp_path / "x.csv")["all"][0]["text"]) == 300_000
    assert csv.field_size_limit() == before


def test_read_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("one\r\n\ntwo\n", newline="")
    (tmp_path / "x.csv").write_text("id,text\nabc,one\nabd,\nabe,two\n")
    assert read_texts(tmp_path / "x.txt") == ["one", "", "two"]
    assert read_texts(tmp_path / "x.csv", COLUMNS) == ["one", "", "two"]
    assert read_texts(str(tmp_path / "x.csv")) == ["one", "", "two"]
    assert read_texts("great film") == ["great film"]
    assert read_texts("a/b?\0" + "x" * 5000) == ["a/b?\0" + "x" * 5000]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("很好\nbad\n".encode())))
    assert read_texts("-") == ["很好", "bad"]


def test_read_labelled_keeps_every_row(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "", "label": 2.0}\n')
    for source in (tmp_path / "test.jsonl", str(tmp_path / "test.jsonl")):
        assert [e.label for e in read_labelled(source, COLUMNS, "classify")] == ["1", "2"]
    (tmp_path / "train.csv").write_text("text,label\na,1\n")
    assert [e.label for e in read_labelled(tmp_path, COLUMNS, "regress")] == [1.0, 2.0]


def test_labels_are_one_by_their_value_in_all_files(tmp_path: Path) -> None:
    def lines(labels: str) -> str:
        return "text,label\n" + "".join(f"a text {labels} {i},{label}\n" for i, label in enumerate(labels.split() * 20))

    for name, labels in {"train.csv": "1.0 0 nan", "dev.csv": "1 0.0", "test.csv": "1.00 0"}.items():
        (tmp_path / name).write_text(lines(labels), encoding="utf-8")
    found = load(tmp_path)
    assert found.labels == ("0", "1") and len(found.train) == 40
    assert {e.label for e in (*found.control, *found.calibration, *found.test)} == {"0", "1"}
    assert {e.label for e in read_labelled(tmp_path / "test.csv", COLUMNS, "classify", found.labels)} == {"0", "1"}
    with pytest.raises(UserError, match=r"20 rows have no 'label' \(row 3, 6, 9 \.\.\.\)"):
        read_labelled(tmp_path / "train.csv", COLUMNS, "classify", found.labels)


def test_what_is_to_be_evaluated_needs_no_train(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]
    for name, split in (("files", "test"), ("broken", "test"), ("none", "dev")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{split}.csv").write_text("text,label\na,1\nb,2\n", encoding="utf-8")
    (tmp_path / "broken" / "train.csv").write_bytes(b"\xff")  # it is not read
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": made}).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "train"))
    layout = Layout(task="translate", form="pair", source=("text",), target="label")
    for name in ("files", "broken", "one", "splits"):
        assert [e.label for e in read_labelled(tmp_path / name, COLUMNS, "classify")] == ["1", "2"], name
        assert [r.targets for r in read_records(tmp_path / name, layout)] == [("1",), ("2",)], name
    for name in ("none", "train"):
        with pytest.raises(UserError, match="no test split there"):
            read_labelled(tmp_path / name, COLUMNS, "classify")
        with pytest.raises(UserError, match="no test split there"):
            read_records(tmp_path / name, layout)


@pytest.mark.parametrize("label", [["0", "1"], [0, 7], [0.0, 1.0], [-2, 1], [True, False]], ids=str)
def test_parquet_whose_notes_are_older_than_its_columns(tmp_path: Path, label: list[object]) -> None:
    """A column that was taken away, and one that is no longer what was noted of it."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    note = {"_type": "ClassLabel", "names": ["a", "b"]}
    features = {"gone": note, "label": note, "text": {"_type": "Value"}, "odd": {"_type": "ClassLabel", "names": 3}}
    table = pyarrow.table({"text": ["x", "y"], "label": label, "odd": [0, 1]})
    noted = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(noted, tmp_path / "x.parquet")
    wanted = [{"text": t, "label": one, "odd": i} for i, (t, one) in enumerate(zip("xy", label, strict=True))]
    assert read_rows(tmp_path / "x.parquet") == {"all": wanted}


@pytest.mark.parametrize("way", ["offline", "out of reach", "there"])
def test_a_data_set_of_the_hub_that_was_fetched_before(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    asked: list[str] = []
    fetched = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    def question(*_: object, **__: object) -> None:
        asked.append("question")
        if way != "there":
            raise hub.errors.OfflineModeIsEnabled("Cannot reach the hub")

    def load_dataset(name: str) -> object:
        asked.append(f"{name}, offline: {datasets.config.HF_HUB_OFFLINE}")
        return fetched

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", way == "offline")
    monkeypatch.setattr(hub.HfApi, "dataset_info", question)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("org/name") == {"train": ROWS}
    assert asked == [*(["question"] if way != "offline" else []), f"org/name, offline: {way != 'there'}"]
    assert datasets.config.HF_HUB_OFFLINE is (way == "offline")
