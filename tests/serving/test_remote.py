"""Images by URL: from which hosts, from which addresses, and how much of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from psa_vlm.errors import RequestError
from psa_vlm.policy.policy import Policy
from psa_vlm.serving import remote
from psa_vlm.serving.audit import Audit
from psa_vlm.serving.limits import Limits
from psa_vlm.serving.remote import Remote, is_public

from .conftest import CHAT, MakeService, chat, client_of, data_url, encoded


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("::ffff:93.184.216.34", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),  # where clouds keep their secrets
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::7f00:1", False),
        ("::7f00:1", False),
        ("::ffff:0:7f00:1", False),
        ("fec0::1", False),
        ("2002:7f00:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
    ],
)
def test_what_a_public_address_is(address: str, public: bool) -> None:
    assert is_public(address) is public


class Site:
    """A web site on this machine, and a resolver that finds it under every name."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.resolved: list[str] = []
        self.addresses: Sequence[str] = ["127.0.0.1"]
        self.app = Starlette(routes=[Route("/{what:path}", self.get)])

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved.append(host)
        return self.addresses

    async def get(self, request: Request) -> Response:
        self.asked.append((request.headers["host"], str(request.url.query)))
        match request.path_params["what"]:
            case "red.png":
                return Response(encoded("red"))
            case "moved.png":
                return RedirectResponse("/red.png")
            case "endless.png":
                return StreamingResponse(self.drip(0.0))
            case "slow.png":
                return StreamingResponse(self.drip(0.2))
            case _:
                return Response(status_code=404)

    async def drip(self, pause: float) -> AsyncIterator[bytes]:
        while True:
            yield b"a" * 100
            await asyncio.sleep(pause)


@pytest.fixture()
def site() -> Site:
    return Site()


@pytest.fixture()
def here(site: Site, live: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The site's port under a name of its own; this machine counts as public."""
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1")
    return "pictures.example:" + live(site.app).rpartition(":")[2]


def fetch(site: Site, urls: list[str], hosts: list[str], **limits: int) -> dict[str, bytes]:
    return asyncio.run(Remote(hosts, Limits(**limits), site.resolve).fetch(urls))


def refused(site: Site, url: str, host: str, **limits: int) -> str:
    with pytest.raises(RequestError) as caught:
        fetch(site, [url], [host], **limits)
    assert caught.value.status == 400
    return str(caught.value)


def test_an_image_is_fetched_once_from_a_named_host(site: Site, here: str) -> None:
    url = f"http://{here}/red.png?size=1"
    assert fetch(site, [url, data_url(b"x"), url], [here.upper()]) == {url: encoded("red")}
    assert site.asked == [(here, "size=1")] and site.resolved == ["pictures.example"]


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/red.png",
        "http://pictures.example:1/red.png",
        "http://pictures.example.evil.example/red.png",
        "http://pictures.example./red.png",
        "https://evil.example#@pictures.example/",
        "http://evil.example?pictures.example",
        "http://pictures.example@evil.example/",
        "http://user@pictures.example/",
        "http://pictures.example\\@evil.example/",
        "http://pictures.example\t/red.png",
        "http://\uff50ictures.example/red.png",
        "http://pictures.example:99999/",
        "http://[::1/red.png",
        "http:///red.png",
    ],
)
def test_another_host_is_not_even_resolved(site: Site, url: str) -> None:
    assert "image 0" in refused(site, url, "pictures.example")
    assert site.resolved == []


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::ffff:10.0.0.1"], []]
)
def test_a_private_address_is_not_connected_to(
    site: Site, live: Callable[[Any], str], addresses: list[str]
) -> None:
    host = "pictures.example:" + live(site.app).rpartition(":")[2]
    site.addresses = addresses
    assert "no public address" in refused(site, f"http://{host}/red.png", host)
    assert site.asked == [] and len(site.resolved) == 1


def test_a_redirect_is_not_followed(site: Site, here: str) -> None:
    told = refused(site, f"http://{here}/moved.png", here)
    assert "status 307" in told and "not followed" in told
    assert len(site.asked) == 1
    assert "status 404" in refused(site, f"http://{here}/none.png", here)


def test_size_and_time_are_limited(site: Site, here: str) -> None:
    assert "1,000 bytes" in refused(site, f"http://{here}/endless.png", here, image=1000)
    start = time.perf_counter()
    assert "within 1 s" in refused(site, f"http://{here}/slow.png", here, fetch_seconds=1)
    assert time.perf_counter() - start < 10
    assert "can not be reached" in refused(site, "http://pictures.example:9/", "pictures.example:9")


def test_the_service_assesses_what_it_fetched(
    site: Site, here: str, make_service: MakeService, audit: Audit, make_url: Any
) -> None:
    fetching = Remote([here], Limits(), site.resolve)

    def ask(url: str) -> Any:
        return client.post(CHAT, json=chat(make_url("blue"), url, text="Hi", max_tokens=2))

    with client_of(make_service(Policy.default(), remote=fetching)) as client:
        psa = ask(f"http://{here}/red.png").json()["psa"]
        assert len(psa["images"]) == 2
        assert ask(f"http://{here}/none.png").json()["error"]["code"] == "remote_image"
        first, second = audit.records()
    assert first["images"] == [one["sha256"] for one in psa["images"]]
    assert second["error"]["code"] == "remote_image"
