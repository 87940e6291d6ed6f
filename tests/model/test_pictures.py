"""Small copies, and where the model looked."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from psa_vlm.model import pictures


def test_a_small_copy_keeps_its_shape_and_leaves_the_picture() -> None:
    picture = Image.new("L", (2000, 1000))
    small = pictures.small(picture)
    assert (small.size, small.mode) == ((pictures.SIDE, pictures.SIDE // 2), "RGB")
    assert picture.size == (2000, 1000)
    assert pictures.small(Image.new("RGB", (9, 7))).size == (9, 7)


def test_the_most_that_was_looked_at_is_the_least_transparent() -> None:
    heat = pictures.heat([[0.0, 0.5], [0.1, 0.0]], (40, 20))
    assert (heat.size, heat.mode) == ((40, 20), "RGBA")
    alpha = np.asarray(heat)[..., 3]
    assert alpha[2, 37] > 200 > alpha[17, 2] > alpha[2, 2] == 0


def test_evidence_of_nothing_is_all_transparent() -> None:
    assert not np.asarray(pictures.heat(np.zeros((3, 3)), (6, 6)))[..., 3].any()


def test_a_url_holds_the_very_picture() -> None:
    heat = pictures.heat([[0.2, 1.0]], (4, 2))
    head, _, data = pictures.url(heat).partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as again:
        assert again.tobytes() == heat.tobytes()
