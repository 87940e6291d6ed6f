"""Images made to be mistaken: never a 5xx, never one that is not assessed, and what is assessed is
what the language model sees."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, cast

import httpx2
import numpy as np
import pytest
from PIL import Image

from psa_vlm.inference import PsaVlm
from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.policy.policy import Policy
from psa_vlm.serving.app import create_app
from psa_vlm.serving.audit import Audit, Entry
from psa_vlm.serving.engine import Answer, Ask, Assessed, End, Usage
from psa_vlm.serving.service import Model, Service
from psa_vlm.taxonomy import Taxonomy

from ..files import encode, png_by_hand
from .conftest import CHAT, MakeService, chat, client_of, data_url
from .malformed import malformed

MODERATIONS = "/v1/moderations"
COUNT = 1000
WORDS = Taxonomy.default()


class Counting:
    """An engine that finds everything clean, and keeps what it was shown."""

    taxonomy = WORDS
    samples = False
    waiting = 0

    def __init__(self) -> None:
        self.shown: list[tuple[Image.Image, ...]] = []

    async def assess(self, ask: Ask) -> Assessed:
        self.shown.append(ask.images)
        probs = [dict.fromkeys(names, 0.0) for names in (WORDS.types, WORDS.levels)]
        probs[0][WORDS.clean] = probs[1][WORDS.safe_level] = 1.0
        verdict = Verdict.from_probs([ImageVerdict(*probs) for _ in ask.images], WORDS)
        return Assessed(verdict, ask.policy.decide(verdict, WORDS))

    async def answer(self, ask: Ask) -> Answer:
        return Answer(*await self.assess(ask), self.parts())

    async def parts(self) -> AsyncGenerator[str | End, None]:
        yield "Yes."
        yield End("stop", Usage())


class Kept:
    """An audit log in memory."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def append(self, entry: Entry) -> str:
        self.entries.append(entry)
        return "0" * 64


def asked(path: str, url: str, text: str = "What is this?") -> dict[str, Any]:
    body = chat(url, text=text, max_tokens=2)
    return {"input": body["messages"][0]["content"]} if path == MODERATIONS else body


@pytest.mark.parametrize("path", [CHAT, MODERATIONS])
def test_a_thousand_malformed_images(path: str) -> None:
    engine, audit = Counting(), Kept()
    service = Service(cast(Any, engine), Model("tiny", "f"), Policy.default(), cast(Audit, audit))
    transport = httpx2.ASGITransport(create_app(service), raise_app_exceptions=False)
    outcomes: dict[str, Counter[int]] = {}

    async def send_all() -> None:
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for number, (kind, data, frames) in enumerate(malformed(COUNT)):
                about = f"number {number}, {kind}"
                engine.shown.clear()
                reply = await client.post(path, json=asked(path, data_url(data)))
                outcomes.setdefault(kind, Counter())[reply.status_code] += 1
                if reply.status_code == 200:
                    (shown,) = engine.shown
                    assert len(reply.json()["psa"]["images"]) == len(shown) > 0, about
                    assert {one.mode for one in shown} == {"RGB"}, about
                    assert frames in (None, len(shown)), about
                else:
                    assert (reply.status_code, engine.shown) == (400, []), about
                    assert reply.json()["error"]["code"] in ("invalid_image", "too_many_images")
                    assert not frames, f"{about}: {reply.text}"

    asyncio.run(send_all())
    assert len(audit.entries) == COUNT
    refused = sum(one.error is not None for one in audit.entries)
    assert refused == sum(counts[400] for counts in outcomes.values())
    for kind in ("truncated", "wrong_header", "flipped_bits", "no_image", "huge"):
        assert outcomes[kind][400], kind
    assert refused < 2 * COUNT / 3  # most kinds are served


# --- what is assessed, by value ------------------------------------------------------------------


def sixteen_bit(colour: int, channels: int) -> tuple[bytes, np.ndarray]:
    """A PNG of 16 bits, and its 8 upper ones [H, W, channels]."""
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_by_hand(7, 9, 16, colour, rows), (values >> 8).astype(np.uint8)


def grey_of_16_bits() -> tuple[bytes, np.ndarray]:
    data, upper = sixteen_bit(0, 1)
    return data, upper.repeat(3, axis=2)


def colours_of_16_bits() -> tuple[bytes, np.ndarray]:
    return sixteen_bit(2, 3)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    found: np.ndarray = colours * share + 255 * (1 - share)
    return found


def alpha_of_16_bits() -> tuple[bytes, np.ndarray]:
    data, upper = sixteen_bit(6, 4)
    return data, on_white(upper[..., :3], upper[..., 3])


def inks() -> tuple[bytes, np.ndarray]:
    """One ink after the other, and all of them."""
    colours = np.zeros((32, 32, 4), dtype=np.uint8)
    for index in range(4):
        colours[8 * index : 8 * index + 8, :, index] = 200
    colours[:, 16:] += 50
    shown = 255 * (1 - colours[..., :3] / 255) * (1 - colours[..., 3:] / 255)
    return encode(Image.fromarray(colours, "CMYK"), "JPEG", quality=100, subsampling=0), shown


def hidden_by_alpha() -> tuple[bytes, np.ndarray]:
    """Its colours are a picture, and all of it is transparent: there is nothing to see."""
    colours = np.asarray(PICTURE)
    hidden = np.dstack([colours, np.zeros(colours.shape[:2], dtype=np.uint8)])
    return encode(Image.fromarray(hidden), "PNG"), np.full_like(colours, 255)


def drawn_in_alpha() -> tuple[bytes, np.ndarray]:
    """Its colours are plain black, and the picture is in what is transparent."""
    alpha = np.asarray(PICTURE.convert("L"))
    black = np.zeros((*alpha.shape, 3), dtype=np.uint8)
    return encode(Image.fromarray(np.dstack([black, alpha])), "PNG"), on_white(black, alpha)


def transparent_colour_of_a_palette() -> tuple[bytes, np.ndarray]:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 4, 8))
    shown = np.full((8, 8, 3), (255, 0, 0))
    shown[:, :4] = 255
    return encode(image, "PNG", transparency=1), shown


def turned(orientation: int) -> Callable[[], tuple[bytes, np.ndarray]]:
    def make() -> tuple[bytes, np.ndarray]:
        upright = np.asarray(PICTURE)
        stored = STORED[orientation](upright)
        exif = Image.Exif()
        exif[0x0112] = orientation
        return encode(Image.fromarray(stored), "PNG", exif=exif), upright

    return make


PICTURE = Image.new("RGB", (24, 16), "white")
PICTURE.paste("red", (0, 0, 8, 4))
PICTURE.paste("blue", (16, 8, 24, 16))
PICTURE.paste("green", (4, 8, 6, 16))
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda one: np.rot90(one, 2),
    4: np.flipud,
    5: lambda one: one.transpose(1, 0, 2),
    6: lambda one: np.rot90(one, 1),
    7: lambda one: np.rot90(one, 2).transpose(1, 0, 2),
    8: lambda one: np.rot90(one, -1),
}
"""How a camera that was held so stores an upright picture."""

MADE = [
    grey_of_16_bits,
    colours_of_16_bits,
    alpha_of_16_bits,
    inks,
    hidden_by_alpha,
    drawn_in_alpha,
    transparent_colour_of_a_palette,
    *map(turned, STORED),
]


@pytest.mark.parametrize("make", MADE)
def test_what_is_assessed_is_the_picture_that_the_model_sees(
    model: PsaVlm,
    make_service: MakeService,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], tuple[bytes, np.ndarray]],
) -> None:
    """One encoding serves verdict and answer, and what is encoded is the reference's picture."""
    data, reference = make()
    encode = model.backbone.encode
    shown: list[Sequence[Image.Image]] = []

    def seen(images: Sequence[Image.Image], counts: Sequence[int]) -> Any:
        shown.append(images)
        return encode(images, counts)

    monkeypatch.setattr(model.backbone, "encode", seen)
    allow = Policy.from_text(
        'name: all\ninherits: default\nrules: {"*": {low: allow, medium: allow, high: allow}}\n'
    )
    with client_of(make_service(allow)) as client:
        for path in (CHAT, MODERATIONS):
            shown.clear()
            reply = client.post(path, json=asked(path, data_url(data)))
            assert reply.status_code == 200, reply.text
            ((picture,),) = shown  # encoded once, for the verdict and for the words
            assert picture.mode == "RGB"
            found = np.asarray(picture, dtype=float)
            assert found.shape == reference.shape
            assert np.abs(found - reference).max() <= 3, path


def test_a_frame_on_another_is_assessed_as_it_is_shown(model: PsaVlm) -> None:
    """The second frame of a GIF may hold only what changes."""
    from psa_vlm.serving.images import open_urls
    from psa_vlm.serving.limits import Limits

    first, second = PICTURE.copy(), PICTURE.copy()
    second.paste("black", (10, 2, 14, 6))
    data = encode(first, "GIF", save_all=True, append_images=[second], optimize=True)
    (picture,) = open_urls([data_url(data)], Limits())
    assert [one.size for one in picture.frames] == [(24, 16)] * 2
    assert picture.frames[1].getpixel((11, 3)) == (0, 0, 0)
    assert picture.frames[1].getpixel((1, 1)) == (255, 0, 0)
