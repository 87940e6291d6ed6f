"""Training through the language model: the safety tokens (2) of stage I, the LoRA of stage II."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from psa_vlm.data.images import Source, open_images
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import DataError, InputError
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.prompts import IGNORED
from psa_vlm.model.tokens import add_safety_tokens
from psa_vlm.progress import track
from psa_vlm.training.config import LanguageSchedule, LoraConfig, TokensConfig
from psa_vlm.training.fit import History, Rows, Task, Work, fit

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class Dialogue:
    """What the language model is to say."""

    id: str
    """Of its sample."""
    images: tuple[Source, ...]
    """Files or pictures."""
    conversation: tuple[Turn, ...]
    """Turns up to the user's last."""
    answer: str
    """The assistant's next words, on which the loss is."""
    hint: str | None = None
    """The policy's sentence beside the question."""


def dialogues(
    samples: Sequence[Sample], hints: Sequence[str | None] | None = None
) -> list[Dialogue]:
    """The last exchange of each sample, with what was said before it.

    Args:
        samples: each with an answer.
        hints: one for each sample; None is none at all.

    Raises:
        DataError: counts the samples without an answer.
    """
    unanswered = [sample for sample in samples if not sample.answer]
    if unanswered:
        raise DataError(
            f"{len(unanswered)} of {len(samples)} samples have no answer, {unanswered[0].id} the"
            " first: the language model has nothing to learn there; complete or remove them"
        )
    return [
        Dialogue(sample.id, sample.images, _until_question(sample), sample.answer or "", hint)
        for sample, hint in zip(samples, hints or [None] * len(samples), strict=True)
    ]


def _until_question(sample: Sample) -> tuple[Turn, ...]:
    turns = list(sample.conversation)
    while turns[-1].role != "user":
        turns.pop()
    return tuple(turns)


def lengths(backbone: Backbone, rows: Sequence[Dialogue]) -> list[int]:
    """How many tokens each dialogue has, its images taken as small ones.

    Raises:
        DataError: one can't be written as a prompt, which shows before anything is trained.
    """
    found = []
    for row in track(rows, "prompts"):
        try:
            prompt = backbone.tokenize(
                [row.conversation], [len(row.images)], [row.hint], [row.answer]
            )
        except InputError as error:
            raise DataError(f"sample {row.id}: {error}") from None
        found.append(prompt["labels"].numel())
    return found


class Collate:
    """Makes a batch ready for the model, in whatever process reads ahead: images and prompts.

    Args:
        backbone: its processor is used, and its model left alone.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def __call__(self, rows: Sequence[Dialogue]) -> dict[str, Any]:
        """What `_Answers` takes, of B dialogues.

        Raises:
            ImageError: an image can't be used.
            InputError: a dialogue can't be written as a prompt.
        """
        opened = [[frame for one in row.images for frame in open_images(one)] for row in rows]
        images, counts = [one for some in opened for one in some], [len(some) for some in opened]
        pixels, marks = self.backbone.process(images, counts) if images else ({}, [])
        prompts = self.backbone.tokenize(
            [row.conversation for row in rows],
            counts,
            [row.hint for row in rows],
            [row.answer for row in rows],
            marks,
        )
        return {"pixels": pixels, "marks": marks, **prompts}


def layers(model: nn.Module, backbone: Backbone) -> list[str]:
    """Class names of the model's layers, as its family names them, of those that it has."""
    present = {type(module).__name__ for module in model.modules()}
    return sorted(present & set(backbone.model._no_split_modules or ()))


class _Answers(Task):
    """The language-model loss on the answers, of batches that `Collate` makes.

    Args:
        model: the backbone's model with what is trained inside it, as PEFT wraps it.
        backbone: encodes images.
    """

    accepts_loss_kwargs = True
    """Trainer tells how many tokens a step's answers have, on all devices and batches of it."""

    def __init__(self, model: nn.Module, backbone: Backbone) -> None:
        super().__init__()
        self.model = model
        self.backbone = backbone
        self._no_split_modules = layers(model, backbone)  # what FSDP shards one by one

    def train(self, mode: bool = True) -> _Answers:
        super().train(mode)
        self.backbone.model.eval()  # no dropout on the way of the image
        self.backbone.model.get_decoder().train(mode)
        return self

    def forward(
        self,
        pixels: dict[str, Tensor],
        marks: list[str],
        num_items_in_batch: Tensor | None = None,
        **prompts: Tensor,
    ) -> dict[str, Tensor]:
        """The mean over the tokens of the answers.

        Args:
            pixels: of all images, as `process` makes them.
            marks: of each image.
            num_items_in_batch: tokens that the mean is over, if this batch is part of a step: so
                a step is the same in however many parts it is computed.
            prompts: B prompts with their answers, as `tokenize` makes them.
        """
        features = None
        if marks:
            with torch.no_grad():
                features = self.backbone.encode_inputs(pixels, marks)
        arguments = self.backbone.arguments(prompts, features)
        loss = self.backbone.language(**arguments, use_cache=False).loss
        if num_items_in_batch is not None:
            loss = loss * (prompts["labels"] != IGNORED).sum() / num_items_in_batch
        return {"loss": loss}


def _fit(
    model: nn.Module,
    backbone: Backbone,
    rows: Sequence[Dialogue],
    schedule: LanguageSchedule,
    work: Work,
) -> History:
    if schedule.gradient_checkpointing:
        backbone.model.activation_checkpointing_enable()
    counted = lengths(backbone, rows)
    task, collate = _Answers(model, backbone), Collate(backbone)
    grouped = counted if schedule.group_by_length else None
    history = fit(task, Rows(rows), collate, schedule, work, grouped)
    if schedule.gradient_checkpointing:
        backbone.model.activation_checkpointing_disable()
    return history


def _with_adapter(backbone: Backbone, config: PeftConfig) -> PeftModel:
    """Put what is to be trained into the layers of the backbone's model."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # of an attribute that transformers renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(backbone.model, config)


def train_tokens(
    backbone: Backbone,
    samples: Sequence[Sample],
    config: TokensConfig,
    work: Work,
    hints: Sequence[str | None] | None = None,
) -> History:
    """Add the safety tokens (2) and train their embedding rows; every other weight stays as it is.

    The prompts hold the hints that inference will use: without them, the tokens would learn to
    refuse whatever is asked.

    Args:
        backbone: changed in place.
        samples: answered.
        config: `count` 0 adds nothing and trains nothing.
        work: where checkpoints go.
        hints: one for each sample; None is none at all (paper: stage I).

    Raises:
        DataError: samples without answer, which it counts.
        ImageError: an image can't be used.
        CheckpointError: a checkpoint can't be written.
    """
    from peft import TrainableTokensConfig

    rows = dialogues(samples, hints)
    if config.count == 0:
        return []
    ids = add_safety_tokens(backbone, config.count, work.seed)
    model = _with_adapter(backbone, TrainableTokensConfig(token_indices=list(ids)))
    history = _fit(model, backbone, rows, config, work)
    backbone.model = model.merge_and_unload().eval().requires_grad_(False)
    return history


def train_lora(
    backbone: Backbone, rows: Sequence[Dialogue], config: LoraConfig, work: Work
) -> tuple[PeftModel, History]:
    """Train LoRA on the language model's linear layers; the backbone's weights stay as they are.

    Args:
        backbone: the update is put into its layers, where it acts from now on.
        rows: what to say, and beside which hint.
        config: size and schedule.
        work: where checkpoints go.

    Returns:
        The adapter, not merged: `merge_adapter()` makes it free to run.

    Raises:
        ImageError: an image can't be used.
        CheckpointError: a checkpoint can't be written.
    """
    import peft

    set_seed(work.seed)
    adapter = _with_adapter(
        backbone,
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=backbone.spec.language_layers,
        ),
    )
    history = _fit(adapter, backbone, rows, config, work)
    return adapter.eval().requires_grad_(False), history
