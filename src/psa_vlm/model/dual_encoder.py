"""A dual encoder (CLIP, SigLIP) as a backbone: it reads for the bottleneck, and writes nothing.

Shape letters: B batch, T text positions, D text width, Dv vision width, W windows of L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from psa_vlm.errors import InputError, NoLanguageModel
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.families import encoder_for
from psa_vlm.model.image_features import ImageFeatures
from psa_vlm.model.prompts import chat, check_conversation

if TYPE_CHECKING:
    from PIL.Image import Image

    from psa_vlm.data.sample import Turn

WINDOWS = 64
"""Most windows of one text: some 4,000 tokens, as many as common language models read."""


class DualEncoder(Backbone):
    """A frozen image encoder and text encoder without a language model.

    With it, the bottleneck guards models that run elsewhere: everything about verdicts works, and
    whatever needs a language model raises :class:`psa_vlm.errors.NoLanguageModel`.

    h_t are the last states of the text encoder. A language model's input embeddings serve the
    bottleneck because a deep model wrote its knowledge into them and they are free; those of a dual
    encoder know neither order nor context, and nothing after the bottleneck makes up for that. Its
    last states do, and the pair was trained so that they speak of what images show. The price is
    their short context (77 or 64 tokens): longer texts are read in windows, all of them.

    Attributes:
        facts: of its family.
    """

    writes = False

    def _prepare(self) -> None:
        facts = encoder_for(self.model.config.model_type)
        assert facts is not None  # else it would be another backbone
        self.facts = facts

    @cached_property
    def max_tokens(self) -> int:
        """Longest text that is assessed, in tokens."""
        before, after = self._frame
        return WINDOWS * (self._length - len(before) - len(after))

    @property
    def _length(self) -> int:
        """L, tokens of a window."""
        return int(self.model.config.text_config.max_position_embeddings)

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The tokens that stand before and after a text."""
        bare, whole = self._ids("a"), list(self.tokenizer("a")["input_ids"])
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    def _ids(self, text: str) -> list[int]:
        """A text alone, in which a mark of the tokenizer's own is letters like others."""
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return ids

    @torch.no_grad()
    def encode(
        self, images: Sequence[Image], image_counts: Sequence[int] | None = None
    ) -> ImageFeatures:
        """Encode B RGB images in one vision pass: h_o, and nothing for a language model.

        Raises:
            InputError: if there is no image.
        """
        if not images:
            raise InputError("encode needs at least one image")
        pixels = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device, self.dtype)
        tower = self.model.get_encoder(modality="image")
        if self.facts.layer is None:
            seen = tower(pixel_values=pixels).last_hidden_state
        else:
            seen = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
            seen = seen[self.facts.layer]  # [B, (1+)N, Dv]
        maps = self.facts.arrange(seen, {"pixel_values": pixels}, [], self.model.config)
        return ImageFeatures(tuple(maps), None, (), ())

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str], begin: bool = False) -> tuple[Tensor, Tensor]:
        """The text encoder's last states of the users' own words, window by window (paper: h_t).

        Args:
            texts: B of them.
            begin: changes nothing; each window has all the marks that the encoder knows.

        Returns:
            States ``[B, T, D]``, zero in the padding on the right, and the mask ``[B, T]`` (bool,
            true where the text is real).

        Raises:
            InputError: if a text has no words, or more than :attr:`max_tokens`.
        """
        before, after = self._frame
        size = self._length - len(before) - len(after)
        windows: list[list[int]] = []
        counts = []
        for text in texts:
            ids = self._ids(text)
            if not text.strip() or not ids:
                raise InputError("the text is empty: say what is asked about the image")
            if len(ids) > self.max_tokens:
                raise InputError(
                    f"the text is {len(ids):,} tokens long and {self.max_tokens:,} are assessed:"
                    " shorten it"
                )
            parts = [ids[i : i + size] for i in range(0, len(ids), size)]
            windows += [[*before, *part, *after] for part in parts]
            counts.append(len(parts))
        states, real = self._states(windows)
        spans = zip(states.split(counts), real.split(counts), strict=True)
        rows = [part[mask] for part, mask in spans]  # [T, D] each
        masks = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
        return pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)

    def _states(self, windows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Last states ``[W, L, D]``, and which of them are of the text ``[W, L]`` (bool)."""
        pad = self.tokenizer.pad_token_id
        longest = self._length if self.facts.padded else max(map(len, windows))
        ids = torch.tensor([[*one, *[pad] * (longest - len(one))] for one in windows])
        real = torch.tensor([[i < len(one) for i in range(longest)] for one in windows])
        ids, real = ids.to(self.device), real.to(self.device)
        attended = {} if self.facts.padded else {"attention_mask": real.long()}
        states = self.model.text_model(input_ids=ids, **attended).last_hidden_state  # [W, L, D]
        if self.facts.padded:
            real[:, -1] = True  # where it sums up what it read
        return states, real

    # --- what a language model would do ----------------------------------------------------------

    def check_writes(self, what: str) -> None:
        raise NoLanguageModel(what, self.model.config.model_type)

    def prompts(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        """Raises NoLanguageModel."""
        raise NoLanguageModel("a prompt", self.model.config.model_type)

    def write(self, *_: Any, **__: Any) -> Any:
        """Raises NoLanguageModel."""
        raise NoLanguageModel("an answer", self.model.config.model_type)

    def messages(
        self, conversation: Sequence[Turn], images: int, hint: str | None
    ) -> list[dict[str, Any]]:
        """The chat for an engine elsewhere, the users' words as they are.

        Which marks that engine's model would read as structure is not known here.
        """
        check_conversation(conversation)
        roles, texts = [turn.role for turn in conversation], [turn.text for turn in conversation]
        return chat(roles, texts, images, hint)
