"""From the images of a request to pictures, all of them, under limits."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from psa_vlm.data.images import open_images
from psa_vlm.errors import ImageError, RequestError
from psa_vlm.serving.limits import Limits

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """One image of a request.

    Attributes:
        sha256: of the encoded bytes.
        frames: what it shows, every frame of an animation, in 8-bit RGB.
    """

    sha256: str
    frames: tuple[Image, ...]


def open_urls(
    urls: Sequence[str], limits: Limits, fetched: Mapping[str, bytes] | None = None
) -> tuple[Picture, ...]:
    """Open the images of a request; the limits on pictures and pixels count over all of them.

    Args:
        urls: data URLs, and those of `fetched`.
        limits: of a request.
        fetched: what was found at remote URLs; nothing is fetched here.

    Raises:
        RequestError: an image can't be opened, or is more than the limits allow. Either all images
            come back or none.
    """
    if len(urls) > limits.images:
        raise _too_many(limits)
    pictures: list[Picture] = []
    frames = pixels = 0
    for index, url in enumerate(urls):
        if frames == limits.images:  # animations before it took them all
            raise _too_many(limits)
        data = (fetched or {}).get(url)
        if data is None:
            data = _data(url, f"image {index}", limits.image)
        try:
            # Each may use what the ones before it left.
            opened = open_images(data, limits.pixels - pixels, limits.images - frames)
        except ImageError as error:
            raise RequestError(f"image {index}: {error}", None, "invalid_image") from None
        frames += len(opened)
        pixels += sum(one.width * one.height for one in opened)
        pictures.append(Picture(hashlib.sha256(data).hexdigest(), tuple(opened)))
    return tuple(pictures)


def _data(url: str, where: str, most: int) -> bytes:
    """The bytes of a data URL."""
    scheme = url[:16].partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise RequestError(
            f"{where}: remote images are not fetched; send it as a data URL", None, "remote_image"
        )
    head, comma, encoded = url.partition(",")
    if scheme != "data" or not comma or not head.lower().endswith(";base64"):
        raise RequestError(
            f"{where}: not a data URL; write data:image/png;base64,...", None, "invalid_image"
        )
    if len(encoded) > (most + 2) // 3 * 4:  # seen before anything is decoded
        raise RequestError(
            f"{where}: more than {most:,} bytes; make it smaller", None, "image_too_large"
        )
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{where}: its base64 is damaged", None, "invalid_image") from None


def _too_many(limits: Limits) -> RequestError:
    return RequestError(
        f"more than {limits.images} images in the request; send fewer", None, "too_many_images"
    )
