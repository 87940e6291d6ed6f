"""Stage I, concepts: what is learned from, what changes, and what is encoded how often."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from psa_vlm.data.images import open_images
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import CheckpointError, DataError
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.bottleneck import concept_loss
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training import concepts, features
from psa_vlm.training.concepts import (
    check_labelled,
    class_weights,
    train_concepts,
    verdict_text,
)
from psa_vlm.training.features import FeatureCache, backbone_key, image_key
from psa_vlm.training.fit import Work

TAXONOMY = Taxonomy.default()


@pytest.fixture()
def backbone(llava_dir: Path) -> Backbone:
    return Backbone.from_pretrained(llava_dir)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


class Fitted:
    """Stands in for `fit`: keeps what it would train, and trains nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(concepts, "fit", self)

    def __call__(self, task: Any, rows: Any, collate: Any, config: Any, work: Any) -> list[Any]:
        self.task, self.rows, self.collate = task, rows.rows, collate
        return []


def test_the_backbone_is_only_read_and_the_bottleneck_learns(
    backbone: Backbone, samples: list[Sample], schedules: Any, tmp_path: Path
) -> None:
    before = copied(backbone.model.state_dict())
    config = schedules["concepts"]
    untrained, nothing = train_concepts(
        backbone, TAXONOMY, samples, config.model_copy(update={"epochs": 0}), Work(tmp_path / "0")
    )
    trained, history = train_concepts(backbone, TAXONOMY, samples, config, Work(tmp_path / "2"))
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert nothing == [] and [point["step"] for point in history] == [1, 2, 3, 4, 5, 6]
    start, end = untrained.state_dict(), trained.state_dict()
    assert all(not torch.equal(start[name], end[name]) for name in start if "norm" not in name)
    assert not trained.training
    assert list((tmp_path / "2").rglob("events.out.*"))  # TensorBoard's


def test_each_image_is_encoded_once_ever(
    backbone: Backbone,
    samples: list[Sample],
    schedules: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, encoded = backbone.encode, []
    monkeypatch.setattr(
        backbone, "encode", lambda images: encoded.append(len(images)) or encode(images)
    )
    fitted = Fitted(monkeypatch)
    for _ in range(2):
        train_concepts(backbone, TAXONOMY, samples, schedules["concepts"], Work(tmp_path))
        assert encoded == [2, 1]  # three contents in six samples, two at a time; then none
    batch = fitted.collate(fitted.rows)
    assert batch["features"].shape == (6, 4, 4, 24)
    assert batch["texts"] == [f"What is {i}?" for i in range(6)]
    assert [TAXONOMY.types[i] for i in batch["types"]] == ["privacy", "clean"] * 3
    assert [TAXONOMY.levels[i] for i in batch["levels"]] == ["high", "safe"] * 3
    for row, sample in zip(batch["features"], samples, strict=True):
        expected = encode(open_images(sample.images[0])).h_o[0].reshape(4, 4, 24)
        torch.testing.assert_close(row, expected)


def test_the_loss_is_the_papers(
    backbone: Backbone,
    samples: list[Sample],
    schedules: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted = Fitted(monkeypatch)
    config = schedules["concepts"].model_copy(update={"weight": 7.0})
    bottleneck, _ = train_concepts(backbone, TAXONOMY, samples, config, Work(tmp_path))
    batch = fitted.collate(fitted.rows)
    h_t, mask = backbone.embed_text(batch["texts"])
    output = bottleneck(batch["features"].flatten(1, 2), h_t, mask)
    expected = concept_loss(output, batch["levels"], batch["types"], weight=7.0)
    torch.testing.assert_close(fitted.task(**batch)["loss"], expected)


def test_balance_makes_every_class_count_the_same(
    backbone: Backbone,
    samples: list[Sample],
    schedules: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert class_weights([0, 0, 0, 2], 4).tolist() == pytest.approx([2 / 3, 0, 2, 0])
    fitted = Fitted(monkeypatch)
    config = schedules["concepts"].model_copy(update={"class_balance": True})
    train_concepts(backbone, TAXONOMY, samples[:3], config, Work(tmp_path))
    one = fitted.task(**fitted.collate(fitted.rows))["loss"]
    # The one clean sample, given twice, has the weight of the two risky ones.
    train_concepts(
        backbone, TAXONOMY, [*samples[:3], samples[1]], schedules["concepts"], Work(tmp_path)
    )
    torch.testing.assert_close(fitted.task(**fitted.collate(fitted.rows))["loss"], one)


def test_every_picture_of_a_sample_is_a_row(
    backbone: Backbone,
    samples: list[Sample],
    schedules: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    several = replace(samples[0], images=(tmp_path / "moving.gif", Image.new("RGB", (9, 9))))
    fitted = Fitted(monkeypatch)
    train_concepts(backbone, TAXONOMY, [several], schedules["concepts"], Work(tmp_path))
    batch = fitted.collate(fitted.rows)
    assert batch["features"].shape[0] == 4
    assert len({tuple(row.flatten().tolist()) for row in batch["features"]}) == 4
    assert set(batch["types"].tolist()) == {TAXONOMY.type_id("privacy")}


def test_the_text_is_what_the_user_said(samples: list[Sample]) -> None:
    turns = (Turn("user", "<image>\nA?"), Turn("assistant", "B."), Turn("user", "C?"))
    assert verdict_text(replace(samples[0], conversation=turns)) == "A?\nC?"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"type": None}, "type or level"),
        ({"level": None}, "type or level"),
        ({"images": ()}, "image"),
        ({"conversation": (Turn("user", " "),)}, "question"),
    ],
)
def test_samples_that_teach_nothing_are_counted(
    samples: list[Sample], change: dict[str, Any], what: str
) -> None:
    some = [replace(s, **change) if i in (2, 4) else s for i, s in enumerate(samples)]
    with pytest.raises(DataError, match=f"2 of 6 samples have no {what}, s2 the first"):
        check_labelled(some)


def test_a_label_of_another_taxonomy(
    backbone: Backbone, samples: list[Sample], schedules: Any, tmp_path: Path
) -> None:
    other = replace(samples[0], type="weather")
    with pytest.raises(DataError, match="weather"):
        train_concepts(backbone, TAXONOMY, [other], schedules["concepts"], Work(tmp_path))


# --- the features on disk ------------------------------------------------------------------------


def test_a_full_disk_keeps_the_features_before_it(
    backbone: Backbone, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {image_key(sample.images[0]): sample.images[0] for sample in samples}
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
