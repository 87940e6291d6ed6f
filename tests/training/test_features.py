"""Vision features on disk: written once, bounded, and never of another backbone."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from psa_vlm.data.images import open_images
from psa_vlm.data.sample import Sample
from psa_vlm.errors import CheckpointError
from psa_vlm.model.backbone import Backbone
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training import features
from psa_vlm.training.concepts import train_concepts
from psa_vlm.training.features import FeatureCache, backbone_key, image_key
from psa_vlm.training.fit import Work


@pytest.fixture()
def images(samples: list[Sample]) -> dict[str, Any]:
    """Three images by their keys."""
    return {image_key(sample.images[0]): sample.images[0] for sample in samples}


def size_of_one(backbone: Backbone, images: dict[str, Any]) -> int:
    encoded = backbone.encode(open_images(next(iter(images.values())))).maps[0]
    return int(encoded.nbytes)


def test_past_the_budget_images_are_encoded_as_they_are_asked_for(
    backbone: Backbone,
    images: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = FeatureCache(tmp_path / "whole", backbone)
    whole.add(images.items(), batch=1)
    assert whole.complete
    each = size_of_one(backbone, images)
    told = " ".join(capsys.readouterr().err.split())
    assert f"features of 3 images: about {3 * each / 1e9:.3g} GB on disk" in told
    assert "budget" not in told
    budget = 2 * each + 1000  # and the heads of two files
    for stored in (2, 2):  # the second time nothing is added
        part = FeatureCache(tmp_path / "part", backbone, budget)
        part.add(images.items(), batch=1)
        assert not part.complete and [key in part for key in images].count(True) == stored
        used = sum(path.stat().st_size for path in part.folder.iterdir())
        assert 2 * each <= used <= budget
        assert "fits the budget of" in " ".join(capsys.readouterr().err.split())
    encode, calls = backbone.encode, []
    monkeypatch.setattr(backbone, "encode", lambda some: calls.append(len(some)) or encode(some))
    found, expected = part.read([*images, *images]), whole.read(images)
    assert calls == [1] and found.keys() == expected.keys()
    for key in images:
        torch.testing.assert_close(found[key], expected[key])
        assert part.frames(key) == whole.frames(key) == 1


def test_the_budget_changes_no_result(
    backbone: Backbone, samples: list[Sample], schedules: Any, tmp_path: Path
) -> None:
    states = []
    for size in (100.0, 0.0):
        config = schedules["concepts"].model_copy(update={"cache_gb": size, "epochs": 1})
        work = Work(tmp_path / str(size), report_to=())
        trained, _ = train_concepts(backbone, Taxonomy.default(), samples, config, work)
        states.append(trained.state_dict())
        assert bool(list(work.folder.rglob("features/*/*"))) == bool(size)
    torch.testing.assert_close(*states)


def test_a_damaged_file_is_made_again(
    backbone: Backbone,
    images: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = FeatureCache(tmp_path, backbone)
    cache.add(images.items(), batch=1)
    expected = {key: seen.clone() for key, seen in cache.read(images).items()}  # not the file's
    first, *others = sorted(cache.folder.iterdir())
    whole = {path: path.read_bytes() for path in others}
    first.write_bytes(first.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING):
        again = FeatureCache(tmp_path, backbone)
    assert f"{first}: damaged; its images are encoded again" in caplog.text
    assert [key in again for key in images] == [False, True, True]
    again.add(images.items(), batch=1)
    assert {path: path.read_bytes() for path in others} == whole  # none is overwritten
    found = FeatureCache(tmp_path, backbone).read(images)
    torch.testing.assert_close(found, expected)


def test_a_full_disk_keeps_the_features_before_it(
    backbone: Backbone, images: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = features.save_file, []

    def fail_the_second_time(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(features, "save_file", fail_the_second_time)
        with pytest.raises(CheckpointError, match=r"No space left.*free some space"):
            FeatureCache(tmp_path, backbone).add(images.items(), batch=2)
    cache = FeatureCache(tmp_path, backbone)
    assert [key in cache for key in images] == [True, True, False]
    assert [path.suffix for path in cache.folder.iterdir()] == [".safetensors"]
    cache.add(images.items(), batch=2)
    assert all(key in FeatureCache(tmp_path, backbone) for key in images)


def test_another_backbone_has_other_features(backbone: Backbone, tmp_path: Path) -> None:
    key = backbone_key(backbone)
    cache = FeatureCache(tmp_path, backbone)
    cache.add([("a", Image.new("RGB", (9, 9)))], batch=1)
    assert key == backbone_key(backbone)
    with torch.no_grad():
        next(backbone.model.parameters()).view(-1)[0] += 1.0
    assert key != backbone_key(backbone)
    assert "a" not in FeatureCache(tmp_path, backbone)


def test_keys_tell_contents_apart(tmp_path: Path) -> None:
    wide, high = Image.new("RGB", (8, 2), "red"), Image.new("RGB", (2, 8), "red")
    assert image_key(wide) == image_key(wide.copy())
    assert image_key(wide) != image_key(high)
    for name in ("a.png", "b.png"):
        wide.save(tmp_path / name)
    assert image_key(tmp_path / "a.png") == image_key(tmp_path / "b.png")
