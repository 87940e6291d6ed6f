"""A tiny random checkpoint of every family, in the layout that its published checkpoints have."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_base import ImageProcessingMixin

from psa_vlm.data.sample import Turn
from psa_vlm.model.families import SPECS

SIDE, PATCH = 32, 8
DEEP: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "image_size": SIDE,
    "patch_size": PATCH,
    **DEEP,
}
SIZES = ((64, 40), (40, 72), (50, 50))
"""Of pictures, width and height: wide, tall and square."""


def picture(seed: int) -> Image.Image:
    width, height = SIZES[seed % len(SIZES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def asked(*texts: str) -> list[list[Turn]]:
    return [[Turn("user", text)] for text in texts]


# --- tokenizer and template ----------------------------------------------------------------------


def tokenizer_of(*specials: str, eos: str = "</s>", begin: bool = True, **named: str) -> Any:
    """One token a byte; ``named`` are special tokens that become attributes of the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = dict.fromkeys(["<pad>", "<s>", "<unk>", eos, *specials, *named.values()])
    vocab = {
        piece: i for i, piece in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        extra_special_tokens=named,
    )
    fast.add_tokens(list(specials), special_tokens=True)
    return fast


def template_of(user: str, assistant: str, end: str, image: str) -> str:
    """A chat template that writes ``end`` behind every turn."""
    said = (
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{{{{ {image!r} }}}}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
    )
    return (
        "{% for message in messages %}"
        f"{{% if message['role'] == 'assistant' %}}{{{{ {assistant!r} }}}}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {user!r} }}}}{{% endif %}}"
        f"{said}{{{{ {end!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {assistant!r} }}}}{{% endif %}}"
    )


def chatml_of(image: str) -> str:
    return template_of("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n", image)


def text_config(kind: str, tokenizer: Any, **more: Any) -> Any:
    """A language model 32 wide, two layers deep."""
    import transformers

    return getattr(transformers, kind)(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=1024,
        num_key_value_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**DEEP, **more},
    )


def id_of(tokenizer: Any, token: str) -> int:
    found: int = tokenizer.convert_tokens_to_ids(token)
    return found


# --- where torchvision is missing, stand-ins for what needs it and no test uses ------------------

HAS_VIDEOS = find_spec("torchvision") is not None


class NoVideos(ImageProcessingMixin):
    """Stands for a video processor where torchvision, which they need, is missing."""

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Any:
        return cls()


def videos(kind: str) -> Any:
    import transformers

    return getattr(transformers, kind)() if HAS_VIDEOS else NoVideos()


# --- the families --------------------------------------------------------------------------------


def llava() -> tuple[Any, Any]:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaConfig, LlavaProcessor

    tokenizer = tokenizer_of("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text_config("LlamaConfig", tokenizer),
        image_token_index=id_of(tokenizer, "<image>"),
    )
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return config, LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template_of("USER: ", "ASSISTANT: ", "</s>", "<image>\n"),
    )


def llava_next() -> tuple[Any, Any]:
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )

    tokenizer = tokenizer_of("<image>")
    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text_config("MistralConfig", tokenizer),
        image_token_index=id_of(tokenizer, "<image>"),
        image_grid_pinpoints=grids,
    )
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=grids,
    )
    return config, LlavaNextProcessor(
        pixels,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template_of("[INST] ", " [/INST] ", "</s>", "<image>\n"),
    )


def llava_onevision() -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessorPil,
        LlavaOnevisionProcessor,
        SiglipVisionConfig,
    )

    tokenizer = tokenizer_of("<|im_start|>", "<image>", "<video>", eos="<|im_end|>", begin=False)
    grids = [[a * SIDE, b * SIDE] for a in (1, 2, 3) for b in (1, 2, 3)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(vision_use_head=False, **VISION),
        text_config=text_config("Qwen2Config", tokenizer),
        image_token_index=id_of(tokenizer, "<image>"),
        video_token_index=id_of(tokenizer, "<video>"),
        image_grid_pinpoints=grids,
    )
    pixels = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grids
    )
    return config, LlavaOnevisionProcessor(
        pixels,
        tokenizer,
        videos("LlavaOnevisionVideoProcessor"),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chatml_of("<image>\n"),
    )


QWEN_MARKS = (
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def qwen(
    config: str, text: str, processor: str, video: str, vision: dict[str, Any], **more: Any
) -> tuple[Any, Any]:
    import transformers

    tokenizer = tokenizer_of(*QWEN_MARKS, eos="<|im_end|>", begin=False)
    pixels = transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        size={"shortest_edge": 4 * PATCH**2, "longest_edge": (12 * PATCH) ** 2},
    )
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    made = getattr(transformers, config)(
        vision_config={**QWEN_VISION, **vision},
        text_config=text_config(text, tokenizer, rope_parameters=rope, **more).to_dict(),
        **{
            f"{name}_token_id": id_of(tokenizer, f"<|{mark}|>")
            for name, mark in (
                ("image", "image_pad"),
                ("video", "video_pad"),
                ("vision_start", "vision_start"),
                ("vision_end", "vision_end"),
            )
        },
    )
    return made, getattr(transformers, processor)(
        pixels,
        tokenizer,
        videos(video),
        chat_template=chatml_of("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def qwen2_vl() -> tuple[Any, Any]:
    vision = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    names = ("Qwen2VLConfig", "Qwen2VLTextConfig", "Qwen2VLProcessor", "Qwen2VLVideoProcessor")
    return qwen(*names, vision)


def qwen2_5_vl() -> tuple[Any, Any]:
    """Windows of two blocks by two: smaller than the images."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
    }
    names = ("Qwen2_5_VLConfig", "Qwen2_5_VLTextConfig", "Qwen2_5_VLProcessor")
    return qwen(*names, "Qwen2VLVideoProcessor", vision)


def qwen3_vl() -> tuple[Any, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    names = ("Qwen3VLConfig", "Qwen3VLTextConfig", "Qwen3VLProcessor", "Qwen3VLVideoProcessor")
    return qwen(*names, vision, head_dim=8)


def internvl() -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessorPil,
        InternVLConfig,
        InternVLProcessor,
        InternVLVisionConfig,
    )

    tokenizer = tokenizer_of(
        "<|im_start|>",
        eos="<|im_end|>",
        begin=False,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    sizes = {"image_size": (SIDE, SIDE), "patch_size": (PATCH // 2, PATCH // 2)}
    positions = (SIDE // PATCH) ** 2  # after two by two patches are joined
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**{**VISION, **sizes}),
        text_config=text_config("Qwen2Config", tokenizer),
        image_token_id=id_of(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=positions,
        tie_word_embeddings=False,
    )
    pixels = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4
    )
    return config, InternVLProcessor(
        pixels,
        tokenizer,
        videos("InternVLVideoProcessor"),
        image_seq_length=positions,
        chat_template=chatml_of("<IMG_CONTEXT>\n"),
    )


def idefics3() -> tuple[Any, Any]:
    from transformers import (
        Idefics3Config,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        Idefics3VisionConfig,
    )

    end = "<end_of_utterance>"
    places = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    marks = ("<fake_token_around_image>", "<image>", "<global-img>", *places)
    tokenizer = tokenizer_of(*marks, eos=end)
    config = Idefics3Config(
        vision_config=Idefics3VisionConfig(**VISION),
        text_config=text_config("LlamaConfig", tokenizer),
        image_token_id=id_of(tokenizer, "<image>"),
        scale_factor=2,
    )
    pixels = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    return config, Idefics3Processor(
        pixels,
        tokenizer,
        image_seq_len=(SIDE // PATCH // 2) ** 2,
        chat_template=template_of("User:", "Assistant:", f"{end}\n", "<image>"),
    )


def gemma3() -> tuple[Any, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ImageProcessorPil,
        Gemma3Processor,
        SiglipVisionConfig,
    )

    tokenizer = tokenizer_of(
        "<start_of_turn>",
        "<end_of_turn>",
        eos="<eos>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    side, positions = 2 * SIDE, (SIDE // PATCH) ** 2  # four patches are one position
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(vision_use_head=False, **{**VISION, "image_size": side}),
        text_config=text_config(
            "Gemma3TextConfig",
            tokenizer,
            head_dim=8,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
        ),
        mm_tokens_per_image=positions,
        boi_token_index=id_of(tokenizer, "<start_of_image>"),
        eoi_token_index=id_of(tokenizer, "<end_of_image>"),
        image_token_index=id_of(tokenizer, "<image_soft_token>"),
    )
    pixels = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    start = "<start_of_turn>"
    return config, Gemma3Processor(
        pixels,
        tokenizer,
        image_seq_length=positions,
        chat_template=template_of(
            f"{start}user\n", f"{start}model\n", "<end_of_turn>\n", "<start_of_image>"
        ),
    )


def paligemma() -> tuple[Any, Any]:
    """Without a chat template, as published."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaProcessor,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
    )

    tokenizer = tokenizer_of(eos="<eos>", begin=False, image_token="<image>")
    pixels = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    pixels.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(pixels, tokenizer)
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(vision_use_head=False, **VISION),
        text_config=text_config("GemmaConfig", tokenizer, head_dim=8),
        image_token_index=id_of(tokenizer, "<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    return config, processor


def mistral3() -> tuple[Any, Any]:
    from transformers import (
        Mistral3Config,
        PixtralImageProcessorPil,
        PixtralProcessor,
        PixtralVisionConfig,
    )

    tokenizer = tokenizer_of("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    side = 2 * SIDE
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**{**VISION, "hidden_size": 32, "image_size": side}),
        text_config=text_config("MistralConfig", tokenizer, head_dim=8),
        image_token_index=id_of(tokenizer, "[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    pixels = PixtralImageProcessorPil(
        size={"longest_edge": side}, patch_size={"height": PATCH, "width": PATCH}
    )
    return config, PixtralProcessor(
        pixels,
        tokenizer,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=template_of("[INST]", "[/INST]", "</s>", "[IMG]"),
    )


def instructblip() -> tuple[Any, Any]:
    """Without a chat template, and with a second tokenizer for the Q-Former, as published."""
    from transformers import (
        BertTokenizer,
        BlipImageProcessorPil,
        InstructBlipConfig,
        InstructBlipProcessor,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
    )

    tokenizer = tokenizer_of()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?.,:'-"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    pixels = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    questions = BertTokenizer({piece: i for i, piece in enumerate(pieces)})
    processor = InstructBlipProcessor(pixels, tokenizer, questions, num_query_tokens=6)
    reader = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**VISION).to_dict(),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(pieces), **reader, **DEEP
        ).to_dict(),
        text_config=text_config("LlamaConfig", tokenizer).to_dict(),
        num_query_tokens=6,
        image_token_index=id_of(tokenizer, "<image>"),
    )
    return config, processor


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "mistral3": mistral3,
    "instructblip": instructblip,
}
"""Config and processor of each family."""


def randomised(model: Any) -> Any:
    """Random weights, large enough in the language model for images and words to matter."""
    vision = model.get_encoder(modality="image")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for module in vision.modules():  # a picture keeps its place
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.05)
    return model


@pytest.fixture(scope="session", autouse=True)
def without_torchvision() -> Iterator[None]:
    """Processors load without their video processor, and Pixtral's without its fast twin."""
    if HAS_VIDEOS:
        yield
        return
    from transformers import processing_utils

    with pytest.MonkeyPatch.context() as patch:
        loader = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING
        patch.setitem(loader._MAPPING_NAMES, "video_processor", ("no_videos", "NoVideos"))
        patch.setitem(sys.modules, "no_videos", SimpleNamespace(NoVideos=NoVideos))  # type: ignore
        module = processing_utils.transformers_module
        patch.setattr(module, "VideoProcessorMixin", NoVideos, raising=False)
        pixtral = import_module("transformers.models.pixtral")
        slow = import_module("transformers.models.pixtral.image_processing_pil_pixtral")
        patch.setitem(sys.modules, "transformers.models.pixtral.image_processing_pixtral", slow)
        processing = import_module("transformers.models.pixtral.processing_pixtral")
        for owner in (pixtral, module, import_module("transformers")):
            patch.setattr(owner, "PixtralProcessor", processing.PixtralProcessor, raising=False)
        yield


@pytest.fixture(scope="module", params=list(SPECS))
def family_dir(
    request: pytest.FixtureRequest,
    without_torchvision: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The checkpoint folder of one family after the other."""
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp(request.param)
    config, processor = BUILDERS[request.param]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomised(AutoModelForImageTextToText.from_config(config))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture()
def family(request: pytest.FixtureRequest) -> str:
    """The name of the family that `family_dir` is of."""
    name: str = request.node.callspec.params["family_dir"]
    return name
