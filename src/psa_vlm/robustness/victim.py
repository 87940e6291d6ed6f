"""Requests to a run as differentiable functions of their pixels: what gradient attacks see.

Shape letters: B requests of one image each, H x W the images' size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from psa_vlm.data.images import open_images
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import InputError
from psa_vlm.inference import PsaVlm
from psa_vlm.model.bottleneck import BottleneckOutput, SafetyBottleneck
from psa_vlm.model.image_features import ImageFeatures
from psa_vlm.model.pixels import Pixels, tensor_of
from psa_vlm.model.probe import same_weights
from psa_vlm.policy.policy import Decision

HARMFUL = "harmful"
"""Tag of a sample: the answer that must not be given, word for word."""


class Victim:
    """B requests with images of one size, put to a run as an attacker with its weights would.

    Attributes:
        model: the run.
        samples: one image each; what the user says is not changed.
        clean: their images ``[B, 3, H, W]`` in 0 to 255.

    Raises:
        InputError: a sample has not exactly one image, sizes differ, or gradients can't pass
            through the processor.
    """

    def __init__(
        self, model: PsaVlm, samples: Sequence[Sample], pixels: Pixels | None = None
    ) -> None:
        self.model = model
        self.samples = list(samples)
        self.pixels = pixels or Pixels(model.backbone.processor)
        pictures = [picture_of(sample) for sample in samples]
        if len({picture.size for picture in pictures}) > 1:
            raise InputError("images of one attack must be of one size: group them")
        self.clean = tensor_of(pictures).to(model.backbone.device)  # [B, 3, H, W]
        self._inputs, self._marks = model.backbone.process(pictures)
        self._prompts: dict[tuple[str | None, ...], dict[str, Tensor]] = {}
        self._parts: dict[tuple[int, ...], Victim] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, rows: Sequence[int]) -> Victim:
        """Some of the requests, remembered: attacks leave out those that have fallen."""
        key = tuple(rows)
        if key == tuple(range(len(self))):
            return self
        if key not in self._parts:
            self._parts = {
                key: Victim(self.model, [self.samples[row] for row in rows], self.pixels)
            }
        return self._parts[key]

    def encode(self, x: Tensor) -> ImageFeatures:
        """Features of images ``[B, 3, H, W]`` in place of the clean ones, with gradients."""
        values = self.pixels(x).to(self.model.backbone.dtype)
        return self.model.backbone.encode_inputs(
            {**self._inputs, "pixel_values": values}, self._marks
        )

    def read(
        self, features: ImageFeatures, bottleneck: SafetyBottleneck | None = None
    ) -> BottleneckOutput:
        """What the run's bottleneck, or another one, says of encoded images."""
        return (bottleneck or self.model.bottleneck).read(features.maps, *self._text)

    def decide(self, features: ImageFeatures, output: BottleneckOutput) -> list[Decision]:
        """What the policy does with each, exactly as for a request."""
        verdicts = self.model.verdicts(detached(output), features.maps)
        return [self.model.policy.decide(one, self.model.taxonomy) for one in verdicts]

    def margin(self, output: BottleneckOutput) -> Tensor:
        """How far each is from being called safe ``[B]``, in logits: below 0 it is likely safe.

        A request is called safe if its type is clean or its level safe, so the nearer of the two
        counts. Logits rather than probabilities: these saturate, and their gradients vanish.
        """
        words = self.model.taxonomy
        clean, safe = words.type_id(words.clean), words.level_id(words.safe_level)
        return torch.minimum(
            _odds_against(output.type_logits, clean), _odds_against(output.level_logits, safe)
        )

    def answer(
        self, features: ImageFeatures, hints: Sequence[str | None]
    ) -> tuple[Tensor, list[bool]]:
        """How unlikely the harmful answers are, and which of them the model would give.

        The second holds exactly for greedy decoding: every token of the answer is the likeliest
        after the ones before it.

        Args:
            features: of `encode`.
            hints: beside each question.

        Returns:
            Mean negative log-likelihood of an answer's tokens ``[B]``, and B truths.
        """
        inputs = dict(self._prompt(tuple(hints), features))
        labels = inputs.pop("labels")[:, 1:]  # [B, L-1]
        output = self.model.backbone.model(**inputs, **features.model_inputs(), use_cache=False)
        logits = output.logits[:, :-1].float()  # [B, L-1, vocabulary]
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # [B, L-1]
        said = labels != -100
        likeliest = (logits.argmax(-1) == labels) | ~said
        return loss.sum(1) / said.sum(1), likeliest.all(1).tolist()

    def _prompt(self, hints: tuple[str | None, ...], features: ImageFeatures) -> dict[str, Tensor]:
        if hints not in self._prompts:
            missing = [one.id for one in self.samples if HARMFUL not in one.tags]
            if missing:
                raise InputError(f"sample {missing[0]}: no tag '{HARMFUL}' says what to aim at")
            self._prompts[hints] = self.model.backbone.prompts(
                [[Turn("user", sample.question)] for sample in self.samples],
                [1] * len(self),
                hints,
                [sample.tags[HARMFUL] for sample in self.samples],
                features,
            )
        return self._prompts[hints]

    @cached_property
    def _text(self) -> tuple[Tensor, Tensor]:
        begin = self.model.bottleneck.config.begin
        return self.model.backbone.embed_text([one.question for one in self.samples], begin)


def detached(output: BottleneckOutput) -> BottleneckOutput:
    """The same without gradients."""
    return BottleneckOutput(*(tensor.detach() for tensor in vars(output).values()))


def _odds_against(logits: Tensor, index: int) -> Tensor:
    """Log-odds ``[B]`` that it is any other than `index`."""
    others = [i for i in range(logits.shape[1]) if i != index]
    odds: Tensor = logits[:, others].logsumexp(1) - logits[:, index]
    return odds


def other_bottleneck(model: PsaVlm, run: Path, base: Path | None = None) -> SafetyBottleneck:
    """The bottleneck of another run on the same base model.

    Raises:
        InputError: its base model is another one.
        CheckpointError: the run can't be read.
    """
    other = PsaVlm.from_pretrained(run, base=base)
    if not same_weights(other.backbone.probe, model.backbone.probe):
        raise InputError(f"{run}: has another base model; transfer needs one on the same")
    return other.bottleneck


def picture_of(sample: Sample) -> Any:
    """The one picture of a sample.

    Raises:
        InputError: it has another number of them.
    """
    pictures = [frame for image in sample.images for frame in open_images(image)]
    if len(pictures) != 1:
        raise InputError(f"sample {sample.id}: has {len(pictures)} images; attacks take one")
    return pictures[0]


def with_picture(sample: Sample, picture: Any) -> Sample:
    """The same request about another picture."""
    return replace(sample, images=(picture,))
