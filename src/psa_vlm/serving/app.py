"""The service's routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from psa_vlm.errors import RequestError
from psa_vlm.serving import protocol
from psa_vlm.serving.failures import answer_errors
from psa_vlm.serving.gate import Gate
from psa_vlm.serving.service import Caller, Service
from psa_vlm.serving.ui import add_page

_bearer = HTTPBearer(auto_error=False, description="A tenant's key; none on a loopback without.")


def _caller(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    service: Service = request.app.state.service
    return service.caller(None if given is None else given.credentials)


Who = Annotated[Caller, Depends(_caller)]


def create_app(service: Service) -> FastAPI:
    """The routes of a service; the engine runs and the policy is watched while the app is up."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.engine:
            watch = asyncio.create_task(service.policies.watch())
            app.state.ready = True
            yield
            app.state.ready = False
            watch.cancel()
        service.audit.close()

    app = FastAPI(title="psa-vlm", lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Gate, service=service)
    answer_errors(app)

    @app.post("/v1/chat/completions")
    async def chat(body: protocol.ChatRequest, who: Who) -> Response:
        """A reply to a conversation with images; all of them are assessed first."""
        return await service.chat(body, who)

    @app.post("/v1/moderations")
    async def moderations(body: protocol.ModerationRequest, who: Who) -> Response:
        """How risky images are in the light of words."""
        return await service.moderate(body, who)

    @app.get("/v1/models")
    async def models(who: Who) -> dict[str, Any]:
        """The one model that is served."""
        model = {"id": service.model.name, "object": "model", "created": 0, "owned_by": "psa-vlm"}
        return {"object": "list", "data": [model]}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Requests would be served: the engine runs, and the audit log answers."""
        if not getattr(app.state, "ready", False):
            raise RequestError("the engine is not running", None, "not_ready", 503)
        await run_in_threadpool(service.audit.check)
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.page(), media_type=service.metrics.media_type)

    add_page(app, service)
    return app
