"""Which columns and which task: by name, by content, and never an id."""

from __future__ import annotations

from typing import Any

import pytest

from multistep.data.columns import find_columns
from multistep.data.labels import Spelling, infer_task, to_labels

WORDS = ["a fine day", "a poor film", "so so", "quite good, really"]


def rows(n: int = 40, **columns: Any) -> list[dict[str, Any]]:
    return [{name: make(i) for name, make in columns.items()} for i in range(n)]


def words(i: int) -> str:
    return f"{WORDS[i % 4]} number {i}"


@pytest.mark.parametrize(
    ("columns", "task", "text", "label"),
    [
        ({"text": words, "label": lambda i: i % 2, "rating": lambda i: i % 10, "id": str}, "auto", ("text",), "label"),
        (
            {"id": lambda i: f"test/positive/{i:040d}", "say": words, "kind": lambda i: "ab"[i % 2]},
            "auto",
            ("say",),
            "kind",
        ),
        ({"Review": words, "Stars": lambda i: i % 5}, "auto", ("Review",), "Stars"),
        ({"premise": words, "hypothesis": words, "label": lambda i: i % 3}, "auto", ("premise", "hypothesis"), "label"),
        ({"words": words, "label": lambda i: "ab"[i % 2], "price": lambda i: i * 0.7}, "regress", ("words",), "price"),
        ({"text": words, "lang": lambda i: "en", "mood": lambda i: "ab"[i % 2]}, "auto", ("text",), "mood"),
        ({"": str, "text": words, "many": lambda i: i, "what": lambda i: "ab"[i % 2]}, "auto", ("text",), "what"),
        ({"text": words, "tags": lambda i: ["a", "b"][: i % 3]}, "auto", ("text",), "tags"),
        ({"note": words, "review": words, "y": lambda i: i % 2}, "auto", ("review",), "y"),
    ],
)
def test_found(columns: dict[str, Any], task: str, text: tuple[str, ...], label: str) -> None:
    found = find_columns(rows(**columns), (), None, task, "x.csv")
    assert (found.text, found.label) == (text, label)
    assert repr(label) in found.why


def test_named_columns_win_and_are_joined() -> None:
    data = rows(text=words, title=words, label=lambda i: i % 2, kind=lambda i: i % 3)
    found = find_columns(data, ["title", "text"], "kind", "auto", "x.csv")
    assert (found.text, found.label) == (("title", "text"), "kind")
    assert "as named" in found.why and "not used: label" in found.why


@pytest.mark.parametrize(
    ("cells", "task"),
    [
        (["a", "b"] * 10, "classify"),
        ([0, 1] * 10, "classify"),
        ([True, False] * 10, "classify"),
        (["1", "2", "3", "4", "5"] * 10, "classify"),
        (list(range(77)) * 10, "classify"),  # indices of many classes
        (list(range(77, 0, -1)), "regress"),
        ([i * i for i in range(60)] * 3, "regress"),
        ([0.5 * i for i in range(10)] * 10, "classify"),  # half stars
        ([0.1 * i for i in range(50)], "regress"),
        (["0.25", "", "1.5", "7.75"] * 2 + [str(i / 7) for i in range(30)], "regress"),
        ([["a"], [], ["a", "b"]] * 5, "multilabel"),
        (["['a', 'b']", '["b"]', "[]"] * 5, "multilabel"),
        (["a|b", "c"] * 5, "classify"),  # only lists are certain; a separator must be asked for
        (["1", "1.0", "0", "0.0"] * 10, "classify"),
        (["0", "1"] * 10 + ["nan"] * 20, "classify"),
        ([0, 1] * 10 + [float("nan") for _ in range(20)], "classify"),
        ([str(i / 7) for i in range(30)] + ["NaN"], "regress"),
    ],
)
def test_task(cells: list[Any], task: str) -> None:
    assert infer_task(cells, "x.csv")[0] == task


@pytest.mark.parametrize(
    ("cells", "task", "labels"),
    [
        ([" a ", "", None, 1.0], "classify", None),
        (["a ", "", None, "b"], "classify", ["a", None, None, "b"]),
        ([1, 2.0, float("nan"), True], "classify", None),
        ([1, 2.0, float("nan")], "classify", ["1", "2", None]),
        ([["a"], ["b"]], "classify", ["a", "b"]),
        (["b|a", "c;a ", "", None, "['d', 'c']", "[x]"], "multilabel",
         [("a", "b"), ("a", "c"), (), None, ("c", "d"), ("[x]",)]),
        ([[2, 1, 1], []], "multilabel", [("1", "2"), ()]),
        (["[{[1]}]", "[{{1}}]|a"], "multilabel", [("[{[1]}]",), ("[{{1}}]", "a")]),  # what Python cannot make is a text
        (["1.5", " 2 ", "", "-3e2"], "regress", [1.5, 2.0, None, -300.0]),
        (["1", "1.0", " 0.0 ", "-0", "+1.", "1e0", "0.50", ".5"], "classify", ["1", "1", "0", "0", "1", "1e0", "0.50", ".5"]),
        (["1.1", "1.10", "1.9", "2.0", "2"], "classify", ["1.1", "1.10", "1.9", "2", "2"]),  # versions
        (["12345678901234567890", "12345678901234567891.0"], "classify", ["12345678901234567890", "12345678901234567891"]),
        (["01", "1", "1.0"], "classify", ["01", "1", "1.0"]),  # codes, as those of the post are
        (["1.0", "2.0", "beta"], "classify", ["1.0", "2.0", "beta"]),
        (["1", "nan", "-NaN", "0"], "classify", ["1", None, None, "0"]),
        ([1, "nan", 0], "classify", ["1", None, "0"]),
        (["nan", "pita"], "classify", ["nan", "pita"]),  # breads
        (["1.5", "nan", "2"], "regress", [1.5, None, 2.0]),
    ],
)  # fmt: skip
def test_labels(cells: list[Any], task: Any, labels: list[Any] | None) -> None:
    if labels is None:
        with pytest.raises(ValueError, match="different kinds"):
            to_labels(cells, task, "x.csv")
    else:
        assert to_labels(cells, task, "x.csv") == labels


@pytest.mark.parametrize(
    ("train", "later", "labels"),
    [
        (["0", "1.0"], ["1", "0.0", "nan"], ["1", "0", None]),
        ([0, 1.0], ["1.0", "00"], ["1", "00"]),  # unlike any number of train: it will be said
        (["01", "02"], ["1", "02"], ["1", "02"]),
        (["v1", "1.0"], ["1.0", "nan"], ["1.0", "nan"]),
    ],
)
def test_later_files_are_read_as_train_was(train: list[Any], later: list[Any], labels: list[Any]) -> None:
    """By the columns of one run, and by what its model knows."""
    assert to_labels(later, "classify", "x.csv", Spelling.of(train)) == labels
    names = sorted(set(to_labels(train, "classify", "x.csv")))
    assert to_labels(later, "classify", "x.csv", Spelling.of_model("classify", names)) == labels


def test_a_model_that_tells_1_and_1_0_apart_still_does() -> None:
    """Made before they were one."""
    assert Spelling.of_model("classify", ("0", "1", "1.0")) == (True, False)
    assert Spelling.of_model("classify", ("0", "1", "nan")) == (False, False)
    assert Spelling.of_model("regress", ()) == (True, False)
