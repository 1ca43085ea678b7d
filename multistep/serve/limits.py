"""What a server takes and what it refuses: settings, request bodies, and the one error that becomes a 4xx or 503.

A body is read no further than its limit and no longer than its time, so neither size nor slowness holds anything. Nothing here
imports torch or a model.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from multistep.types import Spec, UserError

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_TEXTS = 256
MAX_BODY_BYTES = 1_000_000
MAX_CHARACTERS = 100_000
BODY_S = 10.0  # that a body may take to arrive, and the head of a request
_LEAST_TOKEN = 8  # characters of a bearer token


class Settings(Spec):
    """Of one server. `queue`: texts that may wait; `time_out`: seconds from the request to its whole answer; `max_tokens`: of an
    answer that is written; `batch`: texts that are answered together."""

    queue: Annotated[int, Field(ge=1, le=100_000)] = 256
    time_out: Annotated[float, Field(gt=0, le=3600)] = 30.0
    max_tokens: Annotated[int, Field(ge=1, le=100_000)] = 1024
    batch: Annotated[int, Field(ge=1, le=4096)] = 32


class Refused(Exception):
    """A request that is answered with `status` and one line. `param`: what of the request is meant; `code`: for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, after_s: float = 0
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {"retry-after": str(max(1, math.ceil(after_s)))} if status in (429, 503) else {}


def token_of(file: Path | None) -> str:
    """The bearer token: of a file, else of the environment's MULTISTEP_TOKEN; "" for none. Raises UserError."""
    if file is not None:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"token file: {file} cannot be read ({_reason(error)}).") from None
        where = f"token file: {file}"
    else:
        token, where = os.environ.get("MULTISTEP_TOKEN", "").strip(), "MULTISTEP_TOKEN"
        if not token:
            return ""
    if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{where}: a token is at least {_LEAST_TOKEN} ASCII characters without spaces. Write one into it."
        )
    return token


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or "not UTF-8").lower()


def holds(token: str, headers: Mapping[str, str]) -> bool:
    """Whether a request carries the token. Takes the same time wherever the two differ."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode())


# ---------------------------------------------------------------------------------------------- bodies


async def read_body(request: Request, seconds: float = BODY_S) -> bytes:
    """The body, read no further than the limit and no longer than `seconds`. Raises Refused."""
    from starlette.requests import ClientDisconnect

    said = request.headers.get("content-length", "")
    too_large = Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send fewer or shorter texts.")
    if said.isascii() and said.isdigit() and (len(said) > 12 or int(said) > MAX_BODY_BYTES):
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > MAX_BODY_BYTES:
                    raise too_large
                parts.append(chunk)
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {seconds:g} s; send it at once.") from None
    except ClientDisconnect:
        raise Refused(499, "the client left.") from None
    return b"".join(parts)


def read_json(body: bytes, example: str) -> dict[str, Any]:
    """A JSON object. Raises Refused, with an example of what to send."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number of 5,000 digits, 100,000 brackets
        raise Refused(400, f"the body is not JSON; send {example}.") from None
    if not isinstance(data, dict):
        raise Refused(422, f"the body is not a JSON object; send {example}.")
    return data


def texts_of(body: bytes) -> tuple[list[str], bool]:
    """The texts of a /predict body, and whether it was a single one. Raises Refused with what is wrong."""
    example = '{"text": "..."}'
    try:
        data = read_json(body, example)
    except Refused as error:
        if error.status == 400:
            raise
        data = {}
    if "text" not in data:
        raise Refused(422, f'the body has no "text"; send {example} or {{"text": ["...", ...]}}.')
    if len(data) > 1:
        unknown = next(key for key in data if key != "text")
        raise Refused(422, f'unknown key {unknown[:40]!r}; only "text" is known.')
    text = data["text"]
    texts = text if isinstance(text, list) else [text]
    if not texts:
        raise Refused(422, '"text" is an empty list; send at least one text.')
    if len(texts) > MAX_TEXTS:
        raise Refused(413, f'"text" holds {len(texts)} texts; send at most {MAX_TEXTS} in a request.')
    for place, one in enumerate(texts):
        check_text(one, f'"text"[{place}]' if isinstance(text, list) else '"text"')
    return texts, not isinstance(text, list)


def check_text(text: Any, where: str, param: str | None = None) -> str:
    """`text`, if it is one. Raises Refused."""
    if not isinstance(text, str):
        raise Refused(422, f"{where} is not a string.", param=param)
    if len(text) > MAX_CHARACTERS:
        raise Refused(413, f"{where} has {len(text)} characters; send at most {MAX_CHARACTERS}.", param=param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(422, f"{where} holds half of a surrogate pair, which is not a character.", param=param) from None
    return text
