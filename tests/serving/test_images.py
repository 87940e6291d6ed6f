"""Images of a request: all of them, within the limits, or an error and none."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest

from psa_vlm.errors import RequestError
from psa_vlm.serving.images import open_urls
from psa_vlm.serving.limits import Limits

from .conftest import data_url, encoded


def code_of(urls: list[str], limits: Limits | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        open_urls(urls, limits or Limits())
    assert caught.value.status == 400
    return caught.value.code


def test_every_image_and_every_frame_comes_back(make_url: Any) -> None:
    data = encoded("blue")
    pictures = open_urls([data_url(data), make_url(frames=3)], Limits())
    assert [len(one.frames) for one in pictures] == [1, 3]
    assert pictures[0].sha256 == hashlib.sha256(data).hexdigest()
    assert pictures[0].frames[0].getpixel((0, 0)) == (0, 0, 255)


def test_the_limits_count_over_all_images_and_frames(make_url: Any) -> None:
    still, moving = make_url(), make_url(frames=3)
    assert len(open_urls([still, moving], Limits(images=4))) == 2
    assert code_of([moving, still], Limits(images=3)) == "too_many_images"
    assert code_of([still, moving], Limits(images=3)) == "invalid_image"
    assert code_of([still] * 4, Limits(images=3)) == "too_many_images"
    assert len(open_urls([still, still], Limits(pixels=2 * 32 * 32))) == 2
    assert code_of([still, still], Limits(pixels=2 * 32 * 32 - 1)) == "invalid_image"


def test_bytes_are_limited_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded()
    assert open_urls([data_url(data)], Limits(image=len(data)))

    def decode(*_: object, **__: object) -> bytes:
        raise AssertionError("decoded")

    monkeypatch.setattr(base64, "b64decode", decode)
    assert code_of([data_url(data)], Limits(image=len(data) - 3)) == "image_too_large"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://example.com/a.png", "remote_image"),
        ("HTTP://127.0.0.1/a.png", "remote_image"),
        ("file:///etc/hostname", "invalid_image"),
        ("/etc/hostname", "invalid_image"),
        ("data:image/png,plain", "invalid_image"),
        ("data:image/png;base64,%%%%", "invalid_image"),
        ("data:image/png;base64,", "invalid_image"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "invalid_image"),
        (data_url(encoded()[:60]), "invalid_image"),
        ("", "invalid_image"),
    ],
)
def test_what_is_no_image_is_refused(url: str, code: str) -> None:
    assert code_of([data_url(encoded()), url]) == code
