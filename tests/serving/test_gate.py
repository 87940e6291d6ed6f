"""What is stopped before it is read, and who is not waited for for ever: the app as a server asks
it, so that a body can stay out and a client can stop reading."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from psa_vlm.policy.policy import Policy
from psa_vlm.serving.app import create_app
from psa_vlm.serving.keys import Keys, hash_key, new_key
from psa_vlm.serving.limits import Limits

from .conftest import CHAT, MakeService

POLICY = Policy.from_text("name: house\ninherits: default\ntenants: {school: {}}\n")
KEY = new_key()
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]


@pytest.fixture()
def make_app(make_service: MakeService) -> Callable[..., Any]:
    def make(keys: Keys | None = None, **limits: int) -> Any:
        return create_app(make_service(POLICY, keys=keys, limits=Limits(**limits)))

    return make


async def whole() -> Message:
    return {"type": "http.request", "body": b"{}", "more_body": False}


async def never() -> Message:
    await asyncio.sleep(60)
    raise AssertionError("waited for")


async def unread() -> Message:
    raise AssertionError("the body was read")


async def ask(
    app: Any,
    path: str,
    receive: Receive = whole,
    send: Callable[[Message], Awaitable[None]] | None = None,
    **headers: str,
) -> tuple[int, Any]:
    """Status and body of what comes back."""
    sent: list[Message] = []

    async def keep(message: Message) -> None:
        sent.append(message)

    named = {"host": "localhost", "content-type": "application/json", **headers}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST" if path != "/v1/models" else "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send or keep)
    if not sent:
        return 0, None
    return sent[0]["status"], json.loads(b"".join(one.get("body", b"") for one in sent))


def test_a_stranger_s_body_is_not_read(make_app: Callable[..., Any]) -> None:
    app = make_app(Keys({"school": [hash_key(KEY)]}))
    for headers in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": f"Basic {KEY}"}):
        for path in (CHAT, "/v1/moderations", "/v1/nothing"):
            status, body = asyncio.run(ask(app, path, unread, **headers))
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    status, _ = asyncio.run(ask(app, CHAT, authorization=f"bearer {KEY}"))
    assert status == 400  # read, and of no use


def test_a_body_that_does_not_come_is_given_up(make_app: Callable[..., Any]) -> None:
    async def drip() -> Message:
        await asyncio.sleep(0.3)
        return {"type": "http.request", "body": b" ", "more_body": True}

    for slow in (never, drip):
        status, body = asyncio.run(ask(make_app(seconds=1), CHAT, slow))
        assert status == 408 and "within 1 s" in body["error"]["message"]


def test_a_client_that_does_not_read_is_given_up(make_app: Callable[..., Any]) -> None:
    async def stuck(_: Message) -> None:
        await asyncio.sleep(60)

    app = make_app(seconds=1, requests=1)

    async def both() -> tuple[int, Any]:
        await ask(app, "/v1/models", send=stuck)
        return await ask(app, "/v1/models")  # its place is free again

    assert asyncio.run(both())[0] == 200


def test_no_more_are_under_way_than_may_be(make_app: Callable[..., Any]) -> None:
    app = make_app(requests=2)

    async def third() -> tuple[int, Any]:
        slow = [asyncio.create_task(ask(app, CHAT, never)) for _ in range(2)]
        await asyncio.sleep(0.1)
        refused = await ask(app, CHAT, unread)
        assert (await ask(app, "/healthz"))[0] == 405  # those who watch are always answered
        for one in slow:
            one.cancel()
        await asyncio.wait(slow)
        assert (await ask(app, CHAT))[0] == 400
        return refused

    status, body = asyncio.run(third())
    assert (status, body["error"]["code"]) == (429, "overloaded")
