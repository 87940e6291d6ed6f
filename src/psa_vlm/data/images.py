"""From whatever a caller calls an image to RGB pictures, or one clear error."""

from __future__ import annotations

import io
import itertools
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from psa_vlm.errors import ImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

MAX_PIXELS = 50_000_000
MAX_FRAMES = 16
MAX_ASPECT = 100
"""Longer side by shorter: an image processor scales the shorter side to a fixed size, so that a
thin strip of few pixels would become a huge picture there."""
MAX_SCANS = 100
"""Of a JPEG, which usually has ten at most: a further one takes 75 bytes, and all pixels are gone
through once more for it."""
_SCAN = b"\xff\xda"

Source = str | Path | bytes | Image.Image


def open_images(
    source: Source, max_pixels: int = MAX_PIXELS, max_frames: int = MAX_FRAMES
) -> list[Image.Image]:
    """Open an image, all frames of an animation included.

    Sizes are checked before any pixel is decoded. Pictures come out upright (EXIF orientation
    applied) in 8-bit RGB; what is transparent stands on white. A picture given is left as it was.

    Args:
        source: a file, an encoded image (PNG, JPEG, WEBP, GIF or BMP), or a loaded picture.
        max_pixels: most pixels, over all frames.
        max_frames: most frames of an animation.

    Raises:
        ImageError: missing, damaged, no image, or too large.
    """
    if isinstance(source, Image.Image):
        where = "image"
    elif isinstance(source, bytes):
        where = f"image of {len(source):,} bytes"
    else:
        where = str(source)
        if not Path(source).is_file():
            raise ImageError(f"{where}: no such image file")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of what is repaired or an error here
        try:
            if isinstance(source, Image.Image):
                return _frames(source, where, max_pixels, max_frames)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=FORMATS) as image:
                if image.format in ("JPEG", "MPO"):
                    _check_scans(source, where)
                return _frames(image, where, max_pixels, max_frames)
        except ImageError:
            raise
        except Image.DecompressionBombError:
            raise ImageError(_too_large(where, max_pixels)) from None
        except UnidentifiedImageError:
            known = ", ".join(FORMATS)
            raise ImageError(f"{where}: not an image ({known}), or damaged at its start") from None
        except Exception as error:  # decoders raise all sorts of things on damaged files
            raise ImageError(f"{where}: damaged or truncated image ({error})") from error


def _check_scans(source: str | Path | bytes, where: str) -> None:
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if data.count(_SCAN) > MAX_SCANS:
        raise ImageError(f"{where}: a JPEG of more than {MAX_SCANS} scans; save it anew")


def _frames(image: Image.Image, where: str, max_pixels: int, max_frames: int) -> list[Image.Image]:
    start, pixels = image.tell(), 0
    frames: list[Image.Image] = []
    try:
        for index in itertools.count():
            if index and image.format == "MPO":  # a photograph; the rest is its preview or depth
                break
            try:
                image.seek(index)
            except EOFError:
                break
            if index == max_frames:
                raise ImageError(f"{where}: more than {max_frames} frames; send fewer")
            width, height = image.size
            pixels += width * height
            if pixels > max_pixels:
                raise ImageError(_too_large(where, max_pixels))
            if not width or not height:
                raise ImageError(f"{where}: {width} x {height} holds no pixels")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ImageError(
                    f"{where}: {width} x {height} is no picture; crop it to at most"
                    f" {MAX_ASPECT} times as long as wide"
                )
            frames.append(_to_rgb(ImageOps.exif_transpose(image), where))
        return frames
    finally:
        image.seek(start)


def _too_large(where: str, max_pixels: int) -> str:
    return f"{where}: more than {max_pixels:,} pixels; scale it down"


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ImageError(f"{where}: 32-bit grey has no agreed white; convert it to 8 bits first")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
