"""What a request may hold, and how it is told what it may not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from psa_vlm.data.sample import Turn
from psa_vlm.errors import RequestError
from psa_vlm.serving import protocol


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **changes}


def said(**changes: Any) -> RequestError:
    given = body(**changes)
    with pytest.raises(ValidationError) as caught:
        protocol.ChatRequest.model_validate(given)
    errors = caught.value.errors()
    return protocol.invalid({**errors[0], "loc": ("body", *errors[0]["loc"])}, given)


def test_a_conversation_keeps_every_word_and_every_image() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:1"}}
    parts = [{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": [image, {"type": "text", "text": "c"}]},
    ]
    chat = protocol.ChatRequest.model_validate(body(messages=messages))
    assert protocol.conversation(chat.messages) == (
        Turn("user", "a\nb"),
        Turn("assistant", "No."),
        Turn("user", "c"),
    )
    assert [protocol.image_urls(one.content) for one in chat.messages] == [
        ["data:1"],
        [],
        ["data:1"],
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "Hi"}],
        [{"role": "user", "content": " "}],
        [{"role": "user", "content": []}],
    ],
)
def test_a_conversation_ends_with_words_of_the_user(messages: list[Any]) -> None:
    chat = protocol.ChatRequest.model_validate(body(messages=messages))
    with pytest.raises(RequestError, match="the last message"):
        protocol.conversation(chat.messages)


@pytest.mark.parametrize("name", ["top_p", "seed", "tools", "logit_bias", "stop", "frobnicate"])
def test_an_unknown_parameter_is_refused_by_name(name: str) -> None:
    error = said(**{name: None})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert name in str(error)


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_value"),
        ({"temperature": -1.0}, "temperature", "invalid_value"),
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"temperature": "0"}, "temperature", "invalid_value"),
        ({"temperature": False}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"stream": "false"}, "stream", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_parameter"),
        (
            {"messages": [{"role": "developer", "content": "a"}]},
            "messages.0.role",
            "unsupported_value",
        ),
        (
            {"messages": user({"type": "input_audio"})},
            "messages.0.content.0.type",
            "unsupported_value",
        ),
        (
            {"messages": user({"type": "image_url", "image_url": {"url": "a", "detail": "low"}})},
            "messages.0.content.0.image_url.detail",
            "unsupported_value",
        ),
        (
            {"messages": user({"type": "text", "text": "a", "cache": 1})},
            "messages.0.content.0.cache",
            "unsupported_parameter",
        ),
        (
            {"messages": user({"type": "text", "text": "\ud800"})},
            "messages.0.content.0.text",
            "invalid_value",
        ),
        ({"model": "\ud800"}, "model", "invalid_value"),
    ],
)
def test_an_error_names_the_place(changes: Any, param: str, code: str) -> None:
    error = said(**changes)
    assert (error.param, error.code) == (param, code)
    assert param in str(error)


def test_zero_is_a_temperature() -> None:
    assert protocol.ChatRequest.model_validate(body(temperature=0)).temperature == 0


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")],
)
def test_errors_have_the_form_that_clients_read(status: int, kind: str) -> None:
    told = protocol.error_body(RequestError("no", "n", "c", status))
    assert told == {"error": {"message": "no", "type": kind, "param": "n", "code": "c"}}


def test_half_a_character_does_not_break_the_error_that_names_it() -> None:
    json.dumps(protocol.error_body(said(**{"\ud800": 1})), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [0] * 200_000},
        {"messages": [{"role": "user", "content": ""}] * 200_000},
        {"messages": [{"role": "user", "content": [0] * 200_000}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 200_000}]},
        {"messages": [{"role": "system", "content": [0] * 200_000}]},
        {"messages": [{"role": "assistant", "content": [0] * 200_000}]},
        {f"key {i}": 0 for i in range(200_000)},
    ],
)
def test_a_body_of_mistakes_is_given_up_early(body: dict[str, Any]) -> None:
    """Each error is an object of its own: millions of them would stop the service."""
    with pytest.raises(ValidationError) as caught:
        protocol.ChatRequest.model_validate({"model": "m", **body})
    assert caught.value.error_count() < 5
