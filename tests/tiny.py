"""Tiny checkpoints of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def byte_tokenizer() -> Any:
    """One token a byte; begin of text added by the tokenizer itself, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def llava_processor(tokenizer: Any, chat_template: str = CHAT_TEMPLATE) -> Any:
    """32 pixels in patches of 8: 16 positions to an image."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def llava_model(tokenizer: Any, tied: bool = False) -> Any:
    """A LLaVA of random weights: vision 24 wide, language model 32 wide, two layers each."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    shape = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24, intermediate_size=32, image_size=32, patch_size=8, **shape
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=tied,
            **shape,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():  # large enough for images and words to matter
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_llava(folder: Path, tied: bool = False) -> None:
    """A LLaVA that loads with plain transformers."""
    tokenizer = byte_tokenizer()
    llava_model(tokenizer, tied).save_pretrained(folder)
    llava_processor(tokenizer).save_pretrained(folder)


def dual_encoder(kind: str) -> tuple[Any, Any]:
    """A CLIP or SigLIP of random weights: images 24 wide, texts 32 wide and 16 tokens long."""
    import torch
    import transformers

    tokenizer = byte_tokenizer()
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    words = {"vocab_size": len(tokenizer), "hidden_size": 32, "max_position_embeddings": 16}
    words |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**words, **shape},
        vision_config={"hidden_size": 24, "image_size": 32, "patch_size": 8, **shape},
    )
    sizes = {"size": {"height": 32, "width": 32}}
    if kind == "CLIP":
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pixels = getattr(transformers, f"{kind}ImageProcessorPil")(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}Model")(config)
        for name, parameter in model.named_parameters():  # a picture keeps its place
            torch.nn.init.normal_(parameter, std=0.05 if "vision" in name else 0.3)
    return model, getattr(transformers, f"{kind}Processor")(pixels, tokenizer)


def random_bottleneck(backbone: Any) -> Any:
    """A small bottleneck for a backbone, always with the same weights."""
    import torch

    from psa_vlm.model.bottleneck import BottleneckConfig, SafetyBottleneck

    widths = backbone.vision_width, backbone.text_width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SafetyBottleneck(BottleneckConfig(*widths, hidden=16, tokens=4, heads=4, depth=1))
