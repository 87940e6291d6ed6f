"""The engine in this process: one thread, small batches, a queue of fixed length."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from psa_vlm.errors import InputError, Overloaded, RequestError
from psa_vlm.inference import PsaVlm, Seen
from psa_vlm.serving.engine import Answer, Ask, Assessed, End, Usage, refusal

if TYPE_CHECKING:
    from psa_vlm.model.calibration import Calibration
    from psa_vlm.taxonomy import Taxonomy


@dataclass(eq=False)
class _Job:
    """One request on its way; what the engine's thread says of it is said in the loop."""

    ask: Ask
    answers: bool
    loop: asyncio.AbstractEventLoop
    assessed: asyncio.Future[Assessed]
    parts: asyncio.Queue[str | End | Exception]
    began: bool = False
    left: bool = False

    def assess(self, found: Assessed) -> None:
        self.loop.call_soon_threadsafe(self._set, found)

    def put(self, part: str | End) -> None:
        self.began = True
        self.loop.call_soon_threadsafe(self.parts.put_nowait, part)

    def fail(self, error: Exception) -> None:
        self.loop.call_soon_threadsafe(self._fail, error)

    def _set(self, found: Assessed) -> None:
        if self.assessed.done():  # who asked has gone
            self.left = True
        else:
            self.assessed.set_result(found)

    def _fail(self, error: Exception) -> None:
        if self.assessed.done():
            self.parts.put_nowait(error)
        else:
            self.assessed.set_exception(error)


class _Heard:
    """The parts of a job's answer."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str | End:
        if self._ended:
            raise StopAsyncIteration
        part = await self._job.parts.get()
        self._ended = not isinstance(part, str)
        if isinstance(part, Exception):
            raise part
        return part

    async def aclose(self) -> None:
        self._ended = self._job.left = True


class _Reading(NamedTuple):
    """A request that the language model answers."""

    job: _Job
    seen: Seen
    hint: str | None


class _Ears:
    """Carries what is written to those who wait for it."""

    def __init__(self, readings: Sequence[_Reading]) -> None:
        self._jobs = [one.job for one in readings]

    def wrote(self, row: int, piece: str) -> None:
        self._jobs[row].put(piece)

    def left(self, row: int) -> bool:
        return self._jobs[row].left


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
    def calibration(self) -> Calibration | None:
        return self.model.calibration

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
            self._queue.get_nowait().fail(_stopping())

    async def assess(self, ask: Ask) -> Assessed:
        return await self._put(ask, answers=False).assessed

    async def answer(self, ask: Ask) -> Answer:
        self.model.backbone.check_writes("chat")
        job = self._put(ask, answers=True)
        verdict, decision = await job.assessed
        if decision.action == "refuse":
            return Answer(verdict, decision, refusal(decision))
        return Answer(verdict, decision, _Heard(job))

    def _put(self, ask: Ask, answers: bool) -> _Job:
        loop = asyncio.get_running_loop()
        job = _Job(ask, answers, loop, loop.create_future(), asyncio.Queue())
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull:
            batches = self._queue.qsize() / self.batch
            raise Overloaded(max(1, math.ceil(batches * self._seconds))) from None
        return job

    # --- batches ---------------------------------------------------------------------------------

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            jobs = [job for job in await self._gather() if not job.assessed.done()]
            start = time.perf_counter()
            try:
                await loop.run_in_executor(self._thread, self._compute, jobs)
            except asyncio.CancelledError:  # the service stops in the middle: nobody waits for ever
                for job in jobs:
                    job.fail(_stopping())
                raise
            self._seconds = time.perf_counter() - start

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

    def _compute(self, jobs: Sequence[_Job]) -> None:
        try:
            for group in _alike(self._assess(jobs)):
                self._write(group)
        except Exception as error:  # a fault of ours must not end the thread's work for good
            for job in jobs:
                job.fail(error)

    def _assess(self, jobs: Sequence[_Job]) -> list[_Reading]:
        """Tell every job its verdict and decision; what comes back is to be answered."""
        readings = []
        for job, seen in zip(jobs, self._see(jobs), strict=True):
            if isinstance(seen, Exception):
                job.fail(seen)
                continue
            try:
                seen = seen.override(job.ask.concepts, self.taxonomy)
            except InputError as error:
                job.fail(error)
                continue
            decision = self.model.decide(seen, job.ask.policy)
            job.assess(Assessed(seen.verdict, decision))
            if job.answers and decision.action != "refuse":
                readings.append(_Reading(job, seen, decision.hint))
        return readings

    def _see(self, jobs: Sequence[_Job]) -> list[Seen | Exception]:
        """An outcome for each: together first, and what fails alone."""
        asks = [job.ask for job in jobs]
        outcomes: list[Seen | Exception]
        try:
            outcomes = [
                *self.model.see_batch(
                    [ask.images for ask in asks],
                    [ask.turns[-1].text for ask in asks],
                    [ask.turns[:-1] for ask in asks],
                )
            ]
        except Exception as error:
            outcomes = [error] * len(jobs)
        if len(jobs) == 1:
            return outcomes
        return [
            self._see([job])[0] if _failed(outcome) else outcome
            for job, outcome in zip(jobs, outcomes, strict=True)
        ]

    def _write(self, group: Sequence[_Reading]) -> None:
        """Answer together; where that fails, alone those who have heard nothing yet."""
        try:
            answers = self.model.answer_batch(
                [one.seen for one in group],
                [one.hint for one in group],
                group[0].job.ask.max_tokens,
                _Ears(group),
            )
        except Exception as error:
            for one in group:
                if len(group) == 1 or one.job.began:
                    one.job.fail(error)
                else:
                    self._write([one])
            return
        for one, answer in zip(group, answers, strict=True):
            usage = Usage(answer.read, answer.tokens)
            one.job.put(End("length" if answer.cut else "stop", usage))


def _alike(readings: Sequence[_Reading]) -> list[list[_Reading]]:
    """Those that one generation can answer: seen together, and of one length."""
    groups: dict[object, list[_Reading]] = {}
    for one in readings:
        key: Any = (id(one.seen.features), one.job.ask.max_tokens)
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _failed(outcome: Seen | Exception) -> bool:
    if isinstance(outcome, Exception):
        return True
    return outcome.verdict is not None and outcome.verdict.error is not None


def _stopping() -> RequestError:
    return RequestError("the service is stopping", None, "stopping", 503)
