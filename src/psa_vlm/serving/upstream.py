"""An engine elsewhere that speaks OpenAI's API: requests are assessed here and answered there.

What is sent on is exactly what was assessed: the decoded frames, encoded anew, and words in which
nothing can pass for a control token of the model. So the engine there must serve the same model, as
`export` writes it. A request that is refused never leaves.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import httpx2
from openai import (
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    OpenAIError,
    RateLimitError,
    Timeout,
)

from psa_vlm.errors import Overloaded, RequestError
from psa_vlm.serving.engine import Answer, Ask, Assessed, End, Usage, refusal
from psa_vlm.serving.in_process import InProcess

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam
    from PIL.Image import Image

    from psa_vlm.model.calibration import Calibration
    from psa_vlm.taxonomy import Taxonomy

CONNECT = 5.0
"""Seconds to reach the engine."""

_logger = logging.getLogger(__name__)


class Upstream:
    """Assesses in this process, and lets an engine elsewhere answer.

    Args:
        local: assesses; its language model is never called.
        url: of the engine's API, as in `http://127.0.0.1:9000/v1`.
        model: what the engine calls its model.
        key: that the engine asks for.
        seconds: without a word from the engine until it is given up.
        most: requests that may be there at once; one more is refused.
    """

    samples = True

    def __init__(
        self,
        local: InProcess,
        url: str,
        model: str,
        key: str | None = None,
        seconds: float = 120,
        most: int = 64,
    ) -> None:
        self.local = local
        self.model = model
        self.most = most
        self._there = 0
        self._client = AsyncOpenAI(
            base_url=url,
            api_key=key or "none",
            timeout=Timeout(seconds, connect=CONNECT),
            max_retries=0,
        )

    @property
    def taxonomy(self) -> Taxonomy:
        return self.local.taxonomy

    @property
    def calibration(self) -> Calibration | None:
        return self.local.calibration

    @property
    def waiting(self) -> int:
        return self.local.waiting

    async def __aenter__(self) -> Self:
        await self.local.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.local.__aexit__(*error)
        await self._client.close()

    async def assess(self, ask: Ask) -> Assessed:
        return await self.local.assess(ask)

    async def answer(self, ask: Ask) -> Answer:
        if self._there >= self.most:
            raise Overloaded(1)
        verdict, decision = await self.local.assess(ask)
        if decision.action == "refuse":
            return Answer(verdict, decision, refusal(decision))
        return Answer(verdict, decision, self._answer(ask, decision.hint))

    async def _answer(self, ask: Ask, hint: str | None) -> AsyncGenerator[str | End, None]:
        """The engine's answer; what goes wrong there is told apart from what goes wrong here.

        Raises:
            InputError: the words imitate control tokens in a way that can't be undone.
            Overloaded: the engine is.
            RequestError: 504 if it does not answer in time, 502 for any other failure.
        """
        messages = await asyncio.to_thread(self._messages, ask, hint)
        if self._there >= self.most:  # others went while this one was assessed
            raise Overloaded(1)
        self._there += 1
        try:
            async with aclosing(self._stream(ask, messages)) as parts:
                async for part in parts:
                    yield part
        except (APITimeoutError, httpx2.TimeoutException):
            told = "the engine behind this service does not answer in time"
            raise RequestError(told, None, "upstream_timeout", 504) from None
        except RateLimitError as error:
            raise Overloaded(_seconds(error.response.headers.get("retry-after"))) from None
        except (OpenAIError, httpx2.HTTPError, ValueError) as error:
            _logger.error("upstream: %s: %s", type(error).__name__, error)
            told = "the engine behind this service can not be reached"
            if isinstance(error, APIStatusError):
                told = f"the engine behind this service failed with status {error.status_code}"
            raise RequestError(told, None, "upstream_error", 502) from None
        finally:
            self._there -= 1

    async def _stream(self, ask: Ask, messages: list[Any]) -> AsyncGenerator[str | End, None]:
        finish, usage = None, None
        chunks = await self._client.chat.completions.create(
            model=self.model,
            messages=cast("list[ChatCompletionMessageParam]", messages),
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            stream=True,
            stream_options={"include_usage": True},
        )
        async with chunks:
            async for chunk in chunks:
                if chunk.usage is not None:
                    usage = Usage(chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
                for choice in chunk.choices:
                    if piece := choice.delta.content or choice.delta.refusal:
                        yield piece
                    finish = choice.finish_reason or finish
        if finish is None:
            told = "the engine behind this service broke off"
            raise RequestError(told, None, "upstream_error", 502)
        yield End(_finish(finish), usage)

    def _messages(self, ask: Ask, hint: str | None) -> list[dict[str, Any]]:
        """The chat in OpenAI's form, with the hint in it and the images as they were assessed."""
        messages = self.local.model.backbone.messages(ask.turns, len(ask.images), hint)
        urls = map(_data_url, ask.images)
        for message in messages:
            parts = [
                {"type": "image_url", "image_url": {"url": next(urls)}}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ]
            message["content"] = parts if len(parts) > 1 else parts[0]["text"]
        return messages


def _data_url(image: Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _finish(reason: str) -> Literal["stop", "length", "content_filter"]:
    match reason:
        case "length" | "content_filter":
            return reason
        case _:
            return "stop"


def _seconds(header: str | None) -> int:
    """What a Retry-After header says, if that is a number."""
    told = header is not None and header.isdecimal() and len(header) < 5
    return max(1, int(header)) if told and header else 1
