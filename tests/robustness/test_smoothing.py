"""Certificates: the numbers of the paper's bound, and noisy encodings that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.inference import PsaVlm
from psa_vlm.robustness.smoothing import (
    Certificate,
    Smoothing,
    certify,
    noisy_encodings,
    radius,
)


@pytest.fixture()
def sample() -> Sample:
    return Sample("one", (Image.new("RGB", (32, 32), (90, 120, 30)),), (Turn("user", "what?"),))


def test_the_radius_is_that_of_the_bound() -> None:
    # All of n draws: the lower bound is alpha ** (1 / n), whose normal quantile is the radius.
    assert radius(1000, 1000, 0.5) == pytest.approx(0.5 * 2.46326, abs=1e-4)
    assert radius(990, 1000, 0.25) < radius(1000, 1000, 0.25) < radius(1000, 1000, 0.5)
    assert radius(500, 1000, 0.5) < 0 and radius(0, 1000, 0.5) < 0


def test_certificates_count_what_the_policy_acts_on(
    model: PsaVlm, sample: Sample, see: object, tmp_path: Path
) -> None:
    see("privacy", "high")  # type: ignore[operator]
    how = Smoothing(sigma=0.1, draws=20)
    found = certify(model, [sample], [sample], how, tmp_path)
    assert found.radii == [pytest.approx(how.farthest)]
    assert found.harmless is not None and found.harmless.value == 0
    see("clean", "safe")  # type: ignore[operator]
    found = certify(model, [sample], [sample], how, tmp_path)
    assert found.radii == [None]
    assert found.harmless is not None and found.harmless.value == 1


def test_noise_is_as_strong_as_it_says_and_kept(
    model: PsaVlm, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weak, strong = (Smoothing(sigma=sigma, draws=6) for sigma in (0.01, 0.3))
    (clean,) = model.backbone.encode(list(sample.images)).maps  # type: ignore[arg-type]
    maps = {how: noisy_encodings(model, sample, how, tmp_path) for how in (weak, strong)}
    assert maps[weak].shape == (6, *clean.shape)
    moved = {how: float((found.float() - clean).norm()) for how, found in maps.items()}
    assert 0 < 3 * moved[weak] < moved[strong]
    monkeypatch.setattr(model.backbone, "encode", lambda images: pytest.fail("encoded again"))
    assert torch.equal(noisy_encodings(model, sample, strong, tmp_path), maps[strong])


def test_the_share_falls_with_the_radius() -> None:
    found = Certificate(Smoothing(), [0.1, None, 0.3], None)
    assert [found.at(least).value for least in (0, 0.2, 0.4)] == pytest.approx([2 / 3, 1 / 3, 0])  # type: ignore[union-attr]
    told = found.to_dict()
    assert told["certified"][0]["value"] == pytest.approx(2 / 3)
    assert told["alpha"] == 0.001 and told["harmless_allowed"] is None
