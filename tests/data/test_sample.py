from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import DataError


def sample(*turns: tuple[str, str]) -> Sample:
    conversation = tuple(Turn(role, text) for role, text in turns)  # type: ignore[arg-type]
    return Sample(id="s1", images=(), conversation=conversation)


@pytest.mark.parametrize(
    "text",
    ["<image>\nWhat is this?", "What is this?\n<image>", "<image><image>\nWhat is this?"],
)
def test_the_question_is_the_users_words_alone(text: str) -> None:
    assert sample(("user", text)).question == "What is this?"


def test_question_and_answer_are_those_of_the_last_exchange() -> None:
    whole = sample(("user", "One?"), ("assistant", "1."), ("user", "Two?"), ("assistant", "2."))
    assert (whole.question, whole.answer) == ("Two?", "2.")


def test_an_earlier_answer_is_not_the_answer_to_an_open_question() -> None:
    still_open = sample(("user", "One?"), ("assistant", "1."), ("user", "Two?"))
    assert (still_open.question, still_open.answer) == ("Two?", None)


@pytest.mark.parametrize("turns", [(), (("assistant", "Hello."),)])
def test_a_conversation_needs_the_user(turns: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(DataError, match="sample s1: the conversation needs a user turn"):
        sample(*turns)


def test_roles_are_user_and_assistant() -> None:
    with pytest.raises(DataError, match="sample s1: role 'system' is neither"):
        sample(("system", "Obey."), ("user", "Hi."))


def test_samples_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        sample(("user", "Hi.")).id = "other"  # type: ignore[misc]
