"""A bundle behind HTTP: the routes.

    POST /predict {"text": "..."}        -> {"prediction": P, "model": "...", "took_ms": 3.1}
    POST /predict {"text": ["...", ...]} -> {"predictions": [P, ...], "model": "...", "took_ms": 3.1}
    POST /v1/completions, /v1/chat/completions, GET /v1/models      as OpenAI has them (openai.py)
    GET  /health     {"status": "ok", ...what the bundle says of itself}; open to all
    GET  /metrics    Prometheus (numbers.py)      GET /explain  why this is served (story.py)      GET /  a page to try it
    P = {"value": label | [labels] | number, "confidence": 0..1 or null, "scores": {the five likeliest labels}, "stage": "...",
         and where labels are promised: "candidates": [...], "abstains": true | false}

A bad request is answered with 4xx and {"error": "..."}, below /v1 with OpenAI's error. The event loop only reads and writes; what
costs time is done by one thread (queue.py, writer.py), many requests at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multistep.serve.gate import ROUTES, Gate, error_of
from multistep.serve.limits import (
    MAX_CHARACTERS,
    MAX_TEXTS,
    Refused,
    Settings,
    holds,
    read_body,
    read_json,
    texts_of,
)
from multistep.types import Prediction, UserError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from starlette.responses import Response

    from multistep.language_bundle import LanguageBundle
    from multistep.serve.language import Language
    from multistep.serve.numbers import Numbers
    from multistep.serve.openai import Kind, Wanted
    from multistep.serve.queue import Waits

_TOP = 5
_WATCH_S = 1.0  # before which nobody looks whether the client is still there: looking costs a busy server more than most answers
_PAGE = Path(__file__).parent / "page" / "index.html"
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TEXT = {"type": "string", "maxLength": MAX_CHARACTERS}
_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["text"],
                "additionalProperties": False,
                "properties": {
                    "text": {"oneOf": [_TEXT, {"type": "array", "minItems": 1, "maxItems": MAX_TEXTS, "items": _TEXT}]}
                },
            },
            "example": {"text": "great film"},
        }
    },
}
_EXAMPLES = {
    "chat": '{"model": "...", "messages": [{"role": "user", "content": "..."}]}',
    "completion": '{"model": "...", "prompt": "..."}',
}
_OBJECT = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}


class _Labels:
    """A bundle that gives labels or numbers, behind the queue."""

    writes = converses = False  # as a Language has them

    def __init__(self, predict: Callable[[list[str]], Sequence[Prediction]], settings: Settings, numbers: Numbers):
        from multistep.serve.queue import Batcher

        self._queue = Batcher[str, Prediction](predict, settings.batch, settings.queue, numbers)
        self.predict = self._queue.ask
        self.close = self._queue.close

    @property
    def waiting(self) -> int:
        return self._queue.waiting

    def arrives(self, change: int) -> None:
        self._queue.arriving += change


def create_app(
    source: Callable[[list[str]], Sequence[Prediction]] | LanguageBundle,
    info: Mapping[str, Any],
    settings: Settings | None = None,
    token: str = "",
    story: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The application. `source`: what maps texts to predictions (it need not be thread-safe), or a bundle that writes. `info` is JSON;
    its "model" is said in every answer. `token`: "" lets everybody in. `story`: what /explain says.

    Raises UserError when the extra `serve` is not installed.
    """
    need_extra()
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException

    from multistep.serve import openai
    from multistep.serve.numbers import Numbers

    settings = settings or Settings()
    numbers = Numbers()
    answerer = _Labels(source, settings, numbers) if callable(source) else _language(source, settings, numbers)
    numbers.watch_queue(lambda: answerer.waiting)
    model, created = str(info.get("model") or "model"), int(time.time())
    speaks = {} if callable(source) else {"writes": answerer.writes, "converses": answerer.converses}
    about = {**info, **speaks}
    page = _PAGE.read_bytes()
    told = json.dumps(story if story is not None else dict(info), ensure_ascii=False, allow_nan=False).encode()

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        answerer.close()

    app = FastAPI(title="multistep", docs_url=None, redoc_url=None, lifespan=life)
    app.state.numbers, app.state.close = numbers, answerer.close

    # The routes take the raw request: FastAPI would read a body of any size before it checks it.
    async def answer(request: Request) -> Response:
        texts, single = texts_of(await _arrived(request, answerer))
        start = time.perf_counter()
        found = await answerer.predict(texts, settings.time_out, _while_there(request))
        took_ms = round(1000 * (time.perf_counter() - start), 3)
        for p in found:
            numbers.answered(p.stage)
        shown = [_shown(p) for p in found]
        head = {"prediction": shown[0]} if single else {"predictions": shown}
        return JSONResponse({**head, "model": model, "took_ms": took_ms})

    async def written(request: Request, kind: Kind) -> Response:
        data = read_json(await _arrived(request, answerer), _EXAMPLES[kind])
        if isinstance(answerer, _Labels):
            raise Refused(
                422, "this bundle does not write token by token; use POST /predict.", code="unsupported_model"
            )
        asked = openai.wanted(data, kind, model, settings.max_tokens)
        shape = openai.Shape.new(kind, model)
        return await _write(request, answerer, asked, shape, settings.time_out, numbers)

    async def completions(request: Request) -> Response:
        return await written(request, "completion")

    async def chat(request: Request) -> Response:
        return await written(request, "chat")

    async def models() -> Response:
        return JSONResponse(openai.models(model, created))

    async def one_model(name: str) -> Response:
        if name != model:
            raise Refused(404, f"there is no model {name[:60]!r}; this server has {model!r}.", code="model_not_found")
        return JSONResponse(openai.one_model(model, created))

    async def health(request: Request) -> Response:
        known = not token or holds(token, request.headers)
        return JSONResponse({**(about if known else {}), "status": "ok"})

    async def metrics() -> Response:
        return Response(numbers.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def explained() -> Response:
        return Response(told, media_type="application/json")

    async def shown_page() -> Response:
        headers = {
            "content-security-policy": _POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        return HTMLResponse(page, headers=headers)

    async def refused(request: Request, error: Exception) -> Response:
        known = error if isinstance(error, Refused) else Refused(422, str(error))
        return JSONResponse(error_of(request.url.path, known), status_code=known.status, headers=known.headers)

    async def not_here(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}. There are POST /predict, /v1/completions, /v1/chat/completions and GET {', '.join(ROUTES[3:])}."
        content = error_of(request.url.path, Refused(error.status_code, message))
        return JSONResponse(content, status_code=error.status_code, headers=error.headers)

    async def broken(request: Request, error: Exception) -> Response:
        return JSONResponse(
            error_of(request.url.path, Refused(500, "something is broken here; see the server's log.")), 500
        )

    # Straight to the function: what FastAPI does before it calls one takes a quarter of a request's time here.
    bodies = {
        "/predict": (answer, _BODY),
        "/v1/completions": (completions, _OBJECT),
        "/v1/chat/completions": (chat, _OBJECT),
    }
    for path, (route, _) in bodies.items():
        app.router.add_route(path, route, methods=["POST"])
    health.__annotations__ = {"request": Request}  # FastAPI resolves names in the module, and Request is not there
    for path, route in (
        ("/v1/models", models),
        ("/v1/models/{name:path}", one_model),
        ("/health", health),
        ("/metrics", metrics),
        ("/explain", explained),
    ):
        app.add_api_route(path, route, methods=["GET"], response_model=None)
    app.add_api_route("/", shown_page, methods=["GET", "HEAD"], response_model=None, include_in_schema=False)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(UserError, refused)
    app.add_exception_handler(HTTPException, not_here)
    app.add_exception_handler(Exception, broken)
    app.add_middleware(Gate, token=token, numbers=numbers)
    app.openapi = lambda: _described(app, {path: body for path, (_, body) in bodies.items()})
    return app


def _described(app: FastAPI, bodies: Mapping[str, Any]) -> dict[str, Any]:
    """The interface as OpenAPI, with the routes that FastAPI does not know."""
    from fastapi.openapi.utils import get_openapi

    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, body in bodies.items():
        answers = {"200": {"description": "Answered."}, "4XX": {"description": "Refused, in a line."}}
        found["paths"][path] = {"post": {"summary": path, "requestBody": body, "responses": answers}}
    return found


def _language(bundle: LanguageBundle, settings: Settings, numbers: Numbers) -> Language:
    from multistep.serve.language import Language

    return Language(bundle, settings, numbers)


# ---------------------------------------------------------------------------------------------- requests


async def _arrived(request: Request, answerer: Any) -> bytes:
    """The body; whoever makes batches knows that it is on its way."""
    answerer.arrives(1)
    try:
        return await read_body(request)
    finally:
        answerer.arrives(-1)


def _while_there(request: Request) -> Waits:
    """Wait for an answer as long as the client does. Most answers come before it is worth looking."""

    async def waits(future: asyncio.Future[Any]) -> Any:
        await asyncio.wait([future], timeout=_WATCH_S)
        if not future.done():
            leaving = asyncio.ensure_future(request.receive())
            try:
                await asyncio.wait([future, leaving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
            if not future.done():
                raise Refused(499, "the client left.")
        return future.result()

    return waits


async def _write(
    request: Request, language: Language, asked: Wanted, shape: Any, seconds: float, numbers: Numbers
) -> Response:
    from fastapi.responses import JSONResponse, StreamingResponse

    from multistep.serve import openai
    from multistep.serve.language import finished, late

    begun = time.perf_counter()
    writing, read = await language.begin(asked)

    def usage(said: Sequence[Any]) -> openai.Usage:
        found = openai.Usage(read, sum(len(s.written.ids) for s in said if s is not None))
        numbers.tokens(found.prompt, found.completion)
        return found

    if not asked.stream:
        said = await finished(writing, seconds - (time.perf_counter() - begun), _while_there(request))
        numbers.answered("", len(said))
        return JSONResponse(shape.whole([(s.text, s.finish) for s in said], usage(said)))

    until = asyncio.get_running_loop().time() + seconds

    async def events() -> AsyncIterator[bytes]:
        try:
            for chunk in shape.begins(len(writing.said)):
                yield openai.event(chunk)
            ended = 0
            while ended < len(writing.said):
                async with asyncio.timeout_at(until):
                    found = await writing.pieces.get()
                if isinstance(found, Exception):
                    raise found
                number, text, said = found
                ended += said is not None
                for chunk in shape.piece(number, text, said.finish if said else None):
                    yield openai.event(chunk)
            total = usage(writing.said)
            numbers.answered("", ended)
            if asked.usage:
                yield openai.event(shape.total(total))
            yield openai.DONE
        except TimeoutError:
            yield openai.event(openai.error(late(writing, seconds)))
        finally:
            writing.leave()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _shown(p: Prediction) -> dict[str, Any]:
    value = list(p.value) if isinstance(p.value, tuple) else _finite(p.value)
    top = heapq.nlargest(_TOP, p.scores, key=p.scores.__getitem__)
    scores = {label: _finite(p.scores[label]) for label in top}
    shown = {"value": value, "confidence": _finite(p.confidence), "scores": scores, "stage": p.stage}
    if p.candidates is not None:
        shown |= {"candidates": list(p.candidates), "abstains": p.abstains}
    return shown


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def need_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f'serve: {error.name} is not installed. Run: pip install "multistep[serve]".') from None
