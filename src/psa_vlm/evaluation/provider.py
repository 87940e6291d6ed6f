"""Our models behind Inspect: the provider `psa`, as in `psa/runs/demo/stage2`.

Model arguments choose the method (see `psa_vlm.evaluation.baselines`): `baseline`, `base`,
`policy`, `device`; and `batch`, how many requests that come at the same time are computed
together. Batches are quicker on a GPU; one at a time, the default, gives the same words whatever
else is asked.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ContentImage,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from psa_vlm.data.images import Source
from psa_vlm.data.sample import Turn
from psa_vlm.errors import ImageError, InputError
from psa_vlm.evaluation.baselines import Ask, Baseline, Method, Told, load_method
from psa_vlm.inference import MAX_NEW_TOKENS

WAIT = 0.02
"""Seconds that a request waits for others to be computed with, where `batch` is above one."""


class PsaAPI(ModelAPI):
    """A run, a trained baseline or a plain checkpoint, answering greedily.

    Args:
        model_name: its folder.
        base_url, api_key: not used; Inspect gives them to every provider.
        config: of generation; `max_tokens` is what we obey.
        baseline: one that needs no training, on the folder's base model.
        base: where the base model is now, if it moved.
        policy: instead of the run's own.
        device: where to compute; the CPU by default.
        batch: most requests computed together.

    Raises:
        PsaVlmError: the folder can't be loaded as asked.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 - as Inspect has it
        baseline: Baseline | None = None,
        base: str | None = None,
        policy: str | None = None,
        device: str | None = None,
        batch: int = 1,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        folder = Path(model_name)
        method, self.method = load_method(
            folder, baseline, None if base is None else Path(base), policy, device
        )
        self._batches = Batches(method, batch)
        self._batch = batch

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer one conversation.

        Raises:
            InputError: it holds what the model does not take (tools, sounds, images elsewhere).
        """
        if tools:
            raise InputError("the psa provider has no tools: score it on tasks without them")
        limit = MAX_NEW_TOKENS if config.max_tokens is None else config.max_tokens
        told = await self._batches.answer(to_ask(input), limit)
        one = told.written
        return ModelOutput(
            model=self.model_name,
            choices=[
                ChatCompletionChoice(
                    message=ChatMessageAssistant(content=one.text, model=self.model_name),
                    stop_reason="max_tokens" if one.cut else "stop",
                )
            ],
            usage=ModelUsage(
                input_tokens=one.read, output_tokens=one.tokens, total_tokens=one.read + one.tokens
            ),
            metadata={"method": self.method, **told.notes},
        )

    def max_connections(self) -> int:
        return 2 * self._batch

    def should_retry(self, ex: Exception) -> bool:
        return False  # the same request would fail in the same way

    def close(self) -> None:
        self._batches.close()


@modelapi(name="psa")
def provider() -> type[ModelAPI]:
    """Registers it with Inspect."""
    return PsaAPI


def to_ask(messages: Sequence[ChatMessage]) -> Ask:
    """A conversation of Inspect's as ours; images stand before the words.

    Raises:
        ImageError: an image is no data URL.
        InputError: another kind of content, or a turn of a tool.
    """
    images: list[Source] = []
    turns: list[Turn] = []
    for message in messages:
        if message.role == "tool":
            raise InputError("the psa provider has no tools: score it on tasks without them")
        parts = message.content
        words = []
        for part in [ContentText(text=parts)] if isinstance(parts, str) else parts:
            if isinstance(part, ContentText):
                words.append(part.text)
            elif isinstance(part, ContentImage) and message.role == "user":
                images.append(_decoded(part.image))
            else:
                raise InputError(f"the psa provider takes words and users' images, not {part.type}")
        turns.append(Turn(message.role, "\n".join(words)))
    return Ask(tuple(images), tuple(turns))


def _decoded(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise ImageError(f"{url[:60]}: images come as data URLs in base64; none is fetched")
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise ImageError(f"{head}: not valid base64") from None


@dataclass
class _Job:
    ask: Ask
    limit: int
    told: Future[Told] = field(default_factory=Future)


class Batches:
    """One thread that computes requests, those that come together as one batch.

    A request that fails in a batch is computed again alone, so that no neighbour can spoil it.

    Args:
        method: answers.
        most: requests in a batch.
    """

    def __init__(self, method: Method, most: int) -> None:
        self._method = method
        self._most = most
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    async def answer(self, ask: Ask, limit: int) -> Told:
        """The answer, when its turn came."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True, name="psa-vlm")
            self._thread.start()
        job = _Job(ask, limit)
        self._jobs.put(job)
        return await asyncio.wrap_future(job.told)

    def close(self) -> None:
        """End the thread when it has computed what waits."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            group: list[_Job | None] = [job]
            while len(group) < self._most and group[-1] is not None:
                try:
                    group.append(self._jobs.get(timeout=WAIT))
                except queue.Empty:
                    break
            jobs = [one for one in group if one is not None]
            for limit in sorted({one.limit for one in jobs}):
                self._compute([one for one in jobs if one.limit == limit])
            if group[-1] is None:
                return

    def _compute(self, jobs: Sequence[_Job]) -> None:
        jobs = [one for one in jobs if not one.told.cancelled()]
        try:
            answers = self._method([one.ask for one in jobs], jobs[0].limit) if jobs else []
        except Exception as error:
            if len(jobs) == 1:
                _settle(jobs[0], error)
            else:
                for one in jobs:
                    self._compute([one])
            return
        for one, told in zip(jobs, answers, strict=True):
            _settle(one, told)


def _settle(job: _Job, outcome: Any) -> None:
    """Give an outcome to who waits, unless they left meanwhile."""
    if not job.told.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        job.told.set_exception(outcome)
    else:
        job.told.set_result(outcome)
