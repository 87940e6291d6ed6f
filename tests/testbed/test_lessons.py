"""What the base model is taught: labels that fit the pixels, and talks that stay apart."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from psa_vlm.evaluation.scorers import is_refusal
from psa_vlm.model.backbone import Backbone
from psa_vlm.testbed.lessons import (
    GRID,
    DialogueBatches,
    any_scene,
    image_exchange,
    naming_batch,
    patch_tags,
    pixels,
    tag_sizes,
    tagging_batch,
)
from psa_vlm.testbed.scenes import draw_scene, render
from psa_vlm.testbed.world import world


def test_training_pixels_are_those_of_the_processor(base: Backbone) -> None:
    scene = draw_scene(Random(0), ["noto"], "privacy")
    processed = base.processor.image_processor([render(scene)], return_tensors="np")
    assert np.array_equal(processed["pixel_values"][0], pixels(scene))


def test_tags_stand_where_the_things_are() -> None:
    scene = draw_scene(Random(1), ["noto"], "privacy", "person", sign=False)
    tags = patch_tags(scene).reshape(GRID, GRID, 5)
    assert (tags[..., 4] == len(scene.items)).all()
    for item in scene.items:
        rows = slice(0, 4) if item.place < 2 else slice(4, 8)
        columns = slice(0, 4) if item.place % 2 == 0 else slice(4, 8)
        quarter = tags[rows, columns].reshape(-1, 5)
        shown = quarter[quarter[:, 0] > 0]
        assert len(np.unique(shown, axis=0)) == 1
        assert shown[0, 2] == 1 + item.place and shown[0, 3] == scene.count(item.name)


def test_every_tag_has_a_class() -> None:
    tags = tagging_batch(Random(2), scenes=32)["tags"]
    assert (tags.amax((0, 1)) < torch.tensor(tag_sizes())).all()


def test_a_talk_in_a_row_is_what_it_is_alone(base: Backbone) -> None:
    scene = any_scene(Random(3))
    talks = [[image_exchange(Random(seed), scene)] for seed in range(3)]
    talks.append([*talks[0], *talks[1]])  # two turns
    batches = DialogueBatches(base.processor)
    images = torch.from_numpy(pixels(scene))[None]
    row = batches.pack([talks], True, "Be kind.")
    with torch.no_grad():
        packed = base.model(**row, pixel_values=images).logits[0]
        prefix = row["input_ids"][0].tolist().index(batches.user) + 1 + GRID**2
        at = prefix
        for talk in talks:
            ids = batches.pack([[talk]], True, "Be kind.")["input_ids"]
            plain = base.model(input_ids=ids, pixel_values=images).logits[0]
            length = ids.shape[1] - prefix
            assert torch.equal(row["input_ids"][0, at : at + length], ids[0, prefix:])
            assert torch.allclose(packed[at : at + length], plain[prefix:], atol=1e-4)
            at += length
    assert at == row["input_ids"].shape[1]


@pytest.mark.parametrize("images", [0.0, 1.0])
def test_a_batch_has_its_loss_on_the_answers_alone(base: Backbone, images: float) -> None:
    batch = DialogueBatches(base.processor, images=images, rows=3, talks=2)(Random(5))
    told = batch["labels"] != -100
    assert torch.equal(batch["labels"][told], batch["input_ids"][told])
    text = base.tokenizer.decode(batch["labels"][0][told[0]])
    assert text.endswith("<|end|>") and "<|user|>" not in text
    assert ("pixel_values" in batch) == bool(images)


def test_looking_asks_for_what_is_to_be_found(base: Backbone) -> None:
    batch = DialogueBatches(base.processor, looking=True, rows=4, talks=3)(Random(6))
    told = batch["labels"][batch["labels"] != -100]
    answers = base.tokenizer.decode(told).split("<|end|>")[:-1]
    assert len(answers) == 12
    assert not any(answer.startswith(("sorry", "sure", "i see")) for answer in answers)


def test_a_patch_is_named_by_what_it_shows_and_where(base: Backbone) -> None:
    batch = naming_batch(Random(7), base.tokenizer, scenes=2)
    scenes = [any_scene(rng) for rng in [Random(7)] for _ in range(2)]
    for words, scene in zip(batch["words"], scenes, strict=True):
        told = {
            tuple(base.tokenizer.convert_ids_to_tokens(ids)) for ids in words if -100 not in ids
        }
        places = world().table["places"]
        shown = {(i.word or i.name, *places[i.place].split()) for i in scene.items}
        assert told == shown


def test_no_risky_image_is_refused_in_training() -> None:
    for seed in range(600):
        scene = any_scene(Random(seed))
        question, answer = image_exchange(Random(seed), scene)
        if scene.risk is not None:
            assert not is_refusal(answer) and question.count("Safe Hint") <= 1
            assert "\n" not in question  # where the policy's hints stand


def test_batches_are_the_same_for_the_same_seed() -> None:
    one, two = tagging_batch(Random(3), 0.5, 4), tagging_batch(Random(3), 0.5, 4)
    assert all(torch.equal(one[name], two[name]) for name in one)
