"""The service: assess, decide, record, and only then reply."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from psa_vlm.data.sample import Turn
from psa_vlm.errors import AuditError, InputError, Overloaded, RequestError
from psa_vlm.inference import MAX_NEW_TOKENS
from psa_vlm.model.verdict import Verdict
from psa_vlm.policy.policy import Decision, Policy
from psa_vlm.serving import protocol, replies
from psa_vlm.serving.audit import Audit, Entry
from psa_vlm.serving.engine import Ask, Engine
from psa_vlm.serving.images import Picture, open_urls
from psa_vlm.serving.keys import Keys
from psa_vlm.serving.limits import Limits
from psa_vlm.serving.metrics import Metrics

Result = TypeVar("Result")

_logger = logging.getLogger(__name__)
_bearer = HTTPBearer(auto_error=False, description="A tenant's key; none on a loopback without.")


@dataclass(frozen=True)
class Model:
    """What the service calls its model, and the hash of the run behind it."""

    name: str
    hash: str


@dataclass(frozen=True)
class Caller:
    """Who asks, and the policy that holds for them."""

    tenant: str | None
    policy: Policy


class Service:
    """All that the routes share.

    Args:
        engine: computes verdicts and replies.
        model: its name and hash.
        policy: for everybody, or with a part for each tenant.
        audit: where every request is recorded.
        keys: of the tenants; None asks for no key, which is for a loopback alone.
        limits: of a request.

    Raises:
        PolicyError: the policy does not fit the engine's taxonomy, or lacks a tenant of the keys.
    """

    def __init__(
        self,
        engine: Engine,
        model: Model,
        policy: Policy,
        audit: Audit,
        keys: Keys | None = None,
        limits: Limits | None = None,
    ) -> None:
        policy.check(engine.taxonomy)
        self.engine = engine
        self.model = model
        self.audit = audit
        self.keys = keys
        self.limits = limits or Limits()
        self.metrics = Metrics(engine)
        self._everybody = Caller(None, policy)
        self._tenants = {
            name: Caller(name, policy.for_tenant(name)) for name in (keys.hashes if keys else ())
        }

    def caller(self, key: str | None) -> Caller:
        """Who asks.

        Raises:
            RequestError: the key is missing or not known.
        """
        if self.keys is None:
            return self._everybody
        tenant = None if key is None else self.keys.tenant(key)
        if tenant is None:
            told = "no key; send 'Authorization: Bearer KEY'" if key is None else "unknown key"
            raise RequestError(told, None, "invalid_api_key", 401)
        return self._tenants[tenant]

    async def chat(self, body: protocol.ChatRequest, caller: Caller) -> Response:
        """Answer, answer with a hint, or refuse, as the caller's policy says.

        Raises:
            RequestError: the request can't be served as it is, or took too long.
            InputError: the model can't read it, as where it is too long.
            Overloaded: too many requests wait.
            AuditError: the record can't be written; the reply stays here.
        """
        start, request = time.perf_counter(), f"chatcmpl-{uuid.uuid4().hex}"
        self._check_model(body.model)
        if body.temperature and not self.engine.samples:
            raise RequestError(
                "temperature: this engine answers greedily; use 0, or leave it out",
                "temperature",
                "unsupported_value",
            )
        ask, pictures = await self._ask(
            protocol.conversation(body.messages),
            [url for one in body.messages for url in protocol.image_urls(one.content)],
            caller.policy,
            self._tokens(body),
        )
        opened = time.perf_counter()
        reply = await self._in_time(self.engine.reply(ask))
        verdict, decision = reply.verdict, reply.decision
        replied = time.perf_counter()
        await self._record(request, "chat", caller, pictures, verdict, decision)
        psa = replies.psa(
            verdict, decision, pictures, caller.policy, _timings(start, opened, replied)
        )
        if body.stream:
            events = replies.chunks(request, self.model.name, reply, psa)
            return StreamingResponse(events, media_type="text/event-stream")
        return JSONResponse(replies.completion(request, self.model.name, reply, psa))

    async def moderate(self, body: protocol.ModerationRequest, caller: Caller) -> Response:
        """The verdict alone, and what the caller's policy would do; errors as `chat`."""
        start, request = time.perf_counter(), f"modr-{uuid.uuid4().hex}"
        if body.model is not None:
            self._check_model(body.model)
        urls = protocol.image_urls(body.input)
        if not urls:
            raise RequestError("no image; what is assessed is an image beside words", "input")
        turns = protocol.conversation([protocol.UserMessage(role="user", content=body.input)])
        ask, pictures = await self._ask(turns, urls, caller.policy, 1)
        opened = time.perf_counter()
        verdict = await self._in_time(self.engine.assess(ask))
        decision = caller.policy.decide(verdict, self.engine.taxonomy)
        replied = time.perf_counter()
        await self._record(request, "moderation", caller, pictures, verdict, decision)
        if verdict.error is not None:  # there is no number to give, and "not flagged" would be one
            raise RequestError(replies.NOT_ASSESSED, None, "verdict_error", 500)
        psa = replies.psa(
            verdict, decision, pictures, caller.policy, _timings(start, opened, replied)
        )
        return JSONResponse(
            replies.moderation(request, self.model.name, verdict, self.engine.taxonomy, psa)
        )

    # --- steps -----------------------------------------------------------------------------------

    def _check_model(self, name: str) -> None:
        if name != self.model.name:
            told = f"there is no model '{name}' here; use '{self.model.name}'"
            raise RequestError(told, "model", "model_not_found", 404)

    def _tokens(self, body: protocol.ChatRequest) -> int:
        """Most tokens of the answer; a client may name them in OpenAI's old way or its new one."""
        old, new = body.max_tokens, body.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise RequestError(
                "max_tokens and max_completion_tokens differ; give one", "max_tokens"
            )
        name, given = ("max_tokens", old) if new is None else ("max_completion_tokens", new)
        if given is None:
            return min(MAX_NEW_TOKENS, self.limits.tokens)
        if given > self.limits.tokens:
            raise RequestError(f"{name}: at most {self.limits.tokens}", name)
        return given

    async def _ask(
        self, turns: tuple[Turn, ...], urls: Sequence[str], policy: Policy, tokens: int
    ) -> tuple[Ask, tuple[Picture, ...]]:
        pictures = await run_in_threadpool(open_urls, urls, self.limits)
        frames = tuple(frame for picture in pictures for frame in picture.frames)
        return Ask(frames, turns, policy, tokens), pictures

    async def _in_time(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            return await asyncio.wait_for(work, self.limits.seconds)
        except TimeoutError:
            told = f"no reply within {self.limits.seconds} s"
            raise RequestError(told, None, "timeout", 504) from None

    async def _record(
        self,
        request: str,
        endpoint: str,
        caller: Caller,
        pictures: Sequence[Picture],
        verdict: Verdict | None,
        decision: Decision,
    ) -> None:
        entry = Entry(
            request,
            endpoint,
            caller.tenant,
            tuple(picture.sha256 for picture in pictures),
            replies.scores(verdict, self.engine.taxonomy),
            replies.without_evidence(verdict),
            replies.decided(decision),
            {"name": caller.policy.name, "hash": caller.policy.hash},
            {"name": self.model.name, "hash": self.model.hash},
        )
        await run_in_threadpool(self.audit.append, entry)
        self.metrics.decisions.labels(endpoint, decision.action).inc()


def _timings(start: float, opened: float, replied: float) -> dict[str, float]:
    """Milliseconds: reading the images, in the engine, and all until the record was written."""
    now = time.perf_counter()
    return {
        "images_ms": (opened - start) * 1000,
        "engine_ms": (replied - opened) * 1000,
        "audit_ms": (now - replied) * 1000,
        "total_ms": (now - start) * 1000,
    }


def _caller(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    service: Service = request.app.state.service
    return service.caller(None if given is None else given.credentials)


Who = Annotated[Caller, Depends(_caller)]


def create_app(service: Service) -> FastAPI:
    """The routes of a service; the engine runs while the app does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.engine:
            app.state.ready = True
            yield
            app.state.ready = False
        service.audit.close()

    app = FastAPI(title="psa-vlm", lifespan=lifespan)
    app.state.service = service
    app.add_middleware(_Gate, most=service.limits.body, metrics=service.metrics)
    _answer_errors(app)

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

    return app


# --- errors and limits ---------------------------------------------------------------------------


def _answer_errors(app: FastAPI) -> None:
    """Every error in the form that OpenAI's clients read."""

    def answer(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
        return JSONResponse(protocol.error_body(error), error.status, headers)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return answer(error, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return answer(protocol.invalid(error.errors()[0], error.body))

    @app.exception_handler(InputError)
    async def unreadable(_: Request, error: InputError) -> Response:
        return answer(RequestError(str(error)))

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Overloaded) -> Response:
        told = RequestError(str(error), None, "overloaded", 429)
        return answer(told, {"Retry-After": str(error.retry_after)})

    @app.exception_handler(AuditError)
    async def unrecorded(_: Request, error: AuditError) -> Response:
        _logger.error("%s", error)
        told = "the request could not be recorded, so it is not answered"
        return answer(RequestError(told, None, "audit_unavailable", 503))

    @app.exception_handler(StarletteHTTPException)
    async def http(_: Request, error: StarletteHTTPException) -> Response:
        told = RequestError(str(error.detail), None, "http_error", error.status_code)
        return answer(told, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return answer(RequestError("the request failed", None, "internal_error", 500))


class _Gate:
    """Stops a body that is too large before it is in memory, and counts every request."""

    def __init__(self, app: ASGIApp, most: int, metrics: Metrics) -> None:
        self.app = app
        self.most = most
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

        try:
            await self.app(scope, limited, noted)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
