"""What every request passes before it is read: who was meant, who asks, how many do, how large it
is and how slow; and all are counted.

A web page can let its visitor's browser ask a service on the visitor's own machine, under a name
that it makes point there. Such a request names the wrong host, so a service without keys answers
to the names of the loopback alone.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from psa_vlm.errors import Overloaded, PsaVlmError, RequestError
from psa_vlm.serving import failures
from psa_vlm.serving.keys import is_loopback

if TYPE_CHECKING:
    from psa_vlm.serving.service import Service

API = ("/v1/", "/ui/chat")
"""Where what costs something begins."""


class Gate:
    """Middleware: refuses wrong hosts, strangers and one too many before their bodies are read,
    stops bodies that are too large or too slow, gives up clients that do not read, and counts.

    Args:
        app: behind it.
        service: with the limits, the keys and the metrics.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limits = self.service.limits
        start, got, status = time.perf_counter(), 0, 500
        whole = stuck = False

        async def limited() -> Message:
            nonlocal got, whole
            if whole:  # what comes now is the news that the client has gone, and no hurry
                return await receive()
            try:
                async with asyncio.timeout(start + limits.seconds - time.perf_counter()):
                    message = await receive()
            except TimeoutError:
                told = f"the body did not come within {limits.seconds} s"
                raise HTTPException(408, told) from None
            whole = not message.get("more_body", False)
            got += len(message.get("body", b""))
            if got > limits.body:
                raise HTTPException(413, f"the body is more than {limits.body:,} bytes")
            return message

        async def noted(message: Message) -> None:
            nonlocal status, stuck
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                async with asyncio.timeout(limits.seconds):
                    await send(message)
            except TimeoutError:
                stuck = True
                raise

        costs = scope["path"].startswith(API)
        app = self.app
        self.under_way += costs
        try:
            if (error := self._refused(scope, costs)) is not None:
                app = failures.response(error)
            await app(scope, limited, noted)
        except Exception:
            if not stuck:  # the server closes what has no end
                raise
        finally:
            self.under_way -= costs
            route = scope.get("route")
            path = getattr(route, "path", "other")
            metrics = self.service.metrics
            metrics.requests.labels(path, str(status)).inc()
            metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _refused(self, scope: Scope, costs: bool) -> PsaVlmError | None:
        """Why a request is not even read, if so."""
        headers = Headers(scope=scope)
        if self.service.keys is None and not _names_loopback(headers.getlist("host")):
            told = "without keys only this machine is served: ask for localhost or 127.0.0.1"
            return RequestError(told, None, "wrong_host", 403)
        if not costs:
            return None
        try:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            self.service.caller(key if key and scheme.lower() == "bearer" else None)
        except RequestError as error:
            return error
        return Overloaded(1) if self.under_way > self.service.limits.requests else None


def _names_loopback(hosts: list[str]) -> bool:
    """Whether a request's Host headers are one, which names a loopback."""
    if len(hosts) != 1:
        return False
    try:
        return is_loopback(urlsplit(f"//{hosts[0]}").hostname or "")
    except ValueError:
        return False
