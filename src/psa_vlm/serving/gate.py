"""What every request passes before it is read: who was meant, how large it is; and all are counted.

A web page can let its visitor's browser ask a service on the visitor's own machine, under a name
that it makes point there. Such a request names the wrong host, so a service without keys answers
to the names of the loopback alone.
"""

from __future__ import annotations

import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from psa_vlm.errors import RequestError
from psa_vlm.serving import failures
from psa_vlm.serving.keys import is_loopback
from psa_vlm.serving.metrics import Metrics


class Gate:
    """Middleware: refuses wrong hosts, stops large bodies before they are in memory, and counts.

    Args:
        app: behind it.
        most: bytes of a body.
        local: whether only a loopback may be asked for.
        metrics: that count.
    """

    def __init__(self, app: ASGIApp, most: int, local: bool, metrics: Metrics) -> None:
        self.app = app
        self.most = most
        self.local = local
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, got, status = time.perf_counter(), 0, 500

        async def limited() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.most:
                raise HTTPException(413, f"the body is more than {self.most:,} bytes")
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        app = self.app
        if self.local and not _names_loopback(Headers(scope=scope).getlist("host")):
            told = "without keys only this machine is served: ask for localhost or 127.0.0.1"
            app = failures.response(RequestError(told, None, "wrong_host", 403))
        try:
            await app(scope, limited, noted)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)


def _names_loopback(hosts: list[str]) -> bool:
    """Whether a request's Host headers are one, which names a loopback."""
    if len(hosts) != 1:
        return False
    try:
        return is_loopback(urlsplit(f"//{hosts[0]}").hostname or "")
    except ValueError:
        return False
