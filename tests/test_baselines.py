"""Tests of the cheap writers: what they write, that they come back from the disk, and that alignment finds a known dictionary."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from multistep.data.cells import Record, Turn
from multistep.models.baselines import Copy, Dictionary, Lead, Nearest, Writer, load_writer, sentences

SOURCES = ["the red house stands there", "a green tree", "where is the station", "how old are you"]
TARGETS = ["one", "two", "three", "four"]


def said(writer: Writer, sources: list[str]) -> list[str]:
    return [p.value for p in writer.write([Record(s, ()) for s in sources])]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two two! Three?", ["One.", "Two two!", "Three?"]),
        ("It costs 3.50 in all. Yes", ["It costs 3.50 in all.", "Yes"]),
        ("你好。今天怎么样？很好", ["你好。", "今天怎么样？", "很好"]),
        ("a line\nanother", ["a line", "another"]),
        ("  ", []),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


def test_lead_takes_the_first() -> None:
    sources = ["A a. B b. C c.", "Only one"]
    assert [said(Lead(n), sources)[0] for n in (1, 2, 3)] == ["A a.", "A a. B b.", "A a. B b. C c."]
    assert said(Lead(2), sources)[1] == "Only one"


def test_nearest_finds_the_same_source_again() -> None:
    writer = Nearest(SOURCES, TARGETS)
    assert said(writer, SOURCES) == TARGETS
    assert said(writer, ["where is a station please", "entirely unlike"])[0] == "three"
    assert all(p.confidence is not None and 0.99 < p.confidence <= 1 for p in writer.write([Record(SOURCES[0], ())]))


def test_nearest_reads_all_turns_of_a_chat() -> None:
    def chat(topic: str, answer: str) -> Record:
        turns = (
            Turn("user", topic),
            Turn("assistant", "yes?"),
            Turn("user", "tell me more"),
            Turn("assistant", answer),
        )
        return Record("tell me more", (answer,), turns=turns)

    known = [
        chat("about the tides of the sea", "moon"),
        chat("about bread and butter", "milk"),
        Record("no answer", ()),
    ]
    writer = Nearest.fit(known)
    assert [p.value for p in writer.write(known[:2])] == ["moon", "milk"]
    assert [p.value for p in writer.write([chat("bread, once more", "unknown")])] == ["milk"]


def test_alignment_finds_the_dictionary_that_made_the_text() -> None:
    rng = random.Random(0)
    words = {f"w{i}": f"v{(7 * i) % 30}" for i in range(30)}
    sources = [" ".join(rng.sample(sorted(words), 6)) for _ in range(300)]
    targets = []
    for source in sources:
        translated = [words[w] for w in source.split()]
        rng.shuffle(translated)
        targets.append(" ".join(translated))
    found = Dictionary.fit(sources, targets)
    assert found.words == words
    assert said(found, ["w1 unknown w2 ."]) == [f"{words['w1']} unknown {words['w2']}."]


@pytest.mark.parametrize(
    "writer", [Copy(), Lead(1), Nearest(SOURCES, TARGETS), Dictionary.fit(SOURCES, TARGETS)], ids=lambda w: w.kind
)
def test_writers_come_back_from_the_disk(writer: Writer, tmp_path: Path) -> None:
    records = [Record(s, ()) for s in [*SOURCES, "你好。 \ud800"]]
    writer.save(tmp_path)
    again = load_writer(tmp_path)
    assert again.kind == writer.kind and again.write(records) == writer.write(records)
