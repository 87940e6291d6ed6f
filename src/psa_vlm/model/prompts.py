"""Conversations to token ids: one way for training and inference, so that they can't differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from psa_vlm.errors import CheckpointError, InputError
from psa_vlm.model.tokens import guard_of, image_mark

if TYPE_CHECKING:
    from psa_vlm.data.sample import Turn
    from psa_vlm.model.tokens import Guard

IGNORED = -100
"""Label of the positions that the loss leaves out."""
IMITATED = "the text imitates control tokens and can't be made plain"
REMEMBERED = 256
"""Shapes of conversations (roles, images, hint) whose control tokens are kept."""


class PromptBuilder:
    """Builds the prompts of one processor.

    Args:
        processor: with its chat template; safety tokens, if any, are in it.
        image: what stands for an image in the text of a prompt, where a call does not say; a
            number stands for as many image marks.
        max_tokens: length that the language model can read.
    """

    def __init__(self, processor: Any, image: str | int, max_tokens: int) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.mark = image_mark(processor)
        self.image = self.mark * image if isinstance(image, int) else image
        self.max_tokens = max_tokens
        self._structure = lru_cache(REMEMBERED)(self._count_structure)
        self._in_mark = lru_cache(REMEMBERED)(self._count_in_mark)

    def inputs(
        self,
        conversations: Sequence[Sequence[Turn]],
        image_counts: Sequence[int],
        hints: Sequence[str | None] | None = None,
        answers: Sequence[str] | None = None,
        marks: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Token ids of B prompts: see :meth:`psa_vlm.model.backbone.Backbone.prompts`.

        Args, where they are others:
            marks: what stands for each image of all prompts, in order.
        """
        count, wanted = len(conversations), sum(image_counts)
        marks = [self.image] * wanted if marks is None else marks
        if len(marks) != wanted:
            raise InputError(f"the prompts hold {wanted} images but {len(marks)} are given")
        rest = iter(marks)
        rows = [
            self._row(turns, list(islice(rest, images)), hint, answer)
            for turns, images, hint, answer in zip(
                conversations,
                image_counts,
                [None] * count if hints is None else hints,
                [None] * count if answers is None else answers,
                strict=True,
            )
        ]
        longest = max((len(prompt) + len(answer) for prompt, answer in rows), default=0)
        if longest > self.max_tokens:
            raise InputError(
                f"the prompt is {longest} tokens long and the model reads {self.max_tokens}: "
                "shorten the text"
            )
        return self._batch(rows, longest, training=answers is not None)

    def messages(
        self, turns: Sequence[Turn], images: int, hint: str | None
    ) -> list[dict[str, Any]]:
        """Chat messages of plain words: :meth:`psa_vlm.model.backbone.Backbone.messages`."""
        return self._checked(turns, [self.mark] * images, hint)[0]

    def questions(
        self, conversations: Sequence[Sequence[Turn]], hints: Sequence[str | None] | None
    ) -> list[str]:
        """The last words of the user with the hint, as the prompts hold them."""
        guard = guard_of(self.processor)
        rows = zip(conversations, hints or [None] * len(conversations), strict=True)
        return [_hinted(guard.clean(turns[-1].text), hint) for turns, hint in rows]

    def _checked(
        self, turns: Sequence[Turn], marks: Sequence[str], hint: str | None
    ) -> tuple[list[dict[str, Any]], str, list[int]]:
        """Messages in which no text can pass for structure, their prompt, and its ids."""
        check_conversation(turns)
        guard = guard_of(self.processor)
        roles, texts = [turn.role for turn in turns], [guard.clean(turn.text) for turn in turns]
        messages = chat(roles, texts, len(marks), hint)
        expected = Counter(self._structure(guard, tuple(roles), len(marks), hint))
        prompt = self._expanded(self._render(messages, add_generation_prompt=True), marks)
        ids = self._ids(prompt)
        for mark in marks:
            expected.update(self._in_mark(guard, mark))
        if guard.structure(ids) != expected:
            raise InputError(IMITATED)
        return messages, prompt, ids

    def _row(
        self, turns: Sequence[Turn], marks: Sequence[str], hint: str | None, answer: str | None
    ) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and of the answer with its end of turn (empty without an answer)."""
        messages, prompt, ids = self._checked(turns, marks, hint)
        if answer is None:
            return ids, []
        answer = guard_of(self.processor).clean(answer)
        return ids, self._answer_ids(messages, marks, prompt, ids, answer)

    def _answer_ids(
        self,
        messages: list[dict[str, Any]],
        marks: Sequence[str],
        prompt: str,
        prompt_ids: list[int],
        answer: str,
    ) -> list[int]:
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = self._expanded(self._render([*messages, turn]), marks)
        if not whole.startswith(prompt):
            raise CheckpointError(
                "the chat template's generation prompt differs from what it writes before an answer"
            )
        end: str = self.tokenizer.eos_token
        tail = whole[len(prompt) :]
        if end not in tail:  # a template for inference alone may leave it out
            tail = tail.rstrip() + end
        ids = self._ids(prompt + tail)
        if ids[: len(prompt_ids)] == prompt_ids:
            return ids[len(prompt_ids) :]
        return self._ids(tail, add_special_tokens=False)  # the joint text would merge over the seam

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise InputError(
                f"{_untaken(message['role'] for message in messages)}: {error}"
            ) from None
        return text

    def _expanded(self, prompt: str, marks: Sequence[str]) -> str:
        """The text with all that stands for each image in place of its mark."""
        parts = prompt.split(self.mark)
        if len(parts) != len(marks) + 1:
            raise InputError(IMITATED)
        return "".join(part + mark for part, mark in zip(parts, [*marks, ""], strict=True))

    def _ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begin = self.tokenizer.bos_token
        has_begin = begin is not None and begin in text  # some templates put images before it
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=add_special_tokens and not has_begin, verbose=False
        )["input_ids"]
        return ids

    def _count_structure(
        self, guard: Guard, roles: tuple[str, ...], images: int, hint: str | None
    ) -> Counter[int]:
        """How often each control token stands in a prompt of plain words, image marks aside.

        Raises:
            CheckpointError: if the chat template does not write one mark for each image.
            InputError: if it leaves out a turn.
        """
        texts = [f"qz{index}qz" for index in range(len(roles))]
        prompt = self._render(chat(roles, texts, images, hint), add_generation_prompt=True)
        if any(prompt.count(text) != 1 for text in texts):
            raise InputError(f"{_untaken(roles)}: it leaves out words")
        found = guard.structure(self._ids(prompt))
        image = self.tokenizer.convert_tokens_to_ids(self.mark)
        if any(found[id_] != images for id_ in (image, *guard.safety_ids)):
            raise CheckpointError(
                f"the chat template writes {found[image]} image marks for {images} images: "
                "it must write one for each, with the safety tokens before it"
            )
        del found[image]
        return found

    def _count_in_mark(self, guard: Guard, mark: str) -> Counter[int]:
        """How often each control token stands in what an image is written as."""
        return guard.structure(self._ids(mark, add_special_tokens=False))

    def _batch(
        self, rows: list[tuple[list[int], list[int]]], longest: int, training: bool
    ) -> dict[str, Tensor]:
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer in rows:
            ids = prompt + answer
            gap = longest - len(ids)
            before, after = (0, gap) if training else (gap, 0)
            for name, values, filler in (
                ("input_ids", ids, pad),
                ("attention_mask", [1] * len(ids), 0),
                ("labels", [IGNORED] * len(prompt) + answer, IGNORED),
            ):
                columns[name].append([filler] * before + values + [filler] * after)
        if not training:
            del columns["labels"]
        return {name: torch.tensor(column) for name, column in columns.items()}


def check_conversation(turns: Sequence[Turn]) -> None:
    """See that there is something to answer.

    Raises:
        InputError: if the last turn is not the user's.
    """
    if not turns or turns[-1].role != "user":
        raise InputError("the conversation must end with a turn of the user")


def chat(
    roles: Sequence[str], texts: Sequence[str], images: int, hint: str | None
) -> list[dict[str, Any]]:
    """Chat messages: images before the first user's words, the hint on a line after the last."""
    texts = [*texts[:-1], _hinted(texts[-1], hint)]
    contents = [[{"type": "text", "text": text}] for text in texts]
    contents[roles.index("user")][:0] = [{"type": "image"}] * images
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]


def _hinted(text: str, hint: str | None) -> str:
    return text if hint is None else f"{text}\n{hint}"


def _untaken(roles: Iterable[str]) -> str:
    return f"the model's chat template does not take these turns ({', '.join(roles)})"
