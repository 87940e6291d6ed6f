"""What computes verdicts and replies: one small interface, and the engine in this process."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

from psa_vlm.errors import Overloaded
from psa_vlm.inference import PsaVlm, Reply
from psa_vlm.model.verdict import Verdict

if TYPE_CHECKING:
    from PIL.Image import Image

    from psa_vlm.data.sample import Turn
    from psa_vlm.policy.policy import Policy
    from psa_vlm.taxonomy import Taxonomy


@dataclass(frozen=True)
class Ask:
    """What an engine is asked.

    Attributes:
        images: every picture of the conversation, none left out.
        turns: the conversation, which ends with the user's turn.
        policy: that decides.
        max_tokens: most tokens of an answer.
    """

    images: tuple[Image, ...]
    turns: tuple[Turn, ...]
    policy: Policy
    max_tokens: int


class Engine(Protocol):
    """Computes verdicts and replies; used as an async context manager while it serves."""

    @property
    def taxonomy(self) -> Taxonomy:
        """The words of its verdicts."""

    @property
    def samples(self) -> bool:
        """Whether it can answer at a temperature above 0."""

    @property
    def waiting(self) -> int:
        """How many requests wait."""

    async def assess(self, ask: Ask) -> Verdict:
        """The verdict alone.

        Raises:
            Overloaded: too many wait.
            InputError: the request can't be assessed.
        """

    async def reply(self, ask: Ask) -> Reply:
        """Verdict, decision and answer; errors as `assess`."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...


Outcome = Reply | Verdict | Exception
Work = Callable[[Sequence[Ask]], Sequence[Reply | Verdict]]


@dataclass(eq=False)
class _Job:
    work: Work
    ask: Ask
    done: asyncio.Future[Any] = field(repr=False)


class InProcess:
    """The model in this process, in one thread, for requests that are gathered into batches.

    A request waits at most `wait` seconds for others. Whatever fails in a batch is computed again
    alone, so that nobody's request can spoil a neighbour's.

    Args:
        model: answers; nothing else may use it meanwhile.
        batch: most requests computed together.
        wait: seconds.
        waiting: most requests that wait; one more is refused.
    """

    samples = False

    def __init__(
        self, model: PsaVlm, batch: int = 8, wait: float = 0.005, waiting: int = 64
    ) -> None:
        self.model = model
        self.batch = batch
        self.wait = wait
        self._queue: asyncio.Queue[_Job] = asyncio.Queue(waiting)
        self._seconds = 0.0  # that the last batch took

    @property
    def taxonomy(self) -> Taxonomy:
        return self.model.taxonomy

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    async def __aenter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, "psa-vlm-engine")
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        self._thread.shutdown()
        while not self._queue.empty():
            self._queue.get_nowait().done.cancel()

    async def assess(self, ask: Ask) -> Verdict:
        verdict: Verdict = await self._put(self._verdicts, ask)
        return verdict

    async def reply(self, ask: Ask) -> Reply:
        reply: Reply = await self._put(self._replies, ask)
        return reply

    async def _put(self, work: Work, ask: Ask) -> Any:
        job = _Job(work, ask, asyncio.get_running_loop().create_future())
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull:
            batches = self._queue.qsize() / self.batch
            raise Overloaded(max(1, math.ceil(batches * self._seconds))) from None
        return await job.done

    # --- batches ---------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while True:
            jobs = [job for job in await self._gather() if not job.done.cancelled()]
            try:
                for group in _alike(jobs):
                    await self._answer(group)
            finally:  # where the service stops in the middle, nobody waits for ever
                for job in jobs:
                    job.done.cancel()

    async def _answer(self, jobs: Sequence[_Job]) -> None:
        loop, start = asyncio.get_running_loop(), time.perf_counter()
        asks = [job.ask for job in jobs]
        outcomes = await loop.run_in_executor(self._thread, _compute, jobs[0].work, asks)
        self._seconds = time.perf_counter() - start
        for job, outcome in zip(jobs, outcomes, strict=True):
            if job.done.cancelled():
                continue
            if isinstance(outcome, Exception):
                job.done.set_exception(outcome)
            else:
                job.done.set_result(outcome)

    async def _gather(self) -> list[_Job]:
        """The next job, and those that come within the wait."""
        jobs = [await self._queue.get()]
        end = time.perf_counter() + self.wait
        while len(jobs) < self.batch:
            left = end - time.perf_counter()
            try:
                jobs.append(
                    self._queue.get_nowait()
                    if left <= 0
                    else await asyncio.wait_for(self._queue.get(), left)
                )
            except (TimeoutError, asyncio.QueueEmpty):
                break
        return jobs

    # --- in the thread ---------------------------------------------------------------------------

    def _verdicts(self, asks: Sequence[Ask]) -> Sequence[Verdict]:
        return self.model.assess_batch(
            [ask.images for ask in asks], [ask.turns[-1].text for ask in asks]
        )

    def _replies(self, asks: Sequence[Ask]) -> Sequence[Reply]:
        return self.model.reply_batch(
            [ask.images for ask in asks],
            [ask.turns[-1].text for ask in asks],
            asks[0].policy,
            histories=[ask.turns[:-1] for ask in asks],
            max_new_tokens=asks[0].max_tokens,
        )


def _alike(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """Jobs that one call of the model can compute: of one kind, policy and length."""
    groups: dict[object, list[_Job]] = {}
    for job in jobs:
        key = (job.work, id(job.ask.policy), job.ask.max_tokens)
        groups.setdefault(key, []).append(job)
    return list(groups.values())


def _compute(work: Work, asks: Sequence[Ask]) -> list[Outcome]:
    """An outcome for each: together first, and what fails alone."""
    try:
        outcomes: list[Outcome] = list(work(asks))
    except Exception as error:
        outcomes = [error] * len(asks)
    if len(asks) == 1:
        return outcomes
    return [
        _compute(work, [ask])[0] if _failed(outcome) else outcome
        for ask, outcome in zip(asks, outcomes, strict=True)
    ]


def _failed(outcome: Outcome) -> bool:
    if isinstance(outcome, Exception):
        return True
    verdict = outcome.verdict if isinstance(outcome, Reply) else outcome
    return verdict is not None and verdict.error is not None
