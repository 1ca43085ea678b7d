"""A row of language data to a record: conversations, answers with their places in a passage, choices. What cannot be used is said
by a reason, what was mended by a remark; records.py counts both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from multistep.data.choices import choices_of, chosen
from multistep.data.columns import text_of
from multistep.data.labels import as_number, brief, cell_kind, structure
from multistep.data.read import Row
from multistep.data.shapes import Layout
from multistep.types import UserError

NO_SOURCE = "without text to start from"
NO_TARGET = "without an answer"
NO_ASSISTANT = "conversations without an assistant turn"
OTHER_ROLE = "conversations with a role other than system, user and assistant"
NOT_INSIDE = "answers not found in their context (kept, not usable as spans)"
MOVED = "answers not where their start says, but elsewhere in the context (moved there)"
CUT = "conversations went on after the last assistant turn (cut there)"
UNANSWERABLE = 'questions without an answer in their context (the right answer is "")'

_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
          "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    role: str  # "system", "user" or "assistant"
    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a language task."""

    source: str  # what is given: "" for lm, the question, the last user turn of a chat
    targets: tuple[str, ...]  # right answers, the first is trained on; () when unknown; lm: the text itself
    context: str = ""  # answer: the passage
    starts: tuple[int, ...] = ()  # answer with a passage: where each target begins in it, in characters; -1: nowhere
    choices: tuple[str, ...] = ()  # answer: multiple choice
    turns: tuple[Turn, ...] = ()  # chat: the whole conversation; it ends with the assistant where the answer is known

    @property
    def asked(self) -> tuple[Turn, ...]:
        """chat: the turns before the answer."""
        return self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns

    @property
    def counted(self) -> tuple[str, ...]:
        """What a loss is charged for: all that the assistant says in a conversation, else the first right answer."""
        return tuple(turn.text for turn in self.turns if turn.role == "assistant") if self.turns else self.targets[:1]


class Found(NamedTuple):
    """`record` is None when the row is of no use; then `reason` says why. `remarks`: what was odd or mended."""

    record: Record | None
    reason: str = ""
    remarks: tuple[str, ...] = ()


def to_record(row: Row, layout: Layout, number: int, where: str, asking: bool = False) -> Found:
    """Raises UserError for a cell that cannot be what its column is; an unknown answer leaves `targets` empty. `asking`: a conversation is to
    be answered, so what the user says last in it stays."""
    if layout.form == "text":
        text = text_of(row, layout.source, number, where)
        return Found(Record("", (text,))) if text else Found(Record("", ()))
    if layout.form == "pair" and layout.task != "chat":
        return Found(Record(_source(row, layout, number, where), _targets(row, layout, number, where)))
    if layout.task == "chat":
        return _chat(row, layout, number, where, asking)
    question = text_of(row, layout.source, number, where)
    context = text_of(row, [layout.context], number, where) if layout.context else ""
    if layout.form == "choices":
        return _choose(row, layout, question, context, number, where)
    return _answer(row, layout, question, context, number, where)


def _source(row: Row, layout: Layout, number: int, where: str) -> str:
    """Text columns joined; a list of sentences in one becomes a text."""
    flat = {name: row.get(name) for name in layout.source}
    flat = {name: " ".join(cell) if _is_texts(cell) else cell for name, cell in flat.items()}
    return text_of(flat, layout.source, number, where)


def _targets(row: Row, layout: Layout, number: int, where: str) -> tuple[str, ...]:
    """The target (or a list of them) and the further references, each once, the first one first."""
    found: list[str] = []
    for name in (layout.target, layout.references):
        if name is not None:
            cell = row.get(name)
            found += cell if _is_texts(cell) else [text_of(row, [name], number, where)]
    return tuple(dict.fromkeys(t for t in found if t.strip()))


def _is_texts(cell: Any) -> TypeGuard[list[str]]:
    return isinstance(cell, list) and all(isinstance(c, str) for c in cell)


# ---------------------------------------------------------------------------------------------- conversations


def _chat(row: Row, layout: Layout, number: int, where: str, asking: bool) -> Found:
    turns: list[Turn] = []
    if layout.system and (system := text_of(row, [layout.system], number, where)).strip():
        turns.append(Turn("system", system))
    name = layout.source[0]
    cell = structure(row.get(name)) if layout.form == "messages" else row.get(name)
    if layout.form == "messages":
        if cell_kind(cell) != "missing" and not isinstance(cell, list):
            raise UserError(
                f"{where}: row {number}: {name!r} holds {brief(cell)}, not a list of messages with role and content."
            )
        turns += _messages(cell or [], number, where)
    elif isinstance(cell, list) and isinstance(row.get(layout.target or ""), list):  # both sides are lists of messages
        turns += _messages([*cell, *row[layout.target or ""]], number, where)
    else:
        past = structure(row.get(layout.history or ""))
        past = [] if cell_kind(past) == "missing" else past
        if not isinstance(past, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in past):
            raise UserError(
                f"{where}: row {number}: {layout.history!r} holds {brief(past)}, not pairs of question and answer."
            )
        for asked, answered in past:
            turns += [Turn("user", str(asked)), Turn("assistant", str(answered))]
        parts = [text_of(row, layout.source, number, where)]
        parts += [text_of(row, [layout.input], number, where)] if layout.input else []
        asked = "\n\n".join(p for p in parts if p.strip())
        answer = text_of(row, [layout.target], number, where) if layout.target else ""
        turns += [Turn("user", asked)] if asked else []
        turns += [Turn("assistant", answer)] if answer.strip() else []
        if not answer.strip():
            return Found(_conversation(turns), NO_TARGET)
    if any(turn.role not in _ROLES.values() for turn in turns):
        return Found(None, OTHER_ROLE)
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if last is None:
        return Found(_conversation(turns), NO_ASSISTANT)
    if asking:
        return Found(_conversation(turns))
    return Found(_conversation(turns[: last + 1]), remarks=(CUT,) if last + 1 < len(turns) else ())


def _conversation(turns: Sequence[Turn]) -> Record:
    user = next((turn.text for turn in reversed(turns) if turn.role == "user"), "")
    answer = (turns[-1].text,) if turns and turns[-1].role == "assistant" else ()
    return Record(user, answer, turns=tuple(turns))


def _messages(cell: Sequence[Any], number: int, where: str) -> list[Turn]:
    """Messages as {"role", "content"} or {"from", "value"}; content may be a list of parts with texts. Empty ones are left out."""
    turns = []
    for message in cell:
        if not isinstance(message, dict):
            raise UserError(
                f'{where}: row {number}: message {brief(message)} is not an object {{"role": ..., "content": ...}}.'
            )
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):
            content = "\n".join(str(p.get("text", "")) if isinstance(p, dict) else str(p) for p in content)
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise UserError(
                f"{where}: row {number}: message {brief(message)} has no role and content (or from and value). Mend the row."
            )
        if content and content.strip():
            turns.append(Turn(_ROLES.get(role.strip().lower(), role), content))
    return turns


# ---------------------------------------------------------------------------------------------- answers


def _answer(row: Row, layout: Layout, question: str, context: str, number: int, where: str) -> Found:
    cell = _answers_in(row.get(layout.target or "")) if layout.context else row.get(layout.target or "")
    given = _given(cell, row.get(layout.starts) if layout.starts else None, number, where)
    if not layout.context:
        return Found(Record(question, tuple(dict.fromkeys(t for t, _ in given if t.strip()))))
    if not any(text.strip() for text, _ in given):
        known = (
            isinstance(cell, list | dict) or row.get("is_impossible") is True
        )  # an empty list says: none; a gap says nothing
        return (
            Found(Record(question, ("",), context, (-1,)), remarks=(UNANSWERABLE,))
            if known
            else Found(Record(question, (), context))
        )
    found: dict[str, int] = {}
    moved = False
    for text, start in given:
        if not text.strip():
            continue
        place = _place(text, start, context)
        moved = moved or (start is not None and start >= 0 and place not in (start, -1))
        found[text] = place if found.get(text, -1) < 0 else found[text]
    order = sorted(found, key=lambda text: found[text] < 0)  # stable: what can be pointed at comes first
    starts = tuple(found[text] for text in order)
    remarks = ((NOT_INSIDE,) if min(starts) < 0 else ()) + ((MOVED,) if moved else ())
    return Found(Record(question, tuple(order), context, starts), remarks=remarks)


def _answers_in(cell: Any) -> Any:
    """Answers that are written into a text cell, in one of the shapes that `_given` knows; any other text is an answer itself."""
    found = structure(cell)
    if isinstance(found, dict):
        known = isinstance(found.get("text"), str) or _is_texts(found.get("text"))
    else:
        known = isinstance(found, list) and all(isinstance(a, dict) and isinstance(a.get("text"), str) for a in found)
    return found if known or _is_texts(found) else cell


def _given(cell: Any, starts: Any, number: int, where: str) -> list[tuple[str, int | None]]:
    """Answers and their starts from any of: a text, texts, {"text": [...], "answer_start": [...]}, [{"text", "answer_start"}]."""
    starts = structure(starts)
    if isinstance(cell, dict) and ("text" in cell or not cell):
        cell, starts = cell.get("text", []), cell.get("answer_start", cell.get("answer_starts"))
    elif isinstance(cell, list) and cell and all(isinstance(a, dict) and "text" in a for a in cell):
        starts = [a.get("answer_start") for a in cell]
        cell = [a["text"] for a in cell]
    texts = cell if isinstance(cell, list) else [cell]
    starts = list(starts) if isinstance(starts, list | tuple) else [starts] * (len(texts) if starts is None else 1)
    if len(starts) != len(texts):
        raise UserError(
            f"{where}: row {number}: {len(texts)} answers with {len(starts)} starts. Give a start to every answer."
        )
    whole = [None if (at := as_number(s)) is None or not math.isfinite(at) else int(at) for s in starts]
    return [(text_of({"answers": t}, ["answers"], number, where), s) for t, s in zip(texts, whole, strict=True)]


def _place(text: str, start: int | None, context: str) -> int:
    """Where `text` is in `context`: at `start` if it is there, else the nearest place, else -1."""
    if start is not None and start >= 0 and context.startswith(text, start):
        return start
    places = []
    at = context.find(text)
    while at >= 0:
        places.append(at)
        at = context.find(text, at + 1)
    return min(places, key=lambda p: abs(p - (start if start is not None else 0)), default=-1)


def _choose(row: Row, layout: Layout, question: str, context: str, number: int, where: str) -> Found:
    texts, letters = choices_of(row, layout.choices, number, where)
    choices = tuple(text for text in texts if text is not None)
    if len(set(choices)) < 2:
        raise UserError(f"{where}: row {number}: {len(set(choices))} different choices. At least two are needed.")
    answer = row.get(layout.target or "")
    if cell_kind(answer) == "missing":
        return Found(Record(question, (), context, choices=choices))
    right = chosen(answer, texts, letters, layout.named_by)
    if right is None:
        raise UserError(
            f"{where}: row {number}: answer {brief(answer)} is none of the {len(choices)} choices. "
            "Give its text, its letter, or its place counted from 0."
        )
    return Found(Record(question, (right,), context, choices=choices))
