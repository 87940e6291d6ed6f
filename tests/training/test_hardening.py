"""Hardening: what is changed, by how much, and that nothing changes while it is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from psa_vlm.data.images import open_images
from psa_vlm.data.sample import Sample
from psa_vlm.model.backbone import Backbone
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training.concepts import train_concepts
from psa_vlm.training.config import Hardening
from psa_vlm.training.fit import Work
from psa_vlm.training.hardening import Hardener, noisy


def pictures(samples: list[Sample]) -> list[Any]:
    return [open_images(sample.images[0])[0] for sample in samples]


def brightness(maps: list[Tensor], rows: list[int]) -> Tensor:
    """A loss that any feature can raise."""
    return torch.stack(maps).sum()


def test_an_attack_raises_the_loss(backbone: Backbone, samples: list[Sample]) -> None:
    shown = pictures(samples[:3])
    plain = backbone.encode(shown).maps
    losses = []
    for eps in (2, 16):
        found = Hardener(backbone, Hardening(eps=eps, steps=4))(shown, brightness)
        assert all(one.shape == two.shape for one, two in zip(found, plain, strict=True))
        assert not any(one.requires_grad for one in found)
        losses.append(float(brightness(found, [])))
    assert float(brightness(list(plain), [])) < losses[0] < losses[1]


def test_an_attack_keeps_its_bound(backbone: Backbone, samples: list[Sample]) -> None:
    """Less than half a step of 8 bits is no change at all."""
    shown = pictures(samples[:2])
    found = Hardener(backbone, Hardening(eps=0.4, steps=3))(shown, brightness)
    for one, plain in zip(found, backbone.encode(shown).maps, strict=True):
        torch.testing.assert_close(one, plain, atol=0.1, rtol=0)  # resizing rounds twice


def test_pictures_of_several_sizes_come_back_in_order(
    backbone: Backbone, samples: list[Sample]
) -> None:
    first, second = pictures(samples[1:3])
    shown = [first, second.resize((64, 64)), second]
    asked: list[list[int]] = []

    def loss(maps: list[Tensor], rows: list[int]) -> Tensor:
        asked.append(rows)
        return brightness(maps, rows)

    found = Hardener(backbone, Hardening(eps=0.4, steps=1))(shown, loss)
    assert asked == [[0, 2], [1]]
    for one, plain in zip(found, backbone.encode(shown).maps, strict=True):
        torch.testing.assert_close(one, plain, atol=0.1, rtol=0)


def test_noise_is_a_share_of_each_image_s_own() -> None:
    maps = [torch.randn(20, 20, 8) * scale for scale in (1, 10)]
    for one, changed in zip(maps, noisy(maps, 0.5), strict=True):
        assert float((changed - one).std() / one.std()) == pytest.approx(0.5, rel=0.1)


def test_off_by_default(train: Any, fitted: Any) -> None:
    train()
    assert "pictures" not in fitted.batch and fitted.task.hardener is None


def test_a_share_of_the_batch_and_of_the_loss_is_attacked(train: Any, fitted: Any) -> None:
    train(hardening=Hardening(eps=16, steps=3, share=0.4))
    batch = fitted.batch
    assert len(batch["pictures"]) == 3  # of six, rounded up
    without = {name: value for name, value in batch.items() if name != "pictures"}
    plain = fitted.task(**without)["loss"]
    loss = fitted.task(**batch)["loss"]
    harder = (loss - 0.6 * plain) / 0.4
    few = {name: value[:3] for name, value in without.items()}
    assert harder.item() > fitted.task(**few)["loss"].item()
    loss.backward()
    assert all(p.grad is not None for p in fitted.task.bottleneck.parameters())


def test_hardening_trains(
    backbone: Backbone, samples: list[Sample], schedules: Any, tmp_path: Path
) -> None:
    hardening = Hardening(eps=4, pixel_noise=2, feature_noise=0.1, steps=1)
    config = schedules["concepts"].model_copy(update={"hardening": hardening})
    found = [
        train_concepts(backbone, Taxonomy.default(), samples, config, Work(tmp_path / str(i)))
        for i in range(2)
    ]
    (bottleneck, history), (again, _) = found
    assert len(history) == 6
    for one, other in zip(bottleneck.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)  # noise is of the run's seed
