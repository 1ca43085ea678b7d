"""The shapes of OpenAI's API: requests to what is wanted, what was written to answers, errors to theirs. No torch here.

What can be obeyed is taken; what cannot is refused with 422, never ignored, unless it asks for nothing (a penalty of 0, one text/plain
format). Beyond OpenAI's names `top_k`, `min_p` and `repetition_penalty` are known, as other servers have them.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from multistep.serve.limits import Refused, check_text

MAX_CHOICES = 16  # texts of one request
MAX_STOPS = 4
MAX_MESSAGES = 512
_SEEDS = 2**31

Kind = Literal["chat", "completion"]
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_COMMON = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "seed", "stop", "stream",
    "stream_options", "user", "metadata", "safety_identifier", "prompt_cache_key",
}  # fmt: skip
_KNOWN = {"chat": _COMMON | {"messages", "max_completion_tokens"}, "completion": _COMMON | {"prompt"}}
# What is taken where it asks for nothing out of the ordinary.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None), "presence_penalty": (0, None), "logit_bias": ({}, None), "logprobs": (False, None),
    "top_logprobs": (0, None), "echo": (False, None), "suffix": ("", None), "best_of": (1, None), "store": (False, None),
    "tools": ([], None), "tool_choice": ("none", "auto", None), "functions": ([], None), "parallel_tool_calls": (True, False, None),
    "response_format": ({"type": "text"}, None), "modalities": (["text"], None), "service_tier": ("auto", "default", None),
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """A request, checked. `None`: as the bundle was tuned. Of `prompts` (completion) and `turns` (chat: role, text) one is filled."""

    prompts: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    n: int = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False  # at the end of a stream


@dataclass(frozen=True)
class Usage:
    prompt: int
    completion: int

    def json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


def wanted(data: Mapping[str, Any], kind: Kind, model: str, most_tokens: int) -> Wanted:
    """Raises Refused: 404 for another model, 422 for what cannot be obeyed."""
    _check_keys(data, kind)
    asked = data.get("model")
    if asked is not None and asked != model:
        name = repr(asked)[:60]
        raise Refused(
            404, f"there is no model {name}; this server has {model!r}.", param="model", code="model_not_found"
        )
    limit = "max_completion_tokens" if data.get("max_completion_tokens") is not None else "max_tokens"
    options = data.get("stream_options")
    if options is not None and not (
        isinstance(options, dict) and set(options) <= {"include_usage", "include_obfuscation"}
    ):
        raise Refused(422, '"stream_options" is not {"include_usage": true or false}.', param="stream_options")
    found = Wanted(
        prompts=_prompts(data) if kind == "completion" else (),
        turns=_turns(data) if kind == "chat" else (),
        n=_whole(data, "n", 1, MAX_CHOICES) or 1,
        max_tokens=_whole(data, limit, 1, most_tokens),
        temperature=_number(data, "temperature", 0, 100),
        top_p=_number(data, "top_p", 0, 1),
        top_k=_whole(data, "top_k", -1, 2**31),
        min_p=_number(data, "min_p", 0, 0.999),
        repetition_penalty=_number(data, "repetition_penalty", 0.01, 10),
        seed=None if (seed := _whole(data, "seed", -(2**63), 2**64)) is None else seed % _SEEDS,
        stops=_stops(data),
        stream=_yes(data, "stream"),
        usage=isinstance(options, dict) and options.get("include_usage") is True,
    )
    if found.n * max(1, len(found.prompts)) > MAX_CHOICES:
        raise Refused(
            422, f"{found.n} texts for {len(found.prompts)} prompts; at most {MAX_CHOICES} in all.", param="n"
        )
    return found


def _check_keys(data: Mapping[str, Any], kind: Kind) -> None:
    for key, value in data.items():
        if key in _NEUTRAL:
            if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in _NEUTRAL[key]):
                raise Refused(422, f"{key!r} cannot be obeyed here; leave it out.", param=key, code="unsupported_value")
        elif key not in _KNOWN[kind]:
            raise Refused(422, f"unknown key {key[:40]!r}.", param=key[:40], code="unknown_parameter")


def _prompts(data: Mapping[str, Any]) -> tuple[str, ...]:
    prompt = data.get("prompt")
    texts = prompt if isinstance(prompt, list) else [prompt]
    if not texts or len(texts) > MAX_CHOICES:
        raise Refused(422, f'"prompt" holds {len(texts)} texts; send 1 to {MAX_CHOICES}.', param="prompt")
    return tuple(check_text(t, '"prompt"', "prompt") for t in texts)


def _turns(data: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    messages = data.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise Refused(422, f'"messages" is not a list of 1 to {MAX_MESSAGES} messages.', param="messages")
    turns = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, dict):
            raise Refused(422, f"{where} is not an object with role and content.", param=where)
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise Refused(422, f"{where}: role {repr(role)[:40]} is none of {', '.join(_ROLES)}.", param=where)
        turns.append((_ROLES[role], _content(message.get("content"), where)))
    if turns[-1][0] != "user":
        raise Refused(422, "the last message is not the user's, so there is nothing to answer.", param="messages")
    return tuple(turns)


def _content(content: Any, where: str) -> str:
    if isinstance(content, list):
        texts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        if not texts or not all(isinstance(t, str) for t in texts):
            raise Refused(422, f"{where}: only parts of type text are understood.", param=where)
        content = "\n".join(t for t in texts if t is not None)
    return check_text(content, f"{where}: content", where)


def _stops(data: Mapping[str, Any]) -> tuple[str, ...]:
    stop = data.get("stop")
    stops = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if len(stops) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= 100 for s in stops):
        raise Refused(422, f'"stop" is not up to {MAX_STOPS} texts of 1 to 100 characters.', param="stop")
    return tuple(check_text(s, '"stop"', "stop") for s in stops)


def _number(data: Mapping[str, Any], key: str, low: float, high: float) -> float | None:
    value = data.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isnan(value):
        raise Refused(422, f"{key!r} is not a number from {low:g} to {high:g}.", param=key)
    return float(value)


def _whole(data: Mapping[str, Any], key: str, low: int, high: int) -> int | None:
    value = data.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused(422, f"{key!r} is not a whole number from {low} to {high}.", param=key)
    return value


def _yes(data: Mapping[str, Any], key: str) -> bool:
    value = data.get(key)
    if value not in (None, True, False) or (isinstance(value, int) and not isinstance(value, bool)):
        raise Refused(422, f"{key!r} is neither true nor false.", param=key)
    return bool(value)


# ---------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Shape:
    """How the answers to one request are written."""

    kind: Kind
    model: str
    id: str
    created: int

    @classmethod
    def new(cls, kind: Kind, model: str) -> Shape:
        head = "chatcmpl-" if kind == "chat" else "cmpl-"
        return cls(kind, model, head + secrets.token_hex(12), int(time.time()))

    def _head(self, streamed: bool) -> dict[str, Any]:
        chat = "chat.completion.chunk" if streamed else "chat.completion"
        name = chat if self.kind == "chat" else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def whole(self, texts: Sequence[tuple[str, str]], usage: Usage) -> dict[str, Any]:
        """`texts`: (text, finish reason) in the order of the choices."""
        choices = []
        for index, (text, finish) in enumerate(texts):
            said: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
            )
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": finish})
        return {**self._head(False), "choices": choices, "usage": usage.json()}

    def begins(self, choices: int) -> list[dict[str, Any]]:
        """A chat's first chunks: who speaks."""
        return [
            self._chunk(i, {"role": "assistant", "content": ""}, None)
            for i in range(choices if self.kind == "chat" else 0)
        ]

    def piece(self, index: int, text: str, finish: str | None) -> list[dict[str, Any]]:
        """Chunks for a new piece of a text, and for its end."""
        if self.kind == "completion":
            return [self._chunk(index, text, finish)]
        pieces = [self._chunk(index, {"content": text}, None)] if text else []
        return pieces + ([self._chunk(index, {}, finish)] if finish else [])

    def total(self, usage: Usage) -> dict[str, Any]:
        return {**self._head(True), "choices": [], "usage": usage.json()}

    def _chunk(self, index: int, said: Any, finish: str | None) -> dict[str, Any]:
        what = {"delta": said} if self.kind == "chat" else {"text": said}
        return {**self._head(True), "choices": [{"index": index, **what, "logprobs": None, "finish_reason": finish}]}


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def models(model: str, created: int) -> dict[str, Any]:
    return {"object": "list", "data": [one_model(model, created)]}


def one_model(model: str, created: int) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": created, "owned_by": "multistep"}


def error(error: Refused) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": _kind(error.status), "param": error.param, "code": error.code}}


def _kind(status: int) -> str:
    known = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
    return known.get(status, "server_error" if status >= 500 else "invalid_request_error")
