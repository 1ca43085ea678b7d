"""Around every request: who may come in, how long it took, and how a refusal is said."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from multistep.serve.limits import Refused, holds

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from multistep.serve.numbers import Numbers

ROUTES = ("/predict", "/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/explain", "/")
_OPEN = {"/", "/health"}  # without a token


def error_of(path: str, error: Refused) -> dict[str, Any]:
    if path.startswith("/v1/"):
        from multistep.serve import openai

        return openai.error(error)
    return {"error": str(error)}


class Gate:
    """`token`: "" lets everybody in."""

    def __init__(self, app: ASGIApp, token: str, numbers: Numbers):
        self.app, self.token, self.numbers = app, token, numbers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, begun, status = scope["path"], time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self.token and path not in _OPEN and not self._may(scope):
                error = Refused(
                    401, "no or wrong token; send the header Authorization: Bearer <token>.", code="invalid_api_key"
                )
                await self._refuse(path, error, scope, receive, noted)
            else:
                await self.app(scope, receive, noted)
        except asyncio.CancelledError:  # the time to drain is over
            self.numbers.cut += 1
            if not status:
                await self._refuse(path, Refused(503, "the server stops."), scope, receive, noted)
        finally:
            self.numbers.request(path if path in ROUTES else "other", status or 500, time.perf_counter() - begun)
        return None

    def _may(self, scope: Scope) -> bool:
        from starlette.datastructures import Headers

        return holds(self.token, Headers(scope=scope))

    async def _refuse(self, path: str, error: Refused, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import JSONResponse

        asks = {"www-authenticate": "Bearer"} if error.status == 401 else {}
        headers = {**error.headers, **asks, "connection": "close"}
        await JSONResponse(error_of(path, error), error.status, headers)(scope, receive, send)
