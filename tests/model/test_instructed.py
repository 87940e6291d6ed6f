"""A projector that reads the question: InstructBLIP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from psa_vlm.data.sample import Turn
from psa_vlm.model.backbone import Backbone

from .conftest import BUILDERS, asked, randomised


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    from transformers import AutoModelForImageTextToText

    folder: Path = tmp_path_factory.mktemp("instructblip")
    config, processor = BUILDERS["instructblip"]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        randomised(AutoModelForImageTextToText.from_config(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Backbone.from_pretrained(folder)


def test_one_question_is_what_the_processor_makes_of_it(backbone: Backbone) -> None:
    image = Image.new("RGB", (40, 30), "red")
    given = backbone.processor(images=image, text=["What is this?"], return_tensors="pt")
    inputs = backbone.prompts(asked("What is this?"), [1], features=backbone.encode([image]))
    assert torch.equal(inputs["input_ids"], given["input_ids"])
    assert torch.equal(inputs["question_ids"], given["qformer_input_ids"])


def test_the_question_is_the_last_one_with_its_hint(backbone: Backbone) -> None:
    turns = [Turn("user", "one?"), Turn("assistant", "yes."), Turn("user", "two?")]
    turns.insert(0, Turn("system", "be kind."))
    inputs = backbone.prompts([turns], [1], ["mind."])
    tokenizer = backbone.processor.qformer_tokenizer
    assert torch.equal(
        inputs["question_ids"], tokenizer("two?\nmind.", return_tensors="pt").input_ids
    )
    mark = "<image>" * 6
    told = backbone.tokenizer.decode(inputs["input_ids"][0])
    assert told == f"{mark}<s>be kind.\none? yes.</s>two?\nmind."


def test_the_question_changes_what_is_seen(backbone: Backbone) -> None:
    features = backbone.encode([Image.new("RGB", (40, 30), "red")])
    seen = []
    for text in ("what?", "who?"):
        inputs = backbone.prompts(asked(text), [1], features=features)
        seen.append(backbone.arguments(inputs, features)["inputs_embeds"][0, :6])
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_a_question_longer_than_it_reads_is_answered(backbone: Backbone) -> None:
    features = backbone.encode([Image.new("RGB", (40, 30), "red")])
    inputs = backbone.prompts(asked("what? " * 60), [1], features=features)
    assert inputs["question_ids"].shape == (1, 64)
    (answer,) = backbone.write(inputs, features, 3)
    assert answer.tokens <= 3 and answer.read == inputs["input_ids"].shape[1]
