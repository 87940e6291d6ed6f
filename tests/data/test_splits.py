from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.data.splits import split
from psa_vlm.errors import DataError, ImageError

FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}


def picture(value: int) -> Image.Image:
    return Image.new("L", (2, 2), value)


def sample(id: int, *images: Path | Image.Image, text: str = "What is this?") -> Sample:
    return Sample(id=str(id), images=images, conversation=(Turn("user", text),))


@st.composite
def data_sets(draw: st.DrawFn) -> list[Sample]:
    pictures = st.lists(st.integers(0, 30), max_size=3)
    return [
        sample(i, *map(picture, values), text=f"Question {draw(st.integers(0, 20))}")
        for i, values in enumerate(draw(st.lists(pictures, max_size=40)))
    ]


def contents(part: list[Sample]) -> set[object]:
    """What must not be seen on two sides: pictures, and the words of samples without any."""
    return {image.tobytes() for sample in part for image in sample.images} | {
        sample.question for sample in part if not sample.images
    }


def ids(parts: dict[str, list[Sample]]) -> dict[str, set[str]]:
    return {name: {sample.id for sample in part} for name, part in parts.items()}


@given(data_sets(), st.integers(0, 1000))
def test_nothing_is_lost_and_nothing_is_on_two_sides(samples: list[Sample], seed: int) -> None:
    parts = split(samples, FRACTIONS, seed)
    assert list(parts) == list(FRACTIONS)
    assert sorted(s.id for part in parts.values() for s in part) == sorted(s.id for s in samples)
    assert all(s.split == name for name, part in parts.items() for s in part)
    sides = [contents(part) for part in parts.values()]
    assert sum(map(len, sides)) == len(set().union(*sides))


@given(data_sets(), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(
    samples: list[Sample], seed: int, random: Callable[..., float]
) -> None:
    shuffled = list(samples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert ids(split(shuffled, FRACTIONS, seed)) == ids(split(samples, FRACTIONS, seed))


@given(st.integers(0, 200), st.integers(0, 1000))
def test_shares_are_kept_where_no_image_is_shared(count: int, seed: int) -> None:
    parts = split([sample(i, picture(i)) for i in range(count)], FRACTIONS, seed)
    for name, share in FRACTIONS.items():
        assert abs(len(parts[name]) - share * count) < len(FRACTIONS)


def test_the_seed_decides() -> None:
    samples = [sample(i, picture(i)) for i in range(100)]
    one, again, other = (split(samples, FRACTIONS, seed) for seed in (1, 1, 2))
    assert ids(one) == ids(again) != ids(other)


def test_a_chain_of_shared_images_stays_together() -> None:
    chain = [sample(i, picture(i), picture(i + 1)) for i in range(50)]
    loose = [sample(100 + i, picture(100 + i)) for i in range(50)]
    parts = split(chain + loose, {"train": 0.5, "test": 0.5}, seed=0)
    assert {str(i) for i in range(50)} in [
        {s.id for s in part if int(s.id) < 100} for part in parts.values()
    ]
    assert [len(part) for part in parts.values()] == [50, 50]


def test_files_are_the_same_by_content_not_by_name(tmp_path: Path) -> None:
    for name in ("a.png", "copy.png"):
        picture(1).save(tmp_path / name)
    samples = [sample(i, tmp_path / name) for i, name in enumerate(["a.png", "copy.png", "a.png"])]
    sides = split(samples, {"train": 0.5, "test": 0.5}, seed=0).values()
    assert sorted(map(len, sides)) == [0, 3]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read \(No such file"):
        split([sample(0, tmp_path / "gone.png")], FRACTIONS, seed=0)


@pytest.mark.parametrize(
    "fractions",
    [{}, {"train": 0.5}, {"train": 1.5, "test": -0.5}, {"train": float("nan")}],
)
def test_fractions_must_sum_to_one(fractions: dict[str, float]) -> None:
    with pytest.raises(DataError, match="split fractions must be 0 or more and sum to 1"):
        split([], fractions, seed=0)
