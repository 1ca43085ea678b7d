"""A bundle behind HTTP.

    POST /predict {"text": "..."}        -> {"prediction": P, "model": "...", "took_ms": 3.1}
    POST /predict {"text": ["...", ...]} -> {"predictions": [P, ...], "model": "...", "took_ms": 3.1}
    GET  /health                         -> {"status": "ok", ...what the bundle says of itself}
    P = {"value": label | [labels] | number, "confidence": 0..1 or null, "scores": {the five likeliest labels}}

A bad request is answered with 4xx and {"error": "..."}. One thread predicts, one request after the other;
the event loop stays free, so /health answers meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multistep.types import Prediction, UserError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

MAX_TEXTS = 256
MAX_BODY_BYTES = 1_000_000
MAX_CHARACTERS = 100_000
_TOP = 5

_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["text"],
                "additionalProperties": False,
                "properties": {
                    "text": {
                        "oneOf": [
                            {"type": "string", "maxLength": MAX_CHARACTERS},
                            {
                                "type": "array",
                                "minItems": 1,
                                "maxItems": MAX_TEXTS,
                                "items": {"type": "string", "maxLength": MAX_CHARACTERS},
                            },
                        ]
                    }
                },
            },
            "example": {"text": "great film"},
        }
    },
}


class _Refused(Exception):
    """A request that is answered with a 4xx."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def create_app(predict: Callable[[list[str]], list[Prediction]], info: Mapping[str, Any]) -> FastAPI:
    """The application. `predict` need not be thread-safe. `info` is JSON; its "model" is said in every answer.

    Raises UserError when the extra `serve` is not installed.
    """
    _need_extra()
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    app = FastAPI(title="multistep", docs_url=None, redoc_url=None)
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="predict")
    model = str(info.get("model") or "model")

    # The routes take the raw request: FastAPI would read a body of any size before it checks it.
    async def answer(request: Request) -> JSONResponse:
        texts, single = _texts(await _body(request))
        start = time.perf_counter()
        found = await asyncio.get_running_loop().run_in_executor(worker, predict, texts)
        took_ms = round(1000 * (time.perf_counter() - start), 3)
        shown = [_shown(p) for p in found]
        head = {"prediction": shown[0]} if single else {"predictions": shown}
        return JSONResponse({**head, "model": model, "took_ms": took_ms})

    async def health() -> JSONResponse:
        return JSONResponse({**info, "status": "ok"})

    async def refused(_: Request, error: Exception) -> JSONResponse:
        status = error.status if isinstance(error, _Refused) else 422
        return JSONResponse({"error": str(error)}, status_code=status)

    async def not_here(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}. There are POST /predict and GET /health."
        return JSONResponse({"error": message}, status_code=error.status_code, headers=error.headers)

    answer.__annotations__ = {"request": Request}  # FastAPI resolves names in the module, and Request is not there
    app.add_api_route("/predict", answer, methods=["POST"], openapi_extra={"requestBody": _BODY}, response_model=None)
    app.add_api_route("/health", health, methods=["GET"], response_model=None)
    app.add_exception_handler(_Refused, refused)
    app.add_exception_handler(UserError, refused)
    app.add_exception_handler(HTTPException, not_here)
    return app


async def _body(request: Request) -> bytes:
    """The body, read no further than the limit."""
    said = request.headers.get("content-length", "")
    too_large = _Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send fewer or shorter texts.")
    if said.isascii() and said.isdigit() and (len(said) > 12 or int(said) > MAX_BODY_BYTES):
        raise too_large
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return body


def _texts(body: bytes) -> tuple[list[str], bool]:
    """The texts of a request body, and whether it was a single one. Raises _Refused with what is wrong."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number of 5,000 digits, 100,000 brackets
        raise _Refused(400, 'the body is not JSON; send {"text": "..."}.') from None
    if not isinstance(data, dict) or "text" not in data:
        raise _Refused(422, 'the body has no "text"; send {"text": "..."} or {"text": ["...", ...]}.')
    if len(data) > 1:
        unknown = next(key for key in data if key != "text")
        raise _Refused(422, f'unknown key {unknown[:40]!r}; only "text" is known.')
    text = data["text"]
    texts = text if isinstance(text, list) else [text]
    if not texts:
        raise _Refused(422, '"text" is an empty list; send at least one text.')
    if len(texts) > MAX_TEXTS:
        raise _Refused(413, f'"text" holds {len(texts)} texts; send at most {MAX_TEXTS} in a request.')
    for place, one in enumerate(texts):
        _check_text(one, f'"text"[{place}]' if isinstance(text, list) else '"text"')
    return texts, not isinstance(text, list)


def _check_text(text: Any, where: str) -> None:
    if not isinstance(text, str):
        raise _Refused(422, f"{where} is not a string.")
    if len(text) > MAX_CHARACTERS:
        raise _Refused(413, f"{where} has {len(text)} characters; send at most {MAX_CHARACTERS}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Refused(422, f"{where} holds half of a surrogate pair, which is not a character.") from None


def _shown(p: Prediction) -> dict[str, Any]:
    value = list(p.value) if isinstance(p.value, tuple) else p.value
    top = sorted(p.scores.items(), key=lambda item: -item[1])[:_TOP]
    return {"value": value, "confidence": p.confidence, "scores": dict(top)}


def serve(
    path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    announce: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> None:
    """Serve the bundle of a run (or a bare bundle folder) until a signal comes. Port 0 takes a free one.

    `announce` gets the address and what /health says once connections are accepted.
    Raises UserError: no bundle there, the extra missing, the port taken.
    """
    _need_extra()
    import uvicorn

    from multistep.bundle import load_bundle

    with _listen(host, port) as listening:  # before the model is read: a taken port is said at once
        bundle = load_bundle(Path(path))
        info = _about(Path(path), bundle.info)
        app = create_app(bundle.predict, info)
        if announce is not None:
            announce(_address(listening, host), info)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def _about(path: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """What /health says of a bundle: no folders of this machine, no numbers of the predictor."""
    folder = path.resolve()
    task, predictor = info["task"], info["predictor"]
    return {
        "model": folder.parent.name if folder.name == "model" else folder.name,
        "task": task["kind"],
        "labels": list(task.get("labels", ())),
        "predictor": predictor["kind"],
        "multistep": info["multistep"],
    }


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UserError(
            f"serve: cannot listen on {host}:{port}: {error.strerror}. Choose another with --port."
        ) from None


def _address(listening: socket.socket, host: str) -> str:
    port = listening.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _need_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f'serve: {error.name} is not installed. Run: pip install "multistep[serve]".') from None
