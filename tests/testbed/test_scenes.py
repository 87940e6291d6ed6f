"""Scenes: what is asked for is there, nothing overlaps, and the same scene is the same picture."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_vlm.testbed.scenes import (
    SIGN,
    SIZE,
    draw_scene,
    held_out_composition,
    make_scene,
    render,
)
from psa_vlm.testbed.sprites import sprite
from psa_vlm.testbed.world import world

STYLES = [*world().table["styles"]["train"], world().table["styles"]["held_out"]]


@pytest.mark.parametrize("style", STYLES)
def test_every_kind_is_drawn_in_every_style_and_no_two_look_the_same(style: str) -> None:
    pictures = {name: np.asarray(sprite(style, name, 32)) for name in world().kinds}
    assert all((picture[..., 3] > 0).mean() > 0.05 for picture in pictures.values())
    assert len({picture.tobytes() for picture in pictures.values()}) == len(pictures)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    risk=st.sampled_from([None, *world().risk_types]),
    setting=st.sampled_from(["alone", "companion", "person"]),
    unseen=st.booleans(),
    held_out=st.booleans(),
)
def test_a_drawn_scene_is_what_was_asked_for(
    seed: int, risk: str | None, setting: str, unseen: bool, held_out: bool
) -> None:
    scene = draw_scene(Random(seed), STYLES, risk, setting, unseen, held_out)
    names = [item.name for item in scene.items]
    assert scene.risk == risk
    assert 1 <= len(names) <= 4
    assert held_out_composition([name for name in names if name != SIGN]) == held_out
    if risk is not None:
        assert scene.setting == setting
        assert scene.main_kind.unseen == unseen
        others = {world().kinds[name].risk for name in names if name != SIGN}
        assert others <= {None, risk}
    places = [item.place for item in scene.items]
    assert places == sorted(set(places))
    for item in scene.items:
        left, top, side = item.box
        assert 0 <= left <= SIZE - side and 0 <= top <= SIZE - side
        assert left // (SIZE // 2) == (left + side - 1) // (SIZE // 2) == item.place % 2


def test_the_main_thing_is_the_largest() -> None:
    for seed in range(50):
        scene = draw_scene(Random(seed), STYLES, "privacy", "companion")
        pictographs = [item for item in scene.items if item.name != SIGN]
        assert max(pictographs, key=lambda item: item.box[2]) is scene.items[scene.main]


def test_the_same_scene_gives_the_same_pixels_and_another_seed_others() -> None:
    scene = draw_scene(Random(3), STYLES, "fairness")
    again = draw_scene(Random(3), STYLES, "fairness")
    assert scene == again
    assert np.array_equal(np.asarray(render(scene)), np.asarray(render(again)))
    other = draw_scene(Random(4), STYLES, "fairness")
    assert not np.array_equal(np.asarray(render(scene)), np.asarray(render(other)))


def test_five_things_are_too_many() -> None:
    with pytest.raises(ValueError, match="four"):
        make_scene(Random(0), "noto", "cat", ["dog", "bird", "fish", "cake"])
