"""Explanations under test: the curves, the pointing and the interventions themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import DataError
from psa_vlm.evaluation.faithfulness import (
    BOX,
    FRACTIONS,
    MAPS,
    _Scene,
    explain,
    intervene,
)
from psa_vlm.inference import PsaVlm
from psa_vlm.policy.policy import Policy

See = Callable[[str, str], None]


def sample(type_: str = "privacy", level: str = "high", answer: str = "No.", i: int = 0) -> Sample:
    pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    turns = (Turn("user", "What is this?"), Turn("assistant", answer))
    return Sample(f"s{i}", (Image.fromarray(pixels),), turns, type_, level)


def leaning(model: PsaVlm) -> None:
    """The head sees privacy at a high level, more or less so by the image."""
    head, words = model.bottleneck.head, model.taxonomy
    with torch.no_grad():
        for linear, index in (
            (head.to_type, words.type_id("privacy")),
            (head.to_level, words.level_id("high")),
        ):
            linear.weight.mul_(0.2)
            linear.bias.zero_()
            linear.bias[index] = 2.0


def test_curves_begin_and_end_where_they_must(model: PsaVlm, see: See) -> None:
    leaning(model)
    samples = [replace(sample(i=i), tags={BOX: "0 0 64 64"}) for i in range(3)]
    found = explain(model, samples)
    assert found.n == 3
    whole = [
        verdict.images[0].scores(model.taxonomy)["privacy"]
        for verdict in model.assess_batch([s.images for s in samples], ["What is this?"] * 3)
    ]
    for name in MAPS:
        down, up = found.deletion[name], found.insertion[name]
        assert len(down) == len(up) == len(FRACTIONS)
        assert down[0] == pytest.approx(np.mean(whole), abs=1e-5)
        assert up[-1] == pytest.approx(down[0], abs=1e-5)
        assert up[0] == pytest.approx(down[-1], abs=1e-5)  # nothing is left of the image
        assert found.deletion_area[name].value == pytest.approx(np.mean(down), abs=1e-6)
        assert found.pointing[name].value == 1  # the box is the whole image
    for name, gain in found.gains.items():
        kind, other = name.split(" over ")
        areas = found.deletion_area if kind == "deletion" else found.insertion_area
        better = areas["evidence"].value - areas[other].value
        assert gain.value == pytest.approx(better if kind == "insertion" else -better, abs=1e-6)
    assert explain(model, samples).deletion == found.deletion  # random maps are of the seed


def test_the_order_decides_what_goes_first(
    model: PsaVlm, see: See, monkeypatch: pytest.MonkeyPatch
) -> None:
    see("privacy", "high")
    scene = _Scene(model, sample())

    def corner(pixels: Tensor) -> list[float]:
        """1 while the last part of the 4 x 4 is there."""
        same = torch.isclose(pixels[..., -8:, -8:], scene.pixels[..., -8:, -8:])
        return same.flatten(1).all(1).float().tolist()

    monkeypatch.setattr(scene, "scores", corner)
    first = [15, *range(15)]
    assert scene.curve(first, insertion=False) == [1] + [0] * 10
    assert scene.curve(first, insertion=True) == [0] + [1] * 10
    last = list(range(16))
    assert scene.curve(last, insertion=False) == [1] * 10 + [0]
    assert scene.curve(last, insertion=True) == [0] * 10 + [1]


def test_pointing_is_at_the_middle_of_a_part(model: PsaVlm) -> None:
    scene = _Scene(model, replace(sample(), tags={BOX: "16 0 32 15"}))  # a row of 4 x 4, 64 pixels
    assert [scene.on_thing(cell) for cell in (0, 1, 2, 5)] == [False, True, False, False]


def test_gradients_are_where_the_score_is(model: PsaVlm, see: See) -> None:
    leaning(model)
    assert (_Scene(model, sample()).gradient() > 0).all()
    see("privacy", "high")  # whatever the image
    assert not _Scene(model, sample()).gradient().any()


def test_only_what_is_seen_as_risky_is_explained(model: PsaVlm, see: See) -> None:
    see("clean", "safe")
    with pytest.raises(DataError, match="seen as risky"):
        explain(model, [sample(), sample("clean", "safe")])


def test_the_right_concept_repairs(model: PsaVlm, see: See) -> None:
    model.policy = Policy.shipped("strict")
    see("clean", "safe")
    found = intervene(model, [sample(answer="Sorry, I can not help with this."), sample()], 4)
    assert found.wrong.value == 1
    assert found.repaired is not None and (found.repaired.value, found.repaired.n) == (1, 1)
    assert found.spoiled is not None and (found.spoiled.value, found.spoiled.n) == (1, 1)
    see("privacy", "high")
    found = intervene(model, [sample("clean", "safe"), sample()], 4)
    assert (found.wrong.value, found.wrong.n) == (0.5, 2)
    assert found.repaired is not None and found.repaired.value == 1
    assert found.spoiled is None
