from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psa_vlm.data.contamination import FILE, Fingerprints, contamination
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import CheckpointError


def picture(seed: int) -> Image.Image:
    grid = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(grid).resize((96, 96), Image.Resampling.BICUBIC)


def sample(id: str, image: Image.Image | None, text: str) -> Sample:
    return Sample(id, () if image is None else (image,), (Turn("user", text),))


TRAINED = [sample("a", picture(0), "What is it?"), sample("b", picture(1), "Who made it?")]


def test_each_kind_of_copy_is_counted() -> None:
    found = contamination(
        [
            sample("copy", picture(0), "what is it"),
            sample("smaller", picture(1).resize((64, 64)), "Something new"),
            sample("prompt", picture(2), "Who made it?"),
            sample("words", None, "Who made it?"),
            sample("new", picture(3), "New too"),
        ],
        Fingerprints.of(TRAINED),
    )
    assert (found.samples, found.images, found.near_images) == (5, 1, 1)
    assert (found.prompts, found.both, found.ids) == (3, 1, ("copy", "smaller"))
    assert "1 share an image with training, 1 nearly, 3 a prompt, 1 both" in str(found)


def test_a_clean_set_is_called_clean() -> None:
    found = contamination([sample("new", picture(3), "New")], Fingerprints.of(TRAINED))
    assert str(found) == "contamination: none of 1 samples is known from training"


def test_what_was_seen_survives_the_disk_and_adds_up(tmp_path: Path) -> None:
    Fingerprints.of(TRAINED[:1]).save(tmp_path)
    loaded = Fingerprints.load(tmp_path)
    assert loaded is not None
    both = loaded | Fingerprints.of(TRAINED[1:])
    for name in ("pixels", "looks", "prompts"):
        assert getattr(both, name).tolist() == getattr(Fingerprints.of(TRAINED), name).tolist()
    assert contamination(TRAINED, loaded).images == 1
    assert contamination(TRAINED, both).images == 2


def test_no_record_is_not_an_empty_one(tmp_path: Path) -> None:
    assert Fingerprints.load(tmp_path) is None
    (tmp_path / FILE).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"seen\.safetensors: damaged"):
        Fingerprints.load(tmp_path)
