"""Images as a client sends them."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image


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


@pytest.fixture(scope="session")
def make_url() -> Any:
    """Makes the data URL of an image: colour, size, frames."""
    return lambda *args, **named: data_url(encoded(*args, **named))
