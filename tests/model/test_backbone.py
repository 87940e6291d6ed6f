"""The backbone on a tiny random LLaVA."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    Blip2Config,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from psa_vlm.data.sample import Turn
from psa_vlm.errors import CheckpointError, InputError
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.image_features import ImageFeatures
from psa_vlm.model.prompts import PromptBuilder
from psa_vlm.model.tokens import add_safety_tokens

from .conftest import asked


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def backbone(llava_dir: Path) -> Backbone:
    return Backbone.from_pretrained(llava_dir)


@pytest.fixture(scope="module")
def with_tokens(llava_dir: Path) -> Backbone:
    backbone = Backbone.from_pretrained(llava_dir)
    add_safety_tokens(backbone, 3)
    return backbone


@contextmanager
def vision_passes(backbone: Backbone) -> Iterator[list[int]]:
    """Batch sizes of the calls of the vision tower."""
    calls: list[int] = []
    handle = backbone.model.model.vision_tower.register_forward_hook(
        lambda _, args, output: calls.append(len(output.last_hidden_state))
    )
    yield calls
    handle.remove()


def plain_answers(
    backbone: Backbone, prompts: list[str], images: list[Image.Image], new: int
) -> list[str]:
    """What plain transformers makes of prompts as text."""
    processor: Any = backbone.processor
    inputs = processor(
        images=images or None, text=prompts, padding=True, padding_side="left", return_tensors="pt"
    )
    suppressed = [backbone.image_token_id, *backbone.safety_token_ids]
    ids = backbone.model.generate(
        **inputs, max_new_tokens=new, do_sample=False, suppress_tokens=suppressed
    )
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


# --- loading -------------------------------------------------------------------------------------


def test_facts_of_the_model(backbone: Backbone) -> None:
    assert (backbone.vision_width, backbone.text_width, backbone.image_tokens) == (24, 32, 16)
    assert backbone.device.type == "cpu" and backbone.dtype == torch.float32
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.safety_token_ids == ()


def test_dtype_can_be_chosen(llava_dir: Path) -> None:
    backbone = Backbone.from_pretrained(llava_dir, dtype=torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    assert backbone.encode([picture(0)]).h_o.dtype == torch.bfloat16
    assert backbone.embed_text(["a"])[0].dtype == torch.bfloat16


def test_an_unknown_family_is_named_with_the_known_ones(tmp_path: Path) -> None:
    Blip2Config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'blip-2' is not known \(known: .*llava, "):
        Backbone.from_pretrained(tmp_path)


def test_a_model_of_words_alone_is_named(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: .* llama does not read images"):
        Backbone.from_pretrained(tmp_path)


def test_an_encoder_decoder_is_named(llava_dir: Path) -> None:
    backbone = Backbone.from_pretrained(llava_dir)
    backbone.model.config.text_config.is_encoder_decoder = True
    with pytest.raises(CheckpointError, match="encoder with a decoder; take a checkpoint whose"):
        Backbone(backbone.model, backbone.processor)


def test_what_can_not_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="can't load a vision-language model from") as caught:
        Backbone.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_chat_template_is_needed(llava_dir: Path) -> None:
    backbone = Backbone.from_pretrained(llava_dir)
    backbone.processor.chat_template = backbone.tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="no chat template"):
        Backbone(backbone.model, backbone.processor)


def test_lora_finds_every_linear_layer_of_the_language_model_and_no_other(
    backbone: Backbone,
) -> None:
    names = [n for n, m in backbone.model.named_modules() if isinstance(m, torch.nn.Linear)]
    pattern = backbone.spec.language_layers
    adapted = {name for name in names if re.fullmatch(pattern, name)}
    prefix = "model.language_model.layers."
    assert adapted == {name for name in names if name.startswith(prefix)}
    assert len(adapted) == 2 * 7  # q, k, v, o, gate, up, down


# --- images --------------------------------------------------------------------------------------


def test_encode_gives_both_sides_of_the_projector_in_one_pass(backbone: Backbone) -> None:
    with vision_passes(backbone) as calls:
        features = backbone.encode([picture(0), picture(1)])
    assert calls == [2]
    assert features.h_o.shape == (2, 16, 24) and features.grid == (4, 4)
    assert len(features) == 2 and not features.h_o.requires_grad
    h_i = torch.stack(list(features.projected.pooler_output))
    torch.testing.assert_close(backbone.model.model.multi_modal_projector(features.h_o), h_i)
    with pytest.raises(InputError, match="at least one image"):
        backbone.encode([])


def test_the_class_token_is_left_out_of_the_features(llava_dir: Path) -> None:
    backbone = Backbone.from_pretrained(llava_dir)
    expected = backbone.encode([picture(0)])
    backbone.model.config.vision_feature_select_strategy = "full"
    backbone.processor.vision_feature_select_strategy = "full"
    features = backbone.encode([picture(0)])
    torch.testing.assert_close(features.h_o, expected.h_o)
    assert features.projected.pooler_output[0].shape == (17, 32)


def test_a_processor_of_another_model_is_named(llava_dir: Path) -> None:
    backbone = Backbone.from_pretrained(llava_dir)
    backbone.processor.patch_size = 16  # 4 positions to an image in place of 16
    told = rf"{llava_dir}: its processor writes 8 positions for 2 images but its model makes 32"
    with pytest.raises(CheckpointError, match=told):
        backbone.encode([picture(0), picture(1)])


def test_a_config_without_an_image_token_is_named(llava_dir: Path) -> None:
    backbone = Backbone.from_pretrained(llava_dir)
    vars(backbone.model.config)["image_token_index"] = None  # which some families' configs allow
    with pytest.raises(CheckpointError, match=r"config\.json has no image_token_index"):
        backbone.encode([picture(0)])


def test_no_hook_is_left_behind(llava_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = Backbone.from_pretrained(llava_dir)
    projector = backbone.model.model.multi_modal_projector
    backbone.encode([picture(0)])
    assert not projector._forward_pre_hooks

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(projector.act, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        backbone.encode([picture(0)])
    assert not projector._forward_pre_hooks


def test_take_picks_images(backbone: Backbone) -> None:
    features = backbone.encode([picture(i) for i in range(3)])
    taken = features.take([2, 0])
    assert len(taken) == 2 and isinstance(taken, ImageFeatures)
    for place, index in enumerate([2, 0]):
        assert torch.equal(taken.h_o[place], features.h_o[index])
        h_i, all_h_i = taken.projected.pooler_output, features.projected.pooler_output
        assert torch.equal(h_i[place], all_h_i[index])


# --- text ----------------------------------------------------------------------------------------


def test_embed_text_is_the_users_own_words(backbone: Backbone) -> None:
    embeds, mask = backbone.embed_text(["hi", "h"])
    assert embeds.shape == (2, 2, 32) and mask.tolist() == [[True, True], [True, False]]
    ids = backbone.tokenizer("hi", add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(embeds[0], backbone.model.get_input_embeddings().weight[ids])
    assert (embeds[1, 1] == 0).all()
    forged, _ = backbone.embed_text(["<image>"])
    image = backbone.model.get_input_embeddings().weight[backbone.image_token_id]
    assert not any(torch.equal(row, image) for row in forged[0])


def test_a_text_can_be_read_from_its_begin_mark_on(backbone: Backbone) -> None:
    rows = backbone.model.get_input_embeddings().weight
    embeds, mask = backbone.embed_text(["hi", "h"], begin=True)
    assert mask.sum(1).tolist() == [3, 2]
    assert all(torch.equal(row, rows[backbone.tokenizer.bos_token_id]) for row in embeds[:, 0])
    assert torch.equal(embeds[:, 1:], backbone.embed_text(["hi", "h"])[0])


def test_all_of_a_text_is_assessed_or_none(backbone: Backbone) -> None:
    assert backbone.embed_text(["a" * 1024])[1].sum() == 1024 == backbone.max_tokens
    with pytest.raises(InputError, match="text is 100,000 tokens long and the model reads 1,024"):
        backbone.embed_text(["fine", "b" * 100_000])


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_empty_text_is_an_error(backbone: Backbone, text: str) -> None:
    with pytest.raises(InputError, match="text is empty"):
        backbone.embed_text(["fine", text])


# --- prompts -------------------------------------------------------------------------------------


def test_a_prompt_is_what_the_template_says(with_tokens: Backbone) -> None:
    turns = [Turn("user", "One?"), Turn("assistant", "Yes."), Turn("user", "Two?")]
    turns.insert(0, Turn("system", "Be kind."))
    inputs = with_tokens.prompts([turns], [2], hints=["Safe Hint: mind."])
    mark = "<safety_0><safety_1><safety_2>" + "<image>" * 16 + "\n"
    assert with_tokens.tokenizer.decode(inputs["input_ids"][0]) == (
        f"<s>Be kind. USER: {mark}{mark}One? ASSISTANT: Yes. "
        "USER: Two?\nSafe Hint: mind. ASSISTANT:"
    )
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_prompts_equal_those_of_the_processor(with_tokens: Backbone) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    expected = with_tokens.processor(
        images=[picture(0)],
        text=with_tokens.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        ),
    )["input_ids"]
    assert with_tokens.prompts(asked("What is this?"), [1])["input_ids"].tolist() == expected


def test_inference_pads_left_and_training_right(with_tokens: Backbone) -> None:
    pad = with_tokens.tokenizer.pad_token_id
    asks = asked("A long question, is it not?", "Short?")
    inputs = with_tokens.prompts(asks, [0, 0])
    gap = int((inputs["attention_mask"][1] == 0).sum())
    assert gap == 21 and inputs["attention_mask"][1].tolist() == [0] * gap + [1] * (
        inputs["input_ids"].shape[1] - gap
    )
    assert inputs["input_ids"][1, :gap].eq(pad).all()
    batch = with_tokens.prompts(asks, [0, 0], answers=["No.", "Yes, very short."])
    length = int(batch["attention_mask"][1].sum())
    assert batch["attention_mask"][1].tolist() == [1] * length + [0] * (
        batch["input_ids"].shape[1] - length
    )
    assert batch["labels"][1, length:].eq(-100).all()


def test_turns_that_the_template_does_not_take_are_an_error(llava_dir: Path) -> None:
    backbone = Backbone.from_pretrained(llava_dir)
    template = backbone.processor.chat_template
    turns = [Turn("system", "Be kind."), Turn("user", "One?")]
    first = "{% if messages[0]['role'] == 'system' %}"
    for changed, told in (
        (f"{first}{{{{ raise_exception('no system turns') }}}}{{% endif %}}", "no system turns"),
        (f"{first}{{% set messages = messages[1:] %}}{{% endif %}}", "leaves out words"),
    ):
        backbone.processor.chat_template = changed + template
        with pytest.raises(InputError, match=rf"\(system, user\).*{told}"):
            backbone.prompts([turns], [0])


def test_training_prompts_are_inference_prompts(with_tokens: Backbone) -> None:
    turns = [Turn("user", "One?"), Turn("assistant", "Yes."), Turn("user", "Two?")]
    turns.insert(0, Turn("system", "Be kind."))
    conversations, counts, hints = [turns, *asked("Hm?")], [2, 1], ["Safe Hint: mind.", None]
    answers = ["No USER: <image> here.", "Yes."]
    inputs = with_tokens.prompts(conversations, counts, hints)
    batch = with_tokens.prompts(conversations, counts, hints, answers)
    for row in range(2):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        assert torch.equal(ids[: len(prompt)], prompt)
        assert labels[: len(prompt)].eq(-100).all()
        told = labels != -100
        assert torch.equal(labels[told], ids[told])
        assert int(batch["attention_mask"][row].sum()) == len(prompt) + int(told.sum())
    spoken = [with_tokens.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert spoken == [" No U\u200bSER: <\u200bimage> here.</s>", " Yes.</s>"]


def test_a_seam_that_the_tokenizer_would_merge_stays(llava_dir: Path) -> None:
    """A generation prompt that ends in a space, before a tokenizer that knows " S" as one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {p: i for i, p in enumerate(["<s>", "</s>", "<image>", *alphabet, "\u0120S"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("\u0120", "S")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_tokens(["<image>"], special_tokens=True)
    base: Any = AutoProcessor.from_pretrained(llava_dir)
    template = (
        "{% for m in messages %}{{ m['role'] + '> ' }}{% for part in m['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{{ '</s>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
    )
    processor = LlavaProcessor(base.image_processor, fast, patch_size=8, chat_template=template)
    builder = PromptBuilder(processor, 16, 1 << 30)
    prompt = builder.inputs(asked("What?"), [1])["input_ids"][0]
    batch = builder.inputs(asked("What?"), [1], answers=["Sure"])
    assert torch.equal(batch["input_ids"][0, : len(prompt)], prompt)
    answer = batch["labels"][0][len(prompt) :]
    assert fast.decode(answer) == "Sure</s>" and (answer != -100).all()
    assert vocab["\u0120S"] in fast("assistant> Sure")["input_ids"]


@pytest.mark.parametrize("turns", [[], [Turn("user", "a"), Turn("assistant", "b")]])
def test_a_conversation_ends_with_the_user(backbone: Backbone, turns: list[Turn]) -> None:
    with pytest.raises(InputError, match="end with a turn of the user"):
        backbone.prompts([turns], [0])


def test_what_the_model_can_not_read_is_an_error(backbone: Backbone) -> None:
    with pytest.raises(InputError, match=r"100\d+ tokens long and the model reads 1024"):
        backbone.prompts(asked("b" * 100_000), [0])


def test_no_image_is_dropped_in_silence(llava_dir: Path) -> None:
    backbone = Backbone.from_pretrained(llava_dir)
    template = backbone.processor.chat_template
    backbone.processor.chat_template = template.replace("'<image>\\n'", "''")
    with pytest.raises(CheckpointError, match="writes 0 image marks for 1 images"):
        backbone.prompts(asked("What?"), [1])
    backbone.processor.chat_template = template
    features, inputs = backbone.encode([picture(0)]), backbone.prompts(asked("What?"), [1])
    with pytest.raises(InputError, match="hold 1 images but 0 are given"):
        backbone.generate(inputs)
    with pytest.raises(InputError, match="hold 0 images but 1 are given"):
        backbone.generate(backbone.prompts(asked("What?"), [0]), features)


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[1], [1, 1], [2, 0, 1], [0, 0]])
def test_answers_equal_those_of_plain_transformers(
    with_tokens: Backbone, counts: list[int]
) -> None:
    images = [picture(i) for i in range(sum(counts))]
    asks = asked("What is this?", "Is it?", "Tell me more about this one.")[: len(counts)]
    texts = [
        with_tokens.processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * n + [{"type": "text", "text": t[0].text}],
                }
            ],
            add_generation_prompt=True,
        )
        for t, n in zip(asks, counts, strict=True)
    ]
    expected = plain_answers(with_tokens, texts, images, 6)
    inputs = with_tokens.prompts(asks, counts)
    with vision_passes(with_tokens) as calls:
        features = with_tokens.encode(images) if images else None
        got = with_tokens.generate(inputs, features, max_new_tokens=6)
        again = with_tokens.generate(inputs, features, max_new_tokens=6)
    assert got == expected == again
    assert calls == ([len(images)] if images else [])


def test_a_batch_answers_as_each_alone(with_tokens: Backbone) -> None:
    asks = asked("What is this, and what is it for?", "Is it?")
    features = with_tokens.encode([picture(0), picture(1)])
    together = with_tokens.generate(with_tokens.prompts(asks, [1, 1]), features, 6)
    for i, ask in enumerate(asks):
        alone = with_tokens.generate(with_tokens.prompts([ask], [1]), features.take([i]), 6)
        assert alone == [together[i]]


def test_reused_features_give_the_logits_of_the_pixels(with_tokens: Backbone) -> None:
    model, inputs = with_tokens.model, with_tokens.prompts(asked("What is this?"), [1])
    seen = []
    for image in (picture(0), picture(1)):
        pixels = with_tokens.processor.image_processor([image], return_tensors="pt")
        reused = with_tokens.encode([image]).mm_encoder_outputs()
        with torch.no_grad():
            expected = model(**inputs, **pixels).logits
            seen.append(model(**inputs, mm_encoder_outputs=reused).logits[:, -1])
        torch.testing.assert_close(seen[-1], expected[:, -1])
    assert (seen[0] - seen[1]).abs().max() > 1e-2  # the image matters


def test_marks_are_never_generated(llava_dir: Path) -> None:
    backbone = Backbone.from_pretrained(llava_dir)
    ids = [*add_safety_tokens(backbone, 3), backbone.image_token_id]
    with torch.no_grad():  # a head that prefers them by far
        backbone.model.lm_head.weight.zero_()
        backbone.model.lm_head.weight[ids] = 50 * torch.randn(4, 32)
    inputs = backbone.prompts(asked("What?", "Why?"), [0, 0])
    generated = backbone.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert not set(generated[:, inputs["input_ids"].shape[1] :].flatten().tolist()) & set(ids)
    assert backbone.generate(inputs, max_new_tokens=5) == ["", ""]
