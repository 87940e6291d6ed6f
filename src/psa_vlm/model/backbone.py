"""The vision-language model being aligned, seen through one small spec.

Shape letters: B batch, N image positions, Dv vision width, T text positions, D language-model
width, L prompt length, H x W grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from psa_vlm.errors import CheckpointError, InputError
from psa_vlm.model import encoding, instructed
from psa_vlm.model.families import encoder_for, spec_for
from psa_vlm.model.image_features import ImageFeatures
from psa_vlm.model.loading import Attention, Bits, load
from psa_vlm.model.probe import probe
from psa_vlm.model.prompts import PromptBuilder
from psa_vlm.model.tokens import guard_of, safety_token_ids
from psa_vlm.model.writing import Listener, Written, heard, written

if TYPE_CHECKING:
    from PIL.Image import Image

    from psa_vlm.data.sample import Turn


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

    writes = True
    """Whether there is a language model."""

    def __init__(self, model: Any, processor: Any, source: str = "") -> None:
        self.source = source
        self.model = model.eval().requires_grad_(False)
        self.probe = probe(model)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._prepare()

    def _prepare(self) -> None:
        """Find the facts of the family, and a chat template."""
        processor, config = self.processor, self.model.config
        self.spec = spec_for(config.model_type)
        if config.get_text_config().is_encoder_decoder:
            raise CheckpointError(
                f"{self.source}: its language model is an encoder with a decoder; take a checkpoint"
                " whose language model is a decoder alone"
            )
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
        attention: Attention | None = None,
        bits: Bits | None = None,
    ) -> Backbone:
        """Load a checkpoint folder or hub id; safetensors only, no remote code.

        Args:
            path: folder or hub id; one of a dual encoder gives a
                :class:`psa_vlm.model.dual_encoder.DualEncoder`.
            dtype: of the weights; None keeps the checkpoint's.
            device: None means the CPU, and the GPU with `bits`.
            attention: implementation of the attention; None leaves it to transformers.
            bits: quantise the language model's layers to 4 or 8 bits by bitsandbytes, and nothing
                else, so that h_o is the same.

        Raises:
            CheckpointError: if it can't be loaded, is no vision-language model, or its family is
                unknown.
            ConfigError: `bits` where there is no GPU, or no language model.
            MissingExtra: `bits` without bitsandbytes.
        """
        from psa_vlm.model.dual_encoder import DualEncoder

        model, processor = load(path, dtype, device, attention, bits)
        kind: type[Backbone] = cls if encoder_for(model.config.model_type) is None else DualEncoder
        return kind(model, processor, str(path))

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
        """Id of the positions that hold an image in the prompt.

        Raises:
            CheckpointError: if the checkpoint does not say.
        """
        if (id_ := self.model.config.image_token_id) is None:
            raise CheckpointError(f"{self.source}: config.json has no image_token_index")
        return int(id_)

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
        return self.encode([encoding.blank()]).maps[0].shape[-1]

    @cached_property
    def image_tokens(self) -> int:
        """Positions that a small image takes in the prompt; in most families, every image."""
        return self.positions(self._builder.image)

    @cached_property
    def _builder(self) -> PromptBuilder:
        _, (mark,) = self.process([encoding.blank()])
        return PromptBuilder(self.processor, mark, self.max_tokens)

    def positions(self, mark: str) -> int:
        """Positions that an image fills, of what stands for it in the text of a prompt."""
        return mark.count(self.tokenizer.convert_ids_to_tokens(self.image_token_id))

    def check_writes(self, what: str) -> None:
        """See that there is a language model.

        Args:
            what: needs one, as in "reply".

        Raises:
            NoLanguageModel: there is none.
        """

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
            CheckpointError: if the processor writes more or fewer positions than the model makes.
        """
        if not images:
            raise InputError("encode needs at least one image")
        with torch.no_grad():
            return self.encode_inputs(*self.process(images, image_counts))

    def process(
        self, images: Sequence[Image], image_counts: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], list[str]]:
        """What the processor makes of images, and what stands for each in the text of a prompt.

        Args:
            images: of all prompts in order, 1 or more.
            image_counts: as for `encode`.

        Returns:
            Tensors on the CPU: a process without the model's device can make them too.
        """
        return encoding.process(self, images, image_counts)

    def encode_inputs(self, inputs: Mapping[str, Tensor], marks: Sequence[str]) -> ImageFeatures:
        """`encode` of what `process` made of images; gradients pass to the pixel values.

        Raises:
            CheckpointError: if the processor writes more or fewer positions than the model makes.
        """
        return encoding.encode(self, inputs, marks)

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
            families also want token types ``[B, L]``, or the question by itself (`question_ids`,
            `question_mask` ``[B, T]``).

        Raises:
            InputError: if a conversation does not end with the user, has turns that the chat
                template does not take, is too long for the model, or imitates control tokens in a
                way that can't be undone; if the features are of another number of images.
            CheckpointError: if the chat template does not write one mark for each image.
        """
        marks = None if features is None else features.marks
        inputs = self.tokenize(conversations, image_counts, hints, answers, marks)
        device = self.device
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def tokenize(
        self,
        conversations: Sequence[Sequence[Turn]],
        image_counts: Sequence[int],
        hints: Sequence[str | None] | None = None,
        answers: Sequence[str] | None = None,
        marks: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """`prompts` on the CPU, of images that `process` gave these marks but none has encoded."""
        inputs = self._builder.inputs(conversations, image_counts, hints, answers, marks)
        for name, types in self.spec.token_types.items():
            inputs[name] = types(inputs["input_ids"], inputs.get("labels"), self.image_token_id)
        if (facts := self.spec.instructed) is not None:
            texts = self._builder.questions(conversations, hints)
            inputs |= instructed.questions(self, facts, texts)
        return inputs

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

    @property
    def language(self) -> Any:
        """What is called with :meth:`arguments`: the model, or its language model alone."""
        facts = self.spec.instructed
        return self.model if facts is None else self.model.get_submodule(facts.language_model)

    def arguments(
        self, inputs: Mapping[str, Tensor], features: ImageFeatures | None = None
    ) -> dict[str, Any]:
        """Prompts with their encoded images in place of the pixels, for :attr:`language`.

        Args:
            inputs: from :meth:`prompts`.
            features: the images of all prompts in order; None if there are none.

        Raises:
            InputError: if the prompts do not speak of exactly these images.
        """
        held = int((inputs["input_ids"] == self.image_token_id).sum())
        if held != (0 if features is None else sum(features.positions)):
            images = 0 if features is None else len(features)
            raise InputError(
                f"the prompts hold {held / self.image_tokens:g} images but {images} are given"
            )
        if (facts := self.spec.instructed) is None:
            encoded = {"mm_encoder_outputs": {}} if features is None else features.model_inputs()
            return {**inputs, **encoded}
        return instructed.joined(self, facts, inputs, features)

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
        arguments = self.arguments(inputs, features)
        config = self.language.generation_config
        suppressed = {
            *(config.suppress_tokens or ()),
            *guard_of(self.processor).safety_ids,
            self.image_token_id,
        }
        told = config.eos_token_id
        told = told if isinstance(told, list) else [] if told is None else [told]
        ends = frozenset([*told, self.tokenizer.eos_token_id])  # as answers end in training
        ids = self.language.generate(
            **arguments,
            **({} if listener is None else heard(listener, self.tokenizer, ends)),
            eos_token_id=sorted(ends),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            suppress_tokens=sorted(suppressed),
        )
        read_too = "input_ids" in arguments  # then the prompts stand before the answers
        new = ids[:, inputs["input_ids"].shape[1] :] if read_too else ids  # [B, S]
        read = inputs["attention_mask"].sum(1).tolist()
        return written(new, read, self.tokenizer, ends)
