"""Pictographs of the testbed: one RGBA atlas per art style, shipped pre-rendered.

`render_atlases` makes the atlases from the openly licensed originals; NOTICE names their licences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.resources import files
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from psa_vlm.errors import InputError
from psa_vlm.testbed.world import Kind, world

TILE = 64  # pixels, side of one sprite in an atlas
COLUMNS = 10
NOTO_SIZE = 109  # the only size at which the Noto colour bitmaps can be drawn


def _square(image: Image.Image) -> Image.Image:
    """Crop to what is drawn and centre it on a transparent TILE x TILE square."""
    image = image.crop(image.getbbox())
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    tile = Image.new("RGBA", (TILE, TILE))
    tile.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return tile


def _noto(kind: Kind, font: ImageFont.FreeTypeFont) -> Image.Image:
    image = Image.new("RGBA", (160, 160))
    text = chr(int(kind.codepoint, 16))
    ImageDraw.Draw(image).text((10, 10), text, font=font, embedded_color=True)
    return image


def _svg(path: Path) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=path.read_text(), width=256, height=256)
    return Image.open(BytesIO(bytes(png))).convert("RGBA")


def render_atlases(noto_font: Path, twemoji: Path, fluent: Path, out: Path) -> list[Path]:
    """Render every kind of the world in every style.

    Args:
        noto_font: `NotoColorEmoji.ttf` with bitmap glyphs (Debian: fonts-noto-color-emoji).
        twemoji: folder of Twemoji SVGs named by code point (package @twemoji/svg 15).
        fluent: folder of flat Fluent SVGs named in words (package fluentui-emoji 1.3).
        out: folder for `<style>.png`.

    Raises:
        InputError: one of the originals is missing.
    """
    for path in (noto_font, twemoji, fluent):
        if not path.exists():
            raise InputError(f"{path}: emoji originals not found; give the folder of the package")
    font = ImageFont.truetype(str(noto_font), NOTO_SIZE)
    draw: dict[str, Callable[[Kind], Image.Image]] = {
        "noto": lambda kind: _noto(kind, font),
        "twemoji": lambda kind: _svg(twemoji / f"{kind.codepoint}.svg"),
        "fluent": lambda kind: _svg(fluent / f"{kind.fluent}.svg"),
    }
    kinds = list(world().kinds.values())
    rows = -(-len(kinds) // COLUMNS)
    written = []
    for style, render in draw.items():
        atlas = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
        for i, kind in enumerate(kinds):
            atlas.paste(_square(render(kind)), (i % COLUMNS * TILE, i // COLUMNS * TILE))
        atlas.save(out / f"{style}.png", optimize=True)
        written.append(out / f"{style}.png")
    return written


@cache
def _atlas(style: str) -> Image.Image:
    with files("psa_vlm.testbed").joinpath(f"assets/{style}.png").open("rb") as stream:
        return Image.open(stream).convert("RGBA")


@cache
def sprite(style: str, kind: str, size: int) -> Image.Image:
    """The pictograph of `kind` in an art style, RGBA, `size` pixels a side."""
    i = list(world().kinds).index(kind)
    x, y = i % COLUMNS * TILE, i // COLUMNS * TILE
    tile = _atlas(style).crop((x, y, x + TILE, y + TILE))
    return tile.resize((size, size), Image.Resampling.LANCZOS)
