"""Images as a client sends them, and services that are asked over real HTTP."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from psa_vlm.inference import PsaVlm


def encoded(colour: str = "red", size: tuple[int, int] = (32, 32), frames: int = 1) -> bytes:
    """A PNG of one colour, or a GIF of several frames."""
    stream = io.BytesIO()
    pictures = [Image.new("RGB", size, colour)]
    pictures += [Image.new("RGB", size, (0, 0, 9 * i)) for i in range(1, frames)]
    if frames == 1:
        pictures[0].save(stream, "PNG")
    else:
        pictures[0].save(stream, "GIF", save_all=True, append_images=pictures[1:])
    return stream.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image(url: str) -> dict[str, Any]:
    """A part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture(scope="session")
def make_url() -> Any:
    """Makes the data URL of an image: colour, size, frames."""
    return lambda *args, **named: data_url(encoded(*args, **named))


@pytest.fixture(scope="module")
def model(run_dir: Path) -> PsaVlm:
    return PsaVlm.from_pretrained(run_dir)


@pytest.fixture()
def live() -> Iterator[Callable[[Any], str]]:
    """Serves an ASGI app at a port of its own, and gives its address."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(_served(app))


@contextmanager
def _served(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield "http://127.0.0.1:{1}".format(*server.servers[0].sockets[0].getsockname())
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture()
def breaks_after(model: PsaVlm) -> Iterator[Callable[[int, str], None]]:
    """Lets the language model fail, with a reason, at its first step after so many."""
    hooks = []

    def set_to(steps: int, reason: str) -> None:
        left = iter(range(steps + 1))

        def fail(*_: Any) -> None:
            if next(left, None) is None:
                raise RuntimeError(reason)

        hooks.append(model.backbone.model.get_decoder().register_forward_pre_hook(fail))

    yield set_to
    for hook in hooks:
        hook.remove()
