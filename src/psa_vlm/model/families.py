"""What has to be known of each family of vision-language models: facts, one entry a family.

Shape letters: B images, C crops, N positions of a crop, P patches of all images, Dv vision width,
H x W grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from psa_vlm.errors import CheckpointError

Arrange = Callable[[Tensor, Mapping[str, Any], Sequence[int], Any], list[Tensor]]
"""(what the projector saw, image inputs, positions of each image in the prompt, model config) to
one ``[H, W, Dv]`` for each image, rows from top to bottom and columns from left to right."""
Project = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(model, what the vision encoder gave ``[C, (1+)N, Dv]``, ids and mask of the question beside each
``[C, T]``) to h_i ``[C, Q, D]``."""
TokenTypes = Callable[[Tensor, Tensor | None, int], Tensor]
"""(input ids ``[B, L]``, labels ``[B, L]`` or None, image token id) to token types ``[B, L]``."""


# --- how the features of an image lie ------------------------------------------------------------


def by_pixels(
    seen: Tensor, inputs: Mapping[str, Any], positions: Sequence[int], config: Any
) -> list[Tensor]:
    """One picture an image ``[B, (1+)N, Dv]``, on the grid of its pixels."""
    patch = config.vision_config.patch_size
    height, width = inputs["pixel_values"].shape[-2:]
    grid = (height // patch, width // patch)
    return list(seen[:, -grid[0] * grid[1] :].unflatten(1, grid))


def first_of_equal_crops(
    seen: Tensor, inputs: Mapping[str, Any], positions: Sequence[int], config: Any
) -> list[Tensor]:
    """Square crops ``[C, N, Dv]``, each as long in the prompt; an image's first is all of it."""
    return _squares(seen, _starts(_equal_crops(seen, positions)))


def last_of_equal_crops(
    seen: Tensor, inputs: Mapping[str, Any], positions: Sequence[int], config: Any
) -> list[Tensor]:
    """Square crops ``[C, N, Dv]``, each as long in the prompt; an image's last is all of it."""
    return _squares(seen, [end - 1 for end in accumulate(_equal_crops(seen, positions))])


def first_of_any_resolution(
    seen: Tensor, inputs: Mapping[str, Any], positions: Sequence[int], config: Any
) -> list[Tensor]:
    """Square crops ``[C, (1+)N, Dv]`` as the image's resolution asks; the first is all of it.

    Images that share a prompt may have the first crop alone.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    side, choices = config.vision_config.image_size, config.image_grid_pinpoints
    sizes = inputs["image_sizes"].tolist()
    groups = inputs.get("batch_num_images", [1] * len(sizes))
    alone = [int(n) == 1 for n in groups for _ in range(int(n))]
    counts = [
        image_size_to_num_patches(size, choices, side) if crops else 1
        for size, crops in zip(sizes, alone, strict=True)
    ]
    return _squares(seen, _starts(counts))


def by_image_sizes(
    seen: Tensor, inputs: Mapping[str, Any], positions: Sequence[int], config: Any
) -> list[Tensor]:
    """Patches of all images ``[P, Dv]``, row by row, on grids as large as the images."""
    sizes = torch.as_tensor(inputs["image_sizes"]) // config.vision_config.patch_size
    parts = seen.split(sizes.prod(-1).tolist())
    return [part.unflatten(0, size) for part, size in zip(parts, sizes.tolist(), strict=True)]


def by_blocks(
    seen: Tensor, inputs: Mapping[str, Any], positions: Sequence[int], config: Any
) -> list[Tensor]:
    """Patches of all images ``[P, Dv]``, the patches that are merged later beside each other."""
    side = config.vision_config.spatial_merge_size
    maps = []
    grids = inputs["image_grid_thw"]  # [B, 3], the first is the number of frames: 1
    for part, (_, rows, columns) in zip(
        seen.split(grids.prod(-1).tolist()), grids.tolist(), strict=True
    ):
        blocks = part.reshape(rows // side, columns // side, side, side, -1)
        maps.append(blocks.transpose(1, 2).reshape(rows, columns, -1))  # [H, W, Dv]
    return maps


def by_windows(
    seen: Tensor, inputs: Mapping[str, Any], positions: Sequence[int], config: Any
) -> list[Tensor]:
    """As `by_blocks`, with the blocks in the order of the encoder's attention windows."""
    from transformers.vision_utils import get_vision_window_index

    vision = config.vision_config
    order, _ = get_vision_window_index(
        inputs["image_grid_thw"],
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    blocks = seen.unflatten(0, (len(order), -1))  # [blocks, patches of a block, Dv]
    blocks = blocks[torch.argsort(order).to(seen.device)]
    return by_blocks(blocks.flatten(0, 1), inputs, positions, config)


def _equal_crops(seen: Tensor, positions: Sequence[int]) -> list[int]:
    """How many crops each image has."""
    length = sum(positions) // len(seen)
    return [count // length for count in positions]


def _starts(counts: Sequence[int]) -> list[int]:
    """Where each image's crops begin."""
    return list(accumulate(counts, initial=0))[:-1]


def _squares(seen: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """Some of the crops as grids; what is more than a square stands before it (a class token)."""
    side = isqrt(seen.shape[1])
    return list(seen[list(indices), -side * side :].unflatten(1, (side, side)))


# --- how they are projected in the light of a question --------------------------------------------


def by_qformer(model: Any, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Queries that read the question and look at the image (Q-Former), then a linear layer."""
    queries = model.query_tokens.expand(len(seen), -1, -1)  # [C, Q, Dq]
    read = model.qformer(
        input_ids=ids,
        attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], 1),
        query_embeds=queries,
        encoder_hidden_states=seen,
        encoder_attention_mask=mask.new_ones(seen.shape[:2]),
    ).last_hidden_state
    h_i: Tensor = model.language_projection(read[:, : queries.shape[1]])  # [C, Q, D]
    return h_i


# --- what the language model is told of its positions --------------------------------------------


def image_positions(ids: Tensor, labels: Tensor | None, image_id: int) -> Tensor:
    """1 where an image stands."""
    return (ids == image_id).long()


def answer_positions(ids: Tensor, labels: Tensor | None, image_id: int) -> Tensor:
    """1 where an answer is learned, which must not be attended to from before it."""
    return torch.zeros_like(ids) if labels is None else (labels != -100).long()


# --- the families --------------------------------------------------------------------------------

LAYERS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
PROJECTOR = "model.multi_modal_projector"
PALIGEMMA_TEMPLATE = """\
{%- for message in messages %}{% for part in message['content'] if part['type'] == 'image' -%}
<image>{% endfor %}{% endfor %}{{ bos_token }}{% for message in messages -%}
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor -%}
{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"""
# Its processor adds the begin mark behind the images, and the last line break.
PALIGEMMA_PLAIN_TEMPLATE = PALIGEMMA_TEMPLATE.replace("{{ bos_token }}", "").replace(
    "'\n'", "'' if loop.last else '\n'"
)
INSTRUCTION_TEMPLATE = """\
{%- for message in messages %}{% for part in message['content'] if part['type'] == 'image' -%}
<image>{% endfor %}{% endfor %}{{ bos_token }}{% for message in messages -%}
{% for part in message['content'] if part['type'] == 'text' -%}
{{ ' ' if message['role'] == 'assistant' }}{{ part['text'] }}{% endfor -%}
{{ {'assistant': eos_token, 'system': '\n'}[message['role']] if message['role'] != 'user' -}}
{% endfor %}"""


@dataclass(frozen=True)
class InstructedSpec:
    """Of families whose projector reads the question too: h_i is made when the prompt is known."""

    question_tokenizer: str
    """Attribute of the processor: what the question is read with."""
    question_config: str
    """Section of the config that says how long a question it reads."""
    project: Project
    """How h_i is made."""
    positions: str
    """Key of the config: how many positions of a prompt an image fills."""
    language_model: str
    """Path of the language model, which is called by itself: the model insists on pixels."""


@dataclass(frozen=True)
class BackboneSpec:
    """What has to be known of a family of models; data and small functions only."""

    model_types: tuple[str, ...]
    """``model_type`` in the config of its checkpoints."""
    projector: str | None
    """Path of the module whose input is h_o; None where it reads the question too."""
    language_layers: str
    """Regular expression (full match) of the language model's linear layers, for LoRA."""
    arrange: Arrange
    """How that input lies in the images."""
    instructed: InstructedSpec | None = None
    """In place of a path of the projector."""
    image_inputs: tuple[str, ...] = ("pixel_values",)
    """What of the processor's output ``get_image_features`` wants."""
    prompt_inputs: tuple[str, ...] = ()
    """What of it the language model wants beside the encoded images; one row for each image."""
    token_types: Mapping[str, TokenTypes] = field(default_factory=dict)
    """What it wants to know of every position of a prompt."""
    layered: tuple[str, ...] = ()
    """Fields of ``get_image_features``' output beside the last: layers of one tensor an image."""
    grouped: bool = False
    """Whether images that share a prompt are cut into crops otherwise than one alone."""
    chat_template: str | None = None
    """For families whose checkpoints have none."""
    plain_template: str | None = None
    """What a checkpoint holds in its place, where the processor itself adds to a prompt."""


QWEN2 = BackboneSpec(
    model_types=("qwen2_vl",),
    projector="model.visual.merger",
    language_layers=LAYERS,
    arrange=by_blocks,
    image_inputs=("pixel_values", "image_grid_thw"),
    prompt_inputs=("image_grid_thw",),
    token_types={"mm_token_type_ids": image_positions},
)

SPECS: dict[str, BackboneSpec] = {
    "llava": BackboneSpec(
        model_types=("llava",),
        projector=PROJECTOR,
        language_layers=LAYERS,
        arrange=by_pixels,
    ),
    "llava-next": BackboneSpec(
        model_types=("llava_next",),
        projector=PROJECTOR,
        language_layers=LAYERS,
        arrange=first_of_any_resolution,
        image_inputs=("pixel_values", "image_sizes"),
    ),
    "llava-onevision": BackboneSpec(
        model_types=("llava_onevision",),
        projector=PROJECTOR,
        language_layers=LAYERS,
        arrange=first_of_any_resolution,
        image_inputs=("pixel_values", "image_sizes", "batch_num_images"),
        grouped=True,
    ),
    "qwen2-vl": QWEN2,
    "qwen2.5-vl": replace(QWEN2, model_types=("qwen2_5_vl",), arrange=by_windows),
    "qwen3-vl": replace(QWEN2, model_types=("qwen3_vl",), layered=("deepstack_features",)),
    "internvl": BackboneSpec(
        model_types=("internvl",),
        projector=PROJECTOR,
        language_layers=LAYERS,
        arrange=last_of_equal_crops,
    ),
    "idefics3": BackboneSpec(
        model_types=("idefics3", "smolvlm"),
        projector="model.connector",
        language_layers=r".*text_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        arrange=last_of_equal_crops,
        image_inputs=("pixel_values", "pixel_attention_mask"),
    ),
    "gemma3": BackboneSpec(
        model_types=("gemma3",),
        projector=PROJECTOR + ".mm_soft_emb_norm",  # behind the pooling of its many patches
        language_layers=LAYERS,
        arrange=first_of_equal_crops,
        token_types={"token_type_ids": image_positions},
    ),
    "paligemma": BackboneSpec(
        model_types=("paligemma",),
        projector=PROJECTOR,
        language_layers=LAYERS,
        arrange=first_of_equal_crops,
        token_types={"token_type_ids": answer_positions},
        chat_template=PALIGEMMA_TEMPLATE,
        plain_template=PALIGEMMA_PLAIN_TEMPLATE,
    ),
    "mistral3": BackboneSpec(
        model_types=("mistral3",),
        projector=PROJECTOR,
        language_layers=LAYERS,
        arrange=by_image_sizes,
        image_inputs=("pixel_values", "image_sizes"),
    ),
    "instructblip": BackboneSpec(
        model_types=("instructblip",),
        projector=None,
        language_layers=r"language_model\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
        arrange=by_pixels,
        instructed=InstructedSpec(
            question_tokenizer="qformer_tokenizer",
            question_config="qformer_config",
            project=by_qformer,
            positions="num_query_tokens",
            language_model="language_model",
        ),
        chat_template=INSTRUCTION_TEMPLATE,
    ),
}
"""The known families, by name."""


@dataclass(frozen=True)
class EncoderSpec:
    """What has to be known of a family of dual encoders."""

    model_types: tuple[str, ...]
    """``model_type`` in the config of its checkpoints."""
    layer: int | None = None
    """Layer of the image encoder whose output is h_o; None is the last, with its norm."""
    padded: bool = False
    """Whether its text encoder learned on texts padded to one length, without a mask; the last
    position then sums up the text."""
    arrange: Arrange = by_pixels
    """How h_o lies in the images."""


ENCODERS: dict[str, EncoderSpec] = {
    "clip": EncoderSpec(
        model_types=("clip",),
        layer=-2,  # the patches of the last are read by nothing, and so were never taught
    ),
    "siglip": EncoderSpec(model_types=("siglip",), padded=True),
}
"""The known dual encoders, by name."""


def encoder_for(model_type: str) -> EncoderSpec | None:
    """The spec of a dual encoder's ``model_type``; None if it is not of one."""
    return next((one for one in ENCODERS.values() if model_type in one.model_types), None)


def spec_for(model_type: str) -> BackboneSpec:
    """The spec of a vision-language model's ``model_type``.

    Raises:
        CheckpointError: if no family has it; the message lists the known ones.
    """
    for spec in SPECS.values():
        if model_type in spec.model_types:
            return spec
    known = [name for spec in SPECS.values() for name in spec.model_types]
    known += [name for facts in ENCODERS.values() for name in facts.model_types]
    raise CheckpointError(
        f"model type {model_type!r} is not known (known: {', '.join(sorted(known))}): "
        "add a BackboneSpec for it to psa_vlm.model.families.SPECS, see docs/add-a-backbone.md"
    )
