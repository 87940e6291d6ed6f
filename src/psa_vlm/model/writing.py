"""From generated tokens to answers: texts, counts, and pieces while they are written.

Shape letters: B batch, L prompt length, S new tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

_UNSETTLED = re.compile(r"\s*[!-~]*\s*\ufffd*$")
"""The end of a text that the next token may change: half a character, white space that the end of
an answer strips, and the last word of a script with spaces, which a decoder may join to the next
("don" and "'t")."""


@dataclass(frozen=True)
class Written:
    """An answer of the language model.

    Attributes:
        text: its words.
        read: tokens of its prompt, image positions included.
        tokens: that were written, the end mark included.
        cut: whether the limit on tokens ended it.
    """

    text: str
    read: int
    tokens: int
    cut: bool


class Listener(Protocol):
    """Hears B answers while they are written; called where the model computes."""

    def wrote(self, row: int, piece: str) -> None:
        """The next piece of an answer; all of them joined are its text."""

    def left(self, row: int) -> bool:
        """Whether nobody waits for an answer any more: it is written no further."""


def written(
    ids: Tensor, read: Sequence[int], tokenizer: Any, ends: frozenset[int]
) -> list[Written]:
    """The answers in generated tokens.

    Args:
        ids: ``[B, S]``.
        read: tokens of each prompt.
        tokenizer: that decodes them.
        ends: ids that end an answer.
    """
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    answers = []
    for text, prompt, row in zip(texts, read, ids.tolist(), strict=True):
        end = next((place for place, id_ in enumerate(row) if id_ in ends), None)
        count = len(row) if end is None else end + 1
        answers.append(Written(text.strip(), prompt, count, end is None))
    return answers


def heard(listener: Listener, tokenizer: Any, ends: frozenset[int]) -> dict[str, Any]:
    """The arguments of ``generate`` that let a listener hear."""
    return {
        "streamer": _Pieces(listener, tokenizer, ends),
        "stopping_criteria": StoppingCriteriaList([_Left(listener)]),
    }


class _Pieces(BaseStreamer):
    """Hands on what further tokens can't change."""

    def __init__(self, listener: Listener, tokenizer: Any, ends: frozenset[int]) -> None:
        self.listener = listener
        self.tokenizer = tokenizer
        self.ends = ends

    def put(self, value: Tensor) -> None:
        """The prompts ``[B, L]`` first, then the tokens ``[B]`` of each step."""
        if value.dim() > 1:
            self.ids: list[list[int]] = [[] for _ in value]
            self.told = [0] * len(value)
            return
        for row, id_ in enumerate(value.tolist()):
            ids = self.ids[row]
            if not ids or ids[-1] not in self.ends:  # what follows an end is padding
                ids.append(id_)
                self._tell(row, _UNSETTLED.sub("", self._text(row)))

    def end(self) -> None:
        for row in range(len(self.ids)):
            self._tell(row, self._text(row).rstrip())

    def _text(self, row: int) -> str:
        text: str = self.tokenizer.decode(self.ids[row], skip_special_tokens=True)
        return text.lstrip()

    def _tell(self, row: int, text: str) -> None:
        if piece := text[self.told[row] :]:
            self.told[row] = len(text)
            self.listener.wrote(row, piece)


class _Left(StoppingCriteria):
    """Ends the answers that nobody waits for."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        left = [self.listener.left(row) for row in range(len(input_ids))]
        return torch.tensor(left, device=input_ids.device)
