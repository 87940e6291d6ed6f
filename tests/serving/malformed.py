"""A thousand images that somebody might send to get past the service, drawn by a seed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from PIL import Image, ImageDraw

from ..files import encode, png_by_hand

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class Malformed(NamedTuple):
    """An encoded image; `frames` is how many pictures it holds, None where only a decoder knows,
    and 0 where it must be refused."""

    kind: str
    data: bytes
    frames: int | None


def malformed(count: int, seed: int = 0) -> Iterator[Malformed]:
    """So many of them, of each kind in turn."""
    rng = random.Random(seed)
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        yield Malformed(kind.__name__, *kind(rng))


def drawn(rng: random.Random, mode: str = "RGB") -> Image.Image:
    """A small picture of some coloured boxes."""
    image = Image.new("RGB", (rng.randint(4, 40), rng.randint(4, 40)), _colour(rng))
    for _ in range(3):
        x, y = rng.randrange(image.width), rng.randrange(image.height)
        ImageDraw.Draw(image).rectangle((x, y, x + 9, y + 9), _colour(rng))
    return image.convert(mode)


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _some(rng: random.Random) -> bytes:
    """A good image of some format, of one frame or a few."""
    format = rng.choice(FORMATS)
    if format in ("GIF", "WEBP", "PNG") and rng.random() < 0.5:
        return _animation(rng, format, 3)
    return encode(drawn(rng), format)


def _animation(rng: random.Random, format: str, frames: int) -> bytes:
    first = drawn(rng)
    rest = [Image.new("RGB", first.size, (40 * i % 256, i, 255 - i)) for i in range(1, frames)]
    return encode(first, format, save_all=True, append_images=rest, duration=40, lossless=True)


# --- damage ---------------------------------------------------------------------------------------


def truncated(rng: random.Random) -> tuple[bytes, int | None]:
    data = _some(rng)
    return data[: rng.randrange(len(data))], None


def wrong_header(rng: random.Random) -> tuple[bytes, int | None]:
    data, other = _some(rng), _some(rng)
    size = rng.randint(1, 30)
    return other[:size] + data[size:], None


def flipped_bits(rng: random.Random) -> tuple[bytes, int | None]:
    data = bytearray(_some(rng))
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data), None


def joined(rng: random.Random) -> tuple[bytes, int | None]:
    """Two files in one: whoever reads the second one sees another picture."""
    return _some(rng) + _some(rng), None


def no_image(rng: random.Random) -> tuple[bytes, int | None]:
    texts = [b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"II*\0\x08\0\0\0"]
    texts += [b"GIF89a", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", rng.randbytes(200)]
    return rng.choice(texts), 0


# --- sizes ----------------------------------------------------------------------------------------


def huge(rng: random.Random) -> tuple[bytes, int | None]:
    """More pixels than bytes could say, in the header alone."""
    side = rng.choice([7_100, 16_383, 30_000, 65_535])
    match rng.choice(FORMATS):
        case "PNG":
            return png_by_hand(side, side, 8, 2, bytes(10)), 0
        case "GIF":
            data = bytearray(encode(drawn(rng), "GIF"))
            data[6:10] = struct.pack("<HH", side, side)
        case "BMP":
            data = bytearray(encode(drawn(rng), "BMP"))
            data[18:26] = struct.pack("<ii", side, side)
        case "JPEG":
            data = bytearray(encode(drawn(rng), "JPEG"))
            at = data.index(b"\xff\xc0")
            data[at + 5 : at + 9] = struct.pack(">HH", side, side)
        case _:
            data = bytearray(encode(drawn(rng), "WEBP", lossless=True))
            data[21:25] = struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    return bytes(data), 0


def odd_sizes(rng: random.Random) -> tuple[bytes, int | None]:
    width, height = rng.choice([(1, 1), (1, 100), (100, 1), (1, 101), (500, 2), (0, 5), (5, 0)])
    rows = b"".join(bytes([0]) + bytes(3 * width) for _ in range(height))
    good = min(width, height) > 0 and max(width, height) <= 100
    return png_by_hand(width, height, 8, 2, rows), int(good)


# --- pictures of other kinds ----------------------------------------------------------------------


ODD_MODES = [
    *(("P", "GIF"), ("RGBA", "GIF"), ("L", "JPEG"), ("RGBA", "WEBP")),
    *((mode, "PNG") for mode in ("1", "LA", "P", "RGBA")),
    *((mode, "BMP") for mode in ("1", "L", "P")),
]


def odd_modes(rng: random.Random) -> tuple[bytes, int | None]:
    mode, format = rng.choice(ODD_MODES)
    image = drawn(rng)
    if mode.endswith("A"):
        image.putalpha(drawn(rng, "L").resize(image.size))
    return encode(image.convert(mode), format), 1


def sixteen_bits(rng: random.Random) -> tuple[bytes, int | None]:
    colour = rng.choice([0, 2, 4, 6])
    width, height = rng.randint(2, 20), rng.randint(2, 20)
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    rows = b"".join(b"\0" + rng.randbytes(2 * channels * width) for _ in range(height))
    return png_by_hand(width, height, 16, colour, rows), 1


def cmyk(rng: random.Random) -> tuple[bytes, int | None]:
    return encode(drawn(rng, "CMYK"), "JPEG", quality=95), 1


def turned(rng: random.Random) -> tuple[bytes, int | None]:
    """Orientations, and numbers that are none."""
    image, exif = drawn(rng), Image.Exif()
    exif[0x0112] = rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535])
    return encode(image, rng.choice(["JPEG", "PNG", "WEBP"]), exif=exif), 1


def broken_exif(rng: random.Random) -> tuple[bytes, int | None]:
    exif = b"Exif\0\0" + rng.choice([b"II*\0", b"MM\0*", b""]) + rng.randbytes(rng.randint(0, 40))
    return encode(drawn(rng), rng.choice(["JPEG", "PNG", "WEBP"]), exif=exif), None


def many_frames(rng: random.Random) -> tuple[bytes, int | None]:
    frames = rng.choice([2, 3, 5, 16, 17, 20])
    format = rng.choice(["GIF", "WEBP", "PNG"])
    return _animation(rng, format, frames), frames if frames <= 16 else 0


KINDS: list[Callable[[random.Random], tuple[bytes, int | None]]] = [
    truncated,
    wrong_header,
    flipped_bits,
    joined,
    no_image,
    huge,
    odd_sizes,
    odd_modes,
    sixteen_bits,
    cmyk,
    turned,
    broken_exif,
    many_frames,
]
