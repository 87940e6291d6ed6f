"""Scenes: one to four pictographs, and perhaps a sign, on a varied background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from psa_vlm.testbed.sprites import sprite
from psa_vlm.testbed.world import Kind, world

SIZE = 96  # pixels, side of a scene
MAIN = (44, 48)  # pixels, side of the main thing; the rest is smaller
SMALL = (26, 34)
SIGN = "sign"


@dataclass(frozen=True)
class Item:
    """One placed thing: a kind by name, or a sign with its word."""

    name: str
    place: int  # 0 top left, 1 top right, 2 bottom left, 3 bottom right
    box: tuple[int, int, int]  # left, top, side in pixels
    turn: int  # degrees
    mirrored: bool
    word: str = ""


@dataclass(frozen=True)
class Scene:
    """What is shown; `items` stand in reading order, `main` is the index of the big thing."""

    style: str
    items: tuple[Item, ...]
    main: int
    seed: int  # of the background and the lighting

    @property
    def main_kind(self) -> Kind:
        return world().kinds[self.items[self.main].name]

    @property
    def risk(self) -> str | None:
        """Risk type of the scene, None when it is clean."""
        return self.main_kind.risk

    @property
    def setting(self) -> str:
        """ "person", "companion" or "alone": what stands beside the main thing."""
        names = {item.name for item in self.items}
        if "person" in names:
            return "person"
        if self.risk is not None and world().companions[self.risk] in names:
            return "companion"
        return "alone"

    @property
    def sign(self) -> str | None:
        """The word on the sign, None without one."""
        return next((item.word for item in self.items if item.name == SIGN), None)

    def count(self, name: str) -> int:
        return sum(item.name == name for item in self.items)


def make_scene(
    rng: Random, style: str, main: str, others: Sequence[str] = (), sign: str | None = None
) -> Scene:
    """Place a big main thing, smaller others and a sign at random.

    Raises:
        ValueError: more than four things.
    """
    names = [main, *others, *([SIGN] if sign else [])]
    if len(names) > 4:
        raise ValueError(f"a scene holds four things, not {len(names)}")
    places = rng.sample(range(4), len(names))
    items = []
    for i, (name, place) in enumerate(zip(names, places, strict=True)):
        side = 44 if name == SIGN else rng.randint(*(MAIN if i == 0 else SMALL))
        spare = SIZE // 2 - side
        items.append(
            Item(
                name=name,
                place=place,
                box=(
                    place % 2 * SIZE // 2 + rng.randint(0, spare),
                    place // 2 * SIZE // 2 + rng.randint(0, spare),
                    side,
                ),
                turn=0 if name == SIGN else rng.randint(-12, 12),
                mirrored=name != SIGN and rng.random() < 0.5,
                word=sign or "" if name == SIGN else "",
            )
        )
    ordered = sorted(items, key=lambda item: item.place)
    return Scene(style, tuple(ordered), ordered.index(items[0]), rng.getrandbits(32))


def held_out_composition(names: Sequence[str]) -> bool:
    """Whether a set of two or more things is kept for evaluation (one in ten, by name)."""
    return len(names) > 1 and crc32("+".join(sorted(names)).encode()) % 10 == 0


def draw_scene(
    rng: Random,
    styles: Sequence[str],
    risk: str | None = None,
    setting: str = "alone",
    unseen: bool | None = False,
    held_out: bool = False,
    sign: bool | None = None,
) -> Scene:
    """Draw a scene of a wished content.

    Args:
        rng: source of all choices.
        styles: art styles to choose from.
        risk: risk type of the main thing, None for a clean scene.
        setting: "alone", "companion" or "person"; only for risky scenes (clean ones are free).
        unseen: main thing from the unseen kinds; None for any.
        held_out: only compositions kept for evaluation, else only the others.
        sign: with or without a sign; None leaves it to chance.
    """
    table = world()
    while True:
        if risk is None:
            main = rng.choice(table.harmless).name
            others = [rng.choice([*table.harmless, table.kinds["person"]]).name]
        else:
            seen = [False, True] if unseen is None else [unseen]
            main = rng.choice([k for u in seen for k in table.risky(risk, u)]).name
            companion = table.companions[risk]
            beside = {"alone": [], "companion": [companion], "person": ["person"]}
            others = list(beside[setting])
        pool = [k.name for k in table.harmless if risk is None or k.name != companion]
        with_sign = rng.random() < 0.2 if sign is None else sign
        room = 3 - len(others) - with_sign
        for _ in range(rng.randint(0, max(room, 0))):
            others.append(rng.choice([main, *others]) if rng.random() < 0.3 else rng.choice(pool))
        if risk is None and rng.random() < 0.25:
            others = others[1:]
        names = [main, *others]
        if held_out == held_out_composition(names) and not (held_out and len(names) < 2):
            word = rng.choice(table.table["signs"]) if with_sign else None
            return make_scene(rng, rng.choice(list(styles)), main, others, word)


def _background(rng: np.random.Generator) -> Image.Image:
    """A light gradient between two colours, with stripes or soft noise on some scenes."""
    ends = rng.uniform(120, 255, size=(2, 3))
    axis = np.linspace(0, 1, SIZE)[:, None]
    ramp = ends[0] * (1 - axis) + ends[1] * axis  # [SIZE, 3]
    pixels = np.broadcast_to(ramp[:, None], (SIZE, SIZE, 3)).copy()
    if rng.random() < 0.5:
        pixels = pixels.transpose(1, 0, 2)
    pattern = rng.random()
    if pattern < 0.3:
        period = int(rng.integers(6, 20))
        pixels[:, (np.arange(SIZE) // period) % 2 == 0] *= rng.uniform(0.88, 0.96)
    elif pattern < 0.6:
        pixels += rng.normal(0, rng.uniform(2, 9), size=(SIZE, SIZE, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=15)


def _sign(word: str, side: int, rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(image)
    light = tuple(int(c) for c in rng.integers(215, 256, 3))
    dark = tuple(int(c) for c in rng.integers(0, 80, 3))
    draw.rectangle((side // 2 - 2, side // 2, side // 2 + 1, side - 1), fill=(110, 80, 50))
    draw.rounded_rectangle((0, 8, side - 1, 31), radius=4, fill=light, outline=dark)
    draw.text((side // 2, 19), word, font=_font(), fill=dark, anchor="mm")
    return image


def render(scene: Scene) -> Image.Image:
    """Draw a scene: RGB, SIZE x SIZE. The same scene always gives the same pixels."""
    rng = np.random.default_rng(scene.seed)
    image = _background(rng)
    for item in scene.items:
        left, top, side = item.box
        if item.name == SIGN:
            tile = _sign(item.word, side, rng)
        else:
            tile = sprite(scene.style, item.name, side)
            if item.mirrored:
                tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if item.turn:
                tile = tile.rotate(item.turn, Image.Resampling.BILINEAR)
        image.paste(tile, (left, top), tile)
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Color, ImageEnhance.Contrast):
        image = enhancer(image).enhance(float(rng.uniform(0.8, 1.2)))
    return image
