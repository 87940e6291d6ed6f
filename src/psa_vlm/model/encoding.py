"""Images through the vision encoder, once.

Shape letters: B images, N image positions, Dv vision width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from psa_vlm.errors import CheckpointError
from psa_vlm.model.image_features import ImageFeatures
from psa_vlm.model.tokens import image_mark

if TYPE_CHECKING:
    from PIL.Image import Image

    from psa_vlm.model.backbone import Backbone


def encode(backbone: Backbone, inputs: Mapping[str, Tensor], marks: Sequence[str]) -> ImageFeatures:
    """See :meth:`psa_vlm.model.backbone.Backbone.encode_inputs`.

    Raises:
        CheckpointError: if the processor writes more or fewer positions than the model makes.
    """
    device = backbone.device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    wanted = {name: inputs[name] for name in backbone.spec.image_inputs if name in inputs}
    positions = [backbone.positions(mark) for mark in marks]
    if backbone.spec.projector is None:  # h_i is made when the prompt is known
        projected = backbone.model.get_encoder(modality="image")(**wanted)
        seen = projected.last_hidden_state  # [B, (1+)N, Dv]
        maps = backbone.spec.arrange(seen, inputs, positions, backbone.model.config)
        kept = BaseModelOutputWithPooling(pooler_output=list(seen))  # type: ignore[arg-type]
        return ImageFeatures(tuple(maps), kept, tuple(marks), tuple(positions))
    with _inputs_of(backbone.model.get_submodule(backbone.spec.projector)) as collected:
        projected = backbone.model.get_image_features(**wanted, return_dict=True)
    h_i = projected.pooler_output
    joined = isinstance(h_i, Tensor)  # [crops, N, D]
    made = sum(part.shape[:-1].numel() for part in h_i)
    if made != sum(positions):
        raise CheckpointError(
            f"{backbone.source}: its processor writes {sum(positions)} positions for {len(marks)}"
            f" images but its model makes {made}: processor_config.json (patch_size,"
            " vision_feature_select_strategy, ...) does not fit config.json"
        )
    if joined:
        h_i = h_i.split([count // h_i.shape[1] for count in positions])
    layers = {name: projected[name] for name in backbone.spec.layered}
    return ImageFeatures(
        tuple(backbone.spec.arrange(collected[0], inputs, positions, backbone.model.config)),
        type(projected)(pooler_output=list(h_i), **layers),  # drop the hidden states
        tuple(marks),
        tuple(positions),
        {name: inputs[name] for name in backbone.spec.prompt_inputs},
        joined,
    )


def process(
    backbone: Backbone, images: Sequence[Image], image_counts: Sequence[int] | None
) -> tuple[dict[str, Tensor], list[str]]:
    """See :meth:`psa_vlm.model.backbone.Backbone.process`."""
    if image_counts is None or not backbone.spec.grouped:
        image_counts = [1] * len(images)
    mark = image_mark(backbone.processor)
    if (instructed := backbone.spec.instructed) is not None:
        inputs = backbone.processor.image_processor(list(images), return_tensors="pt")
        marks = [mark * getattr(backbone.model.config, instructed.positions)] * len(images)
    else:
        rest = iter(images)
        inputs = backbone.processor(
            images=[list(islice(rest, count)) for count in image_counts if count],
            text=[mark * count for count in image_counts if count],
            images_kwargs={"return_tensors": "pt"},
            text_kwargs={"return_tensors": None, "verbose": False},
            return_text_replacement_offsets=True,
        )
        offsets = inputs["text_replacement_offsets"]
        marks = [one["replacement"] for row in offsets for one in row]
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    tensors["pixel_values"] = tensors["pixel_values"].to(backbone.dtype)
    return tensors, marks


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module is called with, and leave no hook behind."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def blank() -> Image:
    """An image of nothing."""
    from PIL import Image

    return Image.new("RGB", (64, 64))
