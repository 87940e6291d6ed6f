"""The way of a request: read it, assess, decide, record, and only then answer."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from psa_vlm.errors import AuditError, Overloaded, RequestError
from psa_vlm.inference import MAX_NEW_TOKENS
from psa_vlm.policy.policy import Policy
from psa_vlm.serving import failures, protocol, replies
from psa_vlm.serving.audit import Audit, Entry
from psa_vlm.serving.engine import Answer, Ask, Assessed, End, Engine
from psa_vlm.serving.explained import explained
from psa_vlm.serving.images import Picture, open_urls
from psa_vlm.serving.keys import Keys
from psa_vlm.serving.limits import Limits
from psa_vlm.serving.metrics import Metrics
from psa_vlm.serving.policies import Policies

if TYPE_CHECKING:
    from PIL.Image import Image

    from psa_vlm.data.sample import Turn
    from psa_vlm.evaluation.drift import DriftMonitor
    from psa_vlm.model.verdict import Verdict
    from psa_vlm.serving.remote import Remote

Result = TypeVar("Result")
REASON = 300
"""Characters that are recorded of why a request failed."""
DECODERS = 4
"""Requests whose images are opened at once; each may take a gigabyte meanwhile."""

_logger = logging.getLogger(__name__)


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


@dataclass
class _Trace:
    """What is known of a request on its way."""

    endpoint: str
    id: str
    caller: Caller
    concepts: Mapping[str, str] = field(default_factory=dict)
    explains: bool = False
    pictures: tuple[Picture, ...] = ()
    start: float = field(default_factory=time.perf_counter)
    timings: dict[str, float] = field(default_factory=dict)
    record: str = ""

    def mark(self, step: str) -> None:
        """Note the milliseconds of a step that ends now, and of all until now."""
        total = (time.perf_counter() - self.start) * 1000
        since = total - self.timings.get("total_ms", 0.0)
        self.timings[step] = self.timings.get(step, 0.0) + since
        self.timings["total_ms"] = total


class Service:
    """All that the routes share.

    Args:
        engine: assesses and answers.
        model: its name and hash.
        policy: for everybody, or with a part for each tenant.
        audit: where every request is recorded.
        keys: of the tenants; None asks for no key, which is for a loopback alone.
        limits: of a request.
        load: reads the policy anew; None for one that stays.
        remote: fetches images by URL; None refuses them.
        drift: watches the calibrated scores; None for a run without a calibration.

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
        load: Callable[[], Policy] | None = None,
        remote: Remote | None = None,
        drift: DriftMonitor | None = None,
    ) -> None:
        self.engine = engine
        self.model = model
        self.audit = audit
        self.keys = keys
        self.limits = limits or Limits()
        self.remote = remote
        self.drift = drift
        self._decoders = asyncio.Semaphore(DECODERS)
        self.metrics = Metrics(engine)
        tenants = None if keys is None else keys.hashes
        self.policies = Policies(policy, engine.taxonomy, tenants, load, self.metrics.reloads)

    def caller(self, key: str | None) -> Caller:
        """Who asks.

        Raises:
            RequestError: the key is missing or not known.
        """
        tenant = None
        if self.keys is not None:
            tenant = None if key is None else self.keys.tenant(key)
            if tenant is None:
                told = "no key; send 'Authorization: Bearer KEY'" if key is None else "unknown key"
                raise RequestError(told, None, "invalid_api_key", 401)
        return Caller(tenant, self.policies.of(tenant))

    async def chat(
        self,
        body: protocol.ChatRequest,
        caller: Caller,
        concepts: Mapping[str, str] | None = None,
        explains: bool = False,
    ) -> Response:
        """Answer, answer with a hint, or refuse, as the caller's policy says.

        Args:
            body: what is asked.
            caller: who asks.
            concepts: risk type -> level to take instead of the predicted one; the record says so.
            explains: for the page: `psa` also holds what `explained` tells.

        Raises:
            RequestError: the request can't be served as it is, took too long, or an engine
                elsewhere failed.
            InputError: the model can't read it, as where it is too long.
            Overloaded: too many requests wait.
            AuditError: the record can't be written; the reply stays here.
        """
        endpoint = "page" if explains else "chat"
        request = f"chatcmpl-{uuid.uuid4().hex}"
        trace = _Trace(endpoint, request, caller, concepts or {}, explains)
        async with self._failing_on_record(trace), AsyncExitStack() as stack:
            ask = await self._chat_ask(body, trace)
            answer = await self._in_time(trace, self.engine.answer(ask))
            stack.push_async_callback(answer.parts.aclose)
            trace.mark("verdict_ms")
            await self._record(trace, Assessed(answer.verdict, answer.decision))
            first = await self._part(trace, answer)
            trace.mark("answer_ms")
            if body.stream:  # its status is told now; what fails later is told in the stream
                asked = body.stream_options is not None and body.stream_options.include_usage
                chunks = replies.Chunks(trace.id, self.model.name, answer.decision, bool(asked))
                events = self._events(trace, answer, first, chunks, stack.pop_all())
                return StreamingResponse(events, media_type="text/event-stream")
            words, part = [], first
            while isinstance(part, str):
                words.append(part)
                part = await self._part(trace, answer)
            trace.mark("answer_ms")
            text, psa = "".join(words), await self._psa(trace, answer)
            return JSONResponse(
                replies.completion(trace.id, self.model.name, answer.decision, text, part, psa)
            )

    async def moderate(self, body: protocol.ModerationRequest, caller: Caller) -> Response:
        """The verdict alone, and what the caller's policy would do; errors as `chat`."""
        trace = _Trace("moderation", f"modr-{uuid.uuid4().hex}", caller)
        async with self._failing_on_record(trace):
            if body.model is not None:
                self._check_model(body.model)
            urls = protocol.image_urls(body.input)
            if not urls:
                raise RequestError("no image; what is assessed is an image beside words", "input")
            turns = self._turns([protocol.UserMessage(role="user", content=body.input)])
            ask = Ask(await self._images(trace, urls), turns, caller.policy, 1)
            assessed = await self._in_time(trace, self.engine.assess(ask))
            trace.mark("verdict_ms")
            await self._record(trace, assessed)
        verdict = assessed.verdict
        if verdict is None or verdict.error is not None:  # "not flagged" would be a verdict
            raise RequestError(replies.NOT_ASSESSED, None, "verdict_error", 500)
        psa = await self._psa(trace, assessed)
        return JSONResponse(
            replies.moderation(trace.id, self.model.name, verdict, self.engine.taxonomy, psa)
        )

    # --- what is asked ---------------------------------------------------------------------------

    async def _chat_ask(self, body: protocol.ChatRequest, trace: _Trace) -> Ask:
        self._check_model(body.model)
        if body.temperature and not self.engine.samples:
            raise RequestError(
                "temperature: this engine answers greedily; use 0, or leave it out",
                "temperature",
                "unsupported_value",
            )
        if body.stream_options is not None and not body.stream:
            raise RequestError("stream_options: only for a stream", "stream_options")
        turns = self._turns(body.messages)
        urls = [url for one in body.messages for url in protocol.image_urls(one.content)]
        tokens = self._tokens(body)
        images = await self._images(trace, urls)
        if trace.concepts and not images:
            raise RequestError("concepts: without an image there is none to override", "concepts")
        return Ask(
            images, turns, trace.caller.policy, tokens, body.temperature or 0.0, trace.concepts
        )

    def _turns(self, messages: Sequence[protocol.Message]) -> tuple[Turn, ...]:
        """The words of a conversation, no more than may be read: to read them takes time too."""
        turns = protocol.conversation(messages)
        most = self.limits.characters
        if sum(len(turn.text) for turn in turns) > most:
            told = f"more than {most:,} characters in the request; shorten the text"
            raise RequestError(told, None, "text_too_long")
        return turns

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

    async def _images(self, trace: _Trace, urls: Sequence[str]) -> tuple[Image, ...]:
        """Every frame of every image, opened within the limits."""
        fetched: dict[str, bytes] = {}
        if self.remote is not None and len(urls) <= self.limits.images:
            fetched = await self._in_time(trace, self.remote.fetch(urls))
        if urls:
            trace.pictures = await self._in_time(trace, self._open(urls, fetched))
        trace.mark("images_ms")
        return tuple(frame for picture in trace.pictures for frame in picture.frames)

    async def _open(self, urls: Sequence[str], fetched: Mapping[str, bytes]) -> tuple[Picture, ...]:
        async with self._decoders:
            return await run_in_threadpool(open_urls, urls, self.limits, fetched)

    # --- what is answered ------------------------------------------------------------------------

    async def _part(self, trace: _Trace, answer: Answer) -> str | End:
        return await self._in_time(trace, anext(answer.parts))

    async def _events(
        self,
        trace: _Trace,
        answer: Answer,
        first: str | End,
        chunks: replies.Chunks,
        opened: AsyncExitStack,
    ) -> AsyncIterator[str]:
        """The stream of an answer: its decision, its words as they come, and its end."""
        async with opened:
            try:
                yield chunks.decision(await self._psa(trace, answer))
                part = first
                while isinstance(part, str):
                    yield chunks.words(part)
                    part = await self._part(trace, answer)
                yield chunks.end(part)
            except Exception as error:
                _logger.exception("%s broke off", trace.id)
                try:
                    await self._record_failure(trace, error)
                except AuditError as unrecorded:
                    _logger.error("%s", unrecorded)
                yield chunks.failure(failures.told(error))

    async def _psa(self, trace: _Trace, found: Assessed | Answer) -> replies.Psa:
        verdict, decision, policy = found.verdict, found.decision, trace.caller.policy
        psa = replies.psa(verdict, decision, trace.pictures, policy, trace.record, trace.timings)
        if not trace.explains:
            return psa
        more = await run_in_threadpool(
            explained, verdict, decision, trace.pictures, policy, self.engine
        )
        return {**psa, "explained": more}

    async def _in_time(self, trace: _Trace, work: Awaitable[Result]) -> Result:
        left = trace.start + self.limits.seconds - time.perf_counter()
        try:
            return await asyncio.wait_for(work, max(left, 0))
        except TimeoutError:
            told = f"no whole reply within {self.limits.seconds} s"
            raise RequestError(told, None, "timeout", 504) from None

    # --- what is recorded ------------------------------------------------------------------------

    async def _record(self, trace: _Trace, assessed: Assessed) -> None:
        """Put a decision on record; when this returns, it is on the disk."""
        trace.record = await self._append(trace, assessed)
        self._watch(assessed.verdict)
        self.metrics.decisions.labels(trace.endpoint, assessed.decision.action).inc()
        trace.mark("audit_ms")

    def _watch(self, verdict: Verdict | None) -> None:
        """Look whether requests still are like those of the calibration."""
        if self.drift is not None and verdict is not None and verdict.scores:
            for one in self.drift.add(verdict.scores):
                self.metrics.drifts.labels(one.type).inc()

    async def _record_failure(self, trace: _Trace, error: Exception) -> None:
        """Put on record that a request has no reply, or no whole one, and why."""
        short = failures.told(error)
        self.metrics.failures.labels(trace.endpoint, short.code).inc()
        if not isinstance(error, AuditError | Overloaded):  # can't be, or would add to the load
            reason = str(error) if short.code != "internal_error" else repr(error)
            why = {"code": short.code, "status": short.status, "reason": reason[:REASON]}
            await self._append(trace, None, why)

    @asynccontextmanager
    async def _failing_on_record(self, trace: _Trace) -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:
            await self._record_failure(trace, error)
            raise

    async def _append(
        self,
        trace: _Trace,
        assessed: Assessed | None,
        error: Mapping[str, object] | None = None,
    ) -> str:
        """Put on record what is known of a request: the record's hash."""
        verdict, decision = assessed or (None, None)
        policy = trace.caller.policy
        entry = Entry(
            trace.id,
            trace.endpoint,
            trace.caller.tenant,
            tuple(picture.sha256 for picture in trace.pictures),
            replies.scores(verdict, self.engine.taxonomy),
            replies.without_evidence(verdict),
            None if decision is None else replies.decided(decision),
            {"name": policy.name, "hash": policy.hash},
            {"name": self.model.name, "hash": self.model.hash},
            error,
        )
        return await run_in_threadpool(self.audit.append, entry)
