from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from psa_vlm.data.images import open_images
from psa_vlm.errors import ImageError

from ..files import encode, png_by_hand

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(seed: int = 0, size: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def animation(format: str, colours: list[tuple[int, int, int]]) -> bytes:
    first, *rest = [Image.new("RGB", (8, 6), colour) for colour in colours]
    return encode(first, format, save_all=True, append_images=rest, duration=40, lossless=True)


def png_header(width: int, height: int) -> bytes:
    """A PNG of the size given that holds one row of its pixels."""
    return png_by_hand(width, height, 8, 2, b"\0" + b"\0\0\0" * width)


def gif_whose_frame_outgrows_its_screen(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    small = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    large = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00"
    return screen + small + large + b";"


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "JPEG"])
def test_formats_and_sources(tmp_path: Path, format: str) -> None:
    path = tmp_path / "picture.any"
    path.write_bytes(encode(Image.new("RGB", (5, 4), RED), format))
    for source in (path, str(path), path.read_bytes()):
        [image] = open_images(source)
        assert (image.mode, image.size) == ("RGB", (5, 4))
        assert np.abs(np.asarray(image).astype(int) - RED).max() <= 2


def test_other_formats_are_refused() -> None:
    with pytest.raises(ImageError, match="not an image"):
        open_images(encode(noise(), "TIFF"))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (2, 2), 1), WHITE),
        (Image.new("L", (2, 2), 100), (100, 100, 100)),
        (Image.new("LA", (2, 2), (0, 0)), WHITE),
        (Image.new("RGBA", (2, 2), (*RED, 0)), WHITE),
        (Image.new("RGBA", (2, 2), (*RED, 255)), RED),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("RGB", (2, 2), BLUE).convert("P"), BLUE),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), RED),
        (Image.new("HSV", (2, 2), (0, 255, 255)), RED),
        (Image.fromarray(np.full((2, 2), 0x80FF, np.uint16)), (128, 128, 128)),
        (Image.fromarray(np.full((2, 2), 0x80FF, np.dtype(">u2"))), (128, 128, 128)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_modes_become_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    [out] = open_images(image)
    assert out.mode == "RGB"
    assert out.getpixel((1, 1)) == expected


def test_a_16_bit_png_keeps_its_greys() -> None:
    [image] = open_images(encode(Image.fromarray(np.full((2, 2), 0x40FF, np.uint16))))
    assert image.getpixel((0, 0)) == (64, 64, 64)


def test_a_transparent_palette_stands_on_white() -> None:
    image = Image.new("P", (2, 2), 3)
    image.putpalette([0] * 768)
    [out] = open_images(encode(image, "PNG", transparency=3))
    assert out.getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_without_a_range_is_refused(mode: str) -> None:
    with pytest.raises(ImageError, match="image: 32-bit grey"):
        open_images(Image.new(mode, (2, 2)))


def test_orientation_is_applied() -> None:
    image = Image.new("RGB", (6, 4), RED)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    [out] = open_images(encode(image, "JPEG", exif=exif))
    assert out.size == (4, 6)
    assert 0x0112 not in out.getexif()


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_every_frame_of_an_animation_comes_out(format: str) -> None:
    colours = [RED, GREEN, BLUE]
    frames = open_images(animation(format, colours))
    assert [frame.getpixel((3, 3)) for frame in frames] == colours
    assert {frame.mode for frame in frames} == {"RGB"}


def test_too_many_frames_are_refused_not_dropped() -> None:
    colours = [(16 * i, 0, 0) for i in range(5)]
    assert len(open_images(animation("GIF", colours), max_frames=5)) == 5
    with pytest.raises(ImageError, match="more than 4 frames"):
        open_images(animation("GIF", colours), max_frames=4)


def test_a_photograph_with_a_preview_is_one_picture() -> None:
    photo = encode(noise(1), "MPO", save_all=True, append_images=[noise(2)])
    [image] = open_images(photo)
    assert image.size == (24, 24)


def test_a_picture_given_is_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(animation("GIF", [RED, GREEN, BLUE]))
    with Image.open(path) as image:
        image.seek(1)
        before = image.convert("RGB").tobytes()
        assert len(open_images(image)) == 3
        assert image.tell() == 1
        assert image.convert("RGB").tobytes() == before


def test_the_picture_that_comes_out_is_a_copy() -> None:
    given_one = Image.new("RGB", (2, 2), RED)
    [out] = open_images(given_one)
    out.putpixel((0, 0), BLUE)
    assert given_one.getpixel((0, 0)) == RED


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(ImageError, match=rf"^{path}: no such image file$"):
            open_images(path)


def test_a_text_named_png_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("Dear diary, ...")
    with pytest.raises(ImageError, match=r"notes\.png: not an image \(PNG, JPEG, WEBP, GIF, BMP\)"):
        open_images(path)


@pytest.mark.parametrize("source", [b"", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_bytes_that_are_no_image(source: bytes) -> None:
    with pytest.raises(ImageError, match=rf"image of {len(source):,} bytes: not an image"):
        open_images(source)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@given(share=st.floats(0, 0.9))
@settings(max_examples=25)
def test_a_truncated_image_is_one_clear_line(format: str, share: float) -> None:
    whole = encode(noise(), format)
    with pytest.raises(ImageError) as caught:
        open_images(whole[: int(share * len(whole))])
    assert "\n" not in str(caught.value)


@given(st.binary(min_size=1, max_size=8), st.floats(0, 1), st.sampled_from(["PNG", "GIF", "WEBP"]))
def test_a_damaged_animation_is_whole_or_an_error(noise: bytes, at: float, format: str) -> None:
    whole = animation(format, [RED, GREEN, BLUE])
    position = int(at * len(whole))
    damaged = whole[:position] + noise + whole[position + len(noise) :]
    try:
        frames = open_images(damaged)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert all(frame.mode == "RGB" for frame in frames)


@pytest.mark.parametrize("side", [7_100, 10_000, 30_000])  # Pillow is silent, warns, raises
def test_a_huge_image_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded.append)
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(side, side))
    with (
        warnings.catch_warnings(record=True) as leaked,
        pytest.raises(ImageError, match=r"huge\.png: more than 50,000,000 pixels"),
    ):
        warnings.simplefilter("always")
        open_images(path)
    assert not decoded
    assert not leaked


def test_a_jpeg_of_endless_scans_is_refused_undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes through all pixels once more, and takes a few bytes."""
    whole = encode(noise(size=64).convert("L"), "JPEG", progressive=True)
    last, end = whole.rindex(b"\xff\xda"), whole.rindex(b"\xff\xd9")
    usual = whole[:end] + whole[last:end] * 50 + whole[end:]
    assert open_images(usual)[0].size == (64, 64)
    bomb = whole[:end] + whole[last:end] * 100 + whole[end:]
    decoded: list[object] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded.append)
    with pytest.raises(ImageError, match="more than 100 scans"):
        open_images(bomb)
    assert not decoded


def test_pixels_are_counted_over_all_frames() -> None:
    colours = [RED, GREEN, BLUE]
    assert len(open_images(animation("GIF", colours), max_pixels=3 * 48)) == 3
    with pytest.raises(ImageError, match="more than 143 pixels"):
        open_images(animation("GIF", colours), max_pixels=143)


@pytest.mark.parametrize("side", [8_000, 12_000, 65_000])
def test_a_frame_that_outgrows_the_animation_is_too_large(side: int) -> None:
    with pytest.raises(ImageError, match="more than 50,000,000 pixels"):
        open_images(gif_whose_frame_outgrows_its_screen(side, side))


@pytest.mark.parametrize("size", [(1, 101), (5000, 2)])
def test_a_thin_strip_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} is no picture"):
        open_images(Image.new("RGB", size))
    assert len(open_images(Image.new("RGB", (1, 100)))) == 1


@pytest.mark.parametrize("size", [(0, 0), (0, 3)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=f"image: {size[0]} x {size[1]} holds no pixels"):
        open_images(Image.new("RGB", size))
