"""The part of OpenAI's API that is served: what a request may hold, and errors in its form.

What is not listed here is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from psa_vlm.data.sample import Turn
from psa_vlm.errors import RequestError


def _encodable(text: str) -> str:
    """JSON can hold half a character, which no tokenizer and no file can."""
    if text != _plain(text):
        raise ValueError("holds half a character (a lone surrogate)")
    return text


def _plain(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


Text = Annotated[str, AfterValidator(_encodable)]
MOST = 1000
"""Messages of a chat, parts of a message, keys of an object: each that is wrong costs time."""
TOLD = 1000
"""Characters of an error: it may quote the request."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MOST:
            raise ValueError(f"holds more than {MOST} keys")
        return data


class TextPart(_Part):
    """Words of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Part):
    """An image as a data URL."""

    url: Text
    detail: Literal["auto"] | None = None


class ImagePart(_Part):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _form(content: object) -> str:
    return "words" if isinstance(content, str) else "parts"


Words = Annotated[Text, Tag("words")]
Parts = Annotated[
    list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
    Field(max_length=MOST, fail_fast=True),
]
TextParts = Annotated[list[TextPart], Field(max_length=MOST, fail_fast=True)]
WordsAlone = Annotated[Words | Annotated[TextParts, Tag("parts")], Discriminator(_form)]
Content = Annotated[Words | Annotated[Parts, Tag("parts")], Discriminator(_form)]


class SystemMessage(_Part):
    """How the model is asked to behave; it opens the conversation."""

    role: Literal["system"]
    content: WordsAlone


class UserMessage(_Part):
    """What the user says and shows."""

    role: Literal["user"]
    content: Content


class AssistantMessage(_Part):
    """What was answered earlier; a refusal counts as its words."""

    role: Literal["assistant"]
    content: WordsAlone | None = None
    refusal: Text | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Part):
    """What else a stream tells."""

    include_usage: bool | None = None


class ChatRequest(_Part):
    """Body of `POST /v1/chat/completions`."""

    model: Text
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ModerationRequest(_Part):
    """Body of `POST /v1/moderations`: words about an image, and the image."""

    model: Text | None = None
    input: Content


def conversation(
    messages: Sequence[SystemMessage | UserMessage | AssistantMessage],
) -> tuple[Turn, ...]:
    """The words of a chat, turn by turn.

    Raises:
        RequestError: it does not end with words of the user, or the system speaks later on.
    """
    if any(one.role == "system" for one in messages[1:]):
        raise RequestError("a system message must be the first message", "messages")
    if messages[-1].role != "user":
        raise RequestError("the last message must be the user's", "messages")
    turns = tuple(Turn(one.role, _said(one)) for one in messages)
    if not turns[-1].text.strip():
        raise RequestError(
            "the last message has no words; say what is asked about the image", "messages"
        )
    return turns


def _said(message: SystemMessage | UserMessage | AssistantMessage) -> str:
    said = words(message.content)
    refusal = message.refusal if isinstance(message, AssistantMessage) else None
    return said or refusal or ""


def words(content: str | Sequence[TextPart | ImagePart] | None) -> str:
    """The text of a message, its parts on lines of their own."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content if isinstance(part, TextPart))


def image_urls(content: str | Sequence[TextPart | ImagePart] | None) -> list[str]:
    """The URLs of a message's images, in order."""
    if content is None or isinstance(content, str):
        return []
    return [part.image_url.url for part in content if isinstance(part, ImagePart)]


def invalid(error: Mapping[str, Any], body: object) -> RequestError:
    """What pydantic says of a body, as an error of ours.

    Args:
        error: one of `ValidationError.errors()`, its `loc` beginning with "body".
        body: that was validated.
    """
    if error["type"] == "json_invalid":
        return RequestError("the body is not valid JSON", None, "invalid_json")
    where = _where(error["loc"][1:], body, error["type"])
    match error["type"]:
        case "extra_forbidden":
            told, code = f"{where} is not supported; leave it out", "unsupported_parameter"
        case "union_tag_invalid":
            context = error["ctx"]
            key = str(context["discriminator"]).strip("'")
            where = f"{where}.{key}" if where else key
            told = f"{where}: '{context['tag']}' is not supported; use {context['expected_tags']}"
            code = "unsupported_value"
        case "literal_error":
            told = f"{where}: this value is not supported; use {error['ctx']['expected']}"
            code = "unsupported_value"
        case "missing":
            told, code = f"{where or 'the body'} is missing", "missing_parameter"
        case _:
            told, code = f"{where or 'the body'}: {error['msg']}", "invalid_value"
    return RequestError(told, where or None, code)


def _where(loc: Sequence[int | str], body: object, kind: str) -> str:
    """The place in the body; the names of pydantic's branches, which stand in no body, go."""
    node, path = body, []
    for index, part in enumerate(loc):
        if index and isinstance(loc[index - 1], int):  # a message or a part names its branch first
            continue
        if (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = node[part]  # type: ignore[index]
            path.append(str(part))
        elif kind == "missing" and index == len(loc) - 1:
            path.append(str(part))
    return ".".join(path)


def error_body(error: RequestError) -> dict[str, Any]:
    """The error in the form that OpenAI's clients read."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        error.status, "server_error" if error.status >= 500 else "invalid_request_error"
    )
    param = None if error.param is None else _plain(error.param[:TOLD])
    message = _plain(str(error)[:TOLD])
    told = {"message": message, "type": kind, "param": param, "code": error.code}
    return {"error": told}
