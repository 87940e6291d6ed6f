from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from psa_vlm.data.hashes import NEAR, array, fingerprint, near_any, near_groups, prompt_hash
from psa_vlm.data.sample import Sample, Turn

from ..files import encode


def drawing(seed: int, side: int = 64) -> Image.Image:
    """Some boxes, the same ones at every size."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), "white")
    for _ in range(6):
        x, y, w, h = rng.random(4)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        box = [side * x / 2, side * y / 2, side * (x / 2 + w / 2), side * (y / 2 + h / 2)]
        ImageDraw.Draw(image).rectangle(box, fill=colour)
    return image


def test_pixels_are_the_same_whatever_file_they_are_in(tmp_path: Path) -> None:
    image = drawing(0)
    image.save(tmp_path / "a.bmp")
    prints = {fingerprint(one) for one in (image, encode(image), tmp_path / "a.bmp")}
    assert len(prints) == 1
    assert fingerprint(drawing(1)).pixels != fingerprint(image).pixels


def test_what_looks_alike_is_near_and_what_does_not_is_far() -> None:
    looks = [fingerprint(drawing(seed)).look for seed in range(12)]
    for seed, look in enumerate(looks):
        for changed in (encode(drawing(seed), "JPEG", quality=60), drawing(seed).resize((50, 50))):
            assert fingerprint(changed).pixels != fingerprint(drawing(seed)).pixels
            assert (fingerprint(changed).look ^ look).bit_count() <= NEAR
        assert all((look ^ other).bit_count() > NEAR for other in looks[:seed])


def test_a_later_frame_makes_another_image() -> None:
    frames, other = [drawing(0), drawing(1)], [drawing(0), drawing(2)]
    gifs = []
    for first, second in (frames, other):
        moving = encode(first, "GIF", save_all=True, append_images=[second])
        gifs.append(fingerprint(moving).pixels)
    assert gifs[0] != gifs[1]


@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=8),
    st.lists(st.tuples(st.integers(0, 7), st.sets(st.integers(0, 63), max_size=6)), max_size=16),
    st.integers(0, 8),
)
def test_near_groups_are_those_of_comparing_all(
    seeds: list[int], changes: list[tuple[int, set[int]]], distance: int
) -> None:
    looks = list(seeds)
    for which, bits in changes:
        if which < len(seeds):
            looks.append(seeds[which] ^ sum(1 << bit for bit in bits))
    groups = near_groups(array(looks), distance)
    reached = np.array([[(a ^ b).bit_count() <= distance for b in looks] for a in looks], bool)
    reached = reached.reshape(len(looks), len(looks))
    for _ in looks:
        reached = reached @ reached
    assert ((groups[:, None] == groups[None, :]) == reached).all()


def test_near_any() -> None:
    others = array([0b1111, 1 << 60])
    assert near_any([0], others, 4) and near_any([7, 0], others, 1)
    assert not near_any([0], array([0b11111]), 4)
    assert not near_any([], others) and not near_any([0], array([]))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is this?", "what  is\nthis", True),
        ("What is this?", "What is that?", False),
        ("No, go", "No go", False),
    ],
)
def test_prompts_are_the_same_by_their_words(one: str, other: str, same: bool) -> None:
    def hashed(text: str) -> int:
        return prompt_hash(Sample("a", (), (Turn("user", text), Turn("assistant", text[:1]))))

    assert (hashed(one) == hashed(other)) is same
