"""Pictures for people: small copies, and where the model looked."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

SIDE = 384
"""The longest side of a small copy, in pixels."""


def small(image: Image.Image) -> Image.Image:
    """A copy that is quick to send and large enough to look at."""
    copy = image.convert("RGB")
    copy.thumbnail((SIDE, SIDE))
    return copy


def heat(evidence: ArrayLike, size: tuple[int, int]) -> Image.Image:
    """Evidence [H, W] as a picture to lay over another: the more, the less transparent."""
    grid = np.asarray(evidence, dtype=np.float64)
    grid = grid / max(grid.max(), 1e-9)
    coarse = Image.fromarray((grid * 255).astype(np.uint8))
    share = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)[..., None]
    share /= 255
    colour = (1 - share) * np.array([255, 190, 60]) + share * np.array([220, 20, 60])
    return Image.fromarray(np.concatenate([colour, 215 * share], -1).astype(np.uint8))


def url(picture: Image.Image) -> str:
    """The picture as a data URL."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
