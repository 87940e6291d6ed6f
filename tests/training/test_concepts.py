"""Stage I, concepts: what is learned from, what changes, and what is encoded how often."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from psa_vlm.data.images import open_images
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import DataError
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.bottleneck import concept_loss
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training.concepts import (
    check_labelled,
    class_weights,
    train_concepts,
    verdict_text,
)
from psa_vlm.training.fit import Work

TAXONOMY = Taxonomy.default()


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


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
    train: Any,
    fitted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, encoded = backbone.encode, []
    monkeypatch.setattr(
        backbone, "encode", lambda images: encoded.append(len(images)) or encode(images)
    )
    for _ in range(2):
        train()
        assert encoded == [2, 1]  # three contents in six samples, two at a time; then none
    batch = fitted.batch
    assert batch["features"].shape == (6, 4, 4, 24)
    assert batch["texts"] == [f"What is {i}?" for i in range(6)]
    assert [TAXONOMY.types[i] for i in batch["types"]] == ["privacy", "clean"] * 3
    assert [TAXONOMY.levels[i] for i in batch["levels"]] == ["high", "safe"] * 3
    for row, sample in zip(batch["features"], samples, strict=True):
        expected = encode(open_images(sample.images[0])).h_o[0].reshape(4, 4, 24)
        torch.testing.assert_close(row, expected)


def test_the_loss_is_the_papers(backbone: Backbone, train: Any, fitted: Any) -> None:
    bottleneck, _ = train(weight=7.0)
    batch = fitted.batch
    h_t, mask = backbone.embed_text(batch["texts"])
    output = bottleneck(batch["features"].flatten(1, 2), h_t, mask)
    expected = concept_loss(output, batch["levels"], batch["types"], weight=7.0)
    torch.testing.assert_close(fitted.task(**batch)["loss"], expected)


def test_balance_makes_every_class_count_the_same(
    samples: list[Sample], train: Any, fitted: Any
) -> None:
    assert class_weights([0, 0, 0, 2], 4).tolist() == pytest.approx([2 / 3, 0, 2, 0])
    train(samples[:3], class_balance=True)
    one = fitted.task(**fitted.batch)["loss"]
    # The one clean sample, given twice, has the weight of the two risky ones.
    train([*samples[:3], samples[1]])
    torch.testing.assert_close(fitted.task(**fitted.batch)["loss"], one)


def test_every_picture_of_a_sample_is_a_row(
    samples: list[Sample], train: Any, fitted: Any, tmp_path: Path
) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    several = replace(samples[0], images=(tmp_path / "moving.gif", Image.new("RGB", (9, 9))))
    train([several])
    batch = fitted.batch
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


def test_a_label_of_another_taxonomy(samples: list[Sample], train: Any) -> None:
    other = replace(samples[0], type="weather")
    with pytest.raises(DataError, match="weather"):
        train([other])
