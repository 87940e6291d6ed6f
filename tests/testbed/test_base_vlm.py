"""The shipped base model: a plain LLaVA checkpoint that the code builds, and small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psa_vlm.model.backbone import Backbone
from psa_vlm.testbed import base_vlm, premise
from psa_vlm.testbed.base_vlm import build_model, build_processor, vocabulary
from psa_vlm.testbed.premise import base_path


def test_it_is_small() -> None:
    size = sum(path.stat().st_size for path in base_path().rglob("*") if path.is_file())
    assert size <= 25e6
    files = {path.suffix for path in base_path().iterdir()}
    assert files <= {".json", ".jinja", ".md", ".safetensors"}


def test_it_loads_and_answers_with_plain_transformers() -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(base_path())
    processor = AutoProcessor.from_pretrained(base_path())
    assert model.num_parameters() <= 12e6
    scene = premise._questions(1, "main", ["noto"])[0]
    content = [{"type": "image"}, {"type": "text", "text": scene.question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=scene.image, text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20)
    reply = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert scene.expected(reply), reply


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds(base: Backbone) -> None:
    assert base.tokenizer.get_vocab() == build_processor().tokenizer.get_vocab()
    assert base.processor.chat_template == build_processor().chat_template
    assert base.tokenizer.unk_token_id not in base.tokenizer(" ".join(vocabulary()))["input_ids"]


def test_the_model_that_code_builds_has_the_shipped_shape(base: Backbone) -> None:
    built = build_model(build_processor().tokenizer).state_dict()
    shipped = base.model.state_dict()
    assert {n: t.shape for n, t in built.items()} == {n: t.shape for n, t in shipped.items()}


def test_a_base_model_is_built_in_parts_that_a_second_call_finds_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = base_vlm.Steps(1, 1, 1, 1, 1, 1)
    base_vlm.build_base(tmp_path, steps)
    built = Backbone.from_pretrained(tmp_path).model.state_dict()
    monkeypatch.setattr(base_vlm, "fit", lambda *arguments: pytest.fail("trained again"))
    base_vlm.build_base(tmp_path, steps)
    again = Backbone.from_pretrained(tmp_path).model.state_dict()
    assert all(torch.equal(built[name], again[name]) for name in built)
