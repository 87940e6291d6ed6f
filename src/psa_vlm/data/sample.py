"""One example of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from psa_vlm.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

Role = Literal["system", "user", "assistant"]

IMAGE_MARK = "<image>"
"""Where published data sets put the image in a text."""


@dataclass(frozen=True)
class Turn:
    """What one side says; a turn of the system may open a conversation, but not a sample's."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """Image(s), a conversation about them, and what is known of their risk.

    Attributes:
        id: unique within its data set.
        images: files or loaded pictures; none for a conversation in text only.
        conversation: turns in order, at least one of them the user's.
        type: risk type by name, None where nobody labelled it.
        level: risk level by name, None where nobody labelled it.
        source: the data set it comes from.
        split: the split it belongs to, None before splitting.
        tags: free notes by name (region, language, ...).
        where: its place in a file, for messages; not part of what it is.

    Raises:
        DataError: the user says nothing, or a role is unknown.
    """

    id: str
    images: tuple[Path | Image.Image, ...]
    conversation: tuple[Turn, ...]
    type: str | None = None
    level: str | None = None
    source: str = ""
    split: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        roles = [turn.role for turn in self.conversation]
        for role in roles:
            if role not in ("user", "assistant"):
                raise DataError(f"sample {self.id}: role {role!r} is neither user nor assistant")
        if "user" not in roles:
            raise DataError(f"sample {self.id}: the conversation needs a user turn")

    @property
    def question(self) -> str:
        """The last user turn, without image marks."""
        return without_image_marks(self.conversation[self._last_user].text)

    @property
    def answer(self) -> str | None:
        """What the assistant says to `question`; None while it is unanswered."""
        replies = self.conversation[self._last_user + 1 :]
        return replies[-1].text if replies else None

    @property
    def _last_user(self) -> int:
        return max(i for i, turn in enumerate(self.conversation) if turn.role == "user")


def without_image_marks(text: str) -> str:
    """The words of a published text: the image marks go, and the line breaks around them."""
    for mark in (f"{IMAGE_MARK}\n", f"\n{IMAGE_MARK}", IMAGE_MARK):
        text = text.replace(mark, "")
    return text.strip()
