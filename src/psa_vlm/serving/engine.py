"""What assesses and answers: one small interface for the engine in this process and others."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from PIL.Image import Image

    from psa_vlm.data.sample import Turn
    from psa_vlm.model.calibration import Calibration
    from psa_vlm.model.verdict import Verdict
    from psa_vlm.policy.policy import Decision, Policy
    from psa_vlm.taxonomy import Taxonomy


@dataclass(frozen=True)
class Ask:
    """What an engine is asked.

    Attributes:
        images: every picture of the conversation, none left out.
        turns: the conversation, which ends with the user's turn.
        policy: that decides.
        max_tokens: most tokens of an answer.
        temperature: 0 answers greedily.
        concepts: risk type -> level to take instead of the predicted one.
    """

    images: tuple[Image, ...]
    turns: tuple[Turn, ...]
    policy: Policy
    max_tokens: int
    temperature: float = 0.0
    concepts: Mapping[str, str] = field(default_factory=dict)


class Assessed(NamedTuple):
    """What was found, and what is done about it; the verdict is None without an image."""

    verdict: Verdict | None
    decision: Decision


@dataclass(frozen=True)
class Usage:
    """Tokens that the language model read and wrote; a refusal costs none."""

    prompt: int = 0
    completion: int = 0


@dataclass(frozen=True)
class End:
    """How an answer ended.

    Attributes:
        finish: OpenAI's finish reason; "content_filter" is a refusal.
        usage: None where the engine did not tell.
    """

    finish: Literal["stop", "length", "content_filter"]
    usage: Usage | None


class Parts(Protocol):
    """An answer as it is written: pieces of text, then one `End`. Closed, it is written no more."""

    def __aiter__(self) -> AsyncIterator[str | End]: ...

    async def __anext__(self) -> str | End: ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True)
class Answer:
    """A decision, and the words that follow it: the model's, or the policy's own refusal."""

    verdict: Verdict | None
    decision: Decision
    parts: Parts


class Engine(Protocol):
    """Assesses and answers; used as an async context manager while it serves."""

    @property
    def taxonomy(self) -> Taxonomy:
        """The words of its verdicts."""

    @property
    def calibration(self) -> Calibration | None:
        """What its verdicts promise; None for nothing."""

    @property
    def samples(self) -> bool:
        """Whether it can answer at a temperature above 0."""

    @property
    def waiting(self) -> int:
        """How many requests wait."""

    async def assess(self, ask: Ask) -> Assessed:
        """Verdict and decision alone.

        Raises:
            Overloaded: too many wait.
            InputError: the request can't be assessed.
        """

    async def answer(self, ask: Ask) -> Answer:
        """Verdict and decision, before the first word; errors as `assess`.

        The parts of the answer may raise InputError, Overloaded, or a RequestError with the status
        of an engine elsewhere that failed.
        """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: object) -> None: ...


async def refusal(decision: Decision) -> AsyncGenerator[str | End, None]:
    """The parts of a refusal."""
    yield decision.refusal or ""
    yield End("content_filter", Usage())
