"""Backbones without a language model: what they read, and what they say is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import CheckpointError, ConfigError, InputError, NoLanguageModel
from psa_vlm.inference import PsaVlm
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.dual_encoder import WINDOWS
from psa_vlm.model.families import ENCODERS
from psa_vlm.model.tokens import add_safety_tokens
from psa_vlm.training.config import ConceptsConfig, Stage1Config, Stage2Config, TokensConfig
from psa_vlm.training.stage1 import run_stage1
from psa_vlm.training.stage2 import run_stage2

from ..tiny import random_bottleneck
from .conftest import picture

KINDS = {"clip": "CLIP", "siglip": "Siglip"}


@pytest.fixture(scope="module", params=list(ENCODERS))
def folder(request: pytest.FixtureRequest, make_dual_encoder: Callable[[str], Path]) -> Path:
    return make_dual_encoder(KINDS[request.param])


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone.from_pretrained(folder)


# --- what it reads -------------------------------------------------------------------------------


def test_facts_of_the_model(backbone: Backbone) -> None:
    assert (backbone.vision_width, backbone.text_width, backbone.writes) == (24, 32, False)
    assert backbone.safety_token_ids == ()
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_features_lie_as_the_image_does(backbone: Backbone) -> None:
    dark = Image.new("RGB", (48, 48), "black")
    images = [dark]
    for top in (0, 24):
        for left in (0, 24):
            images.append(dark.copy())
            images[-1].paste("white", (left, top, left + 24, top + 24))
    features = backbone.encode(images)
    assert features.h_o.shape == (5, 16, 24) and features.grid == (4, 4)
    base, *maps = features.maps
    for i, one in enumerate(maps):
        change = (one - base).norm(dim=-1).reshape(2, 2, 2, 2).mean((1, 3)).flatten()
        assert int(change.argmax()) == i, change


def test_features_are_those_of_plain_transformers(backbone: Backbone) -> None:
    pixels = backbone.processor.image_processor([picture(0)], return_tensors="pt")
    with torch.no_grad():
        seen = backbone.model.vision_model(**pixels, output_hidden_states=True)
    layer = ENCODERS[backbone.model.config.model_type].layer
    expected = seen.last_hidden_state if layer is None else seen.hidden_states[layer]
    torch.testing.assert_close(backbone.encode([picture(0)]).h_o[0], expected[0, -16:])


def test_states_are_those_of_the_text_encoder(backbone: Backbone) -> None:
    states, mask = backbone.embed_text(["What?", "Is it so?"])
    padded = ENCODERS[backbone.model.config.model_type].padded
    how: Any = {"padding": "max_length", "max_length": 16} if padded else {"padding": True}
    given = backbone.tokenizer(["What?", "Is it so?"], return_tensors="pt", **how)
    asked = {} if padded else {"attention_mask": given["attention_mask"]}
    with torch.no_grad():
        plain = backbone.model.text_model(input_ids=given["input_ids"], **asked).last_hidden_state
    for row, (one, real) in enumerate(zip(states, given["attention_mask"].bool(), strict=True)):
        if padded:
            real[-1] = True
        assert int(mask[row].sum()) == int(real.sum())
        torch.testing.assert_close(one[mask[row]], plain[row][real])
        assert (one[~mask[row]] == 0).all()


def test_words_act_in_order(backbone: Backbone) -> None:
    (one, other), _ = backbone.embed_text(["ab", "ba"])
    assert not torch.allclose(one.sum(0), other.sum(0), atol=1e-3)


def test_a_long_text_is_read_in_windows_to_its_end(backbone: Backbone) -> None:
    assert backbone.max_tokens == WINDOWS * (16 - 1)  # the begin mark
    start = "b" * 15
    long, mask = backbone.embed_text([start + "ccc"])
    parts = [backbone.embed_text([text])[0][0] for text in (start, "ccc")]
    torch.testing.assert_close(long[0][mask[0]], torch.cat(parts), atol=1e-5, rtol=1e-5)
    backbone.embed_text(["b" * backbone.max_tokens])
    with pytest.raises(InputError, match=r"100,000 tokens long and 960 are assessed: shorten"):
        backbone.embed_text(["fine", "b" * 100_000])
    with pytest.raises(InputError, match="text is empty"):
        backbone.embed_text([" \n"])


def test_marks_in_a_text_are_letters(backbone: Backbone) -> None:
    _, mask = backbone.embed_text(["<s>"])
    extra = ENCODERS[backbone.model.config.model_type].padded  # the last position
    assert int(mask.sum()) == 1 + len("<s>") + extra


def test_a_batch_is_assessed_as_each_alone(backbone: Backbone) -> None:
    model = PsaVlm(backbone, random_bottleneck(backbone))
    images = [[picture(0)], [picture(1), picture(2)], [picture(3)]]
    texts = ["What?", "A text longer than one window is", "Is it?"]
    for one, text, verdict in zip(images, texts, model.assess_batch(images, texts), strict=True):
        alone = model.assess(one, text)
        assert verdict.error is None and len(verdict.images) == len(one)
        for mine, theirs in zip(verdict.images, alone.images, strict=True):
            assert mine.type_probs == pytest.approx(theirs.type_probs, abs=1e-5)


def test_the_question_and_the_image_matter(backbone: Backbone) -> None:
    model = PsaVlm(backbone, random_bottleneck(backbone))
    verdicts = model.assess_batch([picture(0), picture(0), picture(1)], ["What?", "Why", "What?"])
    assert len({str(one.images[0].type_probs) for one in verdicts}) == 3


# --- runs ----------------------------------------------------------------------------------------


def test_stage1_learns_concepts_alone_and_the_run_comes_back(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [
        Sample(
            id=f"s{i}",
            images=(picture(i),),
            conversation=(Turn("user", f"What is {i}?"),),  # no answer is needed
            type="clean" if i % 2 else "privacy",
            level="safe" if i % 2 else "high",
        )
        for i in range(4)
    ]
    steps: dict[str, Any] = {"epochs": 4, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1}
    first = Stage1Config(
        backbone=str(folder),
        out=tmp_path / "first",
        concepts=ConceptsConfig(hidden=16, tokens=2, heads=4, depth=1, **steps),
        report_to=(),
    )
    trained = run_stage1(first, samples)
    assert f"{folder} has no language model: no safety tokens (2) are trained" in caplog.text
    history = json.loads((first.out / "history.json").read_text())
    assert list(history) == ["concepts"]
    assert history["concepts"][-1]["loss"] < history["concepts"][0]["loss"]
    again = PsaVlm.from_pretrained(first.out)
    assert again.assess(picture(0), "What?") == trained.assess(picture(0), "What?")
    again.save_pretrained(tmp_path / "copy")
    copied = PsaVlm.from_pretrained(tmp_path / "copy")
    assert copied.assess(picture(0), "What?") == trained.assess(picture(0), "What?")
    card = (first.out / "README.md").read_text()
    assert "no language model in it" in card and "model.reply" not in card
    second = Stage2Config(model=first.out, out=tmp_path / "second")
    answered = [
        replace(s, conversation=(*s.conversation, Turn("assistant", "So."))) for s in samples
    ]
    with pytest.raises(NoLanguageModel, match=r"^stage II needs a language model"):
        run_stage2(second, answered)
    assert not list(tmp_path.glob("second*"))


def test_no_tokens_asked_for_is_no_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Stage1Config(
        backbone=str(folder),
        out=tmp_path / "run",
        concepts=ConceptsConfig(hidden=16, tokens=2, heads=4, depth=1, epochs=0),
        tokens=TokensConfig(count=0),
        report_to=(),
    )
    sample = Sample("a", (picture(0),), (Turn("user", "What?"),), "clean", "safe")
    run_stage1(config, [sample])
    assert not caplog.records


def test_other_weights_are_refused(guard_run: Path, make_dual_encoder: Any) -> None:
    with pytest.raises(CheckpointError, match="of type siglip; give the place of the right one"):
        PsaVlm.from_pretrained(guard_run, base=make_dual_encoder("Siglip"))


# --- what is missing -----------------------------------------------------------------------------


def test_what_needs_a_language_model_says_so(guard_run: Path, tmp_path: Path) -> None:
    model = PsaVlm.from_pretrained(guard_run)
    told = r" needs a language model, and the backbone \(clip\) has none: it assesses only"
    with pytest.raises(NoLanguageModel, match="^reply" + told):
        model.reply(picture(0), "What?")
    with pytest.raises(NoLanguageModel, match="^an export" + told):
        model.save_pretrained(tmp_path / "out", merged=True)
    with pytest.raises(NoLanguageModel, match="^a safety token" + told):
        add_safety_tokens(model.backbone, 2)
    turns = [[Turn("user", "What?")]]
    for call in (
        lambda: model.backbone.prompts(turns, [0]),
        lambda: model.backbone.generate({}),
        lambda: model.answer_batch(model.see_batch([[]], ["What?"]), [None]),
    ):
        with pytest.raises(NoLanguageModel, match="needs a language model"):
            call()
    assert not list(tmp_path.iterdir())


def test_there_is_nothing_to_quantise(make_dual_encoder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"bits is 4: .* has no language model; leave bits out"):
        Backbone.from_pretrained(make_dual_encoder("CLIP"), bits=4)
