"""What must hold of every family, on a tiny random checkpoint of each."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.inference import PsaVlm
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.families import SPECS
from psa_vlm.model.tokens import add_safety_tokens, role_marks
from psa_vlm.training.config import (
    ConceptsConfig,
    LoraConfig,
    Stage1Config,
    Stage2Config,
    TokensConfig,
)
from psa_vlm.training.stage1 import run_stage1
from psa_vlm.training.stage2 import run_stage2

from ..tiny import random_bottleneck
from .conftest import SIZES, asked, picture

WANTED = {*("input_ids", "attention_mask", "qformer_input_ids", "qformer_attention_mask")}.union(
    *((*spec.image_inputs, *spec.token_types) for spec in SPECS.values())
)
"""What of a processor's output goes to a model."""


@pytest.fixture(scope="module")
def backbone(family_dir: Path) -> Backbone:
    backbone = Backbone.from_pretrained(family_dir)
    add_safety_tokens(backbone, 3)
    return backbone


@contextmanager
def vision_passes(backbone: Backbone) -> Iterator[list[int]]:
    """One entry for each call of the vision tower."""
    calls: list[int] = []
    tower = backbone.model.get_encoder(modality="image")
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def processed(
    backbone: Backbone, asks: list[list[Turn]], counts: list[int], images: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """What the processor makes of the same requests by itself."""
    processor: Any = backbone.processor
    if backbone.spec.instructed is not None:
        return written_out(backbone, asks, counts, images)
    texts = []
    for turns, count in zip(asks, counts, strict=True):
        if backbone.spec.chat_template is not None:  # which the checkpoint has not
            tokens = "".join(f"<safety_{i}>" for i in range(3))
            texts.append((tokens + processor.image_token) * count + turns[0].text)
            continue
        content = [{"type": "image"}] * count + [{"type": "text", "text": turns[0].text}]
        texts.append(
            processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        )
    rest = iter(images)
    groups = [[next(rest) for _ in range(n)] for n in counts]
    with warnings.catch_warnings():  # PaliGemma's also makes labels, as NumPy does not like
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        inputs = processor(
            images=groups, text=texts, padding=True, padding_side="left", return_tensors="pt"
        )
    return {name: value for name, value in inputs.items() if name in WANTED}


def written_out(
    backbone: Backbone, asks: list[list[Turn]], counts: list[int], images: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """What a model takes whose processor puts one image before each prompt, and no more."""
    processor: Any = backbone.processor
    mark = "".join(f"<safety_{i}>" for i in range(3)) + "<image>" * processor.num_query_tokens
    texts = [mark * n + "<s>" + ask[0].text for n, ask in zip(counts, asks, strict=True)]
    inputs = processor.tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    questions = [ask[0].text for n, ask in zip(counts, asks, strict=True) for _ in range(n)]
    read = processor.qformer_tokenizer(questions, padding=True, return_tensors="pt")
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "pixel_values": processor.image_processor(images, return_tensors="pt")["pixel_values"],
        "qformer_input_ids": read["input_ids"],
        "qformer_attention_mask": read["attention_mask"],
    }


# --- the way of a request ------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[1, 1], [3], [1, 2]])
def test_requests_are_those_of_plain_transformers(backbone: Backbone, counts: list[int]) -> None:
    images = [picture(i) for i in range(sum(counts))]
    asks = asked("What is this?", "Is it?")[: len(counts)]
    plain = processed(backbone, asks, counts, images)
    with vision_passes(backbone) as calls:
        features = backbone.encode(images, counts)
        inputs = backbone.prompts(asks, counts, features=features)
        with torch.no_grad():
            got = backbone.language(**backbone.arguments(inputs, features)).logits
        answers = backbone.generate(inputs, features, max_new_tokens=4)
    assert len(calls) == 1
    for name in inputs.keys() - {"question_ids", "question_mask"}:
        assert torch.equal(inputs[name], plain[name]), name
    with torch.no_grad():
        expected = backbone.model(**plain).logits
        suppressed = [backbone.image_token_id, *backbone.safety_token_ids]
        ids = backbone.model.generate(
            **plain, max_new_tokens=4, do_sample=False, suppress_tokens=suppressed
        )
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-4)
    new = ids[:, inputs["input_ids"].shape[1] :]
    texts = backbone.tokenizer.batch_decode(new, skip_special_tokens=True)
    assert answers == [text.strip() for text in texts]


def test_role_marks_are_no_ends_of_special_tokens(backbone: Backbone) -> None:
    """Or the guard would break harmless words."""
    specials = backbone.tokenizer.all_special_tokens
    for mark in role_marks(backbone.processor, specials):
        assert not any(special.endswith(mark) for special in specials), mark


def test_images_and_words_matter(backbone: Backbone) -> None:
    """So that equal logits mean something."""
    seen = []
    for image in (picture(0), picture(3)):
        features = backbone.encode([image])
        inputs = backbone.prompts(asked("What?"), [1], features=features)
        with torch.no_grad():
            arguments = backbone.arguments(inputs, features)
            seen.append(backbone.language(**arguments).logits[:, -1])
    assert (seen[0] - seen[1]).abs().max() > 1e-2


def test_a_batch_answers_as_each_alone(backbone: Backbone) -> None:
    asks = asked("What is this, and what is it for?", "Is it?", "And this?")
    images = [picture(i) for i in range(3)]
    features = backbone.encode(images)
    together = backbone.generate(backbone.prompts(asks, [1] * 3, features=features), features, 6)
    for i, ask in enumerate(asks):
        one = features.take([i])
        alone = backbone.generate(backbone.prompts([ask], [1], features=one), one, 6)
        assert alone == [together[i]]
        again = backbone.encode([images[i]])
        torch.testing.assert_close(again.maps[0], features.maps[i], atol=1e-4, rtol=1e-4)
    mixed = backbone.prompts(asks[:2], [0, 1], features=features.take([1]))
    answers = backbone.generate(mixed, features.take([1]), 6)
    words = backbone.generate(backbone.prompts(asks[:1], [0]), None, 6)
    assert answers == [words[0], together[1]]


# --- features before the projector ---------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_features_lie_as_the_image_does(backbone: Backbone, size: tuple[int, int]) -> None:
    """A bright square moved in the image moves what the features show, behind a first image too."""
    width, height = size
    dark = Image.new("RGB", size, "black")
    images = [picture(1), dark]
    for top in (0, height // 2):
        for left in (0, width // 2):
            bright = dark.copy()
            bright.paste("white", (left, top, left + width // 2, top + height // 2))
            images.append(bright)
    _, base, *maps = backbone.encode(images).maps
    assert base.ndim == 3 and base.shape[-1] == backbone.vision_width
    for i, features in enumerate(maps):
        change = (features - base).norm(dim=-1)  # [H, W]
        rows, columns = change.shape[0] // 2, change.shape[1] // 2
        quarters = [
            half.mean().item()
            for part in (change[:rows], change[-rows:])
            for half in (part[:, :columns], part[:, -columns:])
        ]
        assert quarters.index(max(quarters)) == i, quarters
        assert max(quarters) > 1.5 * sorted(quarters)[-2]


def test_images_of_any_size_are_assessed_together(backbone: Backbone) -> None:
    model = PsaVlm(backbone, random_bottleneck(backbone))
    images, texts = [picture(i) for i in range(4)], ["What?", "What is it?", "?", "Is it?"]
    together = model.assess_batch(images, texts)
    for image, text, verdict in zip(images, texts, together, strict=True):
        (alone,), (one,) = model.assess(image, text).images, verdict.images
        assert one.type_probs == pytest.approx(alone.type_probs, abs=1e-4)
        assert one.level_probs == pytest.approx(alone.level_probs, abs=1e-4)
        assert one.evidence is not None and alone.evidence is not None
        assert one.evidence.shape == tuple(backbone.encode([image]).maps[0].shape[:2])
        np.testing.assert_allclose(one.evidence, alone.evidence, atol=1e-3)
    several = model.assess([images[0], images[1]], "What?")
    assert several.error is None and len(several.images) == 2


# --- adapting ------------------------------------------------------------------------------------


def test_lora_finds_every_linear_layer_of_the_language_model_and_no_other(
    backbone: Backbone,
) -> None:
    names = [n for n, m in backbone.model.named_modules() if isinstance(m, torch.nn.Linear)]
    adapted = [name for name in names if re.fullmatch(backbone.spec.language_layers, name)]
    decoder = backbone.model.get_decoder()
    linear = [m for m in decoder.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(adapted) == len(linear) == 2 * 7  # q, k, v, o, gate, up, down
    assert all(any(backbone.model.get_submodule(n) is m for m in linear) for n in adapted)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [
        Sample(
            id=f"s{i}",
            images=tuple(picture(j) for j in range(i, i + 1 + i % 2)),
            conversation=(Turn("user", f"What is {i}?"), Turn("assistant", f"It is {i}.")),
            type="clean" if i % 2 else "privacy",
            level="safe" if i % 2 else "high",
        )
        for i in range(3)
    ]


def test_both_stages_learn_and_change_only_what_they_may(
    family_dir: Path, samples: list[Sample], tmp_path: Path
) -> None:
    steps: dict[str, Any] = {"epochs": 3, "batch_size": 3, "learning_rate": 1e-2, "log_every": 1}
    first = Stage1Config(
        backbone=str(family_dir),
        out=tmp_path / "first",
        concepts=ConceptsConfig(hidden=16, tokens=2, heads=4, depth=1, **steps),
        tokens=TokensConfig(count=3, **steps),
    )
    run_stage1(first, samples)
    second = Stage2Config(
        model=first.out,
        out=tmp_path / "second",
        lora=LoraConfig(r=2, alpha=4, dropout=0.0, **steps),
    )
    trained = run_stage2(second, samples)
    for out in (first.out, second.out):
        history = json.loads((out / "history.json").read_text())
        for part, points in history.items():
            assert points[-1]["loss"] < points[0]["loss"], (part, points)
    base, one, two = (
        Backbone.from_pretrained(family_dir),
        PsaVlm.from_pretrained(first.out),
        PsaVlm.from_pretrained(second.out),
    )
    for image in samples[1].images:
        [again, before] = [model.assess(image, "What?") for model in (two, one)]
        assert again == before
    images = list(samples[1].images)
    replies = [m.reply(images, "What?", concepts={}, max_new_tokens=4) for m in (trained, two)]
    assert replies[0] == replies[1]
    assert two.adapter is not None
    two.adapter.unmerge_adapter()
    rows = list(one.backbone.safety_token_ids)
    state = {
        name.replace("base_layer.", ""): w for name, w in two.backbone.model.state_dict().items()
    }
    for name, weight in one.backbone.model.state_dict().items():
        torch.testing.assert_close(state[name], weight, atol=1e-5, rtol=1e-5)
    embeddings = base.model.get_input_embeddings().weight
    for name, weight in base.model.state_dict().items():
        now = one.backbone.model.state_dict()[name]
        if weight.shape == embeddings.shape and now.shape != weight.shape:
            kept = [i for i in range(len(weight)) if i not in rows]
            now, weight = now[kept], weight[kept]
        assert torch.equal(now, weight), name


# --- exporting -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(
    family_dir: Path, random_lora: Callable[[Any], Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of each family with a LoRA, all of it random."""
    backbone = Backbone.from_pretrained(family_dir)
    add_safety_tokens(backbone, 3)
    bottleneck = random_bottleneck(backbone)
    folder = tmp_path_factory.mktemp("runs") / "run"
    PsaVlm(backbone, bottleneck, adapter=random_lora(backbone)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    folder = run.with_name("exported")
    PsaVlm.from_pretrained(run).save_pretrained(folder, merged=True)
    return folder


@pytest.mark.parametrize("count", [1, 2])
def test_an_export_is_plain_transformers(run: Path, exported: Path, count: int) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    images = [picture(i) for i in range(count)]
    backbone = PsaVlm.from_pretrained(run).backbone
    features = backbone.encode(images, [count])
    inputs = backbone.prompts(asked("What is this?"), [count], features=features)
    plain: Any = AutoModelForImageTextToText.from_pretrained(exported).eval()
    processor: Any = AutoProcessor.from_pretrained(exported)
    content = [{"type": "image", "image": image} for image in images]
    chat = [{"role": "user", "content": [*content, {"type": "text", "text": "What is this?"}]}]
    if backbone.spec.instructed is None:
        with warnings.catch_warnings():  # PaliGemma's also makes labels, as NumPy does not like
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            given = processor.apply_chat_template(
                chat,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
    else:  # its processor can't place what the template wants before the image
        given = written_out(backbone, asked("What is this?"), [count], images)
        prompt = processor.tokenizer.apply_chat_template(chat, tokenize=False)
        assert prompt.replace("<image>", "<image>" * processor.num_query_tokens) == (
            processor.tokenizer.decode(given["input_ids"][0])
        )
    assert torch.equal(given["input_ids"], inputs["input_ids"])
    given = {name: value for name, value in given.items() if name in WANTED}
    with torch.no_grad():
        expected = backbone.language(**backbone.arguments(inputs, features)).logits
        torch.testing.assert_close(plain(**given).logits, expected, atol=1e-4, rtol=1e-4)
        new = plain.generate(**given, max_new_tokens=6, do_sample=False)
    answer = processor.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.strip()] == backbone.generate(inputs, features, 6)


def test_an_export_is_a_whole_run(run: Path, exported: Path) -> None:
    before, after = PsaVlm.from_pretrained(run), PsaVlm.from_pretrained(exported)
    assert after.adapter is None and before.adapter is not None
    assert str(after.backbone.source) == str(exported)
    after.policy = before.policy  # an equal one, that names another file as its source
    images, texts = [picture(i) for i in range(2)], ["What?", "Is it?"]
    for concepts in (None, {"privacy": "low"}):
        replies = [
            model.reply_batch(images, texts, concepts=concepts, max_new_tokens=6)
            for model in (before, after)
        ]
        assert replies[0] == replies[1]
