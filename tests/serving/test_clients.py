"""The real `openai` client: sync, async and streaming."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from psa_vlm.inference import PsaVlm
from psa_vlm.policy.policy import Policy
from psa_vlm.serving.app import create_app
from psa_vlm.serving.in_process import InProcess
from psa_vlm.serving.keys import Keys, hash_key, new_key

from .conftest import MakeService, chat

POLICY = Policy.from_text(
    'name: house\ninherits: default\nrules: {"*": {high: refuse}}\ntenants: {school: {}}\n'
)
KEY = new_key()


@pytest.fixture()
def url(model: PsaVlm, make_service: MakeService, live: Callable[[Any], str]) -> str:
    keys = Keys({"school": [hash_key(KEY)]})
    service = make_service(POLICY, InProcess(model), keys=keys)
    return live(create_app(service)) + "/v1"


@pytest.fixture()
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture()
def ask(make_url: Any) -> dict[str, Any]:
    return chat(make_url(), max_tokens=12, temperature=0)


def test_a_reply_is_read(client: openai.OpenAI, ask: dict[str, Any], see: Any) -> None:
    see("privacy", "low")
    reply = client.chat.completions.create(**ask)
    (choice,) = reply.choices
    assert choice.finish_reason == "length" and choice.message.content
    assert reply.usage is not None and reply.usage.completion_tokens == 12
    assert reply.psa["decision"]["rule"] == "*.low"  # type: ignore[attr-defined]
    assert [one.id for one in client.models.list()] == ["tiny"]


def test_a_refusal_is_read(client: openai.OpenAI, ask: dict[str, Any], see: Any) -> None:
    see("privacy", "high")
    (choice,) = client.chat.completions.create(**ask).choices
    assert choice.finish_reason == "content_filter"
    assert choice.message.content is None and choice.message.refusal


def test_a_stream_is_read(client: openai.OpenAI, ask: dict[str, Any], see: Any) -> None:
    see("clean", "safe")
    whole = client.chat.completions.create(**ask)
    usage = {"include_usage": True}
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options=usage))
    assert chunks[0].psa["decision"]["action"] == "allow"  # type: ignore[attr-defined]
    words = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(words) == whole.choices[0].message.content
    assert sum(map(bool, words)) > 1
    assert chunks[-1].usage == whole.usage


def test_the_async_client_reads_many_at_once(url: str, ask: dict[str, Any], see: Any) -> None:
    see("clean", "safe")

    async def streamed(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(**ask, stream=True)
        return "".join([one.choices[0].delta.content or "" async for one in stream])

    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            whole = client.chat.completions.create(**ask)
            first, *rest = await asyncio.gather(whole, *(streamed(client) for _ in range(4)))
            return [first.choices[0].message.content, *rest]

    assert len(set(asyncio.run(all_of_them()))) == 1


def test_a_moderation_is_read(client: openai.OpenAI, ask: dict[str, Any], see: Any) -> None:
    see("privacy", "high")
    (result,) = client.moderations.create(input=ask["messages"][0]["content"]).results
    assert result.flagged
    assert result.categories.privacy is True  # type: ignore[attr-defined]


def test_errors_are_the_client_s_own(url: str, client: openai.OpenAI, ask: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p is not supported") as caught:
        client.chat.completions.create(**ask, top_p=0.5)
    assert (caught.value.param, caught.value.code) == ("top_p", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        client.chat.completions.create(**ask | {"model": "gpt"})
    with (
        openai.OpenAI(base_url=url, api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError, match="unknown key"),
    ):
        stranger.models.list()


def test_a_stream_that_breaks_off_raises(
    client: openai.OpenAI, ask: dict[str, Any], see: Any, breaks_after: Any
) -> None:
    see("clean", "safe")
    breaks_after(30, "broken")
    stream = client.chat.completions.create(**ask | {"max_tokens": 90}, stream=True)
    with pytest.raises(openai.APIError, match="the request failed"):
        list(stream)
