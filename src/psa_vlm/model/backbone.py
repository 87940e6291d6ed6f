"""The vision-language model being aligned, seen through one small spec.

Shape letters: B batch, N image positions, Dv vision width, T text positions, D language-model
width, L prompt length, H x W grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from psa_vlm.errors import CheckpointError, InputError
from psa_vlm.model.probe import probe
from psa_vlm.model.prompts import PromptBuilder
from psa_vlm.model.tokens import guard_of, safety_token_ids

if TYPE_CHECKING:
    from PIL.Image import Image

    from psa_vlm.data.sample import Turn


@dataclass(frozen=True)
class BackboneSpec:
    """What has to be known of a family of models; data only."""

    model_types: tuple[str, ...]
    """``model_type`` in the config of its checkpoints."""
    projector: str
    """Path of the general projector: its input is h_o, its output h_i."""
    language_layers: str
    """Regular expression (full match) of the language model's linear layers, for LoRA."""


SPECS: dict[str, BackboneSpec] = {
    "llava": BackboneSpec(
        model_types=("llava",),
        projector="model.multi_modal_projector",
        language_layers=r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj",
    ),
}
"""The known families, by name."""


def spec_for(model_type: str) -> BackboneSpec:
    """The spec of a ``model_type``.

    Raises:
        CheckpointError: if no family has it; the message lists the known ones.
    """
    for spec in SPECS.values():
        if model_type in spec.model_types:
            return spec
    known = ", ".join(sorted(name for spec in SPECS.values() for name in spec.model_types))
    raise CheckpointError(
        f"model type {model_type!r} is not known (known: {known}): "
        "add a BackboneSpec for it to psa_vlm.model.backbone.SPECS"
    )


@dataclass(frozen=True)
class ImageFeatures:
    """B encoded images: all that the bottleneck and the language model need of them."""

    h_o: Tensor
    """Vision features before the projector ``[B, N, Dv]``, row by row."""
    projected: Any
    """What ``get_image_features`` returned; its ``pooler_output`` is h_i, B times ``[N, D]``."""
    grid: tuple[int, int]
    """Rows and columns of the N positions."""

    def __len__(self) -> int:
        return len(self.h_o)

    def take(self, indices: Sequence[int]) -> ImageFeatures:
        """The features of some of the images, in the order of ``indices``."""
        h_i = self.projected.pooler_output
        projected = type(self.projected)(pooler_output=[h_i[i] for i in indices])
        return ImageFeatures(self.h_o[list(indices)], projected, self.grid)

    def mm_encoder_outputs(self) -> dict[str, Any]:
        """The argument of that name for the model; a copy, because generation may change it."""
        return {"image": type(self.projected)(**self.projected)}


class Backbone:
    """A frozen Hugging Face image-text-to-text model with its processor.

    Attributes:
        model: in evaluation mode, no parameter of it requires a gradient.
        processor: holds tokenizer, image processor and chat template.
        tokenizer: the processor's.
        spec: the facts of its family.
        source: the folder or hub id that it was loaded from.
        probe: some of its weights before anything is added, to know it again.

    Raises:
        CheckpointError: if the family is unknown, or the processor has no chat template.
    """

    def __init__(self, model: Any, processor: Any, source: str = "") -> None:
        self.source = source
        self.spec = spec_for(model.config.model_type)
        self.model = model.eval().requires_grad_(False)
        self.probe = probe(model)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        if not isinstance(processor.chat_template, str):
            processor.chat_template = self.tokenizer.chat_template
        if not isinstance(processor.chat_template, str):
            raise CheckpointError("the checkpoint has no chat template: add chat_template.jinja")

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Backbone:
        """Load a checkpoint folder or hub id; safetensors only, no remote code.

        Args:
            path: folder or hub id.
            dtype: of the weights; None keeps the checkpoint's.
            device: None means the CPU.

        Raises:
            CheckpointError: if it can't be loaded or its family is unknown.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        try:
            spec_for(AutoConfig.from_pretrained(path).model_type)
            processor = AutoProcessor.from_pretrained(path)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                path, dtype="auto" if dtype is None else dtype, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"can't load a vision-language model from {path}: {reason}"
            ) from error
        return cls(model.to(device or "cpu"), processor, str(path))

    # --- facts -----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def image_token_id(self) -> int:
        """Id of the positions that hold an image in the prompt."""
        return int(self.processor.image_token_id)

    @property
    def safety_token_ids(self) -> tuple[int, ...]:
        """Ids of the safety tokens (2), in prompt order; empty before they are added."""
        return safety_token_ids(self.tokenizer)

    @property
    def text_width(self) -> int:
        """D, width of the language model."""
        return int(self.model.config.get_text_config().hidden_size)

    @cached_property
    def max_tokens(self) -> int:
        """Longest prompt that the language model can read."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    @cached_property
    def vision_width(self) -> int:
        """Dv, width of h_o; found by encoding a blank image once."""
        return self.encode([_blank()]).h_o.shape[-1]

    @cached_property
    def image_tokens(self) -> int:
        """Positions that one image takes in the prompt."""
        mark = self.processor.image_token
        ids: list[int] = self.processor(images=[_blank()], text=[mark])["input_ids"][0]
        return ids.count(self.image_token_id)

    @cached_property
    def _builder(self) -> PromptBuilder:
        return PromptBuilder(self.processor, self.image_tokens, self.max_tokens)

    # --- the way of a request --------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, images: Sequence[Image]) -> ImageFeatures:
        """Encode B RGB images in one vision pass: h_o (paper: f) and h_i.

        Raises:
            InputError: if there is no image.
        """
        if not images:
            raise InputError("encode needs at least one image")
        pixels = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device, self.dtype)  # [B, 3, height, width]
        with _inputs_of(self.model.get_submodule(self.spec.projector)) as seen:
            projected = self.model.get_image_features(pixel_values=pixels, return_dict=True)
        (h_o,) = seen  # [B, N, Dv], [B, 1+N, Dv] where the class token is kept
        patch = self.model.config.vision_config.patch_size
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        h_o = h_o[:, -grid[0] * grid[1] :]  # [B, N, Dv]
        h_i = type(projected)(pooler_output=list(projected.pooler_output))  # drop the layers
        return ImageFeatures(h_o, h_i, grid)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Input embeddings of the users' own words: no template, no special token (paper: h_t).

        Returns:
            Embeddings ``[B, T, D]``, zero in the padding on the right, and the mask ``[B, T]``
            (bool, true where the text is real).

        Raises:
            InputError: if a text has no words, or more than the model can read: all of a text is
                assessed, or none of it is answered.
        """
        rows = []
        for text in texts:
            ids = guard_of(self.processor).clean_ids(text)
            if not text.strip() or not ids:
                raise InputError("the text is empty: say what is asked about the image")
            if len(ids) > self.max_tokens:
                raise InputError(
                    f"the text is {len(ids):,} tokens long and the model reads "
                    f"{self.max_tokens:,}: shorten it"
                )
            rows.append(torch.tensor(ids))
        device = self.device
        ids_ = pad_sequence(rows, batch_first=True).to(device)  # [B, T]
        mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], True)
        mask = mask.to(device)  # [B, T]
        embeds: Tensor = self.model.get_input_embeddings()(ids_)  # [B, T, D]
        return embeds.masked_fill(~mask[..., None], 0.0), mask

    def prompts(
        self,
        conversations: Sequence[Sequence[Turn]],
        image_counts: Sequence[int],
        hints: Sequence[str | None] | None = None,
        system: str | None = None,
        answers: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Build B prompts through the chat template; every user's text stays plain text.

        Args:
            conversations: turns without image marks; each ends with the user's.
            image_counts: images of each conversation, placed in its first user turn.
            hints: put on a line of their own after the last user turn's words, in the same turn.
            system: system prompt of all of them.
            answers: for training. The ids up to an answer equal those of inference.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, L]``, padded on the left and ready to
            generate; with answers padded on the right, and with ``labels`` ``[B, L]`` that are
            -100 outside the answer and its end of turn.

        Raises:
            InputError: if a conversation does not end with the user, is too long for the model,
                or imitates control tokens in a way that can't be undone.
            CheckpointError: if the chat template does not write one mark for each image.
        """
        inputs = self._builder.inputs(conversations, image_counts, hints, system, answers)
        device = self.device
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    @torch.no_grad()
    def generate(
        self,
        inputs: dict[str, Tensor],
        features: ImageFeatures | None = None,
        max_new_tokens: int = 256,
    ) -> list[str]:
        """Answer B prompts greedily, reusing the encoded images: no second vision pass.

        Args:
            inputs: from :meth:`prompts`.
            features: the images of all prompts in order; None if there are none.
            max_new_tokens: most tokens of an answer.

        Raises:
            InputError: if the prompts do not speak of exactly these images.
        """
        marks = int((inputs["input_ids"] == self.image_token_id).sum())
        images = 0 if features is None else len(features)
        if marks != images * self.image_tokens:
            raise InputError(
                f"the prompts hold {marks / self.image_tokens:g} images but {images} are given"
            )
        encoded = {} if features is None else features.mm_encoder_outputs()
        suppressed = {
            *(self.model.generation_config.suppress_tokens or ()),
            *guard_of(self.processor).safety_ids,
            self.image_token_id,
        }
        ids = self.model.generate(
            **inputs,
            mm_encoder_outputs=encoded,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            suppress_tokens=sorted(suppressed),
        )
        new = ids[:, inputs["input_ids"].shape[1] :]  # [B, new tokens]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module is called with, and leave no hook behind."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _blank() -> Image:
    from PIL import Image

    return Image.new("RGB", (64, 64))
