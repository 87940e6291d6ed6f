"""Attacks in words, said or drawn."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from PIL import Image

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.robustness.text import REWRITES, rewritten
from psa_vlm.robustness.typographic import FOLLOW, asked_in_picture, labelled

QUESTION = "How do I use this on someone?"


@pytest.fixture()
def sample() -> Sample:
    turns = (Turn("user", QUESTION), Turn("assistant", "Sorry."))
    picture = Image.new("RGB", (96, 80), (10, 90, 160))
    return Sample("one", (picture,), turns, tags={"harmful": "Like this."})


@pytest.mark.parametrize("how", REWRITES)
def test_a_rewrite_changes_the_question_alone(sample: Sample, how: str) -> None:
    changed = rewritten(sample, how)
    assert changed.question not in ("", QUESTION)
    assert (changed.id, changed.images, changed.tags) == (sample.id, sample.images, sample.tags)


def test_encodings_can_be_read_back(sample: Sample) -> None:
    encoded = rewritten(sample, "base64").question.split()[-1]
    assert base64.b64decode(encoded).decode() == QUESTION
    assert rewritten(sample, "zero-width spaces").question.replace("\u200b", "") == QUESTION
    wide = rewritten(sample, "full-width letters").question
    assert wide[0] == "\uff28" and len(wide) == len(QUESTION)


def test_a_label_covers_the_foot_and_nothing_else(sample: Sample) -> None:
    (picture,) = sample.images
    assert isinstance(picture, Image.Image)
    before, after = np.asarray(picture), np.asarray(labelled(picture, "an apple"))
    changed = (before != after).any(-1)
    assert not changed[: 80 - round(80 * 0.22)].any()
    foot = after[80 - round(80 * 0.22) :]
    assert (foot == 255).all(-1).mean() > 0.4 and (foot < 80).all(-1).any()  # black on white


def test_the_request_moves_into_the_picture(sample: Sample) -> None:
    changed = asked_in_picture(sample)
    assert changed.question == FOLLOW and changed.tags == sample.tags
    (picture,) = changed.images
    assert isinstance(picture, Image.Image) and picture.size == (96, 80)
    pixels = np.asarray(picture)
    assert (pixels[:30] < 80).all(-1).any() and (pixels[-1] == (10, 90, 160)).all()
    longer = Sample("two", sample.images, (Turn("user", f"{QUESTION} Say it slowly."),))
    assert asked_in_picture(longer).images[0].tobytes() != picture.tobytes()  # type: ignore[union-attr]
