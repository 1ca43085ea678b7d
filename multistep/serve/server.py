"""The process: a socket, a bundle, a server that drains when it is told to stop.

SIGTERM and SIGINT: nothing new is accepted, what was asked is answered (for as long as a request may take), then the process ends.
A head of a request that does not arrive in time closes its connection; so do too many connections.
"""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from multistep.serve.app import create_app, need_extra
from multistep.serve.limits import BODY_S, Settings
from multistep.types import UserError

_KEEP_ALIVE_S = 30
_CONNECTIONS = 2000  # at once, or what the process may open; requests that were just answered count too

Announce = Callable[[str, Mapping[str, Any]], None]


def serve(
    path: str | Path, host: str = "127.0.0.1", port: int = 8000, announce: Announce | None = None,
    settings: Settings | None = None, token: str = "",
) -> bool:  # fmt: skip
    """Serve the bundle of a run (or a bare bundle folder) until a signal comes. Port 0 takes a free one. Whether all that was asked
    was answered. `settings`: None leaves the defaults; a bundle's own engine says how many texts go together and how many threads.

    `announce` gets the address and what /health says once connections are accepted.
    Raises UserError: no bundle there, the extra missing, the port taken.
    """
    need_extra()
    from multistep.bundle import load_bundle

    with _listen(host, port) as listening:  # before the model is read: a taken port is said at once
        bundle = load_bundle(Path(path))
        info = about(Path(path), bundle.info)
        settings = _as_tuned(settings or Settings(), bundle.info.get("engine") or {})
        app = _app(Path(path), bundle, info, settings, token)
        if not token and not is_loopback(host):
            logging.getLogger("multistep").warning(
                "%s can be reached from other machines and there is no token: give --token-file, or set MULTISTEP_TOKEN.",
                host,
            )
        if announce is not None:
            announce(_address(listening, host), info)
        return _run(app, listening, settings)


def _app(path: Path, bundle: Any, info: Mapping[str, Any], settings: Settings, token: str) -> Any:
    from multistep.serve.story import explain

    source = bundle if bundle.info.get("language") else bundle.predict
    return create_app(source, info, settings, token, explain(path, bundle.info, info))


def _as_tuned(settings: Settings, engine: Mapping[str, Any]) -> Settings:
    """What the bundle's engine was measured with."""
    if engine.get("threads"):
        import torch

        torch.set_num_threads(int(engine["threads"]))
    return settings.with_(batch=int(engine["batch"])) if engine.get("batch") else settings


def about(path: Path, info: Mapping[str, Any]) -> dict[str, Any]:
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


# ---------------------------------------------------------------------------------------------- the server


def _run(app: Any, listening: socket.socket, settings: Settings) -> bool:
    import uvicorn

    patience = _Patience()
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="error", access_log=False, ws="none", lifespan="off", proxy_headers=False, server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S, backlog=512, timeout_graceful_shutdown=max(1, round(settings.time_out)),
            limit_concurrency=_connections(), callback_notify=patience.look, timeout_notify=1,
        )
    )  # fmt: skip
    patience.server = server
    main = threading.current_thread() is threading.main_thread()
    # The server sends itself the signal again when it has drained; that is heard here and means nothing more.
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        server.run(sockets=[listening])
    finally:
        app.state.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return app.state.numbers.cut == 0


class _Patience:
    """Closes connections on which a head of a request has begun, or never began, and did not arrive in time, and those whose client
    does not read its answer."""

    def __init__(self) -> None:
        self.server: Any = None
        self._since: dict[Any, float] = {}

    async def look(self) -> None:
        now = time.monotonic()
        stuck = [c for c in self.server.server_state.connections if _no_head(c) or c.flow.write_paused]
        self._since = {c: self._since.get(c, now) for c in stuck}
        for connection, since in self._since.items():
            if now - since > BODY_S:
                connection.transport.abort()


def _no_head(connection: Any) -> bool:
    """Neither is a request being answered, nor does the keep-alive clock run."""
    cycle = connection.cycle
    return (cycle is None or cycle.response_complete) and connection.timeout_keep_alive_task is None


def _connections() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return _CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(_CONNECTIONS, soft - 64)) if soft > 0 else _CONNECTIONS


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(
            f"serve: cannot listen on {host}:{port}: {error.strerror}. Choose another with --port."
        ) from None


def _address(listening: socket.socket, host: str) -> str:
    port = listening.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
