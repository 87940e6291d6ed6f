"""What happens to images without anybody meaning it: 15 corruptions in 5 strengths, and handling.

The kinds are those of ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261), written anew;
frost is drawn, not pasted from photographs. Their strengths are those of images of 224 pixels, and
lengths scale with the image. Handling is what happens on the way: resized, sent as JPEG, taken as
a screenshot.
"""

# numpy's reductions have no type, so nearly every line of arithmetic here would need a cast.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from psa_vlm.errors import InputError
from psa_vlm.evaluation.risk_control import scipy

ndimage = scipy("ndimage")

Array = np.ndarray[Any, np.dtype[np.float64]]
"""``[H, W, 3]`` in 0 to 1, or a field ``[H, W]``."""
Corruption = Callable[[Array, int, np.random.Generator], Array]
"""Pixels, strength from 0 to 4, source of chance; the outcome is clipped to 0 to 1."""

STRENGTHS = (1, 2, 3, 4, 5)
_SIZE = 224  # pixels, for which lengths are given


def corrupt(picture: Image.Image, kind: str, strength: int, seed: int = 0) -> Image.Image:
    """A corrupted copy of an RGB picture, of the same size; the same seed gives the same.

    Args:
        picture: RGB.
        kind: a name in `CORRUPTIONS`.
        strength: from 1 to 5.
        seed: of all chance.

    Raises:
        InputError: there is no such kind or strength.
    """
    if kind not in CORRUPTIONS or strength not in STRENGTHS:
        known = ", ".join(CORRUPTIONS)
        raise InputError(
            f"no corruption {kind} of strength {strength}: give one of {known}, 1 to 5"
        )
    pixels = np.asarray(picture, dtype=np.float64) / 255
    changed = CORRUPTIONS[kind](pixels, strength - 1, np.random.default_rng(seed))
    return _picture(changed)


def handle(picture: Image.Image, way: str) -> Image.Image:
    """What a picture looks like at the other end, at its own size.

    Args:
        picture: RGB.
        way: a name in `HANDLING`.

    Raises:
        InputError: there is no such way.
    """
    if way not in HANDLING:
        raise InputError(f"no handling {way}: give one of {', '.join(HANDLING)}")
    return HANDLING[way](picture)


def _picture(pixels: Array) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _length(x: Array, pixels: float) -> float:
    """A length at 224 pixels, in an image of this size."""
    return pixels * min(x.shape[:2]) / _SIZE


# --- noise ---------------------------------------------------------------------------------------


def _gaussian_noise(x: Array, s: int, rng: np.random.Generator) -> Array:
    return x + rng.normal(0, (0.08, 0.12, 0.18, 0.26, 0.38)[s], x.shape)


def _shot_noise(x: Array, s: int, rng: np.random.Generator) -> Array:
    photons = (60, 25, 12, 5, 3)[s]
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Array, s: int, rng: np.random.Generator) -> Array:
    hit = rng.random(x.shape) < (0.03, 0.06, 0.09, 0.17, 0.27)[s]
    return np.where(hit, rng.integers(0, 2, x.shape), x)


# --- blur ----------------------------------------------------------------------------------------


def _defocus_blur(x: Array, s: int, rng: np.random.Generator) -> Array:
    radius = _length(x, (3, 4, 6, 8, 10)[s])
    reach = int(np.ceil(radius)) + 1
    away = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1])
    return _filtered(x, (radius + 0.5 - away).clip(0, 1))  # a disk with a soft edge


def _glass_blur(x: Array, s: int, rng: np.random.Generator) -> Array:
    """Pixels taken from near ones by chance, between two blurs."""
    sigma = _length(x, (0.7, 0.9, 1.0, 1.1, 1.5)[s])
    reach = _length(x, (1, 2, 2, 3, 4)[s])
    x = ndimage.gaussian_filter(x, (sigma, sigma, 0))
    for _ in range((2, 1, 3, 2, 2)[s]):
        x = _moved(x, rng.uniform(-reach, reach, (2, *x.shape[:2])), order=1)
    return ndimage.gaussian_filter(x, (sigma, sigma, 0))


def _motion_blur(x: Array, s: int, rng: np.random.Generator) -> Array:
    length = _length(x, (10, 15, 15, 15, 20)[s])
    width = _length(x, (3, 5, 8, 12, 15)[s])
    steps = np.linspace(0, length, max(2, int(np.ceil(length)) + 1))
    weights = np.exp(-((steps / width) ** 2) / 2)
    angle = rng.uniform(-np.pi / 4, np.pi / 4)
    shifted = [
        ndimage.shift(x, (step * np.sin(angle), step * np.cos(angle), 0), order=1, mode="nearest")
        for step in steps
    ]
    return np.tensordot(weights / weights.sum(), np.stack(shifted), 1)


def _zoom_blur(x: Array, s: int, rng: np.random.Generator) -> Array:
    most, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[s]
    factors = np.arange(1, most, step)
    return np.mean([x, *(_zoomed(x, factor) for factor in factors)], axis=0)


# --- weather -------------------------------------------------------------------------------------


def _snow(x: Array, s: int, rng: np.random.Generator) -> Array:
    mean, spread, least, whiten = (
        (0.1, 0.3, 0.5, 0.8),
        (0.2, 0.3, 0.5, 0.7),
        (0.55, 0.3, 0.9, 0.7),
        (0.55, 0.3, 0.85, 0.65),
        (0.55, 0.3, 0.8, 0.55),
    )[s]
    flakes = _zoomed(rng.normal(mean, spread, x.shape[:2]), 2.5).clip(0, 1)
    flakes[flakes < least] = 0
    layer = _motion_blur(flakes[..., None], min(s, 2), rng)
    pale = np.maximum(x, x.mean(2, keepdims=True) * 1.5 + 0.5)
    return whiten * x + (1 - whiten) * pale + layer + np.rot90(layer, 2)


def _frost(x: Array, s: int, rng: np.random.Generator) -> Array:
    """Crystals: ridges of smooth noise, bluish white, thicker towards the edges."""
    keep, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[s]
    ridges = 1 - np.abs(2 * _plasma(x.shape[:2], 1.3, rng) - 1)
    rows, columns = (np.abs(np.linspace(-1, 1, n)) for n in x.shape[:2])
    edge = np.maximum(rows[:, None], columns[None])
    thick = (ridges**3 * (0.4 + 0.6 * edge))[..., None]
    return keep * x + ice * thick * np.array([0.85, 0.93, 1.0])


def _fog(x: Array, s: int, rng: np.random.Generator) -> Array:
    amount, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[s]
    fog = amount * _plasma(x.shape[:2], decay, rng)[..., None]
    return (x + fog) * x.max() / (x.max() + amount)


def _brightness(x: Array, s: int, rng: np.random.Generator) -> Array:
    """Added to the value of hue, saturation and value: the largest channel; the others follow."""
    value = x.max(2, keepdims=True)
    return x * (value + (0.1, 0.2, 0.3, 0.4, 0.5)[s]).clip(0, 1) / np.maximum(value, 1e-6)


# --- digital -------------------------------------------------------------------------------------


def _contrast(x: Array, s: int, rng: np.random.Generator) -> Array:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[s] + mean


def _elastic_transform(x: Array, s: int, rng: np.random.Generator) -> Array:
    """A smooth random field of displacements."""
    most, sigma = ((12, 22), (14, 16), (12, 10), (11, 7), (12, 6))[s]
    field = rng.uniform(-1, 1, (2, *x.shape[:2]))
    smooth = np.stack([ndimage.gaussian_filter(one, _length(x, sigma)) for one in field])
    return _moved(x, smooth / np.abs(smooth).max() * _length(x, most), order=1)


def _pixelate(x: Array, s: int, rng: np.random.Generator) -> Array:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[s]
    small = [max(1, round(n * share)) for n in (x.shape[1], x.shape[0])]
    picture = _picture(x).resize((small[0], small[1]), Image.Resampling.BOX)
    return _pixels(picture.resize((x.shape[1], x.shape[0]), Image.Resampling.NEAREST))


def _jpeg_compression(x: Array, s: int, rng: np.random.Generator) -> Array:
    return _pixels(_jpeg(_picture(x), (25, 18, 15, 10, 7)[s]))


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}


# --- handling ------------------------------------------------------------------------------------


def _resized(picture: Image.Image, share: float) -> Image.Image:
    small = (max(1, round(picture.width * share)), max(1, round(picture.height * share)))
    smaller = picture.resize(small, Image.Resampling.BILINEAR)
    return smaller.resize(picture.size, Image.Resampling.BILINEAR)


def _jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _screenshot(picture: Image.Image) -> Image.Image:
    """The picture in a window with a title bar, with a page around it; scaled down, a JPEG."""
    width, height = picture.size
    page = Image.new("RGB", (round(width * 1.25), round(height * 1.35)), (243, 243, 245))
    page.paste((58, 62, 70), (0, 0, page.width, round(height * 0.12)))
    page.paste(picture, ((page.width - width) // 2, round(height * 0.18)))
    return _jpeg(page.resize((width, height), Image.Resampling.BILINEAR), 80)


HANDLING: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resized to 3/4": lambda picture: _resized(picture, 0.75),
    "resized to 1/2": lambda picture: _resized(picture, 0.5),
    "JPEG at quality 75": lambda picture: _jpeg(picture, 75),
    "JPEG at quality 30": lambda picture: _jpeg(picture, 30),
    "screenshot": _screenshot,
}


# --- parts ---------------------------------------------------------------------------------------


def _pixels(picture: Image.Image) -> Array:
    return np.asarray(picture, dtype=np.float64) / 255


def _filtered(x: Array, kernel: Array) -> Array:
    filtered: Array = ndimage.convolve(x, (kernel / kernel.sum())[..., None], mode="nearest")
    return filtered


def _moved(x: Array, offset: Array, order: int) -> Array:
    """Every pixel taken from `offset` ``[2, H, W]`` beside it."""
    places = np.mgrid[: x.shape[0], : x.shape[1]] + offset
    channels = [
        ndimage.map_coordinates(x[..., i], places, order=order, mode="reflect")
        for i in range(x.shape[2])
    ]
    return np.stack(channels, -1)


def _zoomed(x: Array, factor: float) -> Array:
    """The middle of an image or field, enlarged to its size."""
    rows, columns = ((np.arange(n) - (n - 1) / 2) / factor + (n - 1) / 2 for n in x.shape[:2])
    places = np.stack(np.meshgrid(rows, columns, indexing="ij"))
    if x.ndim == 2:
        field: Array = ndimage.map_coordinates(x, places, order=1, mode="reflect")
        return field
    return _moved(x, places - np.mgrid[: x.shape[0], : x.shape[1]], order=1)


def _plasma(shape: tuple[int, ...], decay: float, rng: np.random.Generator) -> Array:
    """A cloudy field in 0 to 1: noise of many sizes, the finer the weaker by `decay` an octave."""
    total, weight, cells = np.zeros(shape), 1.0, 2
    while cells <= max(shape):
        coarse = rng.random((cells + 1, cells + 1))
        places = np.stack(np.meshgrid(*(np.linspace(0, cells, n) for n in shape), indexing="ij"))
        total += weight * ndimage.map_coordinates(coarse, places, order=1, mode="nearest")
        weight, cells = weight / decay, cells * 2
    field: Array = (total - total.min()) / max(float(np.ptp(total)), 1e-9)
    return field
