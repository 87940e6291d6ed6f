"""The vision-language model being aligned, seen through one small spec.

Shape letters: B batch, N image positions, Dv vision width, T text positions, D language-model
width, L prompt length, H x W grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from psa_vlm.errors import CheckpointError, InputError
from psa_vlm.model.families import spec_for
from psa_vlm.model.probe import probe
from psa_vlm.model.prompts import PromptBuilder
from psa_vlm.model.tokens import guard_of, safety_token_ids
from psa_vlm.model.writing import Listener, Written, heard, written

if TYPE_CHECKING:
    from PIL.Image import Image

    from psa_vlm.data.sample import Turn


@dataclass(frozen=True)
class ImageFeatures:
    """B encoded images: all that the bottleneck and the language model need of them."""

    maps: tuple[Tensor, ...]
    """h_o, vision features before the projector: ``[H, W, Dv]`` of each image."""
    projected: Any
    """What ``get_image_features`` returned, image by image; its ``pooler_output`` is h_i."""
    marks: tuple[str, ...]
    """What stands for each image in the text of a prompt."""
    positions: tuple[int, ...]
    """How many of a prompt's positions each image fills."""
    prompt_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the language model wants to know of the images, a row for each."""
    joined: bool = False
    """Whether the language model wants h_i as one tensor rather than one for each image."""

    def __len__(self) -> int:
        return len(self.maps)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the N positions of h_o, where all images have the same."""
        (grid,) = {(features.shape[0], features.shape[1]) for features in self.maps}
        return grid

    @property
    def h_o(self) -> Tensor:
        """h_o ``[B, N, Dv]``, row by row, where all images have the same grid."""
        return torch.stack(self.maps).flatten(1, 2)

    def take(self, indices: Sequence[int]) -> ImageFeatures:
        """The features of some of the images, in the order of ``indices``."""
        picked = dict(self.projected)
        h_i = picked.pop("pooler_output")
        picked = {
            name: [[one[i] for i in indices] for one in all_] for name, all_ in picked.items()
        }
        picked["pooler_output"] = [h_i[i] for i in indices]
        return ImageFeatures(
            tuple(self.maps[i] for i in indices),
            type(self.projected)(**picked),
            tuple(self.marks[i] for i in indices),
            tuple(self.positions[i] for i in indices),
            {name: rows[list(indices)] for name, rows in self.prompt_inputs.items()},
            self.joined,
        )

    def mm_encoder_outputs(self) -> dict[str, Any]:
        """The argument of that name for the model; a copy, because generation may change it."""
        copy = type(self.projected)(**self.projected)
        if self.joined:
            copy["pooler_output"] = torch.cat(copy.pooler_output)
        return {"image": copy}

    def model_inputs(self) -> dict[str, Any]:
        """All that the model is called with in place of the pixels."""
        return {"mm_encoder_outputs": self.mm_encoder_outputs(), **self.prompt_inputs}


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
        if self.spec.plain_template is not None:  # the checkpoint's is for its processor alone
            processor.chat_template = self.spec.chat_template
        for template in (self.tokenizer.chat_template, self.spec.chat_template):
            if not isinstance(processor.chat_template, str):
                processor.chat_template = template
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
            CheckpointError: if it can't be loaded, is no vision-language model, or its family is
                unknown.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        try:
            _check_family(path, AutoConfig.from_pretrained(path).model_type)
            processor = AutoProcessor.from_pretrained(path)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                path, dtype="auto" if dtype is None else dtype, use_safetensors=True
            )
        except (OSError, ValueError, ImportError) as error:  # some processors need torchvision
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
        return int(self.model.config.image_token_id)

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
        return self.encode([_blank()]).maps[0].shape[-1]

    @cached_property
    def image_tokens(self) -> int:
        """Positions that a small image takes in the prompt; in most families, every image."""
        return self._positions(self._builder.image)

    @cached_property
    def _builder(self) -> PromptBuilder:
        _, (mark,) = self.process([_blank()], [1])
        return PromptBuilder(self.processor, mark, self.max_tokens)

    def _positions(self, mark: str) -> int:
        """Positions that an image fills, of what stands for it in the text of a prompt."""
        return mark.count(self.tokenizer.convert_ids_to_tokens(self.image_token_id))

    # --- the way of a request --------------------------------------------------------------------

    def encode(
        self, images: Sequence[Image], image_counts: Sequence[int] | None = None
    ) -> ImageFeatures:
        """Encode B RGB images in one vision pass: h_o (paper: f) and h_i.

        Args:
            images: of all prompts in order.
            image_counts: how many each prompt has, as for :meth:`prompts`; None is one each. Some
                families cut images into fewer crops where several share a prompt.

        Raises:
            InputError: if there is no image.
        """
        if not images:
            raise InputError("encode needs at least one image")
        if image_counts is None or not self.spec.grouped:
            image_counts = [1] * len(images)
        with torch.no_grad():
            return self.encode_inputs(*self.process(images, [c for c in image_counts if c]))

    def encode_inputs(self, inputs: Mapping[str, Tensor], marks: Sequence[str]) -> ImageFeatures:
        """`encode` of what `process` made of images; gradients pass to the pixel values."""
        wanted = {name: inputs[name] for name in self.spec.image_inputs if name in inputs}
        with _inputs_of(self.model.get_submodule(self.spec.projector)) as seen:
            projected = self.model.get_image_features(**wanted, return_dict=True)
        positions = [self._positions(mark) for mark in marks]
        h_i = projected.pooler_output
        joined = isinstance(h_i, Tensor)  # [crops, N, D]
        if joined:
            h_i = h_i.split([count // h_i.shape[1] for count in positions])
        layers = {name: projected[name] for name in self.spec.layered}
        return ImageFeatures(
            tuple(self.spec.arrange(seen[0], inputs, positions, self.model.config)),
            type(projected)(pooler_output=list(h_i), **layers),  # drop the hidden states
            tuple(marks),
            tuple(positions),
            {name: inputs[name] for name in self.spec.prompt_inputs},
            joined,
        )

    def process(
        self, images: Sequence[Image], image_counts: Sequence[int]
    ) -> tuple[dict[str, Any], list[str]]:
        """What the processor makes of images, and what stands for each in the text of a prompt.

        Args:
            images: of all prompts in order.
            image_counts: how many each prompt has, 1 or more.
        """
        rest = iter(images)
        inputs = self.processor(
            images=[list(islice(rest, count)) for count in image_counts],
            text=[self.processor.image_token * count for count in image_counts],
            images_kwargs={"return_tensors": "pt"},
            text_kwargs={"return_tensors": None, "verbose": False},
            return_text_replacement_offsets=True,
        )
        marks = [one["replacement"] for row in inputs["text_replacement_offsets"] for one in row]
        tensors = {name: v.to(self.device) for name, v in inputs.items() if isinstance(v, Tensor)}
        tensors["pixel_values"] = tensors["pixel_values"].to(self.dtype)
        return tensors, marks

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str], begin: bool = False) -> tuple[Tensor, Tensor]:
        """Input embeddings of the users' own words: no template, no special token (paper: h_t).

        Args:
            texts: B of them.
            begin: put the begin-of-text mark before each, where the tokenizer has one.

        Returns:
            Embeddings ``[B, T, D]``, zero in the padding on the right, and the mask ``[B, T]``
            (bool, true where the text is real).

        Raises:
            InputError: if a text has no words, or more than the model can read: all of a text is
                assessed, or none of it is answered.
        """
        rows = []
        mark = self.tokenizer.bos_token_id if begin else None
        first = [] if mark is None else [mark]
        for text in texts:
            ids = guard_of(self.processor).clean_ids(text)
            if not text.strip() or not ids:
                raise InputError("the text is empty: say what is asked about the image")
            if len(ids) > self.max_tokens:
                raise InputError(
                    f"the text is {len(ids):,} tokens long and the model reads "
                    f"{self.max_tokens:,}: shorten it"
                )
            rows.append(torch.tensor(first + ids))
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
        answers: Sequence[str] | None = None,
        features: ImageFeatures | None = None,
    ) -> dict[str, Tensor]:
        """Build B prompts through the chat template; the text of every turn stays plain text.

        Args:
            conversations: turns without image marks; each ends with the user's, and may begin with
                one of the system.
            image_counts: images of each conversation, placed in its first user turn.
            hints: put on a line of their own after the last user turn's words, in the same turn.
            answers: for training. The ids up to an answer equal those of inference.
            features: the images of all prompts in order; None stands for images as a small one,
                which is right where every image takes as many positions.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, L]``, padded on the left and ready to
            generate; with answers padded on the right, and with ``labels`` ``[B, L]`` that are
            -100 outside the answer and its end of turn. Some
            families also want token types ``[B, L]``.

        Raises:
            InputError: if a conversation does not end with the user, has turns that the chat
                template does not take, is too long for the model, or imitates control tokens in a
                way that can't be undone; if the features are of another number of images.
            CheckpointError: if the chat template does not write one mark for each image.
        """
        marks = None if features is None else features.marks
        inputs = self._builder.inputs(conversations, image_counts, hints, answers, marks)
        for name, types in self.spec.token_types.items():
            inputs[name] = types(inputs["input_ids"], inputs.get("labels"), self.image_token_id)
        device = self.device
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def messages(
        self, conversation: Sequence[Turn], images: int, hint: str | None
    ) -> list[dict[str, Any]]:
        """The chat that `prompts` writes, for an engine elsewhere that renders it itself.

        Args:
            conversation: as one of those of `prompts`.
            images: how many stand in its first user turn, as `{"type": "image"}`.
            hint: after the last user turn's words.

        Raises:
            InputError, CheckpointError: as `prompts`.
        """
        return self._builder.messages(conversation, images, hint)

    def generate(
        self,
        inputs: dict[str, Tensor],
        features: ImageFeatures | None = None,
        max_new_tokens: int = 256,
    ) -> list[str]:
        """The texts of `write`."""
        return [answer.text for answer in self.write(inputs, features, max_new_tokens)]

    @torch.no_grad()
    def write(
        self,
        inputs: dict[str, Tensor],
        features: ImageFeatures | None = None,
        max_new_tokens: int = 256,
        listener: Listener | None = None,
    ) -> list[Written]:
        """Answer B prompts greedily, reusing the encoded images: no second vision pass.

        Args:
            inputs: from :meth:`prompts`.
            features: the images of all prompts in order; None if there are none.
            max_new_tokens: most tokens of an answer.
            listener: hears the answers while they are written.

        Raises:
            InputError: if the prompts do not speak of exactly these images.
        """
        held = int((inputs["input_ids"] == self.image_token_id).sum())
        if held != (0 if features is None else sum(features.positions)):
            images = 0 if features is None else len(features)
            raise InputError(
                f"the prompts hold {held / self.image_tokens:g} images but {images} are given"
            )
        encoded = {"mm_encoder_outputs": {}} if features is None else features.model_inputs()
        config = self.model.generation_config
        suppressed = {
            *(config.suppress_tokens or ()),
            *guard_of(self.processor).safety_ids,
            self.image_token_id,
        }
        ends = config.eos_token_id
        ends = frozenset(ends if isinstance(ends, list) else () if ends is None else (ends,))
        ids = self.model.generate(
            **inputs,
            **encoded,
            **({} if listener is None else heard(listener, self.tokenizer, ends)),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            suppress_tokens=sorted(suppressed),
        )
        new = ids[:, inputs["input_ids"].shape[1] :]  # [B, S]
        read = inputs["attention_mask"].sum(1).tolist()
        return written(new, read, self.tokenizer, ends)


def _check_family(path: str | PathLike[str], model_type: str) -> None:
    try:
        spec_for(model_type)
    except CheckpointError as error:
        from transformers.models.auto import modeling_auto as known

        if model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise CheckpointError(f"{path}: {error}") from None
        raise CheckpointError(
            f"{path}: a model of type {model_type} does not read images and text; give the folder"
            " or hub id of a vision-language model"
        ) from None


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
