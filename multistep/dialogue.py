"""Conversations as token ids: what a model of chats is trained on, and what it is asked with.

A model's own chat template is kept; a tokenizer without one gets ours (`ensure_template`). The ids are those of transformers'
apply_chat_template. In training the assistant's turns count, each with the token that ends it: they begin where the prompt for
them ends. A template that marks them ({% generation %}) is taken at its word. Nothing is shortened silently.
Shapes: T tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from multistep.data.cells import Turn
from multistep.types import UserError

# No token of its own, so that it works with every tokenizer. The space belongs to the answer: "Assistant:" and " Hello" are apart
# in every tokenizer that splits at spaces, so that a prompt's tokens are those of the conversation up to there.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ 'System: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "\ue000answer\ue000"  # a text that no conversation holds (private characters) and no template changes
_MEND = (
    "Mark the assistant's turns in it by {% generation %} ... {% endgeneration %}, or remove it: ours stands in then."
)


class Rendered(NamedTuple):
    """A conversation to train on."""

    ids: np.ndarray  # [T] int32
    counted: np.ndarray  # [T] bool: the assistant's tokens
    dropped: int  # of the oldest turns, how many were left out
    cut: int  # tokens left out at the end, where the last exchange alone is too long


class Asked(NamedTuple):
    """What a model is asked with."""

    ids: np.ndarray  # [T] int32
    dropped: int
    cut: int  # tokens left out at the beginning


class Endings(NamedTuple):
    """What ends an assistant's turn: the ids of tokens, and texts where the template writes no such token."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]


def ensure_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template ours; whether it was given. It is saved with the tokenizer's files."""
    if tokenizer.chat_template is not None:
        return False
    if tokenizer.eos_token is None:
        raise UserError("tokenizer: it has no end token (eos_token), so no answer could end. Name one in its files.")
    tokenizer.chat_template = TEMPLATE
    return True


def render(tokenizer: Any, turns: Sequence[Turn], max_tokens: int | None = None) -> Rendered:
    """A conversation that ends with the assistant, to train on. Where it is too long, the oldest exchanges go, whole; the system's
    turns stay. Raises UserError when the template cannot write it, or does not tell where the assistant speaks."""
    ids, counted = _counted(tokenizer, turns)
    dropped = cut = 0
    if max_tokens is not None and len(ids) > max_tokens:
        kept = _shortened(tokenizer, turns, False, max_tokens)
        ids, counted = _counted(tokenizer, kept)
        dropped, cut = len(turns) - len(kept), max(0, len(ids) - max_tokens)
    return Rendered(ids[: len(ids) - cut], counted[: len(ids) - cut], dropped, cut)


def prompt(tokenizer: Any, turns: Sequence[Turn], max_tokens: int | None = None) -> Asked:
    """The same conversation up to where the assistant is to speak."""
    ids, _ = _encode(tokenizer, _text(tokenizer, turns, asking=True))
    dropped = cut = 0
    if max_tokens is not None and len(ids) > max_tokens:
        kept = _shortened(tokenizer, turns, True, max_tokens)
        ids, _ = _encode(tokenizer, _text(tokenizer, kept, asking=True))
        dropped, cut = len(turns) - len(kept), max(0, len(ids) - max_tokens)
    return Asked(ids[cut:], dropped, cut)


def endings(tokenizer: Any) -> Endings:
    """The end token and, where the template ends the assistant's turns by something else, that."""
    _, end = _around(tokenizer, [Turn("user", "?"), Turn("assistant", "!")], 1)
    end = end.strip() or end
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [i for i in _encode(tokenizer, end)[0].tolist() if i in special][:1]
    known = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return Endings(tuple(dict.fromkeys([*known, *ids])), (end,) if end and not ids else ())


# ---------------------------------------------------------------------------------------------- too long


def _shortened(tokenizer: Any, turns: Sequence[Turn], asking: bool, max_tokens: int) -> list[Turn]:
    """Without as many of the oldest turns as must go. It begins with the user's next turn: templates want the user first."""
    first = next((i for i, turn in enumerate(turns) if turn.role != "system"), 0)
    starts = [i for i, turn in enumerate(turns) if turn.role == "user" and i > first]

    def kept(start: int) -> list[Turn]:
        return [turn for i, turn in enumerate(turns) if i >= start or turn.role == "system"]

    def fits(start: int) -> bool:
        return len(_encode(tokenizer, _text(tokenizer, kept(start), asking))[0]) <= max_tokens

    place = bisect_left(starts, True, key=fits)
    return kept(starts[min(place, len(starts) - 1)]) if starts else list(turns)


# ---------------------------------------------------------------------------------------------- texts and tokens


def _text(tokenizer: Any, turns: Sequence[Turn], asking: bool = False) -> str:
    from jinja2 import TemplateError

    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        roles = ", ".join(turn.role for turn in turns[:6]) + (", ..." if len(turns) > 6 else "")
        raise UserError(f"chat template: it cannot write a conversation of {roles} ({_line(error)}).") from None


def _encode(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T] and the characters [T,2] that each came from. The template writes the special tokens."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return np.array(found["input_ids"], np.int32), np.array(found["offset_mapping"], np.int64).reshape(-1, 2)


def _counted(tokenizer: Any, turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
    wanted = sum(turn.role == "assistant" for turn in turns)
    if _MARKED.search(tokenizer.get_chat_template()):
        _text(tokenizer, turns)  # the same errors
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        found = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
        counted = np.array(found["assistant_masks"], bool)
        if wanted and not counted.any():
            raise UserError("chat template: its {% generation %} marks hold no token. Put them around the answer.")
        return np.array(found["input_ids"], np.int32), counted
    text = _text(tokenizer, turns)
    ids, offsets_T2 = _encode(tokenizer, text)
    counted = np.zeros(len(ids), bool)
    for start, end in _spans(tokenizer, turns, text):
        inside = (offsets_T2[:, 1] > start) & (offsets_T2[:, 0] < end) & (offsets_T2[:, 1] > offsets_T2[:, 0])
        places = np.flatnonzero(inside)
        if len(places):  # what lies between belongs to it too: some tokenizers give white space no characters
            counted[places[0] : places[-1] + 1] = True
    return ids, counted


def _spans(tokenizer: Any, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
    """Where in the text of the conversation the assistant speaks: from the end of the prompt for it to the end of its turn."""
    speaking = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not speaking or speaking[-1] != len(turns) - 1:
        raise ValueError("render: a conversation to train on ends with the assistant")
    head, end = _around(tokenizer, turns, len(turns) - 1)
    if not any(text == head + said + end for said in _forms(turns[-1])):
        raise UserError(f"chat template: it rewrites the answer {turns[-1].text.strip()[:40]!r}. {_MEND}")
    if not end:
        raise UserError("chat template: nothing follows an answer, so no model could learn to end. Add the end token.")
    end = end.rstrip() or end  # line breaks after the end token are the next turn's
    found = []
    for i in speaking:
        begin = _begin(tokenizer, turns, i, text)
        said = next((s for s in _forms(turns[i]) if text.startswith(s + end, begin)), None)
        if said is not None:
            found.append((begin, begin + len(said) + len(end)))
            continue
        until = _text(tokenizer, turns[: i + 1])  # the template may write something before the answer
        if not text.startswith(until):
            raise UserError(
                f"chat template: it writes turn {i + 1} otherwise when the conversation goes on after it. {_MEND}"
            )
        found.append((begin, len(until.rstrip() if end.strip() else until)))
    return found


def _forms(turn: Turn) -> tuple[str, str]:
    """How templates write a text."""
    return turn.text, turn.text.strip()


def _around(tokenizer: Any, turns: Sequence[Turn], i: int) -> tuple[str, str]:
    """What the template writes before and after the text of turn i, were the text another."""
    probe = [*turns[:i], Turn(turns[i].role, _PROBE), *turns[i + 1 :]]
    head, found, tail = _text(tokenizer, probe).rpartition(_PROBE)
    if not found:
        raise UserError(f"chat template: it does not write the text of turn {i + 1}. {_MEND}")
    return head, tail


def _begin(tokenizer: Any, turns: Sequence[Turn], i: int, text: str) -> int:
    """Where the prompt for turn i ends; for a first turn, which has none, where its text begins."""
    before = _text(tokenizer, turns[:i], asking=True) if i else _around(tokenizer, turns, 0)[0]
    if not text.startswith(before):
        raise UserError(
            f"chat template: the prompt for turn {i + 1}, which ends with {before[-30:]!r}, is not how the conversation goes on. "
            f"{_MEND}"
        )
    return len(before)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
