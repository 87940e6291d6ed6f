"""Corruptions: all fifteen, stronger with strength, the same again, and the size is kept."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from psa_vlm.errors import InputError
from psa_vlm.robustness.corruptions import CORRUPTIONS, HANDLING, STRENGTHS, corrupt, handle


def scene(width: int = 96, height: int = 72) -> Image.Image:
    """A disk and a bar on a gradient."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 2 + 40, columns + 60, 200 - rows], -1).clip(0, 255)
    pixels[np.hypot(rows - height / 2, columns - width / 3) < height / 4] = (220, 40, 30)
    pixels[:, 2 * width // 3 : 2 * width // 3 + 4] = (20, 20, 60)
    return Image.fromarray(pixels.astype(np.uint8))


def away(picture: Image.Image) -> float:
    """Root mean square distance from the scene, of 255."""
    pixels = np.asarray(picture, float) - np.asarray(scene(*picture.size), float)
    return float(np.sqrt((pixels**2).mean()))


def test_there_are_fifteen_kinds() -> None:
    assert len(CORRUPTIONS) == 15


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_grows_and_repeats(kind: str) -> None:
    found = [corrupt(scene(), kind, strength, seed=3) for strength in STRENGTHS]
    assert {one.size for one in found} == {(96, 72)}
    assert {one.mode for one in found} == {"RGB"}
    assert 1 < away(found[0]) < away(found[-1]) < 160
    assert corrupt(scene(), kind, 5, seed=3).tobytes() == found[-1].tobytes()


def test_what_is_left_to_chance_follows_the_seed() -> None:
    for kind in ("gaussian_noise", "frost", "snow", "elastic_transform", "motion_blur"):
        first, other = (corrupt(scene(), kind, 3, seed).tobytes() for seed in (0, 1))
        assert first != other, kind


@pytest.mark.parametrize("kind", ["defocus_blur", "glass_blur", "snow", "fog", "pixelate"])
def test_small_and_odd_sizes_are_no_trouble(kind: str) -> None:
    assert corrupt(scene(17, 33), kind, 5).size == (17, 33)


@pytest.mark.parametrize("way", HANDLING)
def test_handling_keeps_the_size_and_changes_a_little(way: str) -> None:
    picture = handle(scene(), way)
    assert picture.size == (96, 72) and 0 < away(picture) < 110


def test_unknown_names_are_errors_that_name_the_known() -> None:
    with pytest.raises(InputError, match="frost"):
        corrupt(scene(), "rust", 1)
    with pytest.raises(InputError, match="1 to 5"):
        corrupt(scene(), "fog", 6)
    with pytest.raises(InputError, match="screenshot"):
        handle(scene(), "fax")
