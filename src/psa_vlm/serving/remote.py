"""Images by URL, from the hosts that the operator names and from no address of the inner network.

A name is resolved once: its addresses are checked, and one of them is connected to. Neither a
redirect nor a second answer of the name's owner can lead elsewhere.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpcore2

from psa_vlm.errors import RequestError
from psa_vlm.serving.limits import Limits

PORTS = {"http": 80, "https": 443}
_GLOBAL = ipaddress.ip_network("2000::/3")
"""Where all addresses of the open internet are; others may lead back to an IPv4 one."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """As the system resolves it."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(one[4][0]) for one in found]


def is_remote(url: str) -> bool:
    """Whether a URL names something to fetch."""
    return url[:8].lower().startswith(("http://", "https://"))


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet, in whatever way it is written."""
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip not in _GLOBAL or ip.sixtofour or ip.teredo:  # in these two one is inside
            return False
    return ip.is_global and not ip.is_multicast


class Remote:
    """Fetches images.

    Args:
        hosts: that may be asked: `example.org`, or `example.org:8443` for another port.
        limits: bytes of an image, and seconds for all images of a request.
        resolve: gives the addresses of a host.
    """

    def __init__(self, hosts: Iterable[str], limits: Limits, resolve: Resolve = resolve) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)
        self.limits = limits
        self._backend = _Checked(resolve)

    async def fetch(self, urls: Sequence[str]) -> dict[str, bytes]:
        """What is at the remote ones among the images of a request.

        Raises:
            RequestError: an image can't be had, or may not.
        """
        found: dict[str, bytes] = {}
        try:
            async with asyncio.timeout(self.limits.fetch_seconds):
                for index, url in enumerate(urls):
                    if is_remote(url) and url not in found:
                        found[url] = await self._fetch(url, f"image {index}")
        except TimeoutError:
            told = f"remote images: not there within {self.limits.fetch_seconds} s"
            raise _refused(told) from None
        return found

    async def _fetch(self, url: str, where: str) -> bytes:
        place = self._place(url, where)
        asked = httpcore2.URL(
            scheme=place.scheme,
            host=place.hostname or "",
            port=place.port,
            target=f"{place.path or '/'}{f'?{place.query}' if place.query else ''}",
        )
        headers = [("Accept", "image/*"), ("Accept-Encoding", "identity")]
        try:
            async with (
                httpcore2.AsyncConnectionPool(network_backend=self._backend) as pool,
                pool.stream("GET", asked, headers=headers) as response,
            ):
                if response.status != 200:
                    redirect = "; redirects are not followed" if response.status // 100 == 3 else ""
                    raise _refused(f"{where}: status {response.status}{redirect}")
                data = bytearray()
                async for chunk in response.aiter_stream():
                    data += chunk
                    if len(data) > self.limits.image:
                        most = f"{self.limits.image:,}"
                        told = f"{where}: more than {most} bytes; make it smaller"
                        raise RequestError(told, None, "image_too_large")
                return bytes(data)
        except _NotPublic:
            raise _refused(f"{where}: its host has no public address") from None
        except (
            httpcore2.NetworkError,
            httpcore2.ProtocolError,
            httpcore2.TimeoutException,
            OSError,
        ):
            raise _refused(f"{where}: its host can not be reached") from None

    def _place(self, url: str, where: str) -> SplitResult:
        """A URL taken apart, this once, after a look at whether it may be fetched."""
        try:
            place = urlsplit(url)
            host, port = place.hostname or "", place.port
        except ValueError:
            raise _refused(f"{where}: not a URL") from None
        if not (url.isascii() and url.isprintable()) or " " in url or "\\" in url:
            raise _refused(f"{where}: not a URL; encode what is no plain letter")
        if "@" in place.netloc:
            raise _refused(f"{where}: a URL with a user's name is not fetched")
        usual = port is None or port == PORTS[place.scheme]
        if f"{host}:{port}" not in self.hosts and not (usual and host in self.hosts):
            raise _refused(f"{where}: images are not fetched from this host")
        return place


class _NotPublic(Exception):
    """A host with an address that is not public."""


class _Checked(httpcore2.AnyIOBackend):
    """Connects to addresses that were looked at."""

    def __init__(self, resolve: Resolve) -> None:
        super().__init__()
        self._resolve = resolve

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(is_public, addresses)):
            raise _NotPublic
        return await super().connect_tcp(addresses[0], port, timeout, local_address, socket_options)


def _refused(told: str) -> RequestError:
    return RequestError(told, None, "remote_image")
